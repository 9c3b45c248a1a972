"""StableRNNCell, StableGRUCell and StableLSTMCell are torch's cells; step by step they give what a full pass gives."""

import itertools

import pytest
import torch
from torch import nn

from stable_rnn import (
    ForgetCap,
    StableGRU,
    StableGRUCell,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    _native,
)
from stable_rnn.cells import CELLS
from stable_rnn.ops.recurrence.function import layer
from stable_rnn.ops.recurrence.problem import Problem

KINDS = [
    ("tanh", nn.RNNCell, StableRNNCell, dict(nonlinearity="tanh")),
    ("relu", nn.RNNCell, StableRNNCell, dict(nonlinearity="relu")),
    ("lstm", nn.LSTMCell, StableLSTMCell, {}),
    ("gru", nn.GRUCell, StableGRUCell, {}),
]
IDS = [k[0] for k in KINDS]
compiled = pytest.mark.skipif(not _native.lib, reason="compiled module not built")


def pair(kind, dtype, **options):
    _, theirs, ours, extra = kind
    a = theirs(5, 7, **extra, **options, dtype=dtype)
    b = ours(5, 7, **extra, **options, dtype=dtype, stability=None)
    b.load_state_dict(a.state_dict(), strict=True)
    return a, b


def outputs(result):
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch(kind, dtype, bias):
    a, b = pair(kind, dtype, bias=bias)
    lstm = kind[0] == "lstm"
    for shape in ((3,), ()):
        x, h, c = (
            torch.randn(*shape, 5, dtype=dtype),
            torch.randn(*shape, 7, dtype=dtype),
            torch.randn(*shape, 7, dtype=dtype),
        )
        for hx in (None, (h, c) if lstm else h):
            for gradient in (False, True):
                found = []
                for m in (a, b):
                    m.zero_grad()
                    with torch.set_grad_enabled(gradient):
                        result = outputs(m(x, hx))
                    if gradient:
                        sum(r.square().sum() for r in result).backward()
                        result += [w.grad.clone() for w in m.parameters()]
                    found.append(result)
                for left, right in zip(*found, strict=True):
                    torch.testing.assert_close(right, left)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_same_errors_as_torch(kind):
    a, b = pair(kind, torch.float32)
    h = lambda *s: (torch.zeros(*s), torch.zeros(*s)) if kind[0] == "lstm" else torch.zeros(*s)  # noqa: E731
    for x, hx in [
        (torch.zeros(2, 3, 5), None),
        (torch.zeros(2, 4), None),
        (torch.zeros(2, 5), h(3, 7)),
        (torch.zeros(2, 5), h(2, 6)),
        (torch.zeros(2, 5), h(1, 1, 2, 7)),
    ]:
        for gradient in (False, True):
            errors = []
            for m in (a, b):
                with pytest.raises((ValueError, RuntimeError)) as caught, torch.set_grad_enabled(gradient):
                    m(x, hx)
                errors.append((caught.type, str(caught.value)))
            assert errors[0] == errors[1]
    if kind[0] != "lstm":
        with pytest.raises(ValueError, match="gelu"):
            StableRNNCell(3, 4, nonlinearity="gelu")
        with pytest.raises(ValueError, match="ForgetCap"):
            StableRNNCell(3, 4, stability=ForgetCap(0.9))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_are_bitwise_the_full_pass(cell, dtype):
    """Given the same xp: one step at a time, many sequences at once or one, chunked calls of any length."""
    for hidden in (1, 31, 64, 200):
        gates = CELLS[cell].gates
        steps, batch = 12, 3
        xp, w = (
            torch.randn(steps * batch, gates * hidden).to(dtype),
            (torch.randn(gates * hidden, hidden) / hidden**0.5).to(dtype),
        )
        h0 = torch.randn(batch, hidden).to(dtype)
        c0 = torch.randn(batch, hidden).to(dtype) if cell == "lstm" else None
        own = torch.randn(hidden).to(dtype) if cell == "gru" else None

        def full(x, t, h, c, w=w, own=own):
            return layer(x, None, None, w, None, own, h, c, *(None,) * 3, Problem(cell, t, h.shape[0], backend="cpu"))

        y, h_n, c_n, _ = full(xp, steps, h0, c0)
        if dtype == torch.bfloat16:
            c0 = None if c0 is None else c0.zero_()  # the cell state itself is kept in float32 within a call only
            y, h_n, c_n, _ = full(xp, steps, h0, c0)
        h, c = h0, c0
        for t in range(steps if dtype == torch.float32 else 1):
            out, h, c, _ = full(xp[t * batch : (t + 1) * batch], 1, h, c if cell == "lstm" else None)
            assert torch.equal(out, y[t * batch : (t + 1) * batch])
        if dtype == torch.float32:
            assert torch.equal(h, h_n) and (cell != "lstm" or torch.equal(c, c_n))
        alone = full(xp[1::batch].contiguous(), steps, h0[1:2], None if c0 is None else c0[1:2])[0]
        assert torch.equal(alone, y[1::batch])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_the_one_call_step_is_the_recurrence_step(kind, dtype):
    """The low-latency step against the op, to a rounding of the input projection, whose summation order is its own."""
    _, b = pair(kind, dtype)
    x, h, c = torch.randn(2, 5).to(dtype), torch.randn(2, 7).to(dtype), torch.randn(2, 7).to(dtype)
    hx = (h, c) if kind[0] == "lstm" else h
    with torch.no_grad():
        fast = outputs(b(x, hx))
    slow = outputs(b(x, hx))
    for a, e in zip(fast, slow, strict=True):
        assert float((a.float() - e.detach().float()).abs().max()) <= 16 * torch.finfo(dtype).eps * max(
            1.0, float(e.detach().abs().max())
        )


