"""The `cuda` backend: the compiled kernels of `csrc/cuda/`, on float32, float16 and bfloat16 tensors (see `params.h`, `cuda.h`).

float32 products are exact float32 unless torch's switch for matrix products allows TF32 (`torch.set_float32_matmul_precision("high")`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from ...cells import CELLS, of_code
from ...precision import tf32_allowed
from .. import cuda_device
from ..kernel_args import DTYPES, TF32, addresses
from . import windows
from .compiled import Kernels, lanes
from .fields import LAUNCH, Fields
from .problem import Problem
from .scanned import Scanned

PLACES = ("registers", "shared memory", "L2")  # of W between steps
EXCHANGES = ("in a cluster", "in a cluster by transactions")
PRODUCTS = ("", " by wgmma")
WISHES = ("STABLE_RNN_EXCHANGE", "STABLE_RNN_PRODUCT")  # read by the module at each call
L2 = PLACES.index("L2")

takes_resets = True  # no wait for their number
in_place = False


def can_run(p: Problem | None, x: Tensor, w_hh: Tensor | None = None, w_hr: Tensor | None = None) -> tuple[bool, str]:
    reason = cuda_device.missing()
    if reason:
        return False, reason
    if not cuda_device.on_gpu(x):
        return False, f"the CUDA kernels run on CUDA devices, the tensors are on {x.device}"
    if x.dtype not in DTYPES:
        return False, f"the CUDA kernels take float32, float16 and bfloat16, not {x.dtype}"
    if w_hr is not None:
        return False, "the CUDA kernels have no projected states (proj_size)"
    limits, reason = cuda_device.limits(x.device.index or 0)
    if limits is None:
        return False, reason
    if limits[0] < 80:
        return False, "the CUDA kernels need sm_80 or newer (A100)"
    if p is None or w_hh is None:
        return True, ""
    for backward in (False, True):
        message = tiling(limits, backward, p.cell, code(x), w_hh.shape[0] // p.spec.gates, 1)["message"]
        if message:
            return False, message
    return True, ""


def tiling(limits: tuple[int, ...], backward: bool, cell: str, dtype: int, hidden: int, entries: int) -> dict:
    """How a shape runs on a device with these limits, and with what the environment asks for: the fields of `CudaTiling`."""
    return _tiling(tuple(map(os.environ.get, WISHES)), limits, backward, cell, dtype, hidden, entries)


@lru_cache(maxsize=256)  # one for each length of a batch
def _tiling(
    wishes: tuple, limits: tuple[int, ...], backward: bool, cell: str, dtype: int, hidden: int, entries: int
) -> dict:
    return cuda_device.lib.recurrence_tiling_cuda(backward, CELLS[cell].code, dtype, hidden, hidden, entries, limits)


def describe(found: dict) -> str:
    """A tiling in words."""
    if found["message"]:
        return found["message"]
    blocks, through = found["blocks"], EXCHANGES[found["exchange"]] if found["cluster"] > 1 else "that meet through L2"
    team = "one block" if blocks == 1 else f"{blocks} blocks {through}"
    return (
        f"{found['teams']} x {team} of {found['warps']} warps{PRODUCTS[found['product']]}, "
        f"{found['units']} units a block, {found['lanes']} lanes a tile, "
        f"W in {PLACES[found['place']]}, {found['shared_bytes'] / 1024:.0f} KB shared"
    )


def numbers(backward: bool, cell: str, dtype: int, hidden: int, lanes: int) -> tuple[int, int, int]:
    """Of one step of M lanes that all write it: operations, 2 M G H^2; bytes of global memory, forward xp and y, backward dy, what the
    forward pass saved, and dz; bytes of W, which a tile reads once, or at every step where it stays in L2."""
    spec, element = CELLS[cell], 4 if dtype in (DTYPES[torch.float32], TF32) else 2
    columns = spec.gates + 1  # xp and y, or dy and dz
    if backward:
        columns += spec.saved + (spec.h_after or spec.carries)
    cells = 4 if backward and spec.has_cell else 0  # c is float32
    weights = spec.gates * hidden * hidden
    return 2 * lanes * weights, lanes * hidden * (columns * element + cells), weights * element


def code(x: Tensor) -> int:
    """The `DType` of x."""
    return TF32 if x.dtype == torch.float32 and tf32_allowed() else DTYPES[x.dtype]


class _Kernels(Kernels):
    """With the device, torch's stream and a workspace behind the fields."""

    dtype = staticmethod(code)

    def call(self, backward: bool, fields: Fields) -> tuple[Callable, Sequence, Tensor]:
        lib, device = cuda_device.lib, fields["w_hh"].device
        index = device.index or 0
        limits, _ = cuda_device.limits(index)
        assert limits is not None  # see can_run()
        need = tiling(
            limits,
            backward,
            of_code(fields["cell"]).name,
            fields["dtype"],
            fields["hidden"],
            lanes(fields),
        )
        work = torch.empty(need.get("workspace_bytes", 0), dtype=torch.uint8, device=device)
        launch = {
            **LAUNCH,
            "device": index,
            "stream": cuda_device.stream(index),
            "workspace": work,
            "workspace_bytes": work.nbytes,
        }
        kernel = lib.recurrence_backward_cuda if backward else lib.recurrence_forward_cuda
        return kernel, addresses((fields | launch).values()), work


_kernels = _Kernels()
forward, backward = _kernels.forward, _kernels.backward
ends, adjoint_ends = _kernels.ends, _kernels.adjoint_ends


def _scan(backward: bool, fields: Fields) -> None:
    """The scan of one group of a cascade."""
    lib, device = cuda_device.lib, fields["y"].device
    need = lib.scan_workspace_cuda(fields["steps"], fields["batch"], fields["units"])
    work = torch.empty(need, dtype=torch.uint8, device=device)
    index = device.index or 0
    launch = {
        **LAUNCH,
        "device": index,
        "stream": cuda_device.stream(index),
        "workspace": work,
        "workspace_bytes": need,
    }
    (lib.scan_backward_cuda if backward else lib.scan_forward_cuda)(*addresses((fields | launch).values()))


scans = Scanned(partial(_scan, False), partial(_scan, True), lambda dtype: torch.float32, lambda dtype: dtype)
scanned_forward, scanned_backward = scans.forward, scans.backward
windowed_backward = partial(windows.windowed_backward, _kernels)
