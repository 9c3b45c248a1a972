"""What compiled kernels take for tensors: codes of dtypes, and addresses of row-major memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `enum DType`; TF32 is asked for by number
TF32 = 3
BF16_WEIGHTS = 5  # of the kernels of the CPU: float32 with state weights in bfloat16
BF16X3 = 6  # likewise: float32 as three products of bfloat16
CPU_DTYPES = (torch.float32, torch.bfloat16)  # that the kernels of the CPU take
_NUMBERS = frozenset((int, float, bool))


def at(t: Tensor | None) -> int:
    """The address of a tensor's values; 0, which kernels take for an absent tensor, for None alone and for tensors without elements."""
    address = 0 if t is None else t.data_ptr()
    if not address and t is not None and t.numel():
        raise RuntimeError(
            f"a tensor of shape {tuple(t.shape)} has no memory: its storage was freed, as FSDP does between uses"
        )
    return address


def addresses(fields: Iterable[Any]) -> list[Any]:
    """The fields of a call: numbers as they are, the addresses of tensors, 0 for None."""
    # `at` without most of its calls
    return [0 if x is None else x if type(x) in _NUMBERS else x.data_ptr() or x.numel() and at(x) for x in fields]


def dense(*tensors: Tensor | None) -> list[Any]:
    """Row by row in memory, with the values that are read there (a negative view of torch's holds the others)."""
    return [None if t is None else t.resolve_neg().contiguous() for t in tensors]


def rows_like(t: Tensor) -> Tensor:
    """Memory for what a kernel writes row by row. (`empty_like` alone keeps the strides of a transposed tensor.)"""
    return torch.empty_like(t, memory_format=torch.contiguous_format)
