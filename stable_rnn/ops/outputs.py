"""What ops give back."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fresh(inputs: Sequence[Tensor | None], *outputs: Tensor) -> tuple[Tensor, ...]:
    """Row-major outputs, none of them an input or another output: what an op has to give, and its fake tells from shapes alone."""
    seen, made = {id(t) for t in inputs}, []
    for t in outputs:
        made.append(t if _row_major(t) and id(t) not in seen else t.clone(memory_format=torch.contiguous_format))
        seen.add(id(t))
    return tuple(made)


def _row_major(t: Tensor) -> bool:
    """As `torch.empty` lays it out. `is_contiguous` asks nothing of the strides of dimensions of size 1, compiled graphs do."""
    step = 1
    for size, stride in zip(t.shape[::-1], t.stride()[::-1]):
        if stride != step:
            return False
        step *= max(size, 1)
    return True
