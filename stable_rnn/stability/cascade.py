"""Cascades: the units of a layer in groups, each of which reads the groups before it, and itself through its forget gate alone. Every W_hh
of that shape is inside, so that the projection sets entries to 0 and moves no other. Why such layers forget is in README.md."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.spectral.later import on_gpu
from .cells import STABILITY
from .projection import checked_weights, store_sharded, warm_of, writable_names
from .weights import named_weights, once, recurrent


def borders(hidden: int, groups: int) -> list[int]:
    """Where the groups begin, and `hidden`: sizes as `torch.tensor_split` makes them; no more groups than units."""
    size, larger = _sizes(hidden, groups)
    return [g * size + min(g, larger) for g in range(min(groups, hidden) + 1)]


def _sizes(hidden: int, groups: int) -> tuple[int, int]:
    """The units of a group, and how many of the first groups have one more."""
    return divmod(hidden, max(1, min(groups, hidden)))


def readable(hidden: int, groups: int, device: torch.device) -> Tensor:
    """(H, H) bool: whether the unit of a row may read that of a column, whose group has to come before."""
    size, larger = _sizes(hidden, groups)
    unit, in_larger = torch.arange(hidden, device=device), larger * (size + 1)
    group = torch.where(unit < in_larger, unit // (size + 1), (unit - in_larger) // size + larger)
    return group[:, None] > group


def readable_trains(w_hh: Tensor, hidden: int, groups: int) -> Tensor:
    """W_hh (G*H, H) itself, bit by bit; entries that no unit may read get no gradient."""
    if not hidden:
        return w_hh
    gates = w_hh.unflatten(0, (-1, hidden))
    return torch.where(readable(hidden, groups, w_hh.device), gates, gates.detach()).flatten(0, 1)


def default_forget(cell: str) -> float:
    return STABILITY[cell].cascade_forget


def cascade_names(module: nn.Module) -> list[str]:
    """The names of the weights that `into_cascade_` may write. ValueError if one of them cannot be written, as `project_` says."""
    recurrent(module)
    if getattr(module, "proj_size", 0):
        raise ValueError(
            f"project_: a cascade has no form for proj_size={module.proj_size}, whose W_hr mixes the units of all groups; "
            "use Certified(...)"
        )
    return writable_names(module, ("weight_hh",))


@torch.no_grad()
def into_cascade_(module: nn.Module, names: list[str], groups: int, certify: bool) -> None:
    """W_hh of every gate, layer and direction (`names`) into the set, in place: exactly, and bitwise untouched where it is inside. Raises,
    gathers and waits as `project_` does."""
    module, _ = recurrent(module)
    if not module.hidden_size:
        return
    held = named_weights(module)
    weights = checked_weights(held, None if certify else warm_of(module).look)
    hidden = module.hidden_size
    matrices = once(weights[name] for name in names)
    outside = ~readable(hidden, groups, matrices[0].device)
    gates = [w.unflatten(0, (-1, hidden)) for w in matrices]
    if on_gpu(matrices):  # a GPU would have to be waited for
        over = [True] * len(gates)
    else:
        over = torch.stack([(w.ne(0) & outside).any() for w in gates]).tolist()
    for w, moves in zip(gates, over):
        if moves:
            w.masked_fill_(outside, 0)
    store_sharded(held, names, weights)
