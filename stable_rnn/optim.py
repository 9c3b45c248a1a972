"""`project_after_step`: keep a model's stable modules in their sets while it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ._numbers import to_int
from .stability import Stability, project_all_
from .watch import settled

# Wrappers that are known to move no weight after the step of the optimizer inside, in which the hook runs
TRANSPARENT = {
    "accelerate.optimizer.AcceleratedOptimizer",
    "lightning.fabric.wrappers._FabricOptimizer",
    "lightning.pytorch.core.optimizer.LightningOptimizer",
    "lightning_fabric.wrappers._FabricOptimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer",
}


def project_after_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, certify: bool = False, every: int = 1
) -> torch.utils.hooks.RemovableHandle:
    """After each `optimizer.step()`, or each `every`-th one, project every module in `model` that has a stable set, itself included.

    By default the cheap uncertified step runs; call `module.project_()` once training is over, or pass certify=True, to have the
    certificate. With every > 1 the weights wander outside in between: that saves time, and costs accuracy where the optimizer's steps are
    large (characters, LSTM of 128 units, Adam at 0.01: 0.006 bits with 2, 0.03 with 4). Modules are looked up now; a set that a module is
    given or loses later counts at once, and so does freezing: a module is skipped while none of the weights that its projection writes
    requires grad. With certify=True modules that share weights are projected in turn until all are in their sets.

    Returns a handle whose `remove()` ends it. It is a step hook of this very optimizer: `load_state_dict`, schedulers and GradScaler keep
    it (a step that the scaler skips is followed by no projection), but copies and pickles of the optimizer don't have it; call this again
    for those. A closure that is evaluated several times within one step, as by LBFGS, sees weights that are not yet projected. With
    `fully_shard` or DDP register it on every rank; sharded weights are gathered after each step.

    Optimizers as accelerate and Lightning wrap them are taken for the one inside.

    Raises TypeError if `optimizer` or `model` is not one, if that optimizer runs no step hooks (its own `__init__` doesn't call torch's),
    or `every` is no int; ValueError if `every` is below 1, if no module in `model` has a stable set, or if a weight to project is computed
    from other parameters (a parametrization, weight norm), is a part that FSDP1 or ZeRO-3 made, or cannot be written for another of the
    reasons that `Certified.project_` has."""
    optimizer = _hooked(optimizer)
    if not isinstance(model, nn.Module):
        raise TypeError(f"project_after_step: model must be an nn.Module, got {type(model).__name__}")
    every = to_int("project_after_step: every", every, 1)
    stable = [module for module in model.modules() if isinstance(getattr(module, "stability", None), Stability)]
    if not stable:
        raise ValueError(
            f"project_after_step: {type(model).__name__} holds no module with a stable set (stability=None everywhere)"
        )

    def trained(module: nn.Module) -> bool:
        stability: Stability | None = getattr(module, "stability", None)
        return stability is not None and any(
            getattr(module, name).requires_grad for name in stability.projected_names(module)
        )

    for module in stable:
        trained(module)  # raises for computed weights

    steps = 0

    def project(*_: object) -> None:
        nonlocal steps
        steps += 1
        settled(*stable)
        if steps % every == 0:
            project_all_([module for module in stable if trained(module)], certify)

    return optimizer.register_step_post_hook(
        torch.compiler.disable(project)
    )  # a compiled step would trace and guard all of it


def _hooked(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose step runs the hook: itself, or what a transparent wrapper holds. TypeError if there is none."""
    while any(f"{kind.__module__}.{kind.__qualname__}" in TRANSPARENT for kind in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        reason = f"optimizer must be a torch.optim.Optimizer, got {kind}"
    elif not hasattr(optimizer, "_optimizer_step_post_hooks") or not getattr(type(optimizer).step, "hooked", False):
        reason = f"{kind} runs no step hooks, since its __init__ does not call torch's"
    else:
        return optimizer
    for name in ("optimizer", "optim", "_optimizer"):
        inner = getattr(optimizer, name, None)
        if isinstance(inner, torch.optim.Optimizer):
            reason += (
                f"; pass the {type(inner).__name__} that it holds (.{name}) if {kind} moves no weight after its step, else call "
                "module.project_(certify=False) after each step"
            )
    raise TypeError(f"project_after_step: {reason}")
