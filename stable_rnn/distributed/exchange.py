"""What ranks send each other: three calls of `torch.distributed`, one of them differentiable, and an agreement before them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather(t: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's t: (R, *t.shape)."""
    found = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(found, t.contiguous(), group=group)
    return torch.stack(found)


class Exchange(torch.autograd.Function):
    """Rows of x (sum of sends, F), so many for each rank, in their order -> the rows received, likewise. Gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, sends: list[int], receives: list[int], x: Tensor) -> Tensor:
        ctx.way = group, receives, sends
        found = x.new_empty(sum(receives), x.shape[1])
        dist.all_to_all_single(found, x.contiguous(), receives, sends, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[None, None, None, Tensor]:
        return None, None, None, Exchange.apply(*ctx.way, given)


class Joined(torch.autograd.Function):
    """y (T, B, F) as it is, and final states on every rank: h (K, B, P), c (K, B, H) of the rank whose `own` (K, B) says that they are its.

    All at once, so that a rank whose loss needs one of the three alone meets the others in the backward pass, where it hands the owner
    what it makes of the states. That pass is the transposed, `back`, whose own backward pass is the first again."""

    @staticmethod
    def forward(
        ctx: Any, group: ProcessGroup, own: Tensor, back: bool, y: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.way = group, own, not back
        return y.clone() if any(ctx.needs_input_grad) else y, *_summed(group, own, back, h, c)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor, dc: Tensor) -> tuple:
        return None, None, None, *Joined.apply(*ctx.way, dy, dh, dc)


def _summed(group: ProcessGroup, own: Tensor, back: bool, h: Tensor, c: Tensor) -> list[Tensor]:
    """The owner's h and c on every rank; `back`: every rank's, added up, on the owner's."""
    masked = lambda t: torch.where(own[..., None], t, 0) if t.numel() else t.clone()  # noqa: E731
    parts = [t for t in (h, c) if t.numel()]
    if not parts:
        return [h.clone(), c.clone()]
    total = torch.cat([(t if back else masked(t)).flatten() for t in parts])
    dist.all_reduce(total, group=group)
    sums = iter(total.split([t.numel() for t in parts]))
    found = [(next(sums).view(t.shape) if t.numel() else t).clone() for t in (h, c)]  # views could not be written to
    return [masked(t) for t in found] if back else found


def agree(
    group: ProcessGroup, device: torch.device, steps: int, facts: dict[str, Any], error: Exception | None
) -> list[int]:
    """Every rank's `steps`, if none has an error and all have the same facts. Else this raises on all of them: the own error, or
    `ValueError` with that of the first rank that has one, or with the facts that differ."""
    digest = int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=8).digest(), "big", signed=True)
    said = gather(torch.tensor([error is None, steps, digest], device=device), group).tolist()
    if all(fine and same == digest for fine, _, same in said):
        return [each for _, each, _ in said]
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, (facts, None if error is None else f"{type(error).__name__}: {error}"), group=group)
    if error is not None:
        raise error
    for rank, (_, text) in enumerate(told):
        if text is not None:
            raise ValueError(f"sequence_parallel: rank {rank} of the group raised {text}")
    differ = [name for name in facts if len({repr(theirs[name]) for theirs, _ in told}) > 1]
    each = "; ".join(
        f"rank {r}: " + ", ".join(f"{n} {theirs[n]}" for n in differ) for r, (theirs, _) in enumerate(told)
    )
    raise ValueError(
        f"sequence_parallel: the ranks of the group have to be given the same, but for their times; {each}"
    )
