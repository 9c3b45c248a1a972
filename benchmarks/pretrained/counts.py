"""How many passes `Verified` takes on each layer, with each of its corrections, as a GPU would run it: many lanes of `chunk` steps."""

from __future__ import annotations

import torch
from torch import nn

from stable_rnn import Recurrent, Verified, stabilize, use_plan

from . import deer
from .networks import Layer

CHUNK, WARMUP, MOST, TOL = 256, 32, 16, 2e-6
MOST_STEPS = 64  # passes of the single steps
METHODS = ("none", "decay", "probes", "quasi-DEER")


@torch.no_grad()
def count(layer: Layer, method: str) -> int | None:
    """Passes of a method until all borders (quasi-DEER: all states) agree to TOL; None: not within MOST (MOST_STEPS)."""
    if method == "quasi-DEER":
        with torch.enable_grad():
            return deer.passes(layer.module, layer.x, TOL, MOST_STEPS)
    module = stabilized(layer)
    with use_plan(module, Verified(tol=TOL, chunk=CHUNK, warmup=WARMUP, max_passes=MOST, correct=method)):
        module(layer.x)
    report = module.last_report
    return None if report.fallback else report.passes


def stabilized(layer: Layer) -> nn.Module:
    """The layer as one of ours, with its weights as they are."""
    copy = type(layer.module)(layer.module.input_size, layer.module.hidden_size, bias=layer.module.bias)
    copy.load_state_dict(layer.module.state_dict())
    return stabilize(copy.eval(), plan=Recurrent())


def row(layer: Layer) -> dict:
    found = {method: count(layer, method) for method in METHODS}
    kind = type(layer.module).__name__.lower()
    about = dict(package=layer.package, version=layer.version, network=layer.network, layer=layer.layer, cell=kind)
    return about | dict(hidden=layer.module.hidden_size, steps=len(layer.x), chunk=CHUNK, passes=found)


def table(rows: list[dict]) -> str:
    lines = [f"| network | layer | cell, H | {' | '.join(METHODS)} |", "|---|---|---|" + "---|" * len(METHODS)]
    for r in rows:
        passes = " | ".join("-" if r["passes"][m] is None else str(r["passes"][m]) for m in METHODS)
        lines.append(f"| {r['package']}: {r['network']} | {r['layer']} | {r['cell']}, {r['hidden']} | {passes} |")
    return "\n".join(lines)
