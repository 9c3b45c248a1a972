"""Interleaved timing: contestants take turns within one process, so that a machine's drift meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Time(NamedTuple):
    median: float  # seconds
    low: float  # fastest round
    high: float  # slowest round


def clock(run: Callable[[], object], calls: int = 1, device: str = "cpu") -> float:
    """Seconds per call: by the host's clock, on a GPU between two events of its stream, with nothing else queued.

    Calls follow each other, so caches are as warm as they are in a loop: the L2 of a GPU is not flushed between them."""
    if device == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(calls):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def race(
    contestants: Mapping[str, Callable[[], object]],
    seconds: float = 2.0,
    rounds: int = 9,
    device: str = "cpu",
    known: Mapping[str, float] | None = None,
) -> dict[str, Time]:
    """Median, fastest and slowest time per call of each contestant over `rounds` turns (A B A B ...) that share about `seconds`.

    `known`: seconds per call of contestants that are warm already; the others are warmed up and timed once first."""
    known, calls = known or {}, {}
    for name, run in contestants.items():
        if name not in known:
            run()
        guess = known[name] if name in known else clock(run, 1, device)
        calls[name] = max(1, round(seconds / rounds / len(contestants) / max(guess, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            found[name].append(clock(run, calls[name], device))
    return {name: Time(statistics.median(t), min(t), max(t)) for name, t in found.items()}
