"""Resets in the CUDA kernels: a mask by buffer row against plain float64 loops, and against the pieces run apart."""

from dataclasses import replace
from itertools import product

import lane_loop as loop
import pytest
import test_pieces
import torch
from executor import build
from lane_loop import CELLS, Case
from test_cascade_runs import cascaded
from test_cuda_recurrence import (
    BACKWARD,
    DESCENDING,
    EXECUTOR,
    FORWARD,
    KINDS,
    SOME,
    VARIANTS,
    assert_like,
    check,
    check_backward,
    check_forward,
    equal,
    exists,
    hidden_of,
    machine,
)
from test_recurrence import assert_close, draw, rows_of
from tiled import REGISTERS, Variant

from stable_rnn.ops.recurrence import cuda, reference, run
from stable_rnn.ops.recurrence.problem import (
    BackwardInputs,
    Inputs,
    Problem,
    WindowedInputs,
    backward_inputs,
    row_length,
)
from stable_rnn.ops.recurrence.report import Run

__all__ = ["machine"]  # the fixture
pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")
FEW = [
    Variant(octets=2, lane_groups=2),
    Variant(2, place=REGISTERS, teams=1),
    Variant(2, octets=4, teams=3),
    Variant(3, grid=True),
]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS[1::2], ids=str)
def test_divisions_of_the_work(machine, variant, kind, cell):
    """Several tiles a team; lanes that end in between; a mask over warm-ups, borders, first and last steps."""
    steps = min(2 * 8 * variant.octets * variant.lane_groups * variant.teams, 37) // 2 + 1
    case = Case(cell, steps, 2, hidden_of(variant), stride=2, warmup=1, resets=0.3, **KINDS[kind])
    case = replace(case, cap=0.8 if case.forgets else 1.0, lengths=(steps, max(steps - 3, 0)))
    made = case.draw()
    if exists(machine, variant, FORWARD, case):
        check_forward(machine, case, variant, made)
    if exists(machine, variant, BACKWARD, case):
        check_backward(machine, case, variant, made, machine.forward(case, made, machine.limits))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("stride, warmup", [(9, 0), (1, 0), (1, 3), (4, 2), (4, 9)])
@pytest.mark.parametrize(
    "layout, lengths",
    [
        ("padded", None),
        ("reverse", (5, 0, 9)),
        ("packed", (9, 4, 2)),
        ("packed_reverse", (4, 0, 9)),
    ],
)
def test_lanes_and_layouts(machine, cell, stride, warmup, layout, lengths):
    for part in (0.25, 0.8):
        case = Case(cell, 9, 3, 17, stride, warmup, layout=layout, lengths=lengths, resets=part)
        check(machine, case, SOME[(stride + warmup) % 3])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_selected_lanes_with_given_states(machine, cell, kind):
    case = Case(cell, 9, 3, 17, stride=2, warmup=1, lengths=(9, 3, 7), resets=0.4, **KINDS[kind])
    for init in (False, True):
        check(machine, replace(loop.with_lanes(case, (0, 2, 7, 10, 12)), init=init), SOME[init])


@pytest.mark.parametrize("cell", CELLS)
def test_only_the_ends_of_rows_that_share_their_times(machine, cell):
    case = Case(cell, 5, 21, 33, stride=5, warmup=0, layout="shared", init=True, resets=0.3)
    for variant in SOME:
        forward, backward = loop.ends_alone(
            case,
            lambda case, made, only=None, how=variant: machine.forward(case, made, how, only),
            lambda case, made, saved, only, how=variant: machine.backward(case, made, saved, how, only),
        )
        assert_like(*forward, case, case.hidden)
        assert_like(*backward, case, case.gates * case.hidden)


