"""The registered spectral ops: schema, implementation and fake side by side (`torch.ops.stable_rnn.*`)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends import Backends, requested
from ..outputs import fresh
from . import cuda, native, reference, triton
from .norm import check_writable

_library = torch.library.Library("stable_rnn", "FRAGMENT")
PROJECTION = Backends("projection", "projection", reference, cuda=cuda, triton=triton, cpu=native)
_CPU = torch.device("cpu")


def _spectral_step(
    matrices: list[Tensor],
    blocks: list[Tensor],
    bounds: list[float],
    fresh: int,
    scale: bool,
    iterations: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    _check(matrices, blocks, bounds, iterations)
    home = _home(matrices)
    with torch.autocast(matrices[0].device.type if matrices else "cpu", enabled=False):
        backend = PROJECTION.choose(requested(), _first(matrices), matrices, blocks)
        norms, near = backend.spectral_step(matrices, blocks, bounds, fresh, scale, iterations, seed)
        return norms.to(home), near.to(home)


def _check(matrices: list[Tensor], blocks: list[Tensor], bounds: list[float], iterations: int) -> None:
    """`ValueError` unless a kernel may write what it is given; of the fake too, to which any tensor on the meta device sends the call."""
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1 (it makes the block orthonormal), got {iterations}")
    if not len(matrices) == len(blocks) == len(bounds):
        raise ValueError(
            f"{len(matrices)} matrices need as many blocks and bounds, got {len(blocks)} and {len(bounds)}"
        )
    for i, (W, X) in enumerate(zip(matrices, blocks)):
        if (
            W.dim() != 2
            or X.dim() != 2
            or X.shape[0] != W.shape[1]
            or X.device != W.device
            or W.is_meta != matrices[0].is_meta
        ):
            raise ValueError(
                f"matrices[{i}] is {tuple(W.shape)} on {W.device}, blocks[{i}] {tuple(X.shape)} on {X.device}; expected "
                "(m, n) and (n, k), on one device"
            )
        check_writable(W, f"matrices[{i}]")
        check_writable(X, f"blocks[{i}]")


def _home(matrices: list[Tensor]) -> torch.device:
    """Where the results are: with the matrices, but for devices without float64."""
    return matrices[0].device if matrices and matrices[0].device.type != "mps" else torch.device("cpu")


def _first(matrices: list[Tensor]) -> torch.device:
    return matrices[0].device if matrices else _CPU


def kernel(matrices: list[Tensor], blocks: list[Tensor]) -> ModuleType | None:
    """The compiled code that runs a step on these, if any does."""
    return PROJECTION.find(requested(), _first(matrices), matrices, blocks)[0]


def _spectral_step_fake(
    matrices: list[Tensor],
    blocks: list[Tensor],
    bounds: list[float],
    fresh: int,
    scale: bool,
    iterations: int,
    seed: int,
) -> tuple[Tensor, ...]:
    _check(matrices, blocks, bounds, iterations)
    return tuple(
        torch.empty(len(matrices), dtype=dtype, device=_home(matrices)) for dtype in (torch.float64, torch.int64)
    )


# One uncertified step for many matrices: W (m, n) and its block (n, k) are overwritten, the `fresh` last columns of the block are not
# read but replaced by random ones that depend on `seed` and the matrix's place. Returns, on the device of the first matrix, estimates of
# the norms afterwards and how many singular values of each block were above 0.999 of the bound before. A matrix with NaN or infinite
# entries is left alone; it raises ValueError (CPU kernels and reference, before anything is written), or has the norm NaN (on a GPU, where
# telling would have to wait).
_library.define(
    "spectral_step_(Tensor(a!)[] matrices, Tensor(b!)[] blocks, float[] bounds, int fresh, bool scale, int iterations, int seed)"
    " -> (Tensor norms, Tensor near)"
)
_library.impl("spectral_step_", _spectral_step, "CompositeExplicitAutograd")
torch.library.register_fake("stable_rnn::spectral_step_", _spectral_step_fake, lib=_library)


def _top_singular(W: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast(W.device.type, enabled=False):
        return fresh((W,), *reference.top_singular(W))


def _top_singular_fake(W: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(W.dtype, torch.float32)
    return tuple(
        W.new_empty(shape, dtype=dtype) for shape in (W.shape[:-2], W.shape[:-1], (*W.shape[:-2], W.shape[-1]))
    )


def _top_singular_vmap(info: Any, in_dims: tuple, W: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return torch.ops.stable_rnn.top_singular(W.movedim(in_dims[0], 0)), (0, 0, 0)


# The top singular triplet of every matrix of a batch, converged; float32 for the halves.
_library.define("top_singular(Tensor W) -> (Tensor sigma, Tensor u, Tensor v)")
_library.impl("top_singular", _top_singular, "CompositeExplicitAutograd")
torch.library.register_fake("stable_rnn::top_singular", _top_singular_fake, lib=_library)
if hasattr(torch.library, "register_vmap"):  # torch 2.5
    torch.library.register_vmap("stable_rnn::top_singular", _top_singular_vmap, lib=_library)
