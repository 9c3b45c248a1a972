"""Cascades under `Scanned()` beside the plain recurrence: `python -m benchmarks.cascades [--out FILE.jsonl] [--rounds N]`.

Plain LSTM and GRU weights without what a cascade of 8 groups does not have; float32, input projection included, forward under `no_grad`,
forward+backward with the gradients of all weights. In each round everybody runs once, in turn; a ratio is that of one round, time over
`Scanned()`'s (above 1: `Scanned()` is faster), given as median (smallest … largest) of the rounds."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import nn

from stable_rnn import Cascade, Chunked, Recurrent, Scanned, StableGRU, StableLSTM
from stable_rnn._errors import UserError

from .jsonl import Log
from .speed.results import environment
from .timing import clock

GROUPS = 8
SIZES = [(16384, 1, 128), (16384, 1, 256), (2048, 16, 128), (2048, 16, 256)]  # T, B, H = I
CELLS = {"LSTM": (StableLSTM, nn.LSTM), "GRU": (StableGRU, nn.GRU)}
PLANS = {"Recurrent()": Recurrent(), "Chunked(256, 32)": Chunked(256, 32)}


def models(cell: str, hidden: int) -> dict[str, nn.Module]:
    """The same weights under each plan, and in torch's module."""
    made: dict[str, nn.Module] = {}
    ours, theirs = CELLS[cell]
    for name, plan in {"Scanned()": Scanned(), **PLANS}.items():
        m = ours(hidden, hidden, stability=Cascade(GROUPS, forget=0.999999), plan=plan, backend="cpu")
        m.stability = None
        made[name] = m
    made["nn"] = theirs(hidden, hidden)
    for m in made.values():
        m.load_state_dict(made["Scanned()"].state_dict())
    return made


def call(m: nn.Module, x: torch.Tensor, backward: bool) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            m(x)

    def both() -> None:
        m.zero_grad()
        m(x)[0].sum().backward()

    return both if backward else forward


def measure(cell: str, steps: int, batch: int, hidden: int, backward: bool, rounds: int) -> dict:
    x = torch.randn(steps, batch, hidden)
    runs = {name: call(m, x, backward) for name, m in models(cell, hidden).items()}
    for run in runs.values():
        run()
    times = [{name: clock(run) for name, run in runs.items()} for _ in range(rounds)]
    row = {"cell": cell, "T": steps, "B": batch, "H": hidden, "passes": "forward+backward" if backward else "forward"}
    row["ms"] = 1e3 * statistics.median(t["Scanned()"] for t in times)
    for name in runs:
        if name != "Scanned()":
            ratios = sorted(t[name] / t["Scanned()"] for t in times)
            row[name] = [statistics.median(ratios), ratios[0], ratios[-1]]
    return row


def shown(row: dict) -> str:
    what = f"| {row['cell']} B={row['B']} H={row['H']} T={row['T']} {row['passes']} | {row['ms']:.3g} |"
    others = (row[name] for name in (*PLANS, "nn"))
    return what + "".join(f" {a:.2f} ({b:.2f} … {c:.2f}) |" for a, b, c in others)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    try:
        log = Log(options.out, {"what": "benchmarks.cascades", "groups": GROUPS, "environment": environment(["cpu"])})
    except UserError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    print("| case | Scanned(), ms | over " + " | over ".join([*PLANS, "torch.nn"]) + " |")
    print("|---" * (3 + len(PLANS)) + "|")
    for cell, size, backward in product(CELLS, SIZES, (False, True)):
        row = measure(cell, *size, backward, options.rounds)
        log.add(row)
        print(shown(row), flush=True)


if __name__ == "__main__":
    main()
