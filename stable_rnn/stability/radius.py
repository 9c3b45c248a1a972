"""The RNN's rate by the numerical radius of W_hh, which is at most its 2-norm and at least half of it. The derivation is in README.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .nearest import FAR

ANGLES = 12
SHORT = (
    1.01  # 1 / cos(pi / 24), by which the largest eigenvalue at that many angles may fall short of the radius, and some
)
ROUNDS = 24  # of cyclic reduction, which converges quadratically
UNIT = 2.0**-53


def radius(W: Tensor) -> float:
    """About max |x* W x| over complex unit vectors x, from below by 1 % at most: the largest eigenvalue of the Hermitian parts of
    e^{i angle} W (H, H)."""
    most = float(W.abs().max())
    if not 0 < most < math.inf:
        return most
    W = (W / most).float()
    even, odd = (W + W.mT) / 2, (W - W.mT) / 2
    angles = (torch.arange(ANGLES) + 0.5) * (math.pi / ANGLES)
    return most * max(
        float(torch.linalg.eigvalsh(torch.complex(math.cos(a) * even, math.sin(a) * odd))[-1]) for a in angles.tolist()
    )


def weighing(W: Tensor, rate: float) -> Tensor | None:
    """P (H, H) with [[P, W^T/rate], [W/rate, 2 - P]] >= 0, midway between the least and the largest; None if none was found.

    The two solve equations X + A^T X^-1 A = 2, by cyclic reduction (Meini, Math. Comp. 71, 2002). Proves nothing."""
    two = 2 * torch.eye(len(W), dtype=W.dtype, device=W.device)
    A, Q, least, largest = W / rate, two, two, two
    for _ in range(ROUNDS):
        L, failed = torch.linalg.cholesky_ex(Q)
        if failed:
            return None
        down, across = (torch.linalg.solve_triangular(L, each, upper=False) for each in (A, A.mT))
        A, down, across = across.mT @ down, down.mT @ down, across.mT @ across
        Q, least, largest = Q - down - across, least - down, largest - across
        if float(A.abs().max()) < 1e-9:
            break
    return (two - least + largest) / 2


def proven(W: Tensor, P: Tensor, rate: float) -> bool:
    """Whether [[rate^2 P, W^T], [W, 2 - P]] is positive semidefinite in exact arithmetic; all float64, P symmetric.

    A Cholesky factor L of it, less a small multiple s of 1: what L L^T misses (computed), the rounding of that difference and of the
    matrix's own entries may be no more than s."""
    K = torch.cat([torch.cat([rate * rate * P, W.mT], 1), torch.cat([W, 2 * torch.eye(len(W), dtype=W.dtype) - P], 1)])
    n, size = len(K), float(torch.linalg.matrix_norm(K))
    if not math.isfinite(size):
        return False
    spare = 16 * (n + 8) * UNIT * (size + float(K.trace()))
    K.diagonal().sub_(spare)
    L, failed = torch.linalg.cholesky_ex(K)
    missed = float(torch.linalg.matrix_norm(K - L @ L.mT))
    rounding = (n + 8) * UNIT * float(L.square().sum()) + 8 * UNIT * (size + n * spare)
    return not failed and 2 * (missed + rounding) <= spare


def into_radius(W: Tensor, bound: float) -> Tensor:
    """W near the closest with a numerical radius <= bound: singular values clipped in the norm that suits W best; W itself if inside."""
    most = float(W.abs().max()) if W.numel() else 0.0
    if most > FAR * bound:
        W = W * (FAR * bound / most)
    P, reach, step = weighing(W, bound), bound, 0.01
    if P is not None:
        return W
    while P is None:
        reach, step = reach * (1 + step), 2 * step
        P = weighing(W, reach)
    inner, outer = (torch.linalg.cholesky(m) for m in (P, 2 * torch.eye(len(W), dtype=W.dtype, device=W.device) - P))
    M = torch.linalg.solve_triangular(inner, torch.linalg.solve_triangular(outer, W, upper=False).mT, upper=False).mT
    squares, V = torch.linalg.eigh(M.mT @ M)
    over = squares > bound * bound
    V, less = V[:, over], bound / squares[over].sqrt() - 1
    return W + outer @ ((M @ V) * less) @ V.mT @ inner.mT
