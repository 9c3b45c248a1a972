"""The Triton scans of a cascade, interpreted or on a GPU, against the oracle's loop over steps."""

import pytest
import torch
from lane_cases import DEVICE
from test_cascade_runs import cascaded, check
from test_pieces import LENGTHS, masked, results
from test_recurrence import CELLS, assert_close, draw, rows_of

from stable_rnn.ops.recurrence import triton
from stable_rnn.ops.recurrence.problem import SCANNED, Problem


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(DEVICE != "cpu", reason="the oracle's tensors lie on the CPU")
@pytest.mark.parametrize("cell", CELLS)
def test_scans(cell, monkeypatch):
    """Several chunks of time, and of chunks; several blocks of units."""
    monkeypatch.setattr(triton, "TIMES", 4)
    monkeypatch.setattr(triton, "COLUMNS", 4)
    check(cell, "reverse_lengths", "triton", torch.float32, (0, 5), steps=19, lengths=(19, 0, 10))
    for layout in ("padded", "end_to_end"):
        check(cell, layout, "triton", torch.float32, (0, 2, 3), steps=6, lengths=(6, 3), cap=0.6)


@pytest.mark.skipif(DEVICE != "cpu", reason="the oracle's tensors lie on the CPU")
@pytest.mark.parametrize("cell", CELLS)
def test_one_chunk_and_nothing(cell):
    check(cell, "padded", "triton", torch.float32, (0, 1, 2), steps=5, lengths=(5,))
    check(cell, "lengths", "triton", torch.float32, (0, 2, 5), steps=3, lengths=(0, 0))
    check(cell, "padded", "triton", torch.float32, (0, 2, 5), steps=3, lengths=())


@pytest.fixture
def chunks(monkeypatch):
    """Several of time, and of units."""
    monkeypatch.setattr(triton, "TIMES", 8)
    monkeypatch.setattr(triton, "COLUMNS", 4)


def with_resets(cell, layout):
    """`results` of a cascade by backend and dtype, as a function, and what it is given."""
    rows, base, lengths, step, n = rows_of(layout, 12, LENGTHS)
    made, grads = draw(cell, n, len(LENGTHS), 5, 5, torch.float32)
    made["w_hh"], p = cascaded(made["w_hh"], (0, 2, 5)), Problem(cell, 12, step, SCANNED, cap=0.9)

    def run(backend, dtype=torch.float32):
        given = [{k: None if v is None else v.to(dtype) for k, v in d.items()} for d in (made, grads)]
        return results(cell, *given, base, lengths, masked(rows, n), p._replace(backend=backend))

    return run, made, grads, rows


@pytest.mark.skipif(DEVICE != "cpu", reason="the oracle's tensors lie on the CPU")
@pytest.mark.parametrize("layout", ["padded", "reverse_lengths"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_resets(cell, layout, chunks):
    """Against the reference, which cuts rows into pieces."""
    run, *_ = with_resets(cell, layout)
    found, exact, eager = run("triton"), run("reference", torch.float64), run("reference")
    for name, value in found.items():
        assert_close(value, exact[name].detach(), eager[name].detach(), torch.float32)


@pytest.mark.skipif(DEVICE != "cpu", reason="the oracle's tensors lie on the CPU")
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_nothing_passes_a_reset(cell, chunks):
    """Not even a NaN: from the steps before it, from h0, and from later gradients."""
    run, made, grads, rows = with_resets(cell, "padded")
    clean, times = run("triton"), torch.tensor(rows[3])  # begins anew before its times 0, 2, 3 and 9
    made["xp"][times[1]], grads["dy"][times[10]] = torch.nan, torch.nan
    for state in ("h0", "c0")[: 1 + (cell == "lstm")]:
        made[state][3] = torch.nan
    found = run("triton")
    assert found["y"][times[1]].isnan().all() and found["dxp"][times[10]].isnan().all()
    for name, spared in (("y", times[2:]), ("dxp", times[2:9]), ("y", times[:1])):
        assert torch.equal(found[name][spared], clean[name][spared]), name
    others = torch.tensor(sum(rows[:3] + rows[4:], []))
    for name in ("y", "dxp"):
        assert torch.equal(found[name][others], clean[name][others]), name