@pytest.mark.parametrize("cls", [StableRNN, StableLSTM, StableGRU])
def test_streaming_a_stack_equals_the_full_pass(cls):
    """Several layers, one step or a few at a time, carrying the state."""
    m = cls(5, 7, num_layers=3).eval()
    x = torch.randn(20, 2, 5)
    with torch.no_grad():
        expected, last = m(x)
        for size in (1, 3):
            state, parts = None, []
            for part in x.split(size):
                y, state = m(part, state)
                parts.append(y)
            error = float((torch.cat(parts) - expected).abs().max())
            assert error <= 40 * torch.finfo(torch.float32).eps
            for a, b in zip(outputs(state), outputs(last), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cls, cell", [(StableLSTM, StableLSTMCell), (StableGRU, StableGRUCell)])
def test_streaming_cells_equal_the_stack(cls, cell):
    m = cls(5, 7, num_layers=2, stability=ForgetCap(0.6)).eval()
    cells = [cell(5, 7, stability=ForgetCap(0.6)), cell(7, 7, stability=ForgetCap(0.6))]
    for i, one in enumerate(cells):
        one.load_state_dict({k.removesuffix(f"_l{i}"): v for k, v in m.state_dict().items() if k.endswith(f"_l{i}")})
    x = torch.randn(30, 1, 5)
    with torch.no_grad():
        expected = m(x)[0]
        states = [None, None]
        for t in range(30):
            y = x[t]
            for i, one in enumerate(cells):
                states[i] = one(y, states[i])
                y = outputs(states[i])[0]
            assert float((y - expected[t]).abs().max()) <= 40 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "kind, stability", [*((kind, None) for kind in KINDS), (KINDS[2], ForgetCap(0.55))], ids=[*IDS, "clamped"]
)
def test_a_training_loop_has_the_gradients_of_the_recurrence(kind, stability):
    """Step by step in torch's operations, at most twice as far from float64 as the kernel's step; and twice differentiable."""
    _, _, ours, extra = kind
    exact = ours(5, 7, **extra, dtype=torch.float64, stability=stability, backend="reference")
    x, errors = torch.randn(9, 3, 5), []

    def gradients(cell, x):
        x, state = x.clone().requires_grad_(), None
        total = 0.0
        for row in x:
            state = cell(row, state)
            total = total + outputs(state)[0].square().sum()
        return torch.autograd.grad(total, [x, *cell.parameters()])

    true = gradients(exact, x.double())
    for backend in ("auto", "cpu" if _native.lib else "reference"):
        cell = ours(5, 7, **extra, stability=stability, backend=backend)
        cell.load_state_dict(exact.state_dict())
        found = gradients(cell, x)
        errors.append(max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, true, strict=True)))
    assert errors[0] <= 2 * errors[1] + 1e-7
    cell = ours(3, 4, **extra, dtype=torch.float64, stability=stability)
    state = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(1 + (kind[0] == "lstm"))]
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True), *state]
    step = lambda x, *state: cell(x, state if len(state) > 1 else state[0])  # noqa: E731
    assert torch.autograd.gradgradcheck(step, inputs)


def test_stability_of_cells():
    for cell in (StableRNNCell(5, 7), StableLSTMCell(5, 7), StableGRUCell(5, 7)):
        assert cell.certificate().stable
        with torch.no_grad():
            cell.weight_hh.mul_(100)
        assert not cell.certificate().stable
        cell.project_()
        assert cell.certificate().stable
    with pytest.raises(ValueError, match="stability=None"):
        StableRNNCell(5, 7, stability=None).project_()


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_dtypes_under_autocast(kind, cast):
    """Those of torch's cells, for every dtype of the input and of the states."""
    a, b = pair(kind, torch.float32)
    few = (torch.float32, torch.bfloat16)
    for x, h, c in itertools.product(few, (None, *few), few):
        state = None if h is None else (torch.randn(2, 7).to(h), torch.randn(2, 7).to(c))
        state = state[0] if state and kind[0] != "lstm" else state
        for gradient in (False, True):
            with torch.autocast("cpu", cast), torch.set_grad_enabled(gradient):
                found, expected = (outputs(m(torch.ones(2, 5, dtype=x), state)) for m in (b, a))
            for left, right in zip(found, expected, strict=True):
                assert left.dtype == right.dtype
                # torch rounds inputs, weights, both products and the result to the coarsest dtype here, ours not all of these
                torch.testing.assert_close(left, right, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_no_hidden_unit(kind):
    _, theirs, ours, extra = kind
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            found, expected = (outputs(cls(4, 0, **extra)(torch.randn(2, 4))) for cls in (ours, theirs))
            assert [t.shape for t in found] == [t.shape for t in expected]
    with pytest.raises(ValueError, match="no hidden unit"):
        ours(4, 0, **extra).project_().certificate()


@pytest.mark.parametrize("count", [1, 3])
def test_a_state_is_a_pair(count):
    with pytest.raises(RuntimeError, match=f"expects two hidden states.*got tuple of {count}"):
        StableLSTMCell(5, 7)(torch.zeros(2, 5), (torch.zeros(2, 7),) * count)


def test_reset_of_computed_weights_changes_nothing():
    cell = StableLSTMCell(5, 7)
    nn.utils.parametrizations.weight_norm(cell, "weight_hh")
    before = cell.weight_ih.clone()
    with pytest.raises(ValueError, match="weight_hh of .* is computed"):
        cell.reset_parameters()
    assert torch.equal(cell.weight_ih, before)
