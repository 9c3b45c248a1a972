"""Resets in the Triton recurrence kernels, interpreted or on a GPU: against plain float64 loops, and bitwise against pieces of rows."""

from dataclasses import replace

import lane_loop as loop
import pytest
import torch
from lane_cases import (
    DEVICE,
    WAYS,
    adjoint_ends,
    assert_like,
    check,
    divide,
    ends,
    forward,
    problem,
    rows,
    to_device,
)
from lane_loop import Case

from stable_rnn.ops.recurrence import pieces, verified
from stable_rnn.ops.recurrence import triton as backend
from stable_rnn.ops.recurrence.problem import Inputs, backward_inputs
from stable_rnn.ops.recurrence.sweeps import Backward, Forward


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    divide(request.param, monkeypatch)
    return request.param


KINDS = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    Case("lstm", 5, 3, 20, 5, 0, resets=0.3),
    Case("rnn_tanh", 9, 3, 20, 4, 3, layout="reverse", lengths=(5, 0, 9), resets=0.3),
    Case("rnn_relu", 9, 3, 17, 4, 2, layout="packed_reverse", lengths=(4, 0, 9), resets=0.4),
    Case("lstm", 9, 3, 20, 3, 4, cap=0.55, layout="packed", lengths=(9, 4, 2), resets=0.3),
    Case("gru", 9, 3, 20, 4, 2, cap=0.55, layout="reverse", lengths=(5, 0, 9), resets=0.3),
    Case("gru", 5, 2, 5, 5, 0, resets=1.0),
    Case("lstm", 6, 3, 12, 1, 3, lengths=(6, 2, 5), resets=0.3),  # windows
]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.cell}-{c.stride}-{c.warmup}-{c.layout}")
def test_every_output(case, way, dtype):
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_selected_lanes_with_given_states(cell, way):
    case = Case(cell, 9, 3, 17, stride=2, warmup=1, lengths=(9, 3, 7), resets=0.3)
    saved, _ = check(case)
    check(loop.with_lanes(case, (0, 2, 7, 10, 12), init=True), saved)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_only_the_ends(cell, way):
    """Of rows that share their times; some end in what they start from, some not."""
    case = Case(cell, 3, 19, 20, stride=3, warmup=0, layout="shared", init=True, resets=0.15)
    found, back = loop.ends_alone(
        case,
        lambda case, made, only=None: ends(case, made, only) if only else forward(case, made),
        lambda case, made, saved, only: adjoint_ends(case, made, saved, only),
    )
    assert_like(*found, case, case.hidden)
    assert_like(*back, case, case.gates * case.hidden)


def results(case, made, cut=False) -> dict:
    """All that the backend makes of whole rows, with their mask or cut into pieces."""
    on = {name: to_device(made.get(name)) for name in made}
    given = Inputs(on["xp"], on["w_hh"], None, on["hidden_bias"], on["h0"], on["c0"], *rows(case))
    inputs, p, of = pieces.cut(given, problem(case)) if cut else (given, problem(case), pieces.Rows())
    out = backend.forward(inputs, p.whole())
    h_n, c_n = of.states(out.h_n, out.c_n)
    ends = on["dy"], on["dh_n"], on["dc_n"] if case.lstm else None
    back = backward_inputs(*ends, out.y, out.saved, out.cells, given, problem(case))
    back, p, of = pieces.cut(back, problem(case)) if cut else (back, problem(case), of)
    found = backend.backward(back, p.whole())
    dh0, dc0 = of.origins(found.dh0, found.dc0)
    return dict(y=out.y, saved=out.saved, cells=out.cells, h_n=h_n, c_n=c_n, dz=found.dz, dh0=dh0, dc0=dc0)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_bitwise_as_pieces(cell, way):
    """A row with resets is, bit for bit, its pieces as rows of their own."""
    case = Case(cell, 6, 4, 17, 6, 0, layout="reverse", lengths=(6, 3, 0, 5), resets=0.3)
    made = case.draw()
    masked, apart = results(case, made), results(case, made, cut=True)
    for name, value in masked.items():
        assert torch.equal(value, apart[name]), name


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_a_mask_without_resets_changes_no_bit(cell, way):
    case = Case(cell, 5, 2, 17, 5, 0)
    made = case.draw()
    plain, masked = results(case, made), results(replace(case, resets=0.0), made)
    for name, value in masked.items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_nothing_passes_a_reset(cell, way):
    """Not even a NaN: from the steps before it, from h0, and from later gradients."""
    case, made = Case(cell, 8, 2, 17, 8, 0, resets=0.0), Case(cell, 8, 2, 17, 8, 0).draw()
    case.anew[[0, 6, 12]] = True  # row 0, before its times 0, 3 and 6
    clean = results(case, made)
    for name, row in (("xp", 2), ("dy", 14), ("h0", 0), ("c0", 0)):
        if made[name] is not None:
            made[name][row] = loop.NAN
    found = results(case, made)
    assert found["y"][2:6:2].isnan().all() and found["dz"][12::2].isnan().all()
    for name, spared in (("y", slice(6, None, 2)), ("dz", slice(6, 12, 2)), ("y", slice(1, None, 2)), ("dh0", 0)):
        assert torch.equal(found[name][spared], clean[name][spared]), name


def test_verified(way):
    """With tol 0 the sequential run, bitwise."""
    case = Case("lstm", 20, 2, 10, stride=20, warmup=0, lengths=(20, 13), cap=0.1, resets=0.15)
    made = case.draw()
    made["w_hh"] *= 0.1  # forgets fast
    on = {name: to_device(made[name]) for name in made}
    tensors = Inputs(on["xp"], on["w_hh"], None, on["hidden_bias"], on["h0"], on["c0"], *rows(case))
    checked = problem(case)._replace(stride=5, warmup=2, tol=0.0, max_passes=5)
    whole = backend.forward(tensors, problem(case))
    found, report = verified.run(Forward(backend, tensors, checked, True))
    assert report.passes > 1 and report.left == 0 and not report.why
    assert torch.equal(found.y, whole.y) and torch.equal(found.h_n, whole.h_n)
    ends = on["dy"], on["dh_n"], on["dc_n"]
    tensors = backward_inputs(*ends, found.y, found.saved, found.cells, tensors, checked)
    back, report = verified.run(Backward(backend, tensors, checked))
    assert report.passes > 1 and report.left == 0 and not report.why
    assert torch.equal(back.dz, backend.backward(tensors, problem(case)).dz)
