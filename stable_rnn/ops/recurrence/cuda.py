"""The `cuda` backend: the compiled kernels of `csrc/cuda/`, on float32, float16 and bfloat16 tensors (see `params.h`, `cuda.h`).

float32 products are exact float32 unless torch's switch for matrix products allows TF32 (`torch.set_float32_matmul_precision("high")`).
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from ... import _native
from ...cells import CELLS, of_code
from ...precision import tf32_allowed
from . import windows
from .compiled import DTYPES, TF32, Kernels
from .problem import Problem

DEVICE = "cuda"
lib = _native.lib if hasattr(_native.lib, "recurrence_forward_cuda") else None
PLACES = ("registers", "shared memory", "L2")


def can_run(p: Problem | None, x: Tensor, w_hh: Tensor | None = None, w_hr: Tensor | None = None) -> tuple[bool, str]:
    if lib is None:
        return False, "the compiled module has no CUDA kernels" if _native.lib else f"the compiled module is missing ({_native.reason})"
    if x.device.type != DEVICE:
        return False, f"the CUDA kernels run on CUDA devices, the tensors are on {x.device}"
    if x.dtype not in DTYPES:
        return False, f"the CUDA kernels take float32, float16 and bfloat16, not {x.dtype}"
    if w_hr is not None:
        return False, "the CUDA kernels have no projected states (proj_size)"
    limits, reason = device_limits(x.device.index or 0)
    if limits is None:
        return False, reason
    if limits[0] < 80:
        return False, "the CUDA kernels need sm_80 or newer (A100)"
    if p is None or w_hh is None:
        return True, ""
    for backward in (False, True):
        message = plan(limits, backward, p.cell, code(x), w_hh.shape[0] // p.spec.gates, 1)["message"]
        if message:
            return False, message
    return True, ""


@cache
def device_limits(index: int) -> tuple[tuple[int, ...] | None, str]:
    """((arch, sms, shared bytes of a block, largest cluster), ""), or None and the reason: no driver, too old, an unknown device."""
    try:
        return tuple(lib.cuda_limits(index)), ""
    except RuntimeError as error:
        return None, str(error)


@lru_cache(maxsize=256)  # one for each length of a batch
def plan(limits: tuple[int, ...], backward: bool, cell: str, dtype: int, hidden: int, entries: int) -> dict:
    """How a shape runs on a device with these limits: the fields of `CudaPlan`."""
    return lib.recurrence_plan_cuda(backward, CELLS[cell].code, dtype, hidden, hidden, entries, limits)


def describe(limits: tuple[int, ...], backward: bool, cell: str, dtype: int, hidden: int, entries: int) -> str:
    """A plan in words."""
    found = plan(limits, backward, cell, dtype, hidden, entries)
    if found["message"]:
        return found["message"]
    blocks, through = found["blocks"], "in a cluster" if found["cluster"] > 1 else "that meet through L2"
    team = "one block" if blocks == 1 else f"{blocks} blocks {through}"
    return (f"{found['teams']} x {team} of {found['warps']} warps, {found['units']} units a block, {found['lanes']} lanes a tile, "
            f"W in {PLACES[found['place']]}, {found['shared_bytes'] / 1024:.0f} KB shared")


def code(x: Tensor) -> int:
    """The `DType` of x."""
    return TF32 if x.dtype == torch.float32 and tf32_allowed() else DTYPES[x.dtype]


def _make(like: Tensor, zero: bool, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_zeros(shape, dtype=dtype) if zero else like.new_empty(shape, dtype=dtype)


def _entry(backward: bool) -> Callable:
    """The kernel with its device, torch's stream and a workspace behind the fields."""

    def run(*fields):
        cell, dtype, _, hidden, _, _, steps, batch, _, stride = fields[:10]
        selected, chosen = fields[13:15]
        entries = chosen if selected else -(-steps // stride) * batch
        index = torch.cuda.current_device() if DEVICE == "cuda" else 0
        need = plan(device_limits(index)[0], backward, of_code(cell).name, dtype, hidden, entries)
        work = torch.empty(need.get("workspace_bytes", 0), dtype=torch.uint8, device=DEVICE)
        stream = torch._C._cuda_getCurrentRawStream(index) if DEVICE == "cuda" else 0
        kernel = lib.recurrence_backward_cuda if backward else lib.recurrence_forward_cuda
        kernel(*fields, index, stream, work.data_ptr(), work.nbytes)

    return run


_kernels = Kernels(_entry(False), _entry(True), code, _make)


def _on_device(run: Callable) -> Callable:
    """torch's current device is that of the tensors while `run` allocates and launches."""

    def guarded(x: Tensor, *rest, **named):
        if DEVICE != "cuda" or x.device.index == torch.cuda.current_device():
            return run(x, *rest, **named)
        with torch.cuda.device(x.device):
            return run(x, *rest, **named)

    return guarded


forward, backward = _on_device(_kernels.forward), _on_device(_kernels.backward)


class _This:
    forward, backward = staticmethod(forward), staticmethod(backward)


windowed_backward = _on_device(partial(windows.windowed_backward, _This))
