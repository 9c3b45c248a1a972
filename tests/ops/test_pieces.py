"""Resets at the ops: a row that begins anew inside is run as its pieces are when each is a row of its own."""

import pytest
import torch
from test_recurrence import CELLS, draw, rows_of

from stable_rnn import _native
from stable_rnn.ops.recurrence import pieces, reference, run
from stable_rnn.ops.recurrence.function import layer
from stable_rnn.ops.recurrence.problem import (
    WHOLE,
    BackwardInputs,
    Inputs,
    Problem,
    WindowedInputs,
    backward_inputs,
)

BACKENDS = [("reference", torch.float64)] + [("cpu", torch.float32), ("cpu", torch.bfloat16)] * bool(_native.lib)
SCHEDULES = {"recurrent": (WHOLE, 0), "windowed": (1, 3), "chunked": (4, 2), "verified": (4, 2, 0.0, 9)}
LENGTHS = [11, 1, 0, 6, 12]
# of five rows with at most 12 times: none, one at its start, everywhere, beyond a length
MASKS = [[], [0], range(12), [0, 2, 3, 9], [1, 5, 6, 11]]


def masked(rows, n):
    """(N,) booleans: those of MASKS at the rows' times, and everywhere that is no row's."""
    mask = torch.ones(n, dtype=torch.bool)
    for times, marks in zip(rows, MASKS, strict=True):
        mask[times] = torch.tensor([t in marks for t in range(len(times))], dtype=torch.bool)
    return mask


def results(cell, made, grads, base, lengths, resets, p):
    """Outputs, and the gradients of all that is given, by name."""
    leaves = {k: v.clone().requires_grad_() for k, v in made.items() if v is not None}
    weights = None, None, leaves["w_hh"], leaves.get("w_hr"), leaves.get("hidden_bias")
    *found, _ = layer(leaves["xp"], *weights, leaves["h0"], leaves.get("c0"), base, lengths, resets, p)
    outputs = dict(zip(("y", "h_n", "c_n") if cell == "lstm" else ("y", "h_n"), found))
    given = [grads[f"d{name}"] for name in outputs]
    back = torch.autograd.grad(list(outputs.values()), list(leaves.values()), given)
    return outputs | {f"d{name}": value for name, value in zip(leaves, back, strict=True)}


def apart(cell, made, grads, rows, resets, p):
    """The same, each piece by a call of its own; gradients of the weights are their sums."""
    zero = {k: torch.zeros_like(v) for k, v in made.items() if v is not None}
    total = {"y": torch.zeros_like(grads["dy"]), "h_n": made["h0"].clone(), "dxp": zero["xp"]}
    total |= {"c_n": made["c0"].clone()} if cell == "lstm" else {}
    total |= {f"d{name}": value for name, value in zero.items() if name != "xp"}
    total |= {"dh0": grads["dh_n"].clone()} | ({"dc0": grads["dc_n"].clone()} if cell == "lstm" else {})
    for b, times in enumerate(rows):
        starts = [t for t in range(len(times)) if t == 0 or resets[times[t]]]
        for start, end in zip(starts, [*starts[1:], len(times)]):
            own = {k: v if k not in ("h0", "c0") or v is None else v[b : b + 1] for k, v in made.items()}
            ends = {k: grads[k][b : b + 1] for k in ("dh_n", "dc_n")}
            fresh = bool(resets[times[start]])
            if fresh:
                own |= {k: torch.zeros_like(own[k]) for k in ("h0", "c0") if own[k] is not None}
            if end < len(times):
                ends = {k: torch.zeros_like(v) for k, v in ends.items()}
            at = torch.tensor([times[start]]), torch.tensor([end - start])
            found = results(cell, own, grads | ends, *at, None, p._replace(steps=end - start))
            here = times[start:end]
            for name in ("y", "dxp"):
                total[name][here] = found[name][here].detach()
            for name in ("h_n", "c_n") if cell == "lstm" else ("h_n",):
                total[name][b] = found[name][0].detach()
            for name in ("dh0", "dc0") if cell == "lstm" else ("dh0",):
                if start == 0:
                    total[name][b] = 0 if fresh else found[name][0]
            for name in ("dw_hh", "dw_hr", "dhidden_bias"):
                if name in total:
                    total[name] += found[name]
    return total


