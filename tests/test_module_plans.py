"""The modules under every plan: layouts, windows, checked runs and what they report, plans as options."""

import itertools

import pytest
import torch
from test_modules import IDS, KINDS, flat, pair, state_for
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from stable_rnn import (
    Chunked,
    Recurrent,
    StableLSTM,
    StableRNN,
    Verified,
    Windowed,
    _native,
    use_plan,
)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize(
    "plan", [Windowed(3), Windowed(50), Chunked(3, 2), Chunked(50, 2), Verified(tol=0, chunk=3, warmup=1)], ids=str
)
def test_plans_under_every_layout(kind, plan):
    """packed == lengths == each sequence alone, for every plan, two layers and two directions, outputs and gradients."""
    _, m = pair(kind, num_layers=2, bidirectional=True, plan=plan)
    sizes = [4, 8, 1]
    parts = [torch.randn(n, 4, dtype=torch.float64) for n in sizes]
    hx = state_for(m, 3)
    hx = hx if m.mode == "LSTM" else hx[0]
    one = lambda b: tuple(h[:, b : b + 1] for h in hx) if m.mode == "LSTM" else hx[:, b : b + 1]  # noqa: E731

    def gradient(outputs):
        return torch.autograd.grad(sum((o**2).sum() for o in outputs), list(m.parameters()))

    alone = [m(x[:, None], one(b)) for b, x in enumerate(parts)]
    packed, hidden = m(pack_sequence(parts, enforce_sorted=False), hx)
    padded, hidden_padded = m(nn.utils.rnn.pad_sequence(parts), hx, lengths=torch.tensor(sizes))
    unpacked, _ = pad_packed_sequence(packed)
    # float64, two layers and two directions: the same steps, products of other shapes
    torch.testing.assert_close(unpacked, padded, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(hidden, hidden_padded, rtol=1e-11, atol=1e-11)
    for b, (y, state) in enumerate(alone):
        torch.testing.assert_close(padded[: sizes[b], b], y[:, 0], rtol=1e-11, atol=1e-11)
        for whole, single in zip(flat((y, hidden))[1:], flat((y, state))[1:], strict=True):
            torch.testing.assert_close(whole[:, b], single[:, 0], rtol=1e-11, atol=1e-11)
    expected = gradient([t for pair_ in alone for t in flat(pair_)])
    for found in (gradient([packed.data, *flat((padded, hidden))[1:]]), gradient(flat((padded, hidden_padded)))):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_windowed_is_each_window_alone(kind):
    """One layer: output t is the last state of nn's own module run over x[t-k+1 .. t] from zeros (from h0 where it reaches t=0)."""
    a, b = pair(kind)
    x, k = torch.randn(11, 2, 4, dtype=torch.float64), 4
    hx = state_for(a, 2)
    hx = hx if a.mode == "LSTM" else hx[0]
    with use_plan(b, Windowed(k)):
        y, hidden = b(x, hx)
    for t in range(11):
        begin = max(0, t - k + 1)
        expected, last = a(x[begin : t + 1], hx if begin == 0 else None)
        torch.testing.assert_close(y[t], expected[-1])
    torch.testing.assert_close(hidden, last)
    assert b.plan == Recurrent()


@pytest.mark.skipif(not _native.lib, reason="bitwise promises are the compiled kernels'; library GEMMs make none")
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_verified_with_zero_tolerance_is_the_plain_run(kind):
    """Bitwise, for weights that forget and for weights that do not."""
    for gain in (0.5, 3.0):
        _, m = pair(kind, dtype=torch.float32, backend="cpu")
        with torch.no_grad():
            for name, w in m.named_parameters():
                w.mul_(gain if "hh" in name else 1)
        x = torch.randn(200, 2, 4)
        expected = flat(m(x))
        with use_plan(m, Verified(tol=0, chunk=16, warmup=8)):
            found = flat(m(x))
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)
        report = m.last_report
        assert report.largest_jump == 0 and report.passes >= 1


def test_verified_reports_a_fallback():
    """An integrator never forgets: checking cannot pay, and the module says so."""
    m = StableRNN(1, 2, nonlinearity="relu", stability=None, backend="reference", dtype=torch.float64)
    with torch.no_grad():
        for w in m.parameters():
            w.zero_()
        m.weight_hh_l0.copy_(torch.eye(2))
        m.weight_ih_l0.fill_(1)
    x = torch.rand(500, 1, 1, dtype=torch.float64)
    expected = m(x)[0]
    m.plan = Verified(chunk=10, warmup=2)
    y, _ = m(x)
    assert torch.equal(y, expected)
    assert m.last_report.fallback and m.last_report.forward_bound is None


def test_report_of_both_passes():
    m = StableLSTM(4, 6, num_layers=2, plan=Verified(chunk=16, warmup=32))
    y, _ = m(torch.randn(100, 2, 4))
    assert m.last_report.passes >= 1 and not m.last_report.fallback and m.last_report.backward is None
    assert 0 <= m.last_report.forward_bound < 1e-3
    y.sum().backward()
    assert m.last_report.backward.passes >= 1 and not m.last_report.backward.fallback
    assert StableLSTM(4, 6).last_report is None


def test_use_plan():
    net = nn.Sequential(StableLSTM(4, 4, plan=Windowed(2)), StableRNN(4, 4))
    with use_plan(net, Chunked(4, 2)) as same:
        assert same is net and net[0].plan == net[1].plan == Chunked(4, 2)
    assert net[0].plan == Windowed(2) and net[1].plan == Recurrent()
    with pytest.raises(ValueError, match="Linear"), use_plan(nn.Linear(1, 1), Recurrent()):
        pass
    with pytest.raises(TypeError), use_plan(net, 3):
        pass
    with pytest.raises(TypeError, match="model must be an nn.Module, got NoneType"), use_plan(None, Recurrent()):
        pass


@pytest.mark.parametrize(
    "make,error",
    [
        (lambda: Windowed(0), ValueError),
        (lambda: Windowed(2.0), TypeError),
        (lambda: Windowed(True), TypeError),
        (lambda: Chunked(-1, 2), ValueError),
        (lambda: Chunked(4, -2), ValueError),
        (lambda: Verified(tol=-1), ValueError),
        (lambda: Verified(tol=float("nan")), ValueError),
        (lambda: Verified(tol="a"), TypeError),
        (lambda: Verified(chunk=0), ValueError),
        (lambda: Verified(max_passes=0), ValueError),
    ],
)
def test_bad_plans(make, error):
    with pytest.raises(error, match="must be"):
        make()


def test_every_option_and_plan_runs():
    """The product of options runs and gives finite gradients."""
    plans = [Recurrent(), Windowed(3), Chunked(3, 2), Verified(chunk=3, warmup=2)]
    for plan, layers, both, first, proj in itertools.product(plans, (1, 2), (False, True), (False, True), (0, 2)):
        m = StableLSTM(3, 4, num_layers=layers, bidirectional=both, batch_first=first, proj_size=proj, plan=plan)
        y, (h, c) = m(torch.randn(2, 5, 3))
        (y.sum() + h.sum() + c.sum()).backward()
        assert all(w.grad is not None and w.grad.isfinite().all() for w in m.parameters())


def test_passes_without_end():
    x, plan = torch.randn(40, 2, 4), Verified(chunk=4, warmup=2, max_passes=10**40)
    m = StableLSTM(4, 6, plan=plan)
    torch.testing.assert_close(m(x)[0], m.to_torch()(x)[0])
    assert plan.max_passes == 10**40
