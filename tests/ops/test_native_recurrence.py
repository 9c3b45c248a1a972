"""The compiled kernels through `stable_rnn._C` itself: every output of params.h against plain float64 loops, on every instruction set."""

import os
import subprocess
import sys
from dataclasses import replace

import lane_loop as loop
import pytest
import torch
from lane_loop import CELLS, Case

from stable_rnn import _native

pytestmark = pytest.mark.skipif(_native.lib is None, reason=f"compiled module: {_native.reason}")


def assert_like(found, exact, eager, dtype, steps, terms):
    """Every tensor of `found`: NaN exactly where the oracle is; else at most twice eager's error plus a rounding term: one unit of
    the storage type, and for each of the lane's steps the float32 rounding of a sum of `terms` products (growing like a random walk)."""
    assert found.keys() == exact.keys()
    for name, value in found.items():
        want, plain = exact[name], eager[name]
        assert value.shape == want.shape, name
        written = ~want.isnan()
        assert torch.equal(~value.isnan(), written), f"{name}: the wrong elements were written"
        if not written.any():
            continue
        scale = max(1.0, float(want[written].abs().max()))
        unit = torch.finfo(value.dtype).eps
        sums = torch.finfo(torch.float32).eps * (steps * (terms + 8)) ** 0.5
        # a bfloat16 state is rounded at every step
        stored = torch.finfo(dtype).eps * steps if dtype == torch.bfloat16 else 0.0
        allowed = 2 * float((plain.double() - want)[written].abs().max()) + scale * (unit + sums + stored)
        error = float((value.double() - want)[written].abs().max())
        assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"


def check_forward(case, seed=0):
    made = case.draw(seed)
    found = loop.run_forward(case, made)
    longest = min(case.stride + case.warmup, case.steps)
    assert_like(
        found, loop.loop_forward(case, made), loop.loop_forward(case, made, torch.float32), case.dtype, longest, case.p
    )
    return made, found


def check_backward(case, made, saved):
    found = loop.run_backward(case, made, saved)
    exact, eager = (loop.loop_backward(case, made, saved, kind) for kind in (torch.float64, torch.float32))
    assert_like(
        found, exact, eager, torch.float32, min(case.stride + case.warmup, case.steps), case.gates * case.hidden
    )


def check(case):
    """Forward, and backward over what the plain forward saved."""
    made, saved = check_forward(case)
    if case.select is not None:  # a selection saves its own rows only
        _, saved = check_forward(replace(case, select=None, init=False))
    check_backward(case, made, saved)


def check_windowed(case, groups=2):
    made = case.draw()
    for g in range(groups):
        first, last = case.lanes * g // groups, case.lanes * (g + 1) // groups
        found = loop.run_windowed(case, made, first, last)
        exact, eager = (loop.loop_windowed(case, made, first, last, kind) for kind in (torch.float64, torch.float32))
        assert_like(found, exact, eager, case.dtype, case.warmup + 1, case.gates * case.hidden)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [1, 2, 31, 33, 64, 127, 200])
def test_sizes(cell, hidden, isa):
    for batch in (1, 3):
        check(Case(cell, 4, batch, hidden, stride=4, warmup=0))
    check(Case(cell, 7, 2, hidden, stride=2, warmup=2))
    check_windowed(Case(cell, 4, 1, hidden, stride=1, warmup=2))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("stride, warmup", [(9, 0), (100, 3), (1, 0), (1, 3), (1, 20), (4, 2), (3, 0), (4, 9)])
@pytest.mark.parametrize(
    "layout, lengths",
    [
        ("padded", None),
        ("reverse", None),
        ("padded", (5, 0, 9)),
        ("reverse", (5, 0, 9)),
        ("packed", (9, 4, 2)),
        ("packed_reverse", (4, 0, 9)),
    ],
)
def test_lanes_and_layouts(cell, stride, warmup, layout, lengths):
    case = Case(cell, 9, 3, 5, stride, warmup, layout=layout, lengths=lengths)
    check(case)
    if stride == 1:
        check_windowed(case, groups=3)


