"""Interleaved timing: contestants take turns within one process, so that a machine's drift meets all of them alike."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Time(NamedTuple):
    median: float  # seconds
    low: float  # fastest round
    high: float  # slowest round


def race(contestants: dict[str, Callable[[], object]], seconds: float = 2.0, rounds: int = 9) -> dict[str, Time]:
    """Median, fastest and slowest time per call of each contestant over `rounds` turns that share about `seconds` in all."""
    calls = {}
    for name, run in contestants.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(seconds / rounds / len(contestants) / max(time.perf_counter() - start, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            found[name].append((time.perf_counter() - start) / calls[name])
    return {name: Time(statistics.median(t), min(t), max(t)) for name, t in found.items()}
