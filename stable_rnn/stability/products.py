"""The training step of `nearest.py` in matrix products alone, for devices where the host must not wait: nothing is read from the device,
no eigenvectors are looked for, nothing is kept from step to step, and a CUDA graph may capture it. README.md has the derivation.

A stack of N matrices W (N, G*H, P), their gates stacked; scales (N, G, H) > 0 of their rows, d, or (N, G, 1). In units of the bound,
B = diag(d) W and K = B^T B (P, P); W is inside where K <= 1. A step of an LSTM with H = P takes 88 products of P x P matrices, 176 P^3
operations."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 2
FAR = 4.0  # bounds, in the root mean square of all singular values: weights further out are scaled down to that first
# Odd quintics a x + b x^3 + c x^5, one after the other: each is the best on what the one before makes of 0.005 <= |x| <= 1, up to a factor
# that keeps it within 1. Together sign(x) up to 7e-4 there.
SIGN = (
    (4.2373, -12.4740, 9.2368),
    (4.1725, -11.9409, 8.7685),
    (3.9023, -9.8824, 6.9801),
    (3.0230, -4.8367, 2.8138),
    (2.0375, -1.5968, 0.5593),
)
SURPLUS = 3.0  # of the second order: more than a direction needs for itself, as it turns others outwards
SPREAD = 16.0  # most that is believed
# Odd quintics likewise, x (a + b x^2 + c x^4): within 12 % of 1 for 0.1 <= x <= 1, so that what multiplies x is near 1/x
ROOT = ((3.8555, -9.5524, 6.6969), (2.9140, -4.3674, 2.4533))
# (T_4(CENTRE - SLOPE y) / HEIGHT)^2 falls from 1 as exp(-y) does at first, and stays within 0 and 1/9 from there to REACH
CENTRE = 1.1
HEIGHT = 8 * CENTRE**4 - 8 * CENTRE**2 + 1
SLOPE = HEIGHT / (64 * CENTRE**3 - 32 * CENTRE)
REACH = (CENTRE + 1) / SLOPE


def step_of_products(W: Tensor, scales: Tensor, bound: float) -> Tensor:
    """As `nearest.step_into_ball`, for a stack. Matrices inside, and those with NaN or infinite entries, come back as they are."""
    N, G, _ = scales.shape
    most = scales.amax((1, 2), keepdim=True)
    rows = (scales / most).to(W.dtype).unsqueeze(3)
    aim = (bound / most).to(W.dtype)  # (N, 1, 1)
    B = (rows * W.unflatten(1, (G, -1))).flatten(1, 2)
    reach = B.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(W.dtype).tiny)  # no square overflows
    unit = torch.maximum(aim, reach * _size(B / reach) / (FAR * W.shape[2] ** 0.5))
    U = start = (W / unit).unflatten(1, (G, -1))
    outside = torch.zeros_like(aim, dtype=torch.bool)
    for _ in range(ROUNDS):
        less, found = _less(U, rows)
        U, outside = torch.where(found.unsqueeze(3), U - less, U), outside | found
    near = torch.addcmul(W * (aim / unit), aim, (U - start).flatten(1, 2))
    finite = near.isfinite().all(2, keepdim=True).all(1, keepdim=True)
    return torch.where(outside & finite, near, W)


def _less(U: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What U (N, G, H, P) loses on its way to ||rows U||_2 <= 1, and whether it is outside (N, 1, 1). rows (N, G, H or 1, 1) <= 1."""
    gates = rows.amax(2, keepdim=True)
    squared = gates.square().flatten(1)  # (N, G)
    A, M, M2 = _grams(rows * U, rows)
    A.diagonal(dim1=1, dim2=2).sub_(1)
    outer = _outer(A)
    X = outer @ A @ outer
    diagonal = X.diagonal(dim1=1, dim2=2).unsqueeze(1)
    outside = diagonal.amax(2, keepdim=True) > 64 * torch.finfo(U.dtype).eps  # v^T A v > 0 for some v
    spread = (_dot(X, A) + diagonal.sum(2, keepdim=True)) * _dot(X, M2) / _dot(X, M).square()
    square = X @ X
    second = (SURPLUS * spread.clamp(1, SPREAD) - 1) / (1 + _size(square).sqrt())
    L = _balanced(outer @ M @ outer, X + second * square)
    return (rows / gates).square() * (U @ _lost(L, squared)), outside


def _grams(B: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """B^T diag(d)^2p B (N, P, P) for p = 0, 1, 2. B (N, G, H, P), rows (N, G, H or 1, 1)."""
    powers = torch.cat([torch.ones_like(rows), rows.square(), rows.square().square()], 3)  # (N, G, H or 1, 3)
    if rows.shape[2] > 1:
        return tuple((B * power).flatten(1, 2).mT @ B.flatten(1, 2) for power in powers.split(1, 3))
    found = powers.flatten(1, 2).mT @ (B.mT @ B).flatten(2)
    return found.unflatten(2, B.shape[3:] * 2).unbind(1)


def _outer(A: Tensor) -> Tensor:
    """The projector (1 + sign A) / 2 onto the eigenvectors of the symmetric A with positive eigenvalues; between 0 and 1 on those whose
    eigenvalues are too close to 0."""
    X = A / _size(A)
    square = X @ X
    X = X / (1.01 * _size(square @ square).sqrt().sqrt())  # above the largest eigenvalue, by P^(1/8) at most
    for a, b, c in SIGN:
        square = X @ X
        X = torch.baddbmm(X, X, torch.baddbmm(square, square, square, beta=b, alpha=c), beta=a)
    X = X / 2
    X.diagonal(dim1=1, dim2=2).add_(0.5)
    return X


def _balanced(M: Tensor, F: Tensor) -> Tensor:
    """L >= 0, nearly that of M L + L M = F and as a rule less: C F C with C near (2 M)^(-1/2), for M, F >= 0."""
    square = M @ M
    most = _size(square).sqrt().clamp(min=torch.finfo(M.dtype).tiny)  # above the largest eigenvalue, by P^(1/4) at most
    first = _even(M / most, square / most.square(), ROOT[0])
    M = first @ (M / most) @ first
    C = first @ _even(M, M @ M, ROOT[1])
    L = C @ F @ C.mT / (2 * most)
    return (L + L.mT) / 2


def _even(M: Tensor, square: Tensor, terms: tuple[float, float, float]) -> Tensor:
    """a + b M + c M^2."""
    a, b, c = terms
    found = b * M + c * square
    found.diagonal(dim1=1, dim2=2).add_(a)
    return found


def _lost(L: Tensor, squared: Tensor) -> Tensor:
    """1 - exp(-d_g^2 L), nearly, of each gate: L (N, P, P), squared (N, G) -> (N, G, P, P)."""
    square = L @ L
    over = (_size(square).sqrt() / REACH).clamp(min=1)
    L, square = L / over, square / over.square()
    powers = torch.stack([L, square, square @ L, square @ square], 1).flatten(2)
    c, s = CENTRE, SLOPE
    taylor = (-(32 * c**3 - 16 * c) * s, (48 * c**2 - 8) * s**2, -32 * c * s**3, 8 * s**4)  # T_4(c - s y) - T_4(c)
    weights = torch.stack([-t / HEIGHT * squared**n for n, t in enumerate(taylor, 1)], 2)  # (N, G, 4)
    lost = (weights @ powers).unflatten(2, L.shape[1:])
    return 2 * lost - lost @ lost


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


def _size(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True)


def _over(a: Tensor, b: Tensor) -> Tensor:
    return a / b.clamp(min=torch.finfo(b.dtype).tiny)
