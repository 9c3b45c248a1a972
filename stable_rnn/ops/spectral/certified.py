"""The certified projection: afterwards the norm of what is stored is proven to be within the bound. The mathematics is in README.md.

On the CPU matrices are taken one by one. On a GPU the host waits once for the proofs of all, and once more if some are outside: a step of
the block power iteration with more iterations projects them, and what it stores is judged and proven. What that leaves over is then taken
one by one as on the CPU.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .later import on_device
from .norm import prove, scaled, shift, spectral_norm_bound, tall, width
from .reference import krylov

ROUNDING = 2.0**-20  # of a step in float32, relative to the bound, where the norm is not far beyond it

Found = tuple[Tensor | None, float]  # what to store, None if W is inside; an upper bound of its norm
Step = Callable[
    [list[Tensor], list[Tensor], list[float]], bool
]  # projects matrices in place, with their blocks and bounds; False: cannot


def look(matrices: Sequence[Tensor], bounds: Sequence[float], good: Sequence[Tensor] | None = None) -> list[float]:
    """For each matrix (m, n) an upper bound of its norm if it is proven to be <= bound (and `good`), else infinity; NaN if an entry is not
    finite. Matrices of one shape are proven together; the host waits once."""
    groups = defaultdict(list)
    for i, W in enumerate(matrices):
        groups[W.shape, W.dtype, W.device].append(i)
    norms = []
    for members in groups.values():
        some = torch.stack([matrices[i] for i in members])
        limits, exponents = zip(*(_limit(matrices[i], bounds[i]) for i in members))
        found = proven(
            some, on_device(limits, torch.float64, some.device), on_device(exponents, torch.int32, some.device)
        )
        if good is not None:
            found = torch.where(torch.stack([good[i] for i in members]), found, torch.inf)
        norms.append(torch.where(torch.isfinite(some).all(-1).all(-1), found, torch.nan))
    values = torch.cat([n.to(norms[0].device) for n in norms]).tolist() if norms else []
    places = [i for members in groups.values() for i in members]
    return [value for _, value in sorted(zip(places, values), key=lambda pair: pair[0])]


def one_by_one(
    matrices: Sequence[Tensor], bounds: Sequence[float], blocks: Sequence[Tensor], scale: bool
) -> list[Found]:
    """Writes the blocks only."""
    return [_alone(*each, scale) for each in zip(matrices, bounds, blocks)]


def together(
    matrices: Sequence[Tensor],
    bounds: Sequence[float],
    blocks: Sequence[Tensor],
    scale: bool,
    norms: Sequence[float],
    step: Step,
) -> list[Found]:
    """As `one_by_one`; `norms` are those of `look`."""
    found: list[Found] = [(None, norm) for norm in norms]
    outside = [i for i, norm in enumerate(norms) if norm == math.inf]
    if outside:
        some, starts = [matrices[i] for i in outside], [blocks[i] for i in outside]
        made = _stepped(some, [bounds[i] for i in outside], starts, scale, step)
        for i, stored, block, norm in zip(outside, *made):
            if norm < math.inf:
                blocks[i].copy_(block)
                found[i] = stored, norm
            else:
                found[i] = _alone(matrices[i], bounds[i], blocks[i], scale)
    return found


def _stepped(
    matrices: list[Tensor], bounds: list[float], blocks: list[Tensor], scale: bool, step: Step
) -> tuple[list, list, list[float]]:
    """What a step makes of the matrices and of their blocks, and the norms that it is proven to have: infinite, too, where singular vectors
    have not converged."""
    stored, vectors, aims = [W.clone() for W in matrices], [block.clone() for block in blocks], []
    for W, bound in zip(matrices, bounds):
        slack = width(max(W.shape), min(W.shape))
        aims.append(bound * (1 - slack) * (1 - slack - torch.finfo(W.dtype).eps - ROUNDING))
    if not step(stored, vectors, aims):
        return stored, vectors, [math.inf] * len(stored)
    good = [
        torch.ones((), dtype=torch.bool, device=W.device) if scale else _converged(W, aim, block)
        for W, aim, block in zip(matrices, aims, vectors)
    ]
    return stored, vectors, look(stored, bounds, good)


def _converged(W: Tensor, aim: float, V: Tensor) -> Tensor:
    """Whether the columns of V hold all right singular vectors of W beyond aim, up to an error of the projection (twice the residual, as
    in `_few_outside`) that is small beside its step, or beside the rounding of what is stored."""
    A, own = scaled(W)
    limit, V, whole = shift(torch.full_like(A[0, 0], aim), -own), V.to(A), V.shape[1] == min(W.shape)
    Y = A @ V
    S = torch.linalg.vector_norm(Y, dim=0)
    outside = S > limit
    R = (A.mT @ (Y / torch.where(outside, S, 1.0)) - V * S) * outside
    rounding = torch.finfo(W.dtype).eps / 4 * torch.linalg.matrix_norm(A)
    small = torch.linalg.matrix_norm(R) <= 1e-4 * torch.linalg.vector_norm((S - limit) * outside) + rounding
    return small if whole else small & ~outside.all()


def _limit(W: Tensor, bound: float) -> tuple[float, int]:
    """(limit, e): what is proven to lie below limit * 2**e, limit in [1/2, 1), has a proven norm <= bound."""
    limit, exponent = math.frexp(bound)
    return limit * (1 - width(max(W.shape), min(W.shape))), exponent


def proven(W: Tensor, limit: Tensor, exponent: Tensor) -> Tensor:
    """An upper bound of the norm of W (..., m, n) where limit * 2**exponent (...) is proven to be about one, else infinity."""
    A, own = scaled(W)
    if A.numel() == 0:
        return A.new_zeros(A.shape[:-2])
    limit, exponent = limit.to(A.device), exponent.to(A.device)
    gap = exponent - own
    square = prove(tall(A), shift(limit, gap.clamp(-500, 500)).square())
    far = torch.where(
        gap < 0, torch.inf, float(A.shape[-2] * A.shape[-1])
    )  # so far outside, or inside, that the largest entry decides
    square = torch.where(gap.abs() > 500, far, square)
    return torch.where((A == 0).all(-1).all(-1), 0.0, shift(square.sqrt() * (1 + 1e-15), own))


def proven_within(W: Tensor, bound: float) -> float:
    """An upper bound of the norm of W (m, n) if it is proven to be <= bound, else infinity."""
    limit, exponent = _limit(W, bound)
    limits = torch.tensor(limit, dtype=torch.float64, device="cpu"), torch.tensor(exponent, device="cpu")
    return float(proven(W, *limits))


def _alone(W: Tensor, bound: float, block: Tensor, scale: bool) -> Found:
    """The target T in float64 is rounded to W's dtype, and what is then proven inside is stored. Where rounding takes it outside again,
    the excess of the rounded matrix is subtracted from T once more: it accumulates there until rounding gives way, which one larger
    step cannot do (a correction below half a unit in the last place vanishes each time). One rounding is enough as a rule.
    """
    number, exponent = _limit(W, bound)
    unit = torch.tensor(exponent, device=W.device)
    norm = proven_within(W, bound)
    if norm < math.inf:
        return None, norm
    aim = number * (1 - width(max(W.shape), min(W.shape)) - torch.finfo(W.dtype).eps)
    A, own = scaled(W)
    T = (_scaled_target if scale else _clipped_target)(A, own - unit, aim, block)
    attempt = 0
    while True:
        stored = shift(T, unit).to(W.dtype)
        norm = proven_within(stored, bound)
        if norm < math.inf:
            return stored, norm
        A, attempt = shift(stored.double(), -unit), attempt + 1
        if attempt > 31:  # seen only where the bound is a few of the dtype's smallest numbers
            T = T / 2
        elif scale:
            T = T * (aim / spectral_norm_bound(A))
        else:
            U, S, Vh = torch.linalg.svd(A, full_matrices=False)
            T = T - (U * (S - aim).clamp(min=0)) @ Vh


def _scaled_target(A: Tensor, gap: Tensor, aim: float, block: Tensor) -> Tensor:
    return A * (aim / spectral_norm_bound(A))


def _clipped_target(A: Tensor, gap: Tensor, aim: float, block: Tensor) -> Tensor:
    """The projection of A * 2**gap onto the ball of radius aim, from the block where it suffices, else from an SVD."""
    if gap < 20:  # else the subtraction would cancel
        B = shift(A, gap)
        found = _few_outside(B, aim, block)
        if found is not None:
            U, S, V = found
            return B - (U * (S - aim).clamp(min=0)) @ V.mT
    return svd_clipped(A, gap, aim, block)


def svd_clipped(A: Tensor, gap: Tensor, aim: float, block: Tensor) -> Tensor:
    """The projection of A * 2**gap, and the block set to the top right singular vectors."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    block.copy_(Vh[: block.shape[1]].mT)
    floor = S[0] * max(A.shape) * torch.finfo(S.dtype).eps  # singular values below are rounding noise: keep the rank
    return (U * shift(torch.where(S > floor, S, 0).double(), gap).clamp(max=aim)) @ Vh.double()


def _few_outside(
    B: Tensor, aim: float, block: Tensor, rounds: int = 4, depth: int = 4
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Converged triplets of all singular values above aim, or None if the block is too small or converges too slowly.

    A residual R = B^T U - V S belongs to exact triplets of a matrix that is ||R||_F away, and the projection does not expand
    distances: the error of the clipped matrix is at most 2 ||R||_F (asked for: 1e-4 of the distance it moves).
    """
    V = block.to(B)
    whole = block.shape[1] == min(B.shape)
    for _ in range(rounds):
        U, S, V = krylov(B, V, depth)
        outside = int((S > aim).sum())
        if outside == len(S) and not whole:
            return None
        block.copy_(V)
        residual = torch.linalg.matrix_norm((B.mT @ U - V * S)[:, :outside])
        if residual <= 1e-4 * torch.linalg.vector_norm(S[:outside] - aim):
            return (U, S, V) if outside else None
    return None
