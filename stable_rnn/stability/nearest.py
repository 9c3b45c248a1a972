"""The nearest weights whose gates, each with its own scale, have a joint spectral norm within a bound. The derivation is in README.md."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 8
FAR = 64.0  # times the bound: weights that reach further are scaled down to it first, so that no square overflows


def into_ball(W: Tensor, scales: Tensor, bound: float, slack: float = 0.0) -> Tensor:
    """Weights near the closest ones (Frobenius norm) with ||diag(d) W'||_2 <= bound, where d is scales[g] in all rows of gate g.

    W (G*H, P), scales (G,) > 0  ->  (G*H, P); W itself if it is inside. A round is exact to first order in how far W is outside (and
    where all scales are equal). Rounds end within bound * (1 + slack); what the last leaves is clipped, all gates alike. Proves nothing."""
    reach = float((W.reshape(len(scales), -1).abs().amax(1) * scales).max())
    if reach > FAR * bound:
        W = W * (FAR * bound / reach)
    rows = scales.repeat_interleave(len(W) // len(scales))[:, None]
    for number in range(ROUNDS + 1):
        scaled = rows * W
        squares, V = _eigh(scaled.mT @ scaled)
        over = squares > bound * bound * (1 + 8 * torch.finfo(W.dtype).eps)
        if not over.any() or number and float(squares[-1]) <= (bound * (1 + slack)) ** 2:
            break
        squares, V = squares[over], V[:, over]  # (k,), (P, k)
        A = W @ V
        if number == ROUNDS:
            return W + (A * (bound / squares.sqrt() - 1)) @ V.mT
        # W' = W - D^2 W V L V^T, with L >= 0 of H L + L H = excess, as the nearest point asks, in the eigenvectors of H
        slopes, Q = _eigh((rows * rows * A).mT @ (rows * rows * A))
        slopes = slopes.clamp(min=torch.finfo(W.dtype).eps * float(slopes[-1]))  # they are positive, up to rounding
        excess = 2 * squares * (squares.sqrt() / bound - 1)
        L = (Q.mT * excess) @ Q / (slopes[:, None] + slopes)
        steps, R = _eigh(Q @ L @ Q.mT)
        shrink = 1 / (1 + steps.clamp(min=0) * scales.square()[:, None])  # (G, k)
        W = W + ((A @ R) * (shrink - 1).repeat_interleave(len(W) // len(scales), 0)) @ (V @ R).mT
    return W


def _eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    found, vectors = torch.linalg.eigh(S.cpu() if S.device.type == "mps" else S)  # which has none
    return found.to(S.device), vectors.to(S.device)