def pieces_of(case, made):
    """The packed case whose rows are the pieces, its inputs, and for each piece its row, whether it begins from that row's state, and
    whether it is that row's last."""
    times = [(b, t) for b in range(case.batch) for t in range(case.length[b])]
    starts = [(b, t) for b, t in times if t == 0 or case.begins_anew(case.row(b, t))]
    ends = [t or case.length[b] for (_, t), (b, _) in zip([*starts[1:], (0, 0)], starts)]
    apart = replace(case, batch=len(starts), lengths=tuple(end - t for end, (_, t) in zip(ends, starts)), resets=None)
    of = torch.tensor([b for b, _ in starts])
    kept = torch.tensor([t == 0 and not case.begins_anew(case.row(b, t)) for b, t in starts])
    last = torch.tensor([end == case.length[b] for end, (b, _) in zip(ends, starts)])
    moved = {k: made[k][of] * kept[:, None].to(case.dtype) for k in ("h0", "c0") if made[k] is not None}
    moved |= {k: made[k][of] * last[:, None].to(case.dtype) for k in ("dh_n", "dc_n")}
    return apart, made | moved, of, kept, last


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_the_pieces_run_apart(machine, cell, kind):
    case = Case(
        cell, 11, 4, 33, stride=11, warmup=0, layout="packed", lengths=(11, 7, 1, 10), resets=0.5, **KINDS[kind]
    )
    made = case.draw()
    apart, separately, of, kept, last = pieces_of(case, made)
    assert 8 < len(of) < case.n and 0 < kept.sum() < case.batch
    saved = machine.forward(case, made, machine.limits)
    alone = machine.forward(apart, separately, machine.limits)
    by_row = ("y", "saved", "cells")
    equal({k: saved[k] for k in by_row if k in saved}, {k: alone[k] for k in by_row if k in alone})
    equal(
        {k: saved[k] for k in ("h_n", "c_n") if k in saved}, {k: alone[k][last] for k in ("h_n", "c_n") if k in alone}
    )
    back, back_alone = (machine.backward(c, m, saved, machine.limits) for c, m in ((case, made), (apart, separately)))
    equal({k: back[k] for k in ("dz", "dh")}, {k: back_alone[k] for k in ("dz", "dh")})
    opened = torch.tensor([case.begins_anew(case.row(b, 0)) for b in range(case.batch)])
    for name in ("dh0", "dc0")[: 1 + case.lstm]:
        assert (back[name][opened] == 0).all() and torch.equal(back[name][~opened], back_alone[name][kept])
    tried = 0
    for variant, where in product(FEW, [machine] if machine.device != "cpu" else [EXECUTOR, DESCENDING]):
        if exists(machine, variant, FORWARD, case):
            equal(where.forward(case, made, variant), saved)
            tried += 1
        if exists(machine, variant, BACKWARD, case):
            equal(where.backward(case, made, saved, variant), back)
            tried += 1
    assert tried >= 4


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_mask_without_resets_is_none(machine, cell, kind):
    case = Case(cell, 9, 3, 33, stride=4, warmup=2, lengths=(9, 0, 5), **KINDS[kind])
    masked, made = replace(case, resets=0.0), case.draw()
    saved = machine.forward(case, made, machine.limits)
    equal(machine.forward(masked, made, machine.limits), saved)
    equal(machine.backward(masked, made, saved, machine.limits), machine.backward(case, made, saved, machine.limits))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_nan_goes_over_a_reset(machine, cell, kind):
    """Neither forward, of inputs and first states, nor backward, of gradients."""
    case = Case(
        cell, 6, 2, 20, stride=6, warmup=0, resets=(4, 1), **KINDS[kind]
    )  # row 0 before time 2, row 1 before time 0
    made = case.draw()
    clean = machine.forward(case, made, machine.limits)
    far = {k: None if v is None else v.clone() for k, v in made.items()}
    far["xp"][2] = far["dy"][4] = loop.NAN  # row 0, time 1; row 0, time 2
    for name in ("h0", "c0"):
        if far[name] is not None:
            far[name][1] = loop.NAN
    for variant in SOME:
        y = machine.forward(case, far, variant)["y"].view(6, 2, 20)
        assert y[1, 0].isnan().all() and torch.equal(y[2:, 0], clean["y"].view(6, 2, 20)[2:, 0])
        assert torch.equal(y[:, 1], clean["y"].view(6, 2, 20)[:, 1])
        back = machine.backward(case, made | dict(dy=far["dy"]), clean, variant)
        dz = back["dz"].view(6, 2, -1)
        assert dz[2, 0].isnan().any() and dz[:2, 0].isfinite().all() and back["dh0"].isfinite().all()


