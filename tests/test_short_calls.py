"""Calls that `auto` gives to torch's own recurrence or to one call a layer: which they are, and that they are the same function."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from stable_rnn import ForgetCap, StableGRU, StableLSTM, StableRNN, Windowed, _native, base
from stable_rnn.ops.recurrence import backends
from stable_rnn.ops.recurrence.backends import leave_to_torch

compiled = pytest.mark.skipif(_native.lib is None, reason=f"compiled module: {_native.reason}")


@pytest.fixture
def ran(monkeypatch):
    """What ran: "torch", "step" for each layer and direction, or "stack"."""
    found = []
    torch_runs, step, stack = base.StableRNNBase._run_torch, base.native.cell_step, base.StableRNNBase._stack
    monkeypatch.setattr(base.StableRNNBase, "_run_torch", lambda *a: (found.append("torch"), torch_runs(*a))[1])
    monkeypatch.setattr(base.native, "cell_step", lambda *a: (found.append("step"), step(*a))[1])
    monkeypatch.setattr(base.StableRNNBase, "_stack", lambda *a: (found.append("stack"), stack(*a))[1])
    return found


@contextmanager
def use_backend(module, name):
    module.backend = name
    yield
    module.backend = "auto"


@compiled
@pytest.mark.parametrize("options", [{}, dict(batch_first=True, bidirectional=True, num_layers=2), dict(bias=False)])
@pytest.mark.parametrize("stability", [None, ForgetCap(0.55)], ids=str)
def test_one_step_of_a_stream(stability, options, ran):
    """Bitwise where weights are read alone, and by rounding otherwise, the step of the recurrence; states are no views of the output."""
    ours = StableLSTM(6, 9, stability=stability, **options).eval()
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    x, hx = torch.randn(3, 1, 6), [torch.randn(layers, 3, 9) for _ in range(2)]
    x = x if ours.batch_first else x.transpose(0, 1)
    for state in (None, tuple(hx)):
        with torch.no_grad():
            y, (h, c) = ours(x, state)
        assert ran == ["step"] * layers
        with use_backend(ours, "cpu"):
            expected, (h_n, c_n) = ours(x, state)
        assert ran.pop() == "stack"
        for left, right in ((y, expected), (h, h_n), (c, c_n)):
            assert left.shape == right.shape
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
        kept = h.clone()
        y.zero_()
        assert torch.equal(h, kept)
        ran.clear()


@compiled
@pytest.mark.parametrize("kind, plain", [(StableRNN, nn.RNN), (StableLSTM, nn.LSTM), (StableGRU, nn.GRU)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_one_step_without_a_batch(kind, plain, batch_first, ran):
    ours, theirs = kind(6, 9, 2, batch_first=batch_first, backend="cpu"), plain(6, 9, 2, batch_first=batch_first)
    theirs.load_state_dict(ours.state_dict())
    x, h = torch.randn(1, 6), torch.randn(2, 9)
    with torch.no_grad():
        for hx in (None, (h, h) if kind is StableLSTM else h):
            torch.testing.assert_close(ours(x, hx), theirs(x, hx))
    assert ran == ["step"] * 4


@compiled
def test_what_is_no_single_step(ran):
    """Gradients, other plans, lengths, projections and dropout go their way."""
    x = torch.randn(1, 2, 5)
    StableLSTM(5, 70, stability=None)(x)
    with torch.no_grad():
        StableLSTM(5, 7, stability=None)(x, lengths=torch.tensor([1, 0]))
        StableLSTM(5, 7, stability=None, plan=Windowed(3))(x)
        StableLSTM(5, 7, stability=None, proj_size=3)(x)
        StableLSTM(5, 7, 2, dropout=0.5, stability=None)(x)
        StableLSTM(5, 7, stability=None, backend="reference")(x)
    assert ran == ["stack"] * 6


@compiled
@pytest.mark.parametrize("kind, plain", [(StableRNN, nn.RNN), (StableLSTM, nn.LSTM)])
def test_a_few_steps(kind, plain, ran):
    """torch's own results, with and without gradients, and twice differentiable; not in forward mode, nor packed, nor with lengths."""
    ours = kind(5, 7, stability=None)
    theirs = plain(5, 7)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 8, 5)
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            y, expected = ours(x)[0], theirs(x)[0]
        if gradient:
            (y, *expected) = (
                torch.autograd.grad(y.sum(), ours.parameters()),
                *torch.autograd.grad(expected.sum(), theirs.parameters()),
            )
            for left, right in zip(y, expected, strict=True):
                torch.testing.assert_close(left, right)
        elif ran[-1] == "torch":
            assert torch.equal(y, expected)
    found = []
    for m in (ours, theirs.double()):
        x2 = x.to(m.weight_hh_l0.dtype).requires_grad_()
        (slope,) = torch.autograd.grad(m(x2)[0].square().sum(), x2, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x2)[0].double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert ran == ["torch"] * 3
    ran.clear()
    with forward_ad.dual_level():
        ours(forward_ad.make_dual(x, x))
    assert ran.pop() == "stack"
    with torch.no_grad():
        ours(nn.utils.rnn.pack_padded_sequence(x, [4] * 8))
        ours(x, lengths=torch.full((8,), 4))
        ours(torch.randn(20, 8, 5))
    assert ran == ["stack"] * 3