@pytest.mark.parametrize("cell", CELLS)
def test_many_lanes_fill_several_tiles(cell, isa):
    case = Case(cell, 83, 2, 18, stride=1, warmup=3, threads=2, lengths=(83, 40))
    check(case)
    check_windowed(case, groups=1)


@pytest.mark.parametrize("stride, warmup", [(9, 0), (1, 3), (4, 2)])
@pytest.mark.parametrize("out", [1, 20, 37])
def test_projection(stride, warmup, out, isa):
    case = Case("lstm", 9, 3, 33, stride, warmup, out=out, cap=0.8, lengths=(9, 0, 4))
    check(case)
    check(replace(case, threads=2))
    if stride == 1:
        check_windowed(case)


@pytest.mark.parametrize("cell", loop.CAPPED)
@pytest.mark.parametrize("cap", [0.3, 0.55])
def test_cap_holds_and_stops_the_gradient(cell, cap):
    case = Case(cell, 9, 2, 21, stride=4, warmup=3, cap=cap)
    made, saved = check_forward(case)
    forget = saved["saved"].chunk(4, 1)[1]
    assert forget.max() == torch.tensor(cap) and forget.min() < cap  # both branches are tested
    check_backward(case, made, saved)
    assert (loop.run_backward(case, made, saved)["dz"].chunk(case.gates, 1)[1][forget >= cap] == 0).all()
    check_windowed(replace(case, stride=1))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("stride, warmup", [(9, 0), (1, 3), (4, 2)])
def test_bfloat16(cell, stride, warmup, isa):
    for hidden in (5, 33):
        case = Case(
            cell,
            9,
            3,
            hidden,
            stride,
            warmup,
            dtype=torch.bfloat16,
            cap=0.7 if cell in loop.CAPPED else 1.0,
            lengths=(9, 0, 4),
        )
        check(case)
        if stride == 1:
            check_windowed(case)
    if cell == "lstm":
        check(Case(cell, 9, 3, 33, stride, warmup, out=18, dtype=torch.bfloat16))


@pytest.mark.parametrize("cell", CELLS)
def test_selected_lanes_with_given_states(cell):
    case = Case(cell, 9, 3, 17, stride=2, warmup=1, lengths=(9, 3, 7))
    check(loop.with_lanes(case, (0, 2, 7, 10, 12)))
    check(loop.with_lanes(case, (0, 2, 7, 10, 12), init=True))


def equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name].nan_to_num(nan=77.0), two[name].nan_to_num(nan=77.0)), name


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden, out", [(1, None), (33, None), (130, None), (40, 18), (130, 60)])
@pytest.mark.parametrize("stride, warmup", [(80, 0), (1, 3), (16, 8)])
def test_bitwise_over_threads_and_runs(cell, hidden, out, stride, warmup, isa):
    if out and cell != "lstm":
        return
    case = Case(cell, 80, 2, hidden, stride, warmup, out=out)
    made = case.draw()
    saved = loop.run_forward(case, made)
    back = loop.run_backward(case, made, saved)
    windows = loop.run_windowed(case, made, 0, case.lanes) if stride == 1 else {}
    for threads in (1, 2, 3):
        other = replace(case, threads=threads)
        equal(loop.run_forward(other, made), saved)
        equal(loop.run_backward(other, made, saved), back)
        if stride == 1:
            equal(loop.run_windowed(other, made, 0, case.lanes), windows)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden, out", [(33, None), (130, None), (40, 18)])
def test_bitwise_one_lane_among_a_thousand(cell, hidden, out, isa):
    if out and cell != "lstm":
        return
    case = Case(cell, 1000, 1, hidden, stride=1, warmup=2, out=out, threads=2)
    made = case.draw()
    saved = loop.run_forward(case, made)
    back = loop.run_backward(case, made, saved)
    for lanes in ((0,), (1,), (517,), (999,), (3, 4, 5, 400, 401, 402, 403)):
        some = loop.with_lanes(case, lanes)
        for found, everything in ((loop.run_forward(some, made), saved), (loop.run_backward(some, made, saved), back)):
            for name, value in found.items():
                written = ~value.isnan()
                assert torch.equal(value[written], everything[name][written]), name
        assert not loop.run_forward(some, made)["y"][list(lanes)].isnan().any()


