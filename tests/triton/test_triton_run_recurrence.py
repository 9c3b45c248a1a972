"""The Triton recurrence kernels, interpreted or on a GPU: every output against plain float64 loops, for each way to divide the work."""

from dataclasses import replace

import lane_loop as loop
import pytest
import torch
from lane_cases import (
    DEVICE,
    WAYS,
    adjoint_ends,
    assert_like,
    backward,
    check,
    divide,
    ends,
    forward,
    problem,
    rows,
    to_device,
)
from lane_loop import Case

from stable_rnn.ops.recurrence import reference, verified
from stable_rnn.ops.recurrence import triton as backend
from stable_rnn.ops.recurrence.problem import BackwardInputs, Inputs, WindowedInputs, backward_inputs
from stable_rnn.ops.recurrence.sweeps import Backward, Forward

KINDS = {"float32": dict()}
if DEVICE == "cuda":  # the interpreter has no bfloat16 products, and no TF32
    KINDS |= {
        "tf32": dict(tf32=True),
        "tf32x3": dict(),
        "float16": dict(dtype=torch.float16),
        "bfloat16": dict(dtype=torch.bfloat16),
    }


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    if DEVICE == "cuda":
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", request.param == "tf32")
        monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32x3" if request.param == "tf32x3" else "ieee")
    return KINDS[request.param]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    divide(request.param, monkeypatch)
    return request.param


CASES = [
    Case("lstm", 9, 3, 5, 9, 0),
    Case("rnn_tanh", 33, 2, 33, 33, 0),
    Case("lstm", 1, 19, 48, 1, 0),  # more lanes than a tile has
    Case("rnn_relu", 9, 3, 17, 4, 2, lengths=(9, 0, 4)),
    Case("lstm", 9, 3, 33, 4, 2, cap=0.55, layout="reverse", lengths=(5, 0, 9)),
    Case("lstm", 9, 3, 40, 3, 4, layout="packed", lengths=(9, 4, 2)),
    Case("rnn_tanh", 9, 3, 20, 4, 9, layout="packed_reverse", lengths=(4, 0, 9)),
    Case("lstm", 9, 3, 12, 1, 3, cap=0.7, layout="packed_reverse", lengths=(4, 0, 9)),  # windows
    Case("rnn_tanh", 7, 3, 18, 1, 20),  # longer than the sequence
    Case("rnn_relu", 12, 2, 64, 1, 2, layout="reverse"),
    Case("lstm", 21, 2, 16, 5, 3),
    Case("lstm", 6, 1, 1, 2, 1),
    Case("gru", 9, 3, 5, 9, 0),
    Case("gru", 9, 3, 33, 4, 2, cap=0.55, layout="reverse", lengths=(5, 0, 9)),
    Case("gru", 9, 3, 40, 3, 4, layout="packed", lengths=(9, 4, 2)),
    Case("gru", 9, 3, 12, 1, 3, cap=0.7, layout="packed_reverse", lengths=(4, 0, 9)),  # windows
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.cell}-{c.steps}x{c.batch}x{c.hidden}-{c.stride}-{c.warmup}-{c.layout}"
)
def test_every_output(case, way, kind):
    found, _ = check(replace(case, **kind))
    if case.cap < 1:
        forget = found["saved"].chunk(4, 1)[1]
        forget, cap = forget[~forget.isnan()], torch.tensor(case.cap, dtype=forget.dtype)
        assert (forget == cap).any() and (forget < cap).any()  # both branches are tested


@pytest.mark.parametrize("cell", loop.CELLS)
def test_selected_lanes_with_and_without_given_states(cell, way, kind):
    case = replace(Case(cell, 9, 3, 17, stride=2, warmup=1, lengths=(9, 3, 7)), **kind)
    saved, _ = check(case)
    check(loop.with_lanes(case, (0, 2, 7, 10, 12)), saved)
    check(loop.with_lanes(case, (0, 2, 7, 10, 12), init=True), saved)


@pytest.mark.parametrize("cell", loop.CELLS)
def test_only_the_ends_of_rows_that_share_their_times(cell, way, kind):
    case = replace(Case(cell, 5, 19, 20, stride=5, warmup=0, layout="shared", init=True), **kind)
    found, back = loop.ends_alone(
        case,
        lambda case, made, only=None: ends(case, made, only) if only else forward(case, made),
        lambda case, made, saved, only: adjoint_ends(case, made, saved, only),
    )
    assert_like(*found, case, case.hidden)
    assert_like(*back, case, case.gates * case.hidden)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize("stride, warmup", [(1, 2), (4, 3)])