# ---- the backend, against the reference, which takes a mask step by step

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["gpu" if torch.cuda.is_available() else "executor"])
def device(request, monkeypatch):
    """Of the tensors: on the CPU the block executor runs the kernels."""
    if request.param == "gpu":
        return "cuda"
    build.on_cpu_tensors(monkeypatch)
    return "cpu"


def drawn(cell, layout, schedule, dtype, device):
    """The inputs of one of test_pieces' cases, its gradients, and the problem."""
    made, grads, _, base, lengths, resets, p = test_pieces.case(cell, layout, schedule, "cuda", dtype)
    inputs = Inputs(**made, base=base, lengths=lengths, resets=resets)
    return Inputs(*on(device, inputs)), moved(device, grads), p.resolved()


def on(device, tensors):
    return [None if t is None else t.to(device) for t in tensors]


def moved(device, named):
    return dict(zip(named, on(device, named.values())))


def to(kind, tensors):
    """Floating tensors in another dtype."""
    return [t.to(kind) if t is not None and t.is_floating_point() else t for t in tensors]


def gradients_of(found, inputs, grads, p):
    ends = grads["dy"], grads["dh_n"], grads["dc_n"] if p.cell == "lstm" else None
    return backward_inputs(*ends, found.y, found.saved, found.cells, inputs, p)


