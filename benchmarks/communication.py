"""Bytes that ranks send where they share time, counted at `torch.distributed`, beside the formulas of docs/guide/distributed.md:

    torchrun --nproc-per-node 4 -m benchmarks.communication        # any number of ranks, on this machine

An all_gather counts as R - 1 copies of what a rank gives, an all_reduce as 2 (R - 1) / R of it, exchanges as what is for other ranks."""

from __future__ import annotations

import os
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist

from stable_rnn import Cascade, Chunked, Scanned, StableGRU, StableLSTM, StableRNN, Verified, Windowed
from stable_rnn.distributed import sequence_parallel

B, I, H = 2, 24, 48  # noqa: E741
GROUPS, SIZE = 4, 4  # of the cascades; bytes of a number
CASES = {
    "Windowed(32)": lambda: StableLSTM(I, H, plan=Windowed(32)),
    "Chunked(64, 32)": lambda: StableLSTM(I, H, plan=Chunked(64, 32)),
    "Verified(), LSTM": lambda: StableLSTM(I, H, plan=Verified()),
    "Verified(), RNN": lambda: StableRNN(I, H, plan=Verified()),
    "Scanned(), LSTM": lambda: StableLSTM(I, H, stability=Cascade(GROUPS, 0.8), plan=Scanned()),
    "Scanned(), GRU": lambda: StableGRU(I, H, stability=Cascade(GROUPS, 0.8), plan=Scanned()),
    "Scanned(), RNN": lambda: StableRNN(I, H, stability=Cascade(GROUPS), plan=Scanned()),
}


@contextmanager
def counted():
    """A list, of which the first entry grows by what this rank sends."""
    ranks, rank, sent = dist.get_world_size(), dist.get_rank(), [0]
    plain = dist.all_gather, dist.all_reduce, dist.all_to_all_single

    def all_gather(found, t, **options):
        sent[0] += t.nbytes * (ranks - 1)
        return plain[0](found, t, **options)

    def all_reduce(t, **options):
        sent[0] += t.nbytes * 2 * (ranks - 1) // ranks
        return plain[1](t, **options)

    def all_to_all_single(found, t, receives, sends, **options):
        sent[0] += sum(n for to, n in enumerate(sends) if to != rank) * t[:1].nbytes
        return plain[2](found, t, receives, sends, **options)

    with patch.multiple(dist, all_gather=all_gather, all_reduce=all_reduce, all_to_all_single=all_to_all_single):
        yield sent


def formulas(module) -> tuple[int, int]:
    """Forward and backward, of one layer and direction, of a rank in the middle, whose times begin at a multiple of the chunk."""
    ranks, plan, carries = dist.get_world_size(), module.plan, not isinstance(module, StableRNN)
    states = 2 if isinstance(module, StableLSTM) else 1
    if isinstance(plan, Windowed):
        halo = (plan.k - 1) * B * I * SIZE
        return halo, halo
    if isinstance(plan, Chunked):
        lead = -(-plan.warmup // plan.chunk) * plan.chunk
        halo = (2 * lead + plan.chunk) * B * I * SIZE
        return halo, halo
    if isinstance(plan, Verified):  # of one round
        each = states * B * H * SIZE * (1 + 2 * (ranks - 1))
        return each, each
    scan = 2 * B * H * SIZE * (ranks - 1) * carries
    gates = {StableLSTM: 4, StableGRU: 3, StableRNN: 1}[type(module)]
    return scan + B * H * SIZE * (type(module) is not StableGRU), scan + gates * B * H * SIZE


def passes(module, steps: int) -> tuple[int, int]:
    """What a rank sends in a forward and a backward pass, but for the agreement and the final states."""
    ranks = dist.get_world_size()
    with counted() as sent:
        y, _ = module(torch.randn(steps, B, I, requires_grad=True))
        forward = sent[0]
        y.sum().backward()
    ends = H * B * SIZE * (2 if isinstance(module, StableLSTM) else 1) * 2 * (ranks - 1) // ranks
    return forward - 24 * (ranks - 1) - ends, sent[0] - forward - ends


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        print(f"{ranks} ranks, B = {B}, I = {I}, H = {H}, float32; KB a layer and pass, of rank {ranks // 2 - 1}")
        print("| plan | T / R | forward | formula | backward | formula |\n|---|---|---|---|---|---|", flush=True)
    for name, make in CASES.items():
        torch.manual_seed(0)
        module = sequence_parallel(make(), dist.group.WORLD)
        for steps in (256, 1024):
            each = [None] * ranks
            dist.all_gather_object(each, passes(module, steps))
            if rank == 0:
                forward, backward = each[max(0, ranks // 2 - 1)]
                told = (forward, formulas(module)[0], backward, formulas(module)[1])
                print(f"| `{name}` | {steps} | " + " | ".join(f"{n / 1024:.1f}" for n in told) + " |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
