"""The `cpu` backend: `csrc/cpu/kernels/spectral.cpp`, for float32 and bfloat16 matrices, all of them in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..kernel_args import CPU_DTYPES, DTYPES

BLOCK = 16  # SPECTRAL_BLOCK of spectral.h


def can_run(matrices: list[Tensor], blocks: list[Tensor]) -> tuple[bool, str]:
    if _native.lib is None:
        return False, f"the compiled module is missing ({_native.reason})"
    for W, X in zip(matrices, blocks):
        if W.device.type != "cpu":
            return False, f"the compiled kernels run on the CPU, a matrix is on {W.device}"
        if W.dtype not in CPU_DTYPES:
            return False, f"the compiled kernels take float32 and bfloat16, not {W.dtype}"
        if X.shape[1] > BLOCK or X.dtype != torch.float32 or not X.is_contiguous():
            return False, f"the compiled kernels take contiguous float32 blocks of at most {BLOCK} vectors"
    return True, ""


def table(matrices: list[Tensor], blocks: list[Tensor]) -> Tensor:
    """The fields of `SpectralMatrix`, a row for each matrix."""
    return torch.tensor(
        [
            (DTYPES[W.dtype], *W.shape, W.stride(0), X.shape[1], W.data_ptr(), X.data_ptr())
            for W, X in zip(matrices, blocks)
        ],
        dtype=torch.int64,
        device="cpu",
    )


def spectral_step(
    matrices: list[Tensor],
    blocks: list[Tensor],
    bounds: list[float],
    fresh: int,
    scale: bool,
    iterations: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """As `reference.spectral_step`."""
    dense = [W if W.shape[1] <= 1 or W.stride(1) == 1 else W.contiguous() for W in matrices]
    shapes = table(dense, blocks)
    limits = torch.tensor(bounds, dtype=torch.float64, device="cpu")
    norms = torch.empty(len(dense), dtype=torch.float64, device="cpu")
    near = torch.empty(len(dense), dtype=torch.int64, device="cpu")
    _native.lib.spectral_step(
        torch.get_num_threads(),
        scale,
        iterations,
        fresh,
        seed & (2**64 - 1),
        len(dense),
        shapes.data_ptr(),
        limits.data_ptr(),
        norms.data_ptr(),
        near.data_ptr(),
    )
    for W, copy, norm in zip(matrices, dense, norms.tolist()):
        if norm != norm:
            raise ValueError(f"a matrix of shape {tuple(W.shape)} holds NaN or infinite values")
        if copy is not W:
            W.copy_(copy)
        elif not W.is_inference():  # inference tensors have no version
            torch.autograd.graph.increment_version(W)  # so that a backward through the old values raises
    return norms, near
