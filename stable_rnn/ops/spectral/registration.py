"""The registered spectral ops: schema, implementation and fake side by side (`torch.ops.stable_rnn.*`)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ...dispatch import requested
from . import native, reference

_library = torch.library.Library("stable_rnn", "FRAGMENT")
_warned: set[str] = set()


def _spectral_step(
    matrices: list[Tensor], blocks: list[Tensor], bounds: list[float], fresh: int, scale: bool, iterations: int, seed: int
) -> tuple[Tensor, Tensor]:
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1 (it makes the block orthonormal), got {iterations}")
    with torch.autocast(matrices[0].device.type if matrices else "cpu", enabled=False):
        return _backend(matrices, blocks).spectral_step(matrices, blocks, bounds, fresh, scale, iterations, seed)


def _backend(matrices: list[Tensor], blocks: list[Tensor]):
    """The rule of `stable_rnn.backends`; the backend `torch` has no other code for this than the reference."""
    name = requested("auto")
    if name in ("reference", "torch"):
        return reference
    able, reason = native.can_run(matrices, blocks)
    if able:
        return native
    if name == "cpu":
        raise ValueError(f"backend 'cpu' cannot run this projection: {reason}")
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"stable_rnn runs its slow reference projection: {reason}", RuntimeWarning, stacklevel=2)
    return reference


def _spectral_step_fake(matrices, blocks, bounds, fresh, scale, iterations, seed):
    return tuple(torch.empty(len(matrices), dtype=dtype, device="cpu") for dtype in (torch.float64, torch.int64))


# One uncertified step for many matrices: W (m, n) and its block (n, k) are overwritten, the `fresh` last columns of the block are not
# read but replaced by random ones that depend on `seed` and the matrix's place. Returns, on the CPU, estimates of the norms afterwards
# and how many singular values of each block were above 0.999 of the bound before.
_library.define(
    "spectral_step_(Tensor(a!)[] matrices, Tensor(b!)[] blocks, float[] bounds, int fresh, bool scale, int iterations, int seed)"
    " -> (Tensor norms, Tensor near)"
)
_library.impl("spectral_step_", _spectral_step, "CompositeExplicitAutograd")
torch.library.register_fake("stable_rnn::spectral_step_", _spectral_step_fake, lib=_library)


def _top_singular(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(W.device.type, enabled=False):
        return reference.top_singular(W)


def _top_singular_fake(W):
    dtype = torch.promote_types(W.dtype, torch.float32)
    return tuple(W.new_empty(shape, dtype=dtype) for shape in (W.shape[:-2], W.shape[:-1], (*W.shape[:-2], W.shape[-1])))


def _top_singular_vmap(info, in_dims, W):
    return torch.ops.stable_rnn.top_singular(W.movedim(in_dims[0], 0)), (0, 0, 0)


# The top singular triplet of every matrix of a batch, converged; float32 for the halves.
_library.define("top_singular(Tensor W) -> (Tensor sigma, Tensor u, Tensor v)")
_library.impl("top_singular", _top_singular, "CompositeExplicitAutograd")
torch.library.register_fake("stable_rnn::top_singular", _top_singular_fake, lib=_library)
if hasattr(torch.library, "register_vmap"):  # torch 2.5
    torch.library.register_vmap("stable_rnn::top_singular", _top_singular_vmap, lib=_library)