def assert_all_close(found, exact, eager, dtype, lanes=None):
    """`lanes`: which run, where borders are among the outputs."""
    for name, *values in zip(exact._fields, found, exact, eager, strict=True):
        if not values[0].numel():  # the reference gives every cell a c
            continue
        if lanes is not None and name in exact._fields[-5:]:
            values = [value[lanes] for value in values]
        assert_close(*values, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", ["recurrent", "chunked", "windowed"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_the_reference(cell, schedule, dtype, device):
    """All outputs, of borders and decay too."""
    for layout in ("padded", "reverse_lengths"):
        inputs, grads, p = drawn(cell, layout, schedule, dtype, device)
        length = row_length(p, len(inputs.h0), inputs.lengths, device)
        lanes = (torch.arange(p.lanes(), device=device)[:, None] * p.stride < length).flatten()
        exact, eager = (
            reference.forward(Inputs(*to(kind, inputs)), p, borders=True) for kind in (torch.float64, dtype)
        )
        found = cuda.forward(inputs, p, borders=True)
        assert_all_close(found, exact, eager, dtype, lanes)
        given = gradients_of(found, inputs, grads, p)
        exact, eager = (
            reference.backward(BackwardInputs(*to(kind, given)), p, borders=True) for kind in (torch.float64, dtype)
        )
        assert_all_close(cuda.backward(given, p, borders=True), exact, eager, dtype, lanes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_windows_go_back_to_a_reset(cell, dtype, device):
    for layout in ("padded", "reverse_lengths"):
        inputs, grads, p = drawn(cell, layout, "windowed", dtype, device)
        ends = grads["dy"], grads["dh_n"], grads["dc_n"] if cell == "lstm" else None
        given = WindowedInputs(*ends, *inputs)
        exact, eager = (
            reference.windowed_backward(WindowedInputs(*to(kind, given)), p) for kind in (torch.float64, dtype)
        )
        for a, b, c in zip(cuda.windowed_backward(given, p), exact, eager, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_close(a.float(), b, c, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "layout, lengths, groups",
    [
        ("padded", (9, 9), (0, 2, 3, 7)),
        ("reverse_lengths", (300, 0, 129), (0, 33, 36)),
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_scans(cell, layout, lengths, groups, dtype, device):
    """Time in one part and in several chunks of parts, against the plain recurrence."""
    hidden = groups[-1]
    rows, base, length, step, n = rows_of(layout, max(lengths), list(lengths))
    made, grads = draw(cell, n, len(lengths), hidden, hidden, dtype)
    made["w_hh"] = cascaded(made["w_hh"], groups)
    resets = torch.rand(n, generator=torch.Generator().manual_seed(n)) < (0.3 if n < 99 else 0.03)
    resets[rows[0][0]] = True
    inputs = Inputs(*on(device, Inputs(**made, base=base, lengths=length, resets=resets)))
    grads, p = moved(device, grads), Problem(cell, max(lengths), step, cap=0.8).resolved()
    found = cuda.scanned_forward(inputs, p, groups)
    exact, eager = (reference.forward(Inputs(*to(kind, inputs)), p) for kind in (torch.float64, dtype))
    assert_all_close(found, exact, eager, dtype)
    given = gradients_of(found, inputs, grads, p)
    exact, eager = (reference.backward(BackwardInputs(*to(kind, given)), p) for kind in (torch.float64, dtype))
    assert_all_close(cuda.scanned_backward(given, p, groups), exact, eager, dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_no_nan_goes_over_a_reset_in_scans(cell, device):
    """From part to part and from chunk to chunk of time, either way."""
    hidden, steps, at = 36, 300, 150
    made, grads = draw(cell, steps, 1, hidden, hidden, torch.float32)
    made["w_hh"], resets = cascaded(made["w_hh"], (0, 33, 36)), torch.arange(steps, device=device) == at
    made, grads = moved(device, made), moved(device, grads)
    p = Problem(cell, steps, 1).resolved()

    def both(xp, dy):
        inputs = Inputs(**made | dict(xp=xp), base=None, lengths=None, resets=resets)
        found = cuda.scanned_forward(inputs, p, (0, 33, 36))
        clean = cuda.scanned_forward(inputs._replace(xp=made["xp"]), p, (0, 33, 36))
        return found.y, cuda.scanned_backward(gradients_of(clean, inputs, grads | dict(dy=dy), p), p, (0, 33, 36)).dz

    xp, dy = made["xp"].clone(), grads["dy"].clone()
    xp[at - 1], dy[at] = loop.NAN, loop.NAN
    (y, dz), (far_y, far_dz) = both(made["xp"], grads["dy"]), both(xp, dy)
    assert far_y[at - 1].isnan().all() and torch.equal(far_y[at:], y[at:])
    assert far_dz[at].isnan().any() and torch.equal(far_dz[:at], dz[:at])


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_checked_lanes_that_begin_at_resets_run_once(cell, device):
    """Forward, whatever the state before a border is; backward no adjoint passes it either."""
    made, grads = draw(cell, 24, 2, 6, 6, torch.float32)
    resets = torch.zeros(12, 2, dtype=torch.bool)
    resets[[4, 8]] = True
    inputs = Inputs(*on(device, Inputs(**made, base=None, lengths=None, resets=resets.flatten())))
    grads = moved(device, grads)
    plain, checked = (Problem(cell, 12, 2, *how, backend="cuda") for how in ((0, 0), (4, 0, 0.0, 9)))
    *expected, _ = run.forward(inputs, plain, True)
    *found, said = run.forward(inputs, checked, True)
    assert (Run.of(said).chunk, Run.of(said).passes, Run.of(said).rerun) == (4, 1, 0)
    y, _, _, saved, cells = expected
    ends = grads["dy"], grads["dh_n"], grads["dc_n"] if cell == "lstm" else None
    given = backward_inputs(*ends, y, saved, cells, inputs, plain)
    *back, said = run.backward(given, checked)
    assert (Run.of(said).chunk, Run.of(said).passes, Run.of(said).rerun) == (4, 1, 0)
    for a, b in zip([*found, *back], [*expected, *run.backward(given, plain)[:4]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_checked_lanes_end_at_the_recurrence(cell, device):
    """To the last bit, forward and backward, with corrections by a decay that is zero over resets."""
    for layout in ("padded", "reverse_lengths"):
        inputs, grads, _ = drawn(cell, layout, "recurrent", torch.float32, device)
        plain, checked = (
            test_pieces.case(cell, layout, schedule, "cuda", torch.float32)[-1]
            for schedule in ("recurrent", "verified")
        )
        *expected, _ = run.forward(inputs, plain, True)
        *found, _ = run.forward(inputs, checked, True)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        y, _, _, saved, cells = expected
        ends = grads["dy"], grads["dh_n"], grads["dc_n"] if cell == "lstm" else None
        given = backward_inputs(*ends, y, saved, cells, inputs, plain)
        for a, b in zip(run.backward(given, checked)[:4], run.backward(given, plain)[:4], strict=True):
            assert torch.equal(a, b)
