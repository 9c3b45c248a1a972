"""How the blocks of a cluster send their states: by its barrier or by transactions, as the environment says. And how lanes get xp."""

from dataclasses import replace

import pytest
import torch
from executor import build
from lane_loop import CELLS, Case
from test_cuda_recurrence import BACKWARD, DESCENDING, EXECUTOR, FORWARD, KINDS, equal, exists, machine
from tiled import L2, REGISTERS, Machine, Variant

from stable_rnn.ops.recurrence import cuda

__all__ = ["machine"]  # the fixture
pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")


def exchange(backward, hidden=256, limits=build.LIMITS):
    return build.module().recurrence_tiling_cuda(backward, 2, 1, hidden, hidden, 1, limits)


@pytest.mark.parametrize("backward", [FORWARD, BACKWARD])
def test_the_environment_chooses(monkeypatch, backward):
    """Of clusters alone; nothing else of the tiling changes."""
    monkeypatch.delenv("STABLE_RNN_EXCHANGE", raising=False)
    plain = exchange(backward)
    assert plain["cluster"] > 1 and plain["exchange"] == 0
    for name, number in (("barrier", 0), ("transactions", 1), ("", 0)):
        monkeypatch.setenv("STABLE_RNN_EXCHANGE", name)
        assert exchange(backward) == plain | {"exchange": number}
    monkeypatch.setenv("STABLE_RNN_EXCHANGE", "transactions")
    for hidden, limits in ((16, build.LIMITS), (256, (80, 108, 166912, 1)), (1024, build.LIMITS)):
        found = exchange(backward, hidden, limits)
        assert found["cluster"] == 1 and found["exchange"] == 0
    for wrong in ("transaction", "1", "BARRIER"):
        monkeypatch.setenv("STABLE_RNN_EXCHANGE", wrong)
        assert "STABLE_RNN_EXCHANGE must be barrier or transactions" in exchange(backward)["message"]


def test_a_tiling_in_words(monkeypatch):
    for name, words in (("barrier", "4 blocks in a cluster of"), ("transactions", "in a cluster by transactions of")):
        monkeypatch.setenv("STABLE_RNN_EXCHANGE", name)
        assert words in cuda.describe(exchange(FORWARD))


RANDOM = Machine("random")
CLUSTERS = [
    Variant(2, octets=2, teams=1),
    Variant(2, place=REGISTERS),
    Variant(3, lane_groups=2),
    Variant(4),
    Variant(16, lane_groups=2, place=L2),
]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", CLUSTERS, ids=str)
def test_transactions_give_the_bits_of_the_barrier(machine, variant, kind, cell):
    """Tiles in turn, lanes that end in between, rows without time, resets, a block that units do not fill."""
    hidden, steps = (250, 7) if variant.blocks == 16 else (63, 41)
    case = Case(cell, steps, 3, hidden, stride=3, warmup=2, lengths=(steps, 0, steps // 2), resets=0.2, **KINDS[kind])
    made = case.draw()
    saved = back = None
    for where in (EXECUTOR, DESCENDING) if machine.device == "cpu" else (machine,):
        if exists(where, variant, FORWARD, case):
            saved = saved or where.forward(case, made, variant)
            equal(where.forward(case, made, replace(variant, transactions=True)), saved)
        if exists(where, variant, BACKWARD, case):
            start = saved or where.forward(case, made, machine.limits)
            back = back or where.backward(case, made, start, variant)
            equal(where.backward(case, made, start, replace(variant, transactions=True)), back)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize("variant", CLUSTERS[:4], ids=str)
@pytest.mark.parametrize("kind, hidden", [("bfloat16", 63), ("float32", 40)])
def test_transactions_in_random_schedules(variant, kind, hidden, cell):
    """Warps take turns in any order, some seldom, stores land at any time. With 40 units the last warp of two blocks has none."""
    case = Case(cell, 14, 3, hidden, stride=3, warmup=1, lengths=(14, 0, 7), resets=0.2, **KINDS[kind])
    made = case.draw()
    saved = EXECUTOR.forward(case, made, Variant())
    back = EXECUTOR.backward(case, made, saved, Variant())
    for seed in range(2, 8):
        RANDOM.descending, how = seed, replace(variant, transactions=seed % 3 > 0)
        if exists(RANDOM, variant, FORWARD, case):
            equal(RANDOM.forward(case, made, how), saved)
        if exists(RANDOM, variant, BACKWARD, case):
            equal(RANDOM.backward(case, made, saved, how), back)


MANY = [Variant(octets=4, place=L2), Variant(octets=8), Variant(2, octets=4), Variant(2, octets=8)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [32, 40, 44, 33])
def test_lanes_get_xp_from_any_address(machine, hidden, cell):
    """16 bytes at a time where rows allow it, else one value: the same bits, from the first byte of a row to its last."""
    case = Case(cell, 40, 2, hidden, stride=1, warmup=1, lengths=(40, 23), dtype=torch.bfloat16)
    made = case.draw()
    want = machine.forward(case, made, Variant())
    space = torch.full((made["xp"].numel() + 16,), float("nan"), dtype=case.dtype, device=machine.device)
    start = -space.data_ptr() % 16 // 2
    for variant in [v for v in MANY if exists(machine, v, FORWARD, case)]:
        for offset in (0, 1, 4, 7):
            xp = space[start + offset :][: made["xp"].numel()].view_as(made["xp"]).copy_(made["xp"])
            assert xp.data_ptr() % 16 == 2 * offset
            equal(machine.forward(case, made | {"xp": xp}, variant), want)


def test_lanes_that_have_ended_read_nothing(machine):
    """xp of times after a row's end may hold anything."""
    case = Case("lstm", 3, 33, 40, stride=3, warmup=0, lengths=(3,) * 7 + (1, 2) * 13, dtype=torch.float16)
    made = case.draw()
    ended = [case.row(b, t) for b in range(33) for t in range(case.length[b], 3)]
    poisoned = made | {"xp": made["xp"].index_fill(0, torch.tensor(ended), float("nan"))}
    for variant in (v for v in MANY if exists(machine, v, FORWARD, case)):
        equal(machine.forward(case, poisoned, variant), machine.forward(case, made, Variant()))
