"""What must never corrupt memory, be silently wrong, or leave a module unusable."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from stable_rnn import (
    Cascade,
    Certified,
    Chunked,
    ForgetCap,
    Recurrent,
    StableGRU,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    Verified,
    Windowed,
    stabilize,
)
from stable_rnn.cells import MODES

PLANS = [Recurrent(), Windowed(3), Chunked(4, 2), Verified(chunk=4, warmup=2)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("cls", [StableRNN, StableLSTM, StableGRU])
def test_wrong_states_and_weights_raise(cls, plan):
    m, x = cls(3, 16, plan=plan, stability=None), torch.randn(5, 2, 3)
    lstm = cls is StableLSTM
    good = torch.zeros(1, 2, 16)
    for bad in (good.bfloat16(), good.double(), good.long(), good.to("meta")):
        with pytest.raises(RuntimeError, match="hidden"):
            m(x, (torch.zeros(1, 2, 16), bad) if lstm else bad)
    gates = MODES[m.mode].gates
    for bad in (
        torch.randn(gates * 32, 32),
        torch.randn(gates * 16, 15),
        torch.randn(gates * 16, 16).bfloat16(),
        torch.randn(gates * 16, 16).double(),
    ):
        for gradient in (True, False):
            with pytest.raises(RuntimeError, match="weight_hh_l0"), torch.set_grad_enabled(gradient):
                functional_call(m, dict(m.named_parameters()) | {"weight_hh_l0": bad}, (x,))
    if lstm:
        with pytest.raises(RuntimeError, match="two hidden states"):
            m(x, (torch.zeros(1, 2, 16),) * 3)


def test_ops_check_rows():
    xp, w, h = torch.randn(6, 4), torch.randn(4, 4), torch.zeros(2, 4)
    rest = (None, "rnn_tanh", 3, 2, 0, 0, -1.0, 1, "auto", False, 1.0, "auto", False)
    call = lambda base, lengths: torch.ops.stable_rnn.recurrence(xp, w, None, None, h, None, base, lengths, *rest)  # noqa: E731
    call(None, torch.tensor([3, 0]))
    for base, lengths in [
        (torch.tensor([0, 3]), None),
        (None, torch.tensor([4, 1])),
        (None, torch.tensor([-1, 1])),
        (torch.tensor([-1, 1]), torch.tensor([1, 1])),
        (torch.tensor([0.0, 1.0]), None),
        (torch.tensor([0]), None),
    ]:
        with pytest.raises(ValueError, match="base|lengths"):
            call(base, lengths)


@pytest.mark.parametrize("gradient", [False, True])
def test_cells_check_their_tensors(gradient):
    cell, x, h = StableLSTMCell(3, 8, stability=None), torch.randn(2, 3), torch.zeros(2, 8)
    with torch.set_grad_enabled(gradient):
        for hx in ((h, h.bfloat16()), (h.double(), h), (h, h.long())):
            with pytest.raises((ValueError, RuntimeError)):
                cell(x, hx)
        for name, bad in [
            ("weight_hh", torch.randn(10, 10)),
            ("weight_hh", torch.randn(32, 8).bfloat16()),
            ("bias_ih", torch.randn(8)),
            ("bias_hh", torch.randn(32).double()),
        ]:
            with pytest.raises((ValueError, RuntimeError)):
                functional_call(cell, dict(cell.named_parameters()) | {name: bad}, (x, (h, h)))
    with pytest.raises(TypeError, match="pair"):
        cell(x, torch.zeros(2, 2, 8))
    for name, value, error in [("stability", "x", TypeError), ("backend", "zzz", ValueError)]:
        with pytest.raises(error):
            setattr(cell, name, value)


def test_cells_under_forward_mode_and_modes(monkeypatch):
    cell, x = StableLSTMCell(3, 8), torch.randn(2, 3)
    with torch.no_grad(), forward_ad.dual_level():
        assert forward_ad.unpack_dual(cell(forward_ad.make_dual(x, torch.ones_like(x)))[0]).tangent.any()
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        assert cell(torch.randn(2, 3))[0].shape == (2, 8)
    for name in ("reference", "torch"):
        monkeypatch.setenv("STABLE_RNN_BACKEND", name)
        cell(x)[0].sum().backward()
        with torch.no_grad():
            cell(x)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_checkpointing(plan):
    m = StableLSTM(3, 8, plan=plan)
    found = []
    for run in (lambda x: m(x)[0], lambda x: checkpoint(lambda x: m(x)[0], x, use_reentrant=False)):
        m.zero_grad()
        x = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        run(x).square().sum().backward()
        found.append([x.grad, *(w.grad.clone() for w in m.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    cell = StableLSTMCell(3, 8)
    checkpoint(lambda x: cell(x)[0], torch.randn(2, 3), use_reentrant=False).sum().backward()


@pytest.mark.parametrize(
    "plan",
    [Windowed(10**9), Windowed(2**70), Chunked(4, 10**6), Chunked(2**70, 2**70), Verified(chunk=4, warmup=10**6)],
    ids=str,
)
def test_windows_longer_than_the_sequence(plan):
    """They are the plain recurrence, at its price."""
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float64)):
        m = StableLSTM(3, 4, backend=backend, dtype=dtype)
        x = torch.randn(9, 2, 3, dtype=dtype)
        expected = m(x)[0]
        first = torch.autograd.grad(expected.square().sum(), list(m.parameters()))
        m.plan = plan
        y = m(x)[0]
        torch.testing.assert_close(y, expected)
        for a, b in zip(torch.autograd.grad(y.square().sum(), list(m.parameters())), first, strict=True):
            torch.testing.assert_close(a, b)


def test_copies_after_a_checked_run():
    m, x = StableLSTM(3, 4, plan=Verified(chunk=4, warmup=2)), torch.randn(20, 2, 3)
    grad(lambda t: m(t)[0].sum())(x)
    copy.deepcopy(m)
    torch._dynamo.reset()
    torch.compile(m, fullgraph=True, backend="aot_eager")(x)[0].sum().backward()
    assert m.last_report.passes >= 1
    copy.deepcopy(m)
    m(x)
    assert pickle.loads(pickle.dumps(m)).last_report == m.last_report


@pytest.mark.parametrize("cls", [StableRNN, StableGRU, StableLSTM])
@pytest.mark.parametrize("stability", [Certified(), Cascade()], ids=repr)
def test_made_on_meta(cls, stability):
    """Modules whose values come later, in every set: what is computed of the set alone is computed on the CPU."""
    with torch.device("meta"):
        m = cls(4, 8, stability=stability)
    m = m.to_empty(device="cpu")
    m.reset_parameters()
    assert m.certificate().rate < 1


def test_meta_and_fake():
    x = torch.randn(5, 2, 3, device="meta")
    assert StableLSTM(3, 4, device="meta")(x)[0].shape == (5, 2, 4)
    assert StableLSTMCell(3, 4, device="meta")(x[0])[0].shape == (2, 4)
    with pytest.raises((ValueError, RuntimeError)):
        StableLSTM(3, 4)(x)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        StableLSTM(3, 4), StableRNNCell(3, 4)


@pytest.mark.parametrize("first", [False, True])
def test_what_lies_in_the_padding_does_not_matter(first):
    m = StableLSTM(3, 4, batch_first=first)
    x, lengths = torch.randn(2, 9, 3), torch.tensor([5, 9])
    x[0, 5:] = float("nan")
    x = x if first else x.transpose(0, 1)
    m(x, lengths=lengths)[0].sum().backward()
    assert all(w.grad.isfinite().all() for w in m.parameters())


def test_stabilize_keeps_hooks():
    plain, seen = nn.LSTM(3, 4), []
    handle = plain.register_forward_hook(lambda m, a, k, y: seen.append(k), with_kwargs=True)
    m = stabilize(nn.Sequential(plain))
    m[0](torch.randn(5, 2, 3), hx=None)
    assert seen == [{"hx": None}]
    handle.remove()
    m[0](torch.randn(5, 2, 3))
    assert len(seen) == 1


def test_a_clamp_means_nothing_to_an_rnn():
    m = StableRNN(3, 4, stability=Certified(clamp=True), backend="torch")
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(m.to_torch()(x)[0], m(x)[0])


def test_parametrized_modules_convert():
    m = StableRNN(3, 4, stability=None)
    torch.nn.utils.parametrizations.weight_norm(m, "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(m.to_torch()(x)[0], m(x)[0])


def test_reports_of_repeated_backward_passes():
    m = StableLSTM(3, 4, plan=Verified(chunk=4, warmup=0))
    y = m(torch.randn(40, 2, 3))[0].sum()
    y.backward(retain_graph=True)
    first = m.last_report.backward
    y.backward()
    assert m.last_report.backward == first


def test_numpy_numbers():
    assert Windowed(np.int64(3)) == Windowed(3) and type(Windowed(np.int64(3)).k) is int
    for value in (
        Verified(tol=np.float32(0.5)).tol,
        Certified(rate=np.float32(0.5)).rate,
        ForgetCap(torch.tensor(0.5)).forget,
    ):
        assert value == 0.5 and type(value) is float


def test_state_of_cells_under_autocast():
    ours, theirs = StableLSTMCell(3, 4), nn.LSTMCell(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(ours(torch.randn(2, 3)), theirs(torch.randn(2, 3)), strict=True):
            assert a.dtype == b.dtype
