"""Moving rows into the set of absolute sums <= bound, in place: the set of ||W||_inf <= bound."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .norm import UNIT, check_bound, check_matrix, check_writable, shift

METHODS = ("l1", "scale")


@torch.no_grad()
def row_project_(W: Tensor, bound: float | Sequence[float] | Tensor, method: str = "l1") -> Tensor:
    """Brings the absolute sum of every row of W (..., m, n) to at most `bound`, in place, with no autograd; returns W.

    method "l1":  each row to the nearest point (Euclidean) of the l1 ball,  p_j = sign(w_j) (|w_j| - theta)_+  with the theta that
    makes the sum equal the bound (Duchi et al., "Efficient projections onto the l1-ball", ICML 2008);
    method "scale":  row * bound / sum.

    What is stored has exact sums <= bound: results are rounded towards zero. Rows whose exact sum is <= bound are left bitwise
    untouched. Any real floating dtype, any strides.

    bound  > 0: a number, or one per row, of a shape that broadcasts to (..., m).
    Raises, before anything is written: ValueError for NaN or infinite entries, a bound that is not positive and finite, does not
    fit the rows or requires grad, an unknown method, a tensor on the meta device or one that overlaps itself (expanded); TypeError for
    other dtypes, sparse tensors and a bound that is no number.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    rows = check_matrix(W)
    check_writable(W)
    limit = _limits(bound, rows)
    gamma = 2 * (rows.shape[-1] + 4) * UNIT  # relative error of a float64 sum, with room
    near = ~(rows.abs().sum(-1, dtype=torch.float64) * (1 + gamma) <= limit)  # outside, or too close to tell
    if rows.numel() and near.any():
        rows[near] = _projected(rows[near], limit[near], gamma, method)
    return W


def _projected(rows: Tensor, limit: Tensor, gamma: float, method: str) -> Tensor:
    """rows (r, n), limit (r,) -> the rows, those outside projected."""
    exponent = torch.frexp(rows.abs().amax(-1).double()).exponent
    A = shift(rows.abs().double(), -exponent[:, None])  # largest entry of a row in [1/2, 1)
    limit = shift(limit, -exponent)
    outside = _outside(A, limit, gamma)
    aim = limit * (1 - 2 * gamma)
    if method == "l1":
        A = _simplex(A, aim)
    total = A.sum(-1)
    A = A * torch.where(total > aim, aim / total, 1.0)[:, None]
    return torch.where(outside[:, None], torch.copysign(_towards_zero(A, exponent[:, None], rows.dtype), rows), rows)


def _limits(bound: float | Sequence[float] | Tensor, rows: Tensor) -> Tensor:
    check_bound(bound)
    limit = torch.as_tensor(bound, dtype=torch.float64, device=rows.device)
    if not ((limit > 0) & torch.isfinite(limit)).all():
        raise ValueError(f"bound must be positive and finite, got {bound}")
    try:
        return limit.expand(rows.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"bound of shape {tuple(limit.shape)} does not fit rows of shape {tuple(rows.shape[:-1])}"
        ) from None


def _outside(A: Tensor, limit: Tensor, gamma: float) -> Tensor:
    """Which rows have an exact sum above the limit; the few that rounding leaves open are summed exactly."""
    total = A.sum(-1)
    outside = total * (1 - gamma) > limit
    for i in ((total * (1 + gamma) > limit) & ~outside).nonzero()[:, 0].tolist():
        outside[i] = math.fsum([*A[i].tolist(), -float(limit[i])]) > 0
    return outside


def _simplex(A: Tensor, aim: Tensor) -> Tensor:
    """The projection of the rows of A >= 0 onto {p >= 0, sum p = aim}. It does not change when a row is shifted by a constant, so
    the largest entry is shifted to 0 (and what lies more than `aim` below can't matter): nothing cancels for any size of entries.

    The threshold rises to its value from below: each round takes the one that the entries still above it would need (Michelot, "A
    finite algorithm for finding the projection of a point onto the canonical simplex of R^n", JOTA 50, 1986). No sort; few rounds.
    """
    D = (A - A.amax(-1, keepdim=True)).maximum(-aim[:, None])  # (r, n), in [-aim, 0]
    theta = (D.sum(-1) - aim) / D.shape[-1]
    above = torch.full_like(theta, D.shape[-1] + 1)
    while True:
        stay = D > theta[:, None]
        count = stay.sum(-1)
        if (count == above).all():
            return (D - theta[:, None]).clamp(min=0)
        theta = theta.maximum(
            (torch.where(stay, D, 0.0).sum(-1) - aim) / count.clamp(min=1)
        )  # rounding must not let it fall: it ends
        above = count


def _towards_zero(A: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """A * 2**exponent for A >= 0, in another dtype and its denormal numbers too, never rounded up."""
    rounded = shift(A, exponent).to(dtype)
    return torch.where(
        shift(rounded.double(), -exponent) > A, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded
    )
