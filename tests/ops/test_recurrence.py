"""The recurrence op on every backend against the oracle: layouts, lanes, cells, gradients."""

from functools import cache

import oracle
import pytest
import torch

from stable_rnn import _native
from stable_rnn.ops.recurrence.function import layer
from stable_rnn.ops.recurrence.problem import Problem

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]
SCHEDULES = [(0, 0), (1, 0), (1, 4), (3, 2), (5, 0), (4, 9), (100, 3)]  # (stride, warmup); 0: the whole sequence
LAYOUTS = ["padded", "reverse", "lengths", "reverse_lengths", "end_to_end", "end_to_end_reverse"]
BACKENDS = [("reference", torch.float64), ("reference", torch.float32), ("reference", torch.bfloat16)]
BACKENDS += [("cpu", torch.float32), ("cpu", torch.bfloat16)] if _native.lib else []


def rows_of(layout, steps, lengths):
    """(rows[b][t], base, lengths, step, number of buffer rows) of one of LAYOUTS."""
    batch = len(lengths)
    reverse = "reverse" in layout
    if layout.startswith("end_to_end"):
        starts = [sum(lengths[:b]) for b in range(batch)]
        rows = [[starts[b] + t for t in range(lengths[b])] for b in range(batch)]
    else:
        used = lengths if "lengths" in layout else [steps] * batch
        rows = [[t * batch + b for t in range(used[b])] for b in range(batch)]
    rows = [r[::-1] if reverse else r for r in rows]
    sign = -1 if reverse else 1
    given = torch.tensor(lengths) if layout not in ("padded", "reverse") else None
    if layout.startswith("end_to_end"):
        base = torch.tensor([starts[b] + (lengths[b] - 1 if reverse else 0) for b in range(batch)])
        return rows, base, given, sign, sum(lengths)
    base = torch.tensor([(lengths[b] - 1) * batch + b for b in range(batch)]) if layout == "reverse_lengths" else None
    return rows, base, given, sign * batch, steps * batch


