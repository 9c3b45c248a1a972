"""`project_after_step`: keep a model's stable modules in their sets while it trains."""

from __future__ import annotations

import torch
from torch import nn

from .stability import Stability


def project_after_step(optimizer: torch.optim.Optimizer, model: nn.Module, certify: bool = False) -> torch.utils.hooks.RemovableHandle:
    """After each `optimizer.step()`, project every module in `model` that has a stable set, the model itself included.

    By default the cheap uncertified step runs; call `module.project_()` once training is over, or pass certify=True, to have the
    certificate. Modules are looked up now; a set that a module is given or loses later counts at once, and so does freezing: a module
    is skipped while none of the weights that its projection writes requires grad. Returns a handle whose `remove()` ends it.

    Raises TypeError if `optimizer` or `model` is not one, ValueError if no module in `model` has a stable set, or if a weight to project
    is computed from other parameters (a parametrization, weight norm)."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"project_after_step: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"project_after_step: model must be an nn.Module, got {type(model).__name__}")
    stable = [module for module in model.modules() if isinstance(getattr(module, "stability", None), Stability)]
    if not stable:
        raise ValueError(f"project_after_step: {type(model).__name__} holds no module with a stable set (stability=None everywhere)")

    def trained(module: nn.Module) -> bool:
        return any(getattr(module, name).requires_grad for name in module.stability.projected_names(module))

    for module in stable:
        trained(module)  # raises for computed weights

    def project(*_: object) -> None:
        for module in stable:
            if module.stability is not None and trained(module):
                module.stability.project_(module, certify=certify)

    return optimizer.register_step_post_hook(project)
