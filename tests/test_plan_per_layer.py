"""A plan for each layer and direction of a module."""

import copy
import pickle

import pytest
import torch
from torch import nn

from stable_rnn import (
    Chunked,
    Recurrent,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    Verified,
    Windowed,
    functional,
    stabilize,
    use_plan,
)

A, B, C = Windowed(3), Chunked(4, 2), Recurrent()


def made(plan=C, layers=2, both=False, cls=StableLSTM):
    torch.manual_seed(0)
    return cls(4, 6, layers, bidirectional=both, stability=None, plan=plan)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("cls", [StableLSTM, StableRNN])
def test_each_layer_runs_its_own(cls, both):
    """As single layers one after the other do."""
    m, x, ways = made([A, B], both=both, cls=cls), torch.randn(17, 2, 4), 1 + both
    whole, _ = m(x)
    for layer, plan in enumerate((A, B)):
        single = cls(x.shape[2], 6, bidirectional=both, stability=None, plan=plan)
        with torch.no_grad():
            for name, w in single.named_parameters():
                w.copy_(getattr(m, name.replace("_l0", f"_l{layer}")))
        x, _ = single(x)
    assert x.shape[2] == 6 * ways
    torch.testing.assert_close(whole, x)


def test_each_direction_runs_its_own():
    m, x = made({(0, 0): A, (0, 1): B}, layers=1, both=True), torch.randn(17, 2, 4)
    y = m(x)[0]
    for plan, part in ((A, slice(0, 6)), (B, slice(6, 12))):
        with use_plan(m, plan):
            torch.testing.assert_close(m(x)[0][:, :, part], y[:, :, part])


@pytest.mark.parametrize(
    "plan, layers, both, shown",
    [
        ([A, C], 2, False, "plan=[Windowed(k=3), Recurrent()]"),
        ((A, C), 2, True, "plan=[Windowed(k=3), Recurrent()]"),
        ({1: A}, 2, False, "plan=[Recurrent(), Windowed(k=3)]"),
        ({0: A, (0, 1): B}, 1, True, "plan={(0, 0): Windowed(k=3), (0, 1): Chunked(chunk=4, warmup=2)}"),
        ({(0, 1): B, 0: A}, 1, True, "plan={(0, 0): Windowed(k=3), (0, 1): Chunked(chunk=4, warmup=2)}"),
        ([A, A], 2, False, "plan=Windowed(k=3)"),
        ({}, 2, False, "plan=Recurrent()"),
        ([Verified(tol=0, correct="none"), A], 2, False, "plan=[Verified(tol=0.0, correct='none'), Windowed(k=3)]"),
    ],
)
def test_what_a_module_shows(plan, layers, both, shown):
    m = made(plan, layers, both)
    assert shown in repr(m)
    assert pickle.loads(pickle.dumps(m)).plan == copy.deepcopy(m).plan == m.plan
    m.plan, before = C, m.plan
    m.plan = before  # what it shows can be set again
    assert shown in repr(m)


@pytest.mark.parametrize(
    "plan, error, match",
    [
        ([A], ValueError, "one plan per layer; got 1, and the module has 2 layers"),
        ([A, B, C], ValueError, "got 3"),
        ([], ValueError, "got 0"),
        ([A, "b"], TypeError, "got 'b'"),
        ([A, [B]], TypeError, "only modules take one plan per layer"),
        ([A, Recurrent], TypeError, "an instance is needed"),
        ({2: A}, ValueError, "layers, 0 to 1.*got 2"),
        ({-1: A}, ValueError, "got -1"),
        ({(0, 1): A}, ValueError, r"directions 0 to 0; got \(0, 1\)"),
        ({"0": A}, ValueError, "got '0'"),
        ({True: A}, ValueError, "got True"),
        ({(0, 0, 0): A}, ValueError, r"got \(0, 0, 0\)"),
        ({0: None}, TypeError, "got None"),
        (made([A, B, B], 3).plan, ValueError, "one of another module; this one has 2 layers"),
        ("Recurrent", TypeError, "plan must be"),
    ],
)
def test_what_does_not_fit(plan, error, match):
    """Says what is allowed, and changes nothing."""
    m = made(A)
    with pytest.raises(error, match=match):
        m.plan = plan
    with pytest.raises(error, match=match):
        made(plan)
    with pytest.raises(error, match=match), use_plan(m, plan):
        pass
    plain = nn.LSTM(4, 6, 2)
    with pytest.raises(error, match=match):
        stabilize(plain, plan=plan)
    assert m.plan == A and type(plain) is nn.LSTM


def test_several_modules_at_once():
    net = nn.ModuleList([made(B), made(A, 1)])
    with pytest.raises(ValueError, match="1 layer$"), use_plan(net, [A, B]):
        pass
    assert [m.plan for m in net] == [B, A]
    with use_plan(net, {0: C}):
        assert [m.plan for m in net] == [C, C]
    net = nn.ModuleList([made(B), made(A)])
    with use_plan(net, [C, A]):
        assert [m.plan.at(1, 0) for m in net] == [A, A]
    assert [m.plan for m in net] == [B, A]
    both = stabilize(nn.Sequential(nn.LSTM(4, 6, 2), nn.RNN(4, 6, 2)), plan=[A, C])
    assert both[0].plan == both[1].plan and both[0].plan.at(0, 0) == A


def test_functions_and_cells_take_one_plan():
    x, w, v = torch.randn(5, 2, 4), torch.randn(24, 4), torch.randn(24, 6)
    with pytest.raises(TypeError, match="only modules take one plan per layer"):
        functional.lstm(x, w, v, plan=[C])
    with pytest.raises(TypeError, match="not one per layer"):
        functional.lstm(x, w, v, plan=made([A, B]).plan)
    assert stabilize(nn.LSTMCell(4, 6), plan=C, cells=True).__class__ is StableLSTMCell


def test_a_compiled_module():
    m, x = made([Chunked(4, 2), Verified(chunk=4, warmup=2)]), torch.randn(17, 2, 4)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend="aot_eager")(x)[0], m(x)[0])
    assert [layer.layer for layer in m.last_report.layers] == [1]


def test_plain_stacks_are_left_to_torch():
    """One plan for all layers is that plan: where torch serves plain recurrences, it still does."""
    m, x = made([C, C]), torch.randn(5, 2, 4)
    m.backend = "torch"
    m(x)
    m.plan = [C, A]
    with pytest.raises(ValueError, match="backend 'torch' cannot run this call: it has no"):
        m(x)


@pytest.mark.parametrize(
    "make, error, match",
    [
        (
            lambda: Verified(correct="newton"),
            ValueError,
            "correct must be one of auto, none, decay, probes; got 'newton'",
        ),
        (lambda: Verified(correct=None), ValueError, "correct must be"),
        (lambda: Verified(tol_on="c"), ValueError, "tol_on must be one of state, output; got 'c'"),
        (lambda: Verified(correct=["none"]), ValueError, "correct must be"),
    ],
)
def test_bad_options_of_verified(make, error, match):
    with pytest.raises(error, match=match):
        make()
