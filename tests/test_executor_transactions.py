"""Stores between the blocks of a cluster that arrive by themselves (`store_async`), in the executor and, where there is one, on a GPU."""

import pytest
import torch
from executor import build
from test_executor import Place, empty, executor, neighbours, place

__all__ = ["executor", "place"]  # the fixtures
pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")


def by_transactions(place, mode=0, blocks=6, cluster=3, warps=2, steps=9):
    return place.run(
        "transactions",
        blocks,
        32 * warps,
        cluster=cluster,
        shared=16 + 32 * cluster * warps,
        out=empty(blocks, warps, steps, dtype=torch.int32),
        count=steps,
        mode=mode,
    )


def sent_by_transactions(blocks=6, cluster=3, warps=2, steps=9):
    """The sums of the kernel, one step after the other."""
    state, sums = [(i, 0) for i in range(cluster * warps)], []
    for _ in range(steps):
        sums.append([7 * i + sum(a + 3 * b for a, b in state) for i in range(cluster * warps)])
        state = [(s % 1000, s % 7) for s in sums[-1]]
    one = torch.tensor(sums).int().T.view(cluster, warps, steps)
    return one.repeat(blocks // cluster, 1, 1)


@pytest.mark.parametrize("blocks, cluster, warps", [(6, 3, 2), (2, 1, 3), (8, 8, 1), (2, 2, 4)])
def test_a_cluster_that_meets_by_transactions(place, blocks, cluster, warps):
    want = sent_by_transactions(blocks, cluster, warps)
    assert torch.equal(by_transactions(place, 0, blocks, cluster, warps), want)


def in_random_schedules(what, seeds=range(2, 22)):
    place = Place("random")
    for seed in seeds:
        place.descending = seed
        yield what(place)


def test_transactions_in_random_schedules():
    for sums in in_random_schedules(by_transactions):
        assert torch.equal(sums, sent_by_transactions())
    assert all(in_random_schedules(neighbours))
    assert not all(in_random_schedules(lambda place: neighbours(place, 1)))


@pytest.mark.parametrize("mode", [1, 2, 5, 6, 14])
def test_wrong_waits_and_counts_of_transactions_show(executor, mode):
    """As sums of what was not there yet, or as an error."""
    try:
        sums = by_transactions(executor, mode)
    except RuntimeError:
        return
    assert not torch.equal(sums, sent_by_transactions())


@pytest.mark.parametrize(
    "mode, message",
    [
        (3, "the kernel hangs, its threads are: block [0-5]: 64 in transactions_wait;"),
        (4, "store_async: no barrier has begun there"),
        (7, "its block ended while stores to it were on their way"),
        (8, "store_async to outside its block's 208 bytes of shared memory"),
        (9, "transactions_arrive more than 2 times"),
        (10, "store_async of 16 bytes at an address that is not a multiple of that"),
        (11, "its barrier was written over"),
        (12, "store_async: its destination was written before it landed"),
        (13, "the kernel hangs"),
    ],
)
def test_wrong_transactions_are_named(executor, mode, message):
    with pytest.raises(RuntimeError, match=message):
        by_transactions(executor, mode)
