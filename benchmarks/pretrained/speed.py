"""Each layer under our `Recurrent()` and `Verified()` beside torch's own module, taking turns; a first call with fresh modules too."""

from __future__ import annotations

import time
from statistics import median

import torch

from stable_rnn import Verified

from ..timing import race
from .counts import stabilized
from .networks import Layer

FIRST = 5  # fresh modules, for the price of a first call


@torch.no_grad()
def row(layer: Layer, seconds: float) -> dict:
    """Seconds of a forward pass over (T, 1, I), the ratios (above 1: Verified is faster), and what Verified did."""
    plain, checked = stabilized(layer), stabilized(layer)
    checked.plan = Verified()
    layer.module.eval()
    found = race(
        {
            "torch": lambda: layer.module(layer.x),
            "recurrent": lambda: plain(layer.x),
            "verified": lambda: checked(layer.x),
        },
        seconds=seconds,
        rounds=7,
    )
    firsts = []
    for _ in range(FIRST):
        fresh = stabilized(layer)
        fresh.plan = Verified()
        firsts.append(_seconds(fresh, layer.x) / _seconds(plain, layer.x))
    kind = type(layer.module).__name__.lower()
    return dict(
        package=layer.package,
        version=layer.version,
        network=layer.network,
        layer=layer.layer,
        cell=kind,
        hidden=layer.module.hidden_size,
        steps=len(layer.x),
        threads=torch.get_num_threads(),
        seconds={name: [round(t, 6) for t in times] for name, times in found.items()},
        over_torch=round(found["torch"].median / found["verified"].median, 3),
        over_recurrent=round(found["recurrent"].median / found["verified"].median, 3),
        first_call=round(median(firsts), 3),
        report=str(checked.last_report),
        fallback=checked.last_report.fallback,
    )


def _seconds(module, x) -> float:
    begin = time.perf_counter()
    module(x)
    return time.perf_counter() - begin


def table(rows: list[dict]) -> str:
    lines = [
        "| network | layer | cell, H | Verified over torch | over Recurrent | first call, of a Recurrent | what ran |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ran = "lanes" if not r["fallback"] else "plain"
        lines.append(
            f"| {r['package']}: {r['network']} | {r['layer']} | {r['cell']}, {r['hidden']} | {r['over_torch']:.2f}x | "
            f"{r['over_recurrent']:.2f}x | {r['first_call']:.2f} | {ran} |"
        )
    return "\n".join(lines)
