"""Notices a module that promises a certified set of weights and is trained without being projected into it.

The first forward pass in training mode notes the versions of the weights; a projection, or weights that are loaded, forget them again.
Versions that have moved when the module leaves training mode are the optimizer's; fused and compiled optimizers move weights and not
their versions, `fully_shard` puts other parameters in the place of the module's for a forward pass: these are not seen. Nothing is read
from a device, and the notes are no part of the module: state dicts, copies and pickles don't hold them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

if TYPE_CHECKING:
    from .bookkeeping import Bookkeeping

# id and version by name: torch swaps no tensor (swap_module_params_on_conversion) to which there is a weak reference
_noted: WeakKeyDictionary[nn.Module, dict[str, tuple[int, int]]] = WeakKeyDictionary()
_told: WeakSet[nn.Module] = WeakSet()


def trains(module: Bookkeeping) -> None:
    """A forward pass in training mode. Compiled ones are not seen."""
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or module.stability is None
        or module.stability.rate is None
        or module.stability.lasts
    ):
        return
    if module not in _noted and not torch._C._are_functorch_transforms_active():
        weights = {
            name: w for name, w in module._parameters.items() if isinstance(w, nn.Parameter) and not w.is_inference()
        }
        _noted[module] = {name: (id(w), w._version) for name, w in weights.items()}


def settled(*modules: nn.Module) -> None:
    """Their weights were projected, are looked after, or come from elsewhere."""
    for module in modules:
        _noted.pop(module, None)


def leaves_training(module: Bookkeeping) -> None:
    """On the way to eval mode: says, once a module, that the optimizer has moved weights which no projection has seen."""
    moved = {
        name
        for name, (number, version) in _noted.get(module, {}).items()
        if (w := module._parameters.get(name)) is not None and id(w) == number and w._version > version
    }
    stability = module.stability
    if not moved or stability is None or stability.rate is None or module in _told:
        return
    try:
        written = stability.projected_names(module)
    except ValueError:  # computed weights: no projection can reach them
        return
    if not moved.isdisjoint(written):
        _told.add(module)
        warnings.warn(
            f"{type(module).__name__} was trained and not projected since, so its weights may have left {stability}: "
            "project_after_step(optimizer, model) keeps them inside, module.project_() brings them back, module.certificate() "
            "tells",
            stacklevel=4,
        )
