"""The Triton scans of a cascade, interpreted or on a GPU, against the oracle's loop over steps."""

import pytest
import torch
from lane_cases import DEVICE
from test_cascade_runs import check
from test_recurrence import CELLS

from stable_rnn.ops.recurrence import triton


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