@pytest.mark.skipif("avx512" not in loop.instruction_sets(), reason="one instruction set with fma")
@pytest.mark.parametrize("cell", CELLS)
def test_bitwise_over_instruction_sets(cell, isa):
    if isa in ("plain", "avx2"):
        return
    case = Case(cell, 12, 2, 45, stride=4, warmup=2)
    made, runs = case.draw(), []
    for name in ("avx2", isa):
        _native.lib.set_isa(name)
        saved = loop.run_forward(case, made)
        runs.append(saved | loop.run_backward(case, made, saved))
    equal(*runs)


def check_ends(case):
    for threads in (1, 2):
        forward, backward = loop.ends_alone(replace(case, threads=threads))
        assert_like(*forward, case.dtype, case.steps, case.p)
        assert_like(*backward, torch.float32, case.steps, case.gates * case.hidden)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_ends_of_rows_that_share_their_times(cell, dtype, isa):
    for batch, hidden in ((1, 5), (7, 33), (40, 18)):
        case = Case(cell, 6, batch, hidden, stride=6, warmup=0, layout="shared", init=True, dtype=dtype)
        check_ends(replace(case, cap=0.6 if cell in loop.CAPPED else 1.0))
    if cell == "lstm":
        check_ends(Case(cell, 6, 7, 33, 6, 0, out=18, layout="shared", init=True, dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_else_depends_on_what_is_asked_for(cell, isa):
    case = Case(cell, 23, 3, 33, stride=7, warmup=3, lengths=(23, 0, 16), cap=0.8 if cell in loop.CAPPED else 1.0)
    made = case.draw()
    saved = loop.run_forward(case, made)
    back = loop.run_backward(case, made, saved)
    for without in (("decay",), ("y",), ("saved", "cells"), ("dz",)):
        names = [k for k in saved if k not in without]
        equal(loop.run_forward(case, made, only=names), {k: saved[k] for k in names})
        names = [k for k in back if k not in without]
        equal(loop.run_backward(case, made, saved, only=names), {k: back[k] for k in names})


@pytest.mark.parametrize("cell", loop.CAPPED)
def test_decay_is_the_product_of_the_saved_gates(cell, isa):
    """To a rounding of each product, on lanes of different lengths; nothing of it where a lane writes nothing."""
    case = Case(cell, 40, 3, 19, stride=11, warmup=5, lengths=(40, 0, 25), cap=0.9)
    made = case.draw()
    saved = loop.run_forward(case, made)
    forget = saved["saved"].double().chunk(4, 1)[1]
    decays = [saved["decay"], loop.run_backward(case, made, saved)["decay"]]
    for id in range(case.lanes):
        b, first, end = case.span(id)
        if first >= end:
            assert all(decay[id].isnan().all() for decay in decays)
            continue
        exact = forget[[case.row(b, t) for t in range(first, end)]].prod(0)
        for decay in decays:
            assert ((decay[id] - exact).abs() <= 11 * 2**-24 * exact).all()


def test_long_decays_underflow_to_zero(isa):
    case = Case("lstm", 300, 1, 20, stride=300, warmup=0, cap=0.5)
    made = case.draw()
    saved = loop.run_forward(case, made)
    assert (saved["decay"] == 0).all() and (loop.run_backward(case, made, saved)["decay"] == 0).all()
    short = replace(case, steps=90, stride=90)
    made["xp"], made["w_hh"][:] = torch.full_like(made["xp"][:90], 9.0), 0  # all gates at the cap
    assert (loop.run_forward(short, made)["decay"] == 0.5**90).all()


@pytest.mark.parametrize("cell", CELLS)
def test_a_rerun_from_the_predecessors_end_is_the_sequential_run(cell):
    whole = Case(cell, 60, 1, 24, stride=60, warmup=0)
    made = whole.draw()
    expected = loop.run_forward(whole, made)
    lanes = replace(whole, stride=20, select=(0, 1, 2))
    found = loop.run_forward(lanes, made)
    for j in (1, 2):
        state = dict(
            h_init=found["h_end"][j - 1].clone()[None],
            c_init=found["c_end"][j - 1].clone()[None] if whole.lstm else None,
        )
        again = loop.run_forward(replace(lanes, select=(j,), init=True), made | state)
        found["h_end"][j], found["y"][20 * j : 20 * j + 20] = again["h_end"][j], again["y"][20 * j : 20 * j + 20]
        if whole.lstm:
            found["c_end"][j] = again["c_end"][j]
    assert torch.equal(found["y"], expected["y"])


def project(x, w_ih, b_ih, b_hh, threads=1):
    xp = torch.full((x.shape[0], w_ih.shape[0]), loop.NAN, dtype=x.dtype)
    _native.lib.input_projection(
        loop.DTYPES[x.dtype], threads, *x.shape, w_ih.shape[0], *map(loop.at, (x, w_ih, b_ih, b_hh, xp))
    )
    return xp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, inputs, sums", [(0, 3, 4), (1, 1, 1), (5, 0, 7), (3, 33, 31), (29, 70, 260), (400, 40, 65), (64, 128, 600)]
)
def test_input_projection(dtype, rows, inputs, sums, isa):
    x, w, b_ih, b_hh = (torch.randn(*shape).to(dtype) for shape in ((rows, inputs), (sums, inputs), (sums,), (sums,)))
    for biases in ((b_ih, b_hh), (None, None)):
        found = project(x, w, *biases)
        exact = x.double() @ w.double().T + sum(b.double() for b in biases if b is not None)
        eager = x.float() @ w.float().T + sum(b.float() for b in biases if b is not None)
        assert_like(dict(xp=found), dict(xp=exact), dict(xp=eager), dtype, 1, inputs)
        assert all(torch.equal(project(x, w, *biases, threads=n), found) for n in (2, 3))
        if rows:
            assert torch.equal(project(x[rows // 2 :][:1], w, *biases), found[rows // 2 :][:1])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch, inputs, hidden", [(1, 1, 1), (1, 64, 64), (3, 5, 33), (29, 70, 130), (2, 0, 7)])
def test_cell_step_is_bitwise_projection_and_recurrence(cell, dtype, batch, inputs, hidden, isa):
    case = Case(cell, 1, batch, hidden, stride=1, warmup=0, dtype=dtype, cap=0.7 if cell in loop.CAPPED else 1.0)
    made, sums = case.draw(), case.gates * hidden
    x, w_ih, b_ih, b_hh = (
        torch.randn(*shape).to(dtype) for shape in ((batch, inputs), (sums, inputs), (sums,), (sums,))
    )
    for biases, state in (((b_ih, b_hh), ("h0", "c0")), ((None, None), ())):
        given = [made[k] if k in state else None for k in ("h0", "c0")]
        h, c = (torch.full((batch, hidden), loop.NAN, dtype=dtype) for _ in range(2))
        _native.lib.cell_step(
            CELLS.index(cell),
            loop.DTYPES[dtype],
            2,
            batch,
            inputs,
            hidden,
            case.cap,
            *map(loop.at, (x, *given, w_ih, made["w_hh"], *biases, h, c)),
        )
        zeros = {k: None if made[k] is None else torch.zeros_like(made[k]) for k in ("h0", "c0") if k not in state}
        b_ih, b_hh = biases
        own = None
        if case.gru and b_hh is not None:  # n's part of b_hh belongs to the hidden product
            own, b_hh = b_hh[2 * hidden :], torch.cat([b_hh[: 2 * hidden], torch.zeros(hidden, dtype=dtype)])
        given = dict(xp=project(x, w_ih, b_ih, b_hh), hidden_bias=own)
        expected = loop.run_forward(case, made | zeros | given)
        assert torch.equal(h, expected["h_n"])
        assert not case.lstm or torch.equal(c, expected["c_n"])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("steps, batch, hidden", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)])
def test_empty(cell, steps, batch, hidden):
    for stride, warmup in ((1, 2), (4, 0)):
        case = Case(cell, steps, batch, hidden, stride, warmup)
        made, saved = check_forward(case)
        check_backward(case, made, saved)
        if stride == 1:
            check_windowed(case, groups=1)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinity_pass_through(cell, isa):
    case = Case(cell, 6, 2, 20, stride=6, warmup=0)
    made = case.draw()
    made["xp"][4] = loop.NAN  # row 0, time 2
    y = loop.run_forward(case, made)["y"].view(6, 2, 20)
    assert not y[:2].isnan().any() and not y[:, 1].isnan().any() and y[2:, 0].isnan().all()
    windows = Case(
        cell, 6, 2, 20, stride=1, warmup=2
    )  # from zeros, which times infinity are NaN: as in a plain product
    made = windows.draw()
    made["w_hh"][3, 5] = float("inf")
    found, exact = loop.run_forward(windows, made), loop.loop_forward(windows, made)
    assert exact["y"][:, 3].isnan().any() and torch.equal(found["y"].isnan(), exact["y"].isnan())


def test_saturated_gates(isa):
    """Pre-activations far outside the range of exp: the limits, not NaN or infinity."""
    for big in (30.0, 90.0, 1e4, 3e38):
        for cell in ("lstm", "gru", "rnn_tanh"):
            case = Case(cell, 2, 1, 16, stride=2, warmup=0)
            made = case.draw()
            made["xp"] = big * torch.sign(made["xp"])
            check_forward_with(case, made)


def check_forward_with(case, made):
    assert_like(
        loop.run_forward(case, made),
        loop.loop_forward(case, made),
        loop.loop_forward(case, made, torch.float32),
        case.dtype,
        case.steps,
        case.p,
    )


def test_tanh_to_a_few_units(isa):
    """A tanh RNN without state weights is tanh itself: within 4 units in the last place, down to the smallest numbers."""
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-30, 0, 5000), -torch.logspace(-30, 0, 5000)])
    case = Case("rnn_tanh", 1, len(x), 1, stride=1, warmup=0)  # each value a row of the batch
    y = loop.run_forward(case, dict(xp=x[:, None], w_hh=torch.zeros(1, 1), h0=torch.zeros(len(x), 1)))["y"][:, 0]
    exact = torch.tanh(x.double())
    assert ((y - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs()).all()


def test_errors_say_what_is_wrong():
    good = Case("rnn_tanh", 3, 1, 4, stride=1, warmup=0)
    made = good.draw()
    for bad, word in (
        (dict(stride=0), "stride"),
        (dict(cap=0.0), "cap"),
        (dict(cap=2.0), "cap"),
        (dict(out=2), "w_hr"),
    ):
        case = replace(good)
        for name, value in bad.items():
            setattr(case, "p" if name == "out" else name, value)
        with pytest.raises(RuntimeError, match=word):
            loop.run_forward(case, made)
    with pytest.raises(RuntimeError, match="stride 1"):
        loop.run_windowed(replace(good, stride=2), made, 0, 1)
    with pytest.raises(ValueError, match="mmx"):
        _native.lib.set_isa("mmx")


def test_instruction_set_by_environment():
    program = "import torch; from stable_rnn import _native; print(_native.lib.cpu_features()['isa'] if _native.lib else _native.reason)"
    refused = (
        "STABLE_RNN_ISA must be plain, avx2, avx512, avx512bf16 or amx, and one that this machine can run, not 'mmx'"
    )
    for asked, said in (("plain", "plain"), ("mmx", refused)):
        run = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"STABLE_RNN_ISA": asked}, capture_output=True, text=True
        )
        assert said in run.stdout, run.stderr