def test_bitwise_one_lane_among_many_and_twice(cell, stride, warmup, way, kind):
    case = replace(Case(cell, 18, 2, 20, stride, warmup), **kind)
    made = case.draw()
    every = forward(case, made)
    every_back = backward(case, made, every)
    equal(forward(case, made), every)
    equal(backward(case, made, every), every_back)
    for lanes in ((7,), (case.lanes - 1,), (2, 3, 8)):
        some = loop.with_lanes(case, lanes)
        for found, everything in ((forward(some, made), every), (backward(some, made, every), every_back)):
            for name, value in found.items():
                written = ~value.isnan()
                assert torch.equal(value[written], everything[name][written]), name
        assert not forward(some, made)["y"].isnan().all()


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_bitwise_whatever_the_team(cell, kind, monkeypatch):
    """The number of members decides who does a sum, not how it is done. (The blocks of units are the same here.)"""
    case, runs = replace(Case(cell, 5, 3, 40, stride=3, warmup=1, lengths=(5, 0, 4)), **kind), []
    made = case.draw()
    for programs in (1, 2, 9):
        with monkeypatch.context() as patch:
            divide("team", patch)
            patch.setattr(
                backend, "device_of", lambda x, n=programs, given=backend.device_of: given(x)._replace(programs=n)
            )
            saved = forward(case, made)
            runs.append(saved | backward(case, made, saved))
    for run in runs[1:]:
        equal(run, runs[0])


def equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name].nan_to_num(nan=77.0), two[name].nan_to_num(nan=77.0)), name


def test_more_tiles_than_teams(monkeypatch):
    """Teams go on to further tiles, whose states take the places of those before."""
    divide("large", monkeypatch)
    case = Case("lstm", 15, 5, 20, stride=1, warmup=2, lengths=(15, 2, 0, 12, 7))  # 75 windows
    found, back = check(case)
    monkeypatch.setattr(backend, "team", lambda tiles, blocks, programs: (1, 2))
    made = case.draw()
    equal(forward(case, made), found)
    equal(backward(case, made, found), back)


@pytest.mark.parametrize("cell", loop.CELLS)
@pytest.mark.parametrize("steps, batch, hidden", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)])
def test_empty(cell, steps, batch, hidden):
    case = Case(cell, steps, batch, hidden, 4, 1)
    made = case.draw()
    out = run(case, made)
    assert out.y.shape == (steps * batch, hidden) and torch.equal(out.h_n.cpu(), made["h0"])
    zeros = torch.zeros(steps * batch, hidden, device=DEVICE)
    before = to_device(made["h0"]) if case.gru else None, to_device(made["c0"])
    ends = to_device(made["dh_n"]), to_device(made["dc_n"]) if case.lstm else None
    kept = out.y, out.saved, out.cells
    back = backend.backward(
        BackwardInputs(zeros, *ends, *kept, to_device(made["w_hh"]), None, *before, None, None), problem(case)
    )
    assert back.dz.shape == (steps * batch, case.gates * hidden) and torch.equal(back.dh0.cpu(), made["dh_n"])
    if case.lstm:
        assert torch.equal(out.c_n.cpu(), made["c0"]) and torch.equal(back.dc0.cpu(), made["dc_n"])


def run(case, made, **options):
    on = {name: to_device(made.get(name)) for name in ("xp", "w_hh", "hidden_bias", "h0", "c0")}
    inputs = Inputs(on["xp"], on["w_hh"], None, on["hidden_bias"], on["h0"], on["c0"], *rows(case))
    return backend.forward(inputs, problem(case), **options)


def test_fresh_outputs_are_zero_where_no_time_is():
    case = Case("lstm", 5, 3, 6, stride=2, warmup=1, lengths=(5, 0, 2))
    made = case.draw()
    out = run(case, made)
    past = torch.tensor([t >= length for t in range(5) for length in case.lengths])
    for t in (out.y, out.saved, out.cells):
        assert (t.cpu()[past] == 0).all() and (t.cpu()[~past] != 0).any()
    assert run(case, made, save=False).saved.numel() == 0
    assert torch.equal(run(case, made, save=False).y, out.y)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_nan_and_infinity_pass_through(cell, way):
    case = Case(cell, 6, 2, 20, stride=6, warmup=0)
    made = case.draw()
    made["xp"][4] = loop.NAN  # row 0, time 2
    y = run(case, made).y.view(6, 2, 20)
    assert not y[:2].isnan().any() and not y[:, 1].isnan().any() and y[2:, 0].isnan().all()


