"""Modules that share weights, each into its own set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

from .projection import ROUNDS, identity
from .sets import Stability
from .sharded import whole


def project_all_(modules: Sequence[nn.Module], certify: bool) -> None:
    """Each module into its own set. With certify=True those that share weights come in turn until none of them moves: ValueError if that
    takes too long, or if a module has no set."""
    sets = [(module, _set_of(module)) for module in modules]
    owners = defaultdict(list)
    for module in modules if certify else ():
        for w in module.parameters(recurse=False):
            owners[identity(w)].append(w)
    shared = [ws[0] for ws in owners.values() if len(ws) > 1]
    for _ in range(ROUNDS):
        before = [whole(w.detach()).clone() for w in shared]
        for module, stability in sets:
            stability.project_(module, certify=certify)
        if all(torch.equal(whole(w.detach()), old) for w, old in zip(shared, before)):
            return
    named = ", ".join(dict.fromkeys(str(stability) for _, stability in sets))
    raise ValueError(
        f"project_: modules that share weights don't come to rest in their sets ({named}); give them weights of their own"
    )


def _set_of(module: nn.Module) -> Stability:
    stability: Stability | None = getattr(module, "stability", None)
    if stability is None:
        raise ValueError(
            f"project_: this {type(module).__name__} has no stable set; give it one first, module.stability = Certified()"
        )
    return stability