def case(cell, layout, schedule, backend, dtype):
    rows, base, lengths, step, n = rows_of(layout, 12, LENGTHS)
    made, grads = draw(cell, n, len(LENGTHS), 6, 4 if layout == "lengths" and cell == "lstm" else 6, dtype)
    p = Problem(cell, 12, step, *SCHEDULES[schedule], cap=0.9, backend=backend)
    return made, grads, rows, base, lengths, masked(rows, n), p


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", ["padded", "reverse", "lengths", "end_to_end_reverse"])
@pytest.mark.parametrize("backend, dtype", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_are_run_as_their_pieces(cell, backend, dtype, layout, schedule):
    """The same bits on the compiled kernels, where a run does not depend on those beside it, up to the sums over all times."""
    made, grads, rows, base, lengths, resets, p = case(cell, layout, schedule, backend, dtype)
    found = results(cell, made, grads, base, lengths, resets, p)
    expected = apart(cell, made, grads, rows, resets, p)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        summed = name[:2] == "dw" or name == "dhidden_bias" or schedule == "windowed" and name[0] == "d"
        if backend == "cpu" and not summed:
            assert torch.equal(value, expected[name]), name
        else:
            size = max(1.0, float(expected[name].abs().max()))
            # sums of some dozen addends in another order; in bfloat16 each piece's was rounded
            assert float((value - expected[name]).detach().abs().max()) <= 32 * torch.finfo(dtype).eps * size, name


@pytest.mark.parametrize("schedule", ["recurrent", "windowed", "chunked"])
@pytest.mark.parametrize("layout", ["padded", "reverse", "lengths"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_reference_takes_a_mask_too(cell, layout, schedule):
    """What it does step by step under transforms equals what it does to pieces: of chunks where these begin at the same times."""
    made, grads, rows, base, lengths, resets, p = case(cell, layout, schedule, "reference", torch.float64)
    if schedule == "chunked":
        for times in rows:
            resets[[row for t, row in enumerate(times) if t % p.stride]] = False
    inputs = Inputs(**made, base=base, lengths=lengths, resets=resets)
    y, h_n, c_n, saved, cells, _ = run.forward(inputs, p, True)
    own = reference.forward(inputs, p.resolved())
    for a, b in zip((own.y, own.h_n, own.c_n, own.saved, own.cells), (y, h_n, c_n, saved, cells), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    ends = grads["dy"], grads["dh_n"], grads["dc_n"] if cell == "lstm" else None
    if schedule == "windowed":
        back = WindowedInputs(*ends, *inputs)
        found, expected = reference.windowed_backward(back, p.resolved()), run.windowed_backward(back, p)
    else:
        back = backward_inputs(*ends, y, saved, cells, inputs, p)
        found, expected = reference.backward(back, p.resolved())[:4], run.backward(back, p)[:4]
    for a, b in zip(found, expected, strict=True):
        assert (a is None or not a.numel()) == (not b.numel())
        if b.numel():
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_decay_is_zero_over_a_reset(cell, backward):
    """Of lanes that write one; of the others it is what it was."""
    made, grads, rows, base, lengths, _, p = case(cell, "padded", "chunked", "reference", torch.float64)
    inputs = Inputs(**made, base=base, lengths=lengths)
    resets = torch.zeros(len(made["xp"]), dtype=torch.bool)
    resets[rows[0][3]] = resets[rows[3][6]] = True

    def decay(inputs):
        out = reference.forward(inputs, p, borders=True)
        if not backward:
            return out.decay
        ends = grads["dy"], grads["dh_n"], grads["dc_n"] if cell == "lstm" else None
        given = backward_inputs(*ends, out.y, out.saved, out.cells, inputs, p)
        return reference.backward(given, p, borders=True).decay

    plain, found = (decay(given).view(3, 5, -1) for given in (inputs, inputs._replace(resets=resets)))
    assert not found[0, 0].any() and not found[1, 3].any() and plain.all()
    assert found[2, 1:3].equal(plain[2, 1:3])


@pytest.mark.parametrize("backend, dtype", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_without_resets_nothing_changes(cell, backend, dtype):
    for schedule in SCHEDULES:
        made, grads, _, base, lengths, resets, p = case(cell, "lengths", schedule, backend, dtype)
        found = results(cell, made, grads, base, lengths, torch.zeros_like(resets), p)
        for name, value in results(cell, made, grads, base, lengths, None, p).items():
            assert torch.equal(found[name], value), (schedule, name)


@pytest.mark.parametrize("backend, dtype", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_opcheck(schedule, backend, dtype):
    """Schema and fakes of the ops, with a mask that lies in another order."""
    made, grads, _, base, lengths, resets, p = case("lstm", "lengths", schedule, backend, dtype)
    inputs = Inputs(**made, base=base, lengths=lengths, resets=torch.stack([resets, ~resets], 1)[:, 0])
    tests, ops = ("test_schema", "test_faketensor"), torch.ops.stable_rnn
    torch.library.opcheck(ops.recurrence, (*inputs, *p, True), test_utils=tests)
    y, _, _, saved, cells, _ = ops.recurrence(*inputs, *p, True)
    given = backward_inputs(*(grads[name] for name in ("dy", "dh_n", "dc_n")), y, saved, cells, inputs, p)
    torch.library.opcheck(ops.recurrence_backward, (*given, *p), test_utils=tests)


@pytest.mark.parametrize("steps, batch", [(3, 0), (1, 1), (5, 1)])
def test_sizes(steps, batch):
    """No rows, one of each."""
    for backend, dtype in BACKENDS:
        made, grads = draw("lstm", steps * batch, batch, 3, 3, dtype)
        p, resets = Problem("lstm", steps, batch, backend=backend), torch.ones(steps * batch, dtype=torch.bool)
        rows = [list(range(b, steps * batch, batch)) for b in range(batch)]
        found, expected = (
            results("lstm", made, grads, None, None, resets, p),
            apart("lstm", made, grads, rows, resets, p),
        )
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name])


def test_no_times():
    for backend, dtype in BACKENDS:
        made, _ = draw("lstm", 0, 2, 3, 3, dtype)
        inputs = Inputs(**made, base=None, lengths=None, resets=torch.zeros(0, dtype=torch.bool))
        y, h_n, c_n, *_ = run.forward(inputs, Problem("lstm", 0, 2, backend=backend), False)
        assert not y.numel() and torch.equal(h_n, made["h0"]) and torch.equal(c_n, made["c0"])


def test_pieces():
    """Where they lie, and which begin and end a row."""
    rows, base, lengths, step, n = rows_of("reverse_lengths", 12, LENGTHS)
    p, resets = Problem("lstm", 12, step), masked(rows, n)
    found = pieces.Pieces.of(resets, p, len(LENGTHS), base, lengths)
    expected, first, last = [], [], []
    for times in rows:
        starts = [t for t in range(len(times)) if t == 0 or resets[times[t]]] or [0]
        first.append(len(expected))
        expected += [times[s:e] for s, e in zip(starts, [*starts[1:], len(times)])]
        last.append(len(expected) - 1)
    own = [[b + t * step for t in range(length)] for b, length in zip(found.base.tolist(), found.lengths.tolist())]
    assert own == expected and (found.first.tolist(), found.last.tolist()) == (first, last)
    assert found.longest == max(map(len, expected))
    assert found.kept.flatten().tolist() == [not times or not resets[times[0]] for times in rows]


@pytest.mark.parametrize(
    "resets, text",
    [
        (torch.zeros(7, dtype=torch.bool), r"resets is \(7,\), torch.bool on cpu; expected \(6,\), torch.bool on cpu"),
        (torch.zeros(6), r"resets is \(6,\), torch.float32"),
        (torch.zeros(6, dtype=torch.bool, device="meta"), "torch.bool on meta"),
    ],
)
def test_masks_that_do_not_fit(resets, text):
    xp, w, h = torch.randn(6, 4), torch.randn(4, 4), torch.zeros(2, 4)
    p = Problem("rnn_tanh", 3, 2)
    for kind in (Inputs, BackwardInputs, WindowedInputs):
        tensors = dict.fromkeys(kind._fields) | dict(xp=xp, w_hh=w, h0=h, dy=xp, dh_n=h, y=xp, resets=resets)
        with pytest.raises(ValueError, match=text):
            {Inputs: lambda *a: run.forward(*a, False), BackwardInputs: run.backward}.get(kind, run.windowed_backward)(
                kind(**{name: tensors[name] for name in kind._fields}), p
            )
