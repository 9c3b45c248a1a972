"""The nearest weights whose gates, each with its own scale, have a joint spectral norm within a bound. The derivation is in README.md."""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 64.0  # times the bound: weights that reach further are scaled down to it first, so that no square overflows
NEWTON = 16  # iterations at most; from an optimizer step's distance two or three do
CLOSE = 1e-7


def into_ball(W: Tensor, scales: Tensor, bound: float, rounds: int = 1) -> Tensor:
    """Weights near the closest ones (Frobenius norm) with ||diag(d) W'||_2 <= bound, where d is scales[g] in all rows of gate g.

    W (G*H, P), scales (G,) > 0  ->  (G*H, P); W itself if it is inside. The directions in which W is outside are treated one by one,
    exactly; their interplay leaves W' outside by the square of how far W was, which more rounds take away. Proves nothing."""
    reach = float((W.reshape(len(scales), -1, W.shape[1]).abs().amax((1, 2)) * scales).max())
    if reach > FAR * bound:
        W = W * (FAR * bound / reach)
    square = scales.square()[:, None]  # (G, 1)
    for _ in range(rounds):
        blocks = W.reshape(len(scales), -1, W.shape[1])
        scaled = (blocks * scales[:, None, None]).flatten(0, 1)
        gram = scaled.mT @ scaled
        found, V = torch.linalg.eigh(gram.cpu() if gram.device.type == "mps" else gram)  # which has no eigh
        found, V = found.to(W.device), V.to(W.device)
        over = found > bound * bound
        if not over.any():
            break
        A = W @ V[:, over]  # (G*H, k)
        shares = square * A.reshape(len(scales), -1, A.shape[1]).square().sum(1)  # (G, k): of the squared singular values
        shrunk = _shrink(shares, square, bound) - 1
        W = W + (A.reshape(len(scales), -1, A.shape[1]) * shrunk[:, None]).flatten(0, 1) @ V[:, over].mT
    return W


def _shrink(shares: Tensor, square: Tensor, bound: float) -> Tensor:
    """1 / (1 + mu_k d_g^2) with the mu_k >= 0 that make the sum over g of shares / (1 + mu d^2)^2 equal bound^2: (G, k).

    Newton's method for 1 / sigma(mu) = 1 / bound, which is concave in mu: it comes from outside and never overshoots."""
    mu = torch.zeros_like(shares[0])
    for _ in range(NEWTON):
        factor = 1 / (1 + mu * square)
        parts = shares * factor * factor
        sigma = parts.sum(0).sqrt()
        if float(sigma.max()) <= bound * (1 + CLOSE):
            break
        slope = (parts * factor * square).sum(0) / sigma**3  # of 1 / sigma
        mu = mu + (1 / bound - 1 / sigma).clamp(min=0) / slope
    return 1 / (1 + mu * square)
