"""The `triton` backend: `triton_step.py`, for float32, bfloat16 and float16 matrices on a GPU, all of one dtype in one launch.

Nothing waits for the device: what a step finds (norms, NaN where a matrix is not finite and was left alone) stays there.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..kernel_args import DTYPES
from ..recurrence import triton as recurrence
from .native import BLOCK

# For Triton's compiler. Threads that hold the same element must find the same bits, as all of them store it: a sum whose products are fused
# in one thread's order and not in another's would differ. (tl.dot has its own fma, whatever is said here.)
OPTIONS = dict(num_warps=8, enable_fp_fusion=False)


def can_run(matrices: list[Tensor], blocks: list[Tensor]) -> tuple[bool, str]:
    for W, X in zip(matrices, blocks):
        able, reason = recurrence.can_run(None, W)
        if not able:
            return able, reason
        if W.device != matrices[0].device or X.device != W.device:
            return False, f"the Triton kernels take matrices of one device, not of {matrices[0].device} and {W.device}"
        if X.shape[1] > BLOCK or X.dtype != torch.float32 or not X.is_contiguous():
            return False, f"the Triton kernels take contiguous float32 blocks of at most {BLOCK} vectors"
    return True, ""


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
    norms = torch.zeros(len(matrices), dtype=torch.float64, device=device)
    near = torch.zeros(len(matrices), dtype=torch.int64, device=device)
    with torch.cuda.device_of(norms):
        for dtype in DTYPES:
            some = [i for i, W in enumerate(matrices) if W.dtype == dtype and W.numel()]
            if some:
                dense = {
                    i: W if W.shape[1] == 1 or W.stride(1) == 1 else W.contiguous()
                    for i, W in enumerate(matrices)
                    if i in some
                }
                _launch(dense, blocks, bounds, norms, near, fresh, scale, iterations, seed)
                for i, copy in dense.items():
                    if copy is not matrices[i]:
                        matrices[i].copy_(copy)
                    elif not copy.is_inference():  # inference tensors have no version
                        torch.autograd.graph.increment_version(copy)
    return norms, near


def _launch(
    dense: dict[int, Tensor],
    blocks: list[Tensor],
    bounds: list[float],
    norms: Tensor,
    near: Tensor,
    fresh: int,
    scale: bool,
    iterations: int,
    seed: int,
) -> None:
    """One launch for matrices of one dtype, given by their places."""
    from triton import language

    from . import triton_step

    fields, space, grams, most, band = [], 0, 0, 0, triton_step.BAND
    for i, W in dense.items():
        (m, n), X = W.shape, blocks[i]
        chunks, slices = -(-m // band), -(-n // band)
        fields.append((i, m, n, W.stride(0), X.shape[1], W.data_ptr(), X.data_ptr(), space, grams))
        space += 16 * (-(-chunks // 16) + n + m + chunks * n)
        grams += 2 * 256 * max(chunks, slices)
        most = max(most, chunks, slices)
    device = recurrence.device_of(norms)
    members = min(most, max(1, device.programs // len(dense)))
    table, limits = (
        _kept(values, dtype, norms.device) for values, dtype in ((fields, torch.int64), (bounds, torch.float64))
    )
    work = (
        torch.empty(space, dtype=torch.float32, device=norms.device),
        torch.empty(grams, dtype=torch.float64, device=norms.device),
        torch.zeros(len(dense), dtype=torch.int32, device=norms.device),
    )
    phases, dtype = 4 * iterations + 3, dense[next(iter(dense))].dtype
    alone, cooperative = members == 1, members > 1 and device.kind != "cpu"
    spans = [(0, phases)] if alone or cooperative else [(p, p + 1) for p in range(phases)]
    for begin, end in spans:
        triton_step.step[(len(dense) * members,)](
            table,
            limits,
            norms,
            near,
            *work,
            iterations,
            fresh,
            seed % 2**31,
            members,
            begin,
            end,
            DTYPE=getattr(language, str(dtype).removeprefix("torch.")),
            SCALE=scale,
            ALONE=alone,
            FIELDS=triton_step.FIELDS,
            BAND=triton_step.BAND,
            TILE=triton_step.TILE,
            launch_cooperative_grid=cooperative,
            **OPTIONS,
        )


_captured: dict[
    tuple, Tensor
] = {}  # what CUDA graphs will read: theirs for good, one table for all graphs of the same matrices


def _kept(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers on the device; the same ones come at every optimizer step."""
    key = tuple(values), dtype, device
    found = _captured.get(key)
    if found is None:
        found = _constant(*key)
        if _capturing(device):
            _captured[key] = found
    return found


@lru_cache(maxsize=32)
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    if _capturing(device):
        raise RuntimeError(
            "spectral_project_: run a step with these row-contiguous matrices and bounds before a CUDA graph captures one"
        )
    return torch.tensor(values, dtype=dtype, device=device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
