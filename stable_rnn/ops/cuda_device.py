"""What the compiled CUDA kernels of every op have in common: their module, and what they ask about a device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _native

lib: Any = _native.lib if hasattr(_native.lib, "recurrence_forward_cuda") else None


def missing() -> str:
    """Why there are no CUDA kernels, or nothing."""
    if lib is not None:
        return ""
    return (
        "the compiled module has no CUDA kernels"
        if _native.lib
        else f"the compiled module is missing ({_native.reason})"
    )


def on_gpu(t: Tensor) -> bool:
    """Whether t lies where the kernels can reach it."""
    return t.device.type == "cuda"


def stream(index: int) -> int:
    """torch's current stream on a device."""
    return torch._C._cuda_getCurrentRawStream(index)


@cache
def limits(index: int) -> tuple[tuple[int, ...] | None, str]:
    """((arch, sms, shared bytes of a block, largest cluster), ""), or None and the reason: no driver, too old, an unknown device."""
    try:
        return tuple(lib.cuda_limits(index)), ""
    except RuntimeError as error:
        return None, str(error)


def clock(index: int) -> float:
    """The highest clock of a device's multiprocessors, in Hz."""
    return lib.cuda_clock(index)