def test_tanh_and_sigmoid_to_a_few_units():
    """A tanh RNN without state weights is tanh itself, down to the smallest numbers: within 6 units in the last place, of which one
    is the division's on a GPU (at most 2 units). So are the gates of an LSTM without any."""
    small = torch.logspace(-30, 0, 200)
    x = torch.cat([torch.linspace(-12, 12, 499), small, -small, torch.tensor([90.0, -1e4, 3e38])])
    case = Case("rnn_tanh", 1, len(x), 1, stride=1, warmup=0)  # each value a row of the batch
    unit = 6 * torch.finfo(torch.float32).eps
    y = run(case, dict(xp=x[:, None], w_hh=torch.zeros(1, 1), h0=torch.zeros(len(x), 1), c0=None)).y[:, 0].cpu()
    exact = torch.tanh(x.double())
    assert ((y - exact).abs() <= unit * exact.abs()).all()
    case = replace(case, cell="lstm")
    zeros = torch.zeros(len(x), 1)
    gates = run(
        case, dict(xp=x[:, None].expand(-1, 4).contiguous(), w_hh=torch.zeros(4, 1), h0=zeros, c0=zeros)
    ).saved.cpu()
    exact = torch.sigmoid(x.double())
    at_least = torch.exp(torch.tensor(-87.0, dtype=torch.float64))  # where the exponential ends
    for gate in (0, 1, 3):
        assert ((gates[:, gate] - exact).abs() <= unit * exact + at_least * (1 + unit)).all()


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize(
    "layout, lengths, resets", [("padded", None, None), ("reverse", (7, 0, 5), 0.3), ("packed", (7, 3, 6), None)]
)
def test_windowed_backward(cell, layout, lengths, resets, way, monkeypatch):
    """The true gradient of windows: sums over the units of all windows, whose rounding grows like a random walk."""
    cap = 0.8 if cell in loop.CAPPED else 1.0
    case = Case(cell, 7, 3, 20, stride=1, warmup=3, layout=layout, lengths=lengths, cap=cap, resets=resets)
    made = case.draw()
    names = ("dy", "dh_n", "dc_n", "xp", "w_hh", "w_hr", "hidden_bias", "h0", "c0")

    def gradients(module, dtype, device):
        given = [
            None if made.get(name) is None or name == "dc_n" and not case.lstm else made[name].to(device, dtype)
            for name in names
        ]
        at = [None if t is None else t.to(device) for t in rows(case)]
        return module.windowed_backward(WindowedInputs(*given, *at), problem(case))

    monkeypatch.setattr(backend.windows, "WORKSPACE", 4 * 20 * 300)  # a few groups
    found = gradients(backend, torch.float32, DEVICE)
    exact, eager = gradients(reference, torch.float64, "cpu"), gradients(reference, torch.float32, "cpu")
    for value, want, plain in zip(found, exact, eager, strict=True):
        if want is not None:
            rounding = 8 * torch.finfo(torch.float32).eps * (case.lanes * case.gates) ** 0.5 * want.abs().max()
            limit = 2 * (plain - want).abs().max() + rounding
            assert (value.cpu() - want).abs().max() <= limit


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_verified(cell, way):
    """Checked lanes are rerun from the states before them until all borders agree: with tol 0 that is the sequential run, bitwise."""
    case = Case(cell, 30, 2, 10, stride=30, warmup=0, lengths=(30, 19), cap=0.1 if cell in loop.CAPPED else 1.0)
    made = case.draw()
    made["w_hh"] *= 0.1  # forgets fast
    on = {name: to_device(made[name]) for name in made}
    tensors = Inputs(on["xp"], on["w_hh"], None, on["hidden_bias"], on["h0"], on["c0"], *rows(case))
    checked = problem(case)._replace(stride=6, warmup=2, tol=0.0, max_passes=5)
    whole = backend.forward(tensors, problem(case))
    found, report = verified.run(Forward(backend, tensors, checked, True))
    assert report.passes > 1 and report.left == 0 and not report.why
    assert torch.equal(found.y, whole.y) and torch.equal(found.h_n, whole.h_n)
    saved = found.y, found.saved, found.cells
    ends = on["dh_n"], on["dc_n"] if case.lstm else None
    tensors = backward_inputs(on["dy"], *ends, *saved, tensors, checked)
    back, report = verified.run(Backward(backend, tensors, checked))
    assert report.passes > 1 and report.left == 0 and not report.why
    assert torch.equal(back.dz, backend.backward(tensors, problem(case)).dz)


def test_assert_like_notices():
    """The comparison of these tests fails for a wrong element, a missing one, and one too many."""
    case = Case("rnn_tanh", 3, 1, 4, 3, 0)
    made = case.draw()
    exact, eager = loop.loop_forward(case, made), loop.loop_forward(case, made, torch.float32)
    for spoil in (1e-4, loop.NAN):
        found = {name: t.float().clone() for name, t in exact.items()}
        found["y"][1, 2] += spoil
        with pytest.raises(AssertionError, match="y"):
            assert_like(found, exact, eager, case, 4)
