"""The `cuda` backend: `csrc/cuda/spectral.cu`, for float32, bfloat16 and float16 matrices on a GPU, all of them in one launch.

Nothing waits for the device: what a step finds (norms, NaN where a matrix is not finite and was left alone) stays there.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from .. import cuda_device
from ..kernel_args import DTYPES
from .native import BLOCK


def can_run(matrices: list[Tensor], blocks: list[Tensor]) -> tuple[bool, str]:
    reason = cuda_device.missing()
    if reason:
        return False, reason
    for W, X in zip(matrices, blocks):
        if not cuda_device.on_gpu(W):
            return False, f"the CUDA kernels run on CUDA devices, a matrix is on {W.device}"
        if W.device != matrices[0].device or X.device != W.device:
            return False, f"the CUDA kernels take matrices of one device, not of {matrices[0].device} and {W.device}"
        if W.dtype not in DTYPES:
            return False, f"the CUDA kernels take float32, bfloat16 and float16, not {W.dtype}"
        if X.shape[1] > BLOCK or X.dtype != torch.float32 or not X.is_contiguous():
            return False, f"the CUDA kernels take contiguous float32 blocks of at most {BLOCK} vectors"
    if not matrices:
        return True, ""
    limits, reason = cuda_device.limits(matrices[0].device.index or 0)
    if limits is None:
        return False, reason
    if _workspace(matrices, blocks, limits) < 0:
        columns = max(W.shape[1] for W in matrices)
        return (
            False,
            f"{columns} columns are too many for the {limits[2] // 1024} KB of shared memory that a block has on this GPU",
        )
    return True, ""


def _workspace(matrices: list[Tensor], blocks: list[Tensor], limits: tuple[int, ...]) -> int:
    """Bytes that a step needs on a device with these limits; -1 where it cannot run."""
    shapes = tuple((DTYPES[W.dtype], *W.shape, W.shape[1], X.shape[1], 0, 0) for W, X in zip(matrices, blocks))
    return _workspace_of(cuda_device.lib, shapes, limits)


@lru_cache(maxsize=64)
def _workspace_of(lib: ModuleType, fields: tuple[tuple[int, ...], ...], limits: tuple[int, ...]) -> int:
    shapes = torch.tensor(fields, dtype=torch.int64, device="cpu")
    return lib.spectral_workspace_cuda(len(fields), shapes.data_ptr(), limits)


@lru_cache(maxsize=64)
def _table(values: tuple, dtype: torch.dtype) -> Tensor:
    """Numbers for the launch to read; the same ones come at every optimizer step."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def spectral_step(
    matrices: list[Tensor],
    blocks: list[Tensor],
    bounds: list[float],
    fresh: int,
    scale: bool,
    iterations: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """As `reference.spectral_step`, but on the device, and with no error for a matrix that is not finite: its norm is NaN."""
    device = matrices[0].device if matrices else torch.device("cpu")
    norms = torch.empty(len(matrices), dtype=torch.float64, device=device)
    near = torch.empty(len(matrices), dtype=torch.int64, device=device)
    if not matrices:
        return norms, near
    dense = [W if W.shape[1] <= 1 or W.stride(1) == 1 else W.contiguous() for W in matrices]
    index = device.index or 0
    fields = tuple(
        (DTYPES[W.dtype], *W.shape, W.stride(0), X.shape[1], W.data_ptr(), X.data_ptr()) for W, X in zip(dense, blocks)
    )
    shapes, limits = _table(fields, torch.int64), _table(tuple(bounds), torch.float64)
    device_limits, reason = cuda_device.limits(index)
    if device_limits is None:
        raise RuntimeError(f"the CUDA kernels cannot run here: {reason}")
    work = torch.empty(_workspace(dense, blocks, device_limits), dtype=torch.uint8, device=device)
    cuda_device.lib.spectral_step_cuda(
        0,
        scale,
        iterations,
        fresh,
        seed & (2**64 - 1),
        len(dense),
        shapes.data_ptr(),
        limits.data_ptr(),
        norms.data_ptr(),
        near.data_ptr(),
        index,
        cuda_device.stream(index),
        work.data_ptr(),
        work.nbytes,
    )
    for W, copy in zip(matrices, dense):
        if copy is not W:
            W.copy_(copy)
        elif not W.is_inference():  # inference tensors have no version
            torch.autograd.graph.increment_version(W)
    return norms, near