@compiled
def test_the_rule(monkeypatch):
    x, narrow = torch.empty(0), torch.empty(0, dtype=torch.bfloat16)
    with torch.no_grad():
        for tiles, pairs in ((False, False), (True, True), (False, True)):
            monkeypatch.setattr(backends, "_TILES_OF_BFLOAT16", tiles)
            monkeypatch.setattr(backends.native, "MULTIPLIES_BFLOAT16", pairs)
            assert leave_to_torch(narrow, "lstm", 17, 1, 64) is leave_to_torch(narrow, "lstm", 16, 1, 128) is tiles
            assert leave_to_torch(narrow, "lstm", 16, 1, 127) is pairs
            assert not leave_to_torch(narrow, "lstm", 1, 1, 64) and not leave_to_torch(narrow, "rnn_tanh", 2, 1, 64)
        assert not leave_to_torch(x, "lstm", None, 8, 64) and not leave_to_torch(narrow, "lstm", None, 8, 64)
        assert not leave_to_torch(x, "lstm", 1, 8, 64) and leave_to_torch(x, "lstm", 2, 8, 64)
        assert leave_to_torch(x, "lstm", 2, 1, 64) and not leave_to_torch(x, "lstm", 9, 8, 64)
        assert not leave_to_torch(x, "lstm", 2, 7, 65) and leave_to_torch(x, "lstm", 2, 8, 65)
    assert not leave_to_torch(narrow, "lstm", 8, 1, 64) and leave_to_torch(x, "lstm", 8, 1, 64)
    assert not leave_to_torch(x, "lstm", 8, 1, 65) and not leave_to_torch(x, "lstm", 9, 1, 64)
    assert leave_to_torch(x, "rnn_relu", 1, 1000, 1000) and not leave_to_torch(x, "rnn_relu", 2, 1000, 1000)
    assert leave_to_torch(x, "rnn_tanh", 8, 4, 64) and not leave_to_torch(x, "rnn_tanh", 8, 4, 256)
    with torch.no_grad():
        assert leave_to_torch(x, "rnn_tanh", 1, 1, 64) and not leave_to_torch(x, "rnn_tanh", 1, 2, 64)
        assert leave_to_torch(x, "rnn_tanh", 8, 4, 64) and not leave_to_torch(x, "rnn_tanh", 8, 4, 256)
        assert leave_to_torch(x, "rnn_tanh", 4, 1, 1024) and not leave_to_torch(x, "rnn_tanh", 4, 2, 1024)
    assert leave_to_torch(x.double(), "lstm", 100, 1, 64)


@compiled
def test_narrow_inference_is_as_exact_as_ours():
    """oneDNN's LSTM of bfloat16, if this machine takes it for `auto`, against our kernel's error from float64."""
    ours = StableLSTM(24, 32, stability=None)
    x, errors = torch.randn(50, 4, 24), []
    with torch.no_grad():
        exact = StableLSTM(24, 32, stability=None, dtype=torch.float64)
        exact.load_state_dict(ours.state_dict())
        true = exact(x.double())[0]
        for ours.backend in ("auto", "cpu"):
            with torch.autocast("cpu", torch.bfloat16):
                y = ours(x)[0]
            assert y.dtype == torch.bfloat16
            errors.append(float((y.double() - true).abs().mean()))
    assert errors[0] <= 1.5 * errors[1]
