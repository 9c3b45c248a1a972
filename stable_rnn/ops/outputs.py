"""What ops give back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fresh(inputs: Sequence[Tensor | None], *outputs: Tensor) -> tuple[Tensor, ...]:
    """Row-major outputs, none of them an input or another output: what an op has to give, and its fake tells from shapes alone."""
    seen, made = set(map(id, inputs)), []
    for t in outputs:
        if id(t) in seen or not _row_major(t.shape, t.stride()):
            t = t.clone(memory_format=torch.contiguous_format)
        seen.add(id(t))
        made.append(t)
    return tuple(made)


def _row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """As `torch.empty` lays it out. `is_contiguous` asks nothing of the strides of dimensions of size 1, compiled graphs do."""
    if len(shape) == 2:  # as a rule, and at every step of a stream
        return strides[1] == 1 and strides[0] == (shape[1] or 1)
    step = 1
    for size, stride in zip(shape[::-1], strides[::-1]):
        if stride != step:
            return False
        step *= max(size, 1)
    return True