def draw(cell, n, batch, hidden, out, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    gates = oracle.GATES[cell]
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    proj = out != hidden
    made = dict(
        xp=rand(n, gates * hidden),
        w_hh=rand(gates * hidden, out) * 0.9 / max(out, 1) ** 0.5,
        w_hr=rand(out, hidden) / hidden**0.5 if proj else None,
        hidden_bias=rand(hidden) if cell == "gru" else None,
        h0=rand(batch, out),
        c0=rand(batch, hidden) if cell == "lstm" else None,
    )
    grads = dict(dy=rand(n, out), dh_n=rand(batch, out), dc_n=rand(batch, hidden))
    cast = lambda d: {k: None if v is None else v.to(dtype) for k, v in d.items()}  # noqa: E731
    return cast(made), cast(grads)


def assert_close(found, expected, eager, dtype):
    """Error at most twice eager's own, plus four roundings of the largest value: eager may be lucky."""
    assert found.shape == expected.shape
    if not expected.numel():
        return
    scale = max(1.0, float(expected.abs().max()))
    allowed = 2 * float((eager.double() - expected).abs().max()) + 4 * torch.finfo(dtype).eps * scale
    error = float((found.detach().double() - expected).abs().max())
    assert error <= allowed, f"error {error:.3g} > {allowed:.3g}"


def run(cell, made, grads, base, lengths, p):
    leaves = {k: v.clone().requires_grad_() for k, v in made.items() if v is not None}
    y, h_n, c_n, _ = layer(
        leaves["xp"],
        None,
        None,
        leaves["w_hh"],
        leaves.get("w_hr"),
        leaves.get("hidden_bias"),
        leaves["h0"],
        leaves.get("c0"),
        base,
        lengths,
        None,
        p,
    )
    outputs = [y, h_n] + ([c_n] if cell == "lstm" else [])
    given = [grads["dy"], grads["dh_n"]] + ([grads["dc_n"]] if cell == "lstm" else [])
    found = torch.autograd.grad(outputs, list(leaves.values()), given)
    return outputs, dict(zip(leaves, found, strict=True))


def loop(cell, made, grads, rows, schedule, steps, cap):
    """Outputs and gradients (None where the cell has no such tensor) of the plain loop, in the dtype of its inputs."""
    leaves = {k: None if v is None else v.clone().requires_grad_() for k, v in made.items()}
    batch, hidden = made["h0"].shape[0], grads["dc_n"].shape[1]
    stride, warmup = schedule
    c0 = leaves["c0"] if cell == "lstm" else made["h0"].new_zeros(batch, hidden)
    weights = leaves["w_hh"], leaves["w_hr"], leaves["hidden_bias"]
    args = (*weights, leaves["h0"], c0, rows, stride or max(steps, 1), warmup, cap)
    y, cells, h_n, c_n, before = oracle.forward(cell, leaves["xp"], *args)
    if stride == 1:
        total = (
            (y * grads["dy"]).sum()
            + (h_n * grads["dh_n"]).sum()
            + ((c_n * grads["dc_n"]).sum() if cell == "lstm" else 0)
        )
        wanted = [k for k, v in leaves.items() if v is not None]
        found = dict(
            zip(wanted, torch.autograd.grad(total, [leaves[k] for k in wanted], materialize_grads=True), strict=True)
        )
    else:
        plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        parts = oracle.backward(cell, *grads.values(), leaves["xp"], y.detach(), cells.detach(), before, *plain)
        found = dict(zip(["xp", "w_hh", "w_hr", "hidden_bias", "h0", "c0"], parts, strict=True))
    return [t.detach() for t in (y, h_n, c_n)], found


@cache
def expected(cell, layout, schedule, dtype, steps, lengths, hidden, out, cap):
    """What a problem's outputs and gradients are, in float64, and what eager torch makes of them in `dtype`."""
    rows, _, _, _, n = rows_of(layout, steps, list(lengths))
    made, grads = draw(cell, n, len(lengths), hidden, out, dtype)
    exact = [{k: None if v is None else v.double() for k, v in d.items()} for d in (made, grads)]
    return loop(cell, *exact, rows, schedule, steps, cap), loop(cell, made, grads, rows, schedule, steps, cap)


def check(cell, layout, schedule, backend, dtype, steps=9, lengths=(9, 0, 4), hidden=5, out=None, cap=1.0):
    out = out or hidden
    _, base, given, step, n = rows_of(layout, steps, list(lengths))
    made, grads = draw(cell, n, len(lengths), hidden, out, dtype)
    outputs, found = run(
        cell, made, grads, base, given, Problem(cell, steps, step, *schedule, cap=cap, backend=backend)
    )
    (states, gradients), (eager_states, eager_gradients) = expected(
        cell, layout, schedule, dtype, steps, lengths, hidden, out, cap
    )
    for a, b, c in zip(outputs, states, eager_states, strict=False):
        assert_close(a, b, c, dtype)
    if cell == "rnn_relu" and dtype == torch.bfloat16:
        return  # rounding h flips units at the kink, whose derivative jumps by 1: held against the reference's own run below
    for name, value in found.items():
        assert_close(value, gradients[name], eager_gradients[name], dtype)


@pytest.mark.parametrize("backend,dtype", BACKENDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_layouts(cell, layout, backend, dtype):
    for schedule in SCHEDULES:
        check(cell, layout, schedule, backend, dtype)


@pytest.mark.parametrize("backend,dtype", BACKENDS, ids=str)
@pytest.mark.parametrize("schedule", [(0, 0), (1, 3), (4, 2)])
def test_projection_and_clamp(schedule, backend, dtype):
    check("lstm", "padded", schedule, backend, dtype, hidden=6, out=4)
    check("lstm", "reverse_lengths", schedule, backend, dtype, hidden=6, out=1, cap=0.6)
    check("lstm", "end_to_end", schedule, backend, dtype, cap=0.5)
    check("gru", "end_to_end", schedule, backend, dtype, cap=0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.skipif(not _native.lib, reason="compiled module not built")
def test_relu_gradients_in_bfloat16(layout):
    lengths, hidden = [9, 0, 4], 5
    rows, base, given, step, n = rows_of(layout, 9, lengths)
    made, grads = draw("rnn_relu", n, len(lengths), hidden, hidden, torch.bfloat16)
    for stride, warmup in SCHEDULES:
        p = Problem("rnn_relu", 9, step, stride, warmup)
        _, by_reference = run("rnn_relu", made, grads, base, given, p._replace(backend="reference"))
        _, found = run("rnn_relu", made, grads, base, given, p._replace(backend="cpu"))
        for name, value in found.items():
            exact = by_reference[name].double()
            assert_close(value, exact, exact, torch.bfloat16)


@pytest.mark.parametrize("backend,dtype", BACKENDS[3:] or BACKENDS[:1], ids=str)
@pytest.mark.parametrize("hidden", [1, 2, 31, 33, 63, 127])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_sizes(cell, hidden, backend, dtype):
    for schedule in [(0, 0), (1, 4), (3, 2)]:
        check(cell, "padded", schedule, backend, dtype, steps=7, lengths=(7, 7), hidden=hidden)


@pytest.mark.parametrize("backend,dtype", BACKENDS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell, backend, dtype):
    for schedule in [(0, 0), (1, 3), (4, 2)]:
        check(cell, "padded", schedule, backend, dtype, steps=5, lengths=())
        check(cell, "end_to_end", schedule, backend, dtype, steps=0, lengths=(0, 0))
        check(cell, "lengths", schedule, backend, dtype, steps=3, lengths=(0, 0))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("schedule", [(0, 0), (1, 3)])
def test_gradcheck(cell, schedule):
    """First and second derivatives; chunks are a rule of their own and are held against the oracle above."""
    hidden, steps, batch = 3, 4, 2
    made, _ = draw(cell, steps * batch, batch, hidden, 2 if cell == "lstm" else hidden, torch.float64)
    names = [k for k, v in made.items() if v is not None]
    p = Problem(cell, steps, batch, *schedule, cap=0.6, backend="reference")

    def function(*leaves):
        t = dict(zip(names, leaves, strict=True))
        weights = None, None, t["w_hh"], t.get("w_hr"), t.get("hidden_bias")
        y, h_n, c_n, _ = layer(t["xp"], *weights, t["h0"], t.get("c0"), None, None, None, p)
        return (y, h_n, c_n) if cell == "lstm" else (y, h_n)

    leaves = [made[k].requires_grad_() for k in names]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("cell", CELLS)
def test_chunk_gradient_is_the_same_when_differentiated_again(cell):
    """With create_graph the chunked rule runs in the reference: same numbers as without."""
    made, grads = draw(cell, 24, 2, 4, 4, torch.float64)
    p = Problem(cell, 12, 2, 3, 2, backend="reference")
    _, plain = run(cell, made, grads, None, None, p)
    leaves = {k: v.clone().requires_grad_() for k, v in made.items() if v is not None}
    weights = None, None, leaves["w_hh"], None, leaves.get("hidden_bias")
    y, h_n, c_n, _ = layer(leaves["xp"], *weights, leaves["h0"], leaves.get("c0"), None, None, None, p)
    outputs, given = (
        [y, h_n] + [c_n][: cell == "lstm"],
        [grads["dy"], grads["dh_n"]] + [grads["dc_n"]][: cell == "lstm"],
    )
    again = torch.autograd.grad(outputs, list(leaves.values()), given, create_graph=True)
    for name, value in zip(leaves, again, strict=True):
        # float64: the same sums in another order
        torch.testing.assert_close(value, plain[name], rtol=1e-12, atol=1e-12)
        assert value.requires_grad
