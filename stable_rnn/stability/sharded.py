"""Weights whose parts lie on several ranks, as `fully_shard` (FSDP2) and tensor parallelism leave them: DTensors.

All of this is collective: every rank of a weight's mesh makes the same calls in the same order."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

GATHER = (
    "FSDP1 and ZeRO-3 hold parts of their own kind: gather them around the call (FullyShardedDataParallel.summon_full_params, "
    "deepspeed.zero.GatheredParameters), or shard with torch.distributed.fsdp.fully_shard"
)


def is_sharded(w: Tensor) -> TypeGuard[DTensor]:
    return hasattr(w, "placements")


def whole(w: Tensor) -> Tensor:
    """All of a weight, on every rank the same; a plain tensor is itself."""
    return w.full_tensor() if is_sharded(w) else w


def store(w: DTensor, value: Tensor) -> None:
    """Each rank its part of `value`, which is the first rank's: two machines need not round alike, and parts of two results are none."""
    from torch.distributed.tensor import distribute_tensor

    w.to_local().copy_(distribute_tensor(value, w.device_mesh, w.placements).to_local())


def check_kept(module: nn.Module, name: str, w: Tensor) -> None:
    """ValueError for a weight where what is written would be lost."""
    if is_sharded(w) and any(placement.is_partial() for placement in w.placements):
        raise ValueError(
            f"project_: {name} has the placements {w.placements}, and a sum of parts cannot be written; redistribute it to "
            "Replicate() or Shard(...)"
        )
    if getattr(module, "_is_fsdp_managed_module", False) and _is_lent(w):
        raise ValueError(
            f"project_: {name} is the gathered copy that fully_shard lends for a pass, and what is written to it is lost; "
            "call reshard() of the FSDP module before"
        )


def _is_lent(w: Tensor) -> bool:
    """fully_shard puts other parameters in the place of a module's own until it reshards; only its private state knows them."""
    from torch.distributed import _composable_state

    for state in getattr(_composable_state, "_module_state_mapping", {}).values():
        state = state() if isinstance(state, weakref.ref) else state
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for held in (held for group in groups for held in getattr(group, "fsdp_params", ())):
            if any(w is getattr(held, copy, None) for copy in ("_unsharded_param", "_sharded_post_forward_param")):
                return True
    return False
