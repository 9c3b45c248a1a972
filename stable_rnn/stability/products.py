"""The training step of `nearest.py` in matrix products alone, for devices where the host must not wait: nothing is read from the device,
no eigenvectors are looked for, nothing is kept from step to step, and a CUDA graph may capture it. README.md has the derivation.

A stack of N matrices W (N, G*H, P), their gates stacked; scales (N, G, H) > 0 of their rows, d, or (N, G, 1). In units of the bound,
B = diag(d) W and K = B^T B (P, P); W is inside where K <= 1. A step of an LSTM with H = P takes 96 products of P x P matrices, 192 P^3
operations, and some 200 launches for all layers of one size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 2
FAR = 4.0  # bounds, in the root mean square of all singular values: weights further out are scaled down to that first
# Paces at least, of the fastest gate's and of the fastest row's of a gate. More of the first costs quality: README.md.
SLOWEST_GATE, SLOWEST_ROW = 2e-4, 0.25
# Odd quintics a x + b x^3 + c x^5, one after the other: each is the best on what the one before makes of 0.005 <= |x| <= 1, up to a factor
# that keeps it below 1, and its x divided by 1.01 for rounding, but for the last. Together sign(x) up to 0.002 there.
SIGN = (
    (4.1953, -12.1071, 8.7885),
    (4.1312, -11.5897, 8.3429),
    (3.8637, -9.5918, 6.6413),
    (2.9931, -4.6945, 2.6772),
    (2.0375, -1.5968, 0.5593),
)
SURPLUS = 4.0  # of the second order, for each 1 of spread: directions that shrink turn others outwards
SPREAD = 16.0  # most that is believed
# Odd quintics likewise, x (a + b x^2 + c x^4): within 12 % of 1 for 0.1 <= x <= 1, so that what multiplies x is near 1/x
ROOT = ((3.8555, -9.5524, 6.6969), (2.9140, -4.3674, 2.4533))
# (T_8(CENTRE - SLOPE y) / T_8(CENTRE))^2 falls from 1 as exp(-y) does at first, and stays within 0 and 1/13 from there to REACH
CENTRE = 1.03
T4 = 8 * CENTRE**4 - 8 * CENTRE**2 + 1
T8 = 2 * T4**2 - 1
SLOPE = T8 / (8 * T4 * (32 * CENTRE**3 - 16 * CENTRE))
REACH = (CENTRE + 1) / SLOPE


def step_of_products(W: Tensor, scales: Tensor, bound: float) -> Tensor:
    """As `nearest.step_into_ball`, for a stack. Matrices inside, and those with NaN or infinite entries, come back as they are."""
    most = scales.amax((1, 2), keepdim=True)
    rows = (scales / most).to(W.dtype).unsqueeze(3)
    aim = (bound / most).to(W.dtype)  # (N, 1, 1)
    B = (rows * W.unflatten(1, (scales.shape[1], -1))).flatten(1, 2)
    reach = B.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(W.dtype).tiny)  # no square overflows
    unit = torch.maximum(aim, reach * (_size(B / reach) / (FAR * W.shape[2] ** 0.5)))
    gates = Gates(rows)
    U = start = (W / unit).unflatten(1, (scales.shape[1], -1))
    outside = torch.zeros_like(aim, dtype=torch.bool)
    for _ in range(ROUNDS):
        less, found = _less(U, gates)
        U, outside = torch.where(found.unsqueeze(3), U - less, U), outside | found
    near = torch.addcmul(W * (aim / unit), aim, (U - start).flatten(1, 2))
    finite = near.abs().amax((1, 2), keepdim=True) < math.inf
    return torch.where(outside & finite, near, W)


class Gates:
    """What all rounds know of the rows' scales d <= 1: rows (N, G, H or 1, 1).

    A row's pace p is d^2, or more where polynomials of few terms would never bring in what lies in rows of small scales alone.

    powers    1, p, p^2, like rows but (N, G, H or 1, 3)
    own       (N, G, H, 1): the pace of each over the largest of its gate; None where these are equal
    weights   (N, G, 4): of the first four powers of L in 1 - T_4(CENTRE - SLOPE p L) / T4, p the largest of a gate
    """

    def __init__(self, rows: Tensor) -> None:
        paces = rows.square().clamp(min=SLOWEST_GATE)
        paces = torch.maximum(paces, SLOWEST_ROW * paces.amax(2, keepdim=True))
        self.rows, largest = rows, paces.amax(2)
        self.powers = torch.cat([torch.ones_like(rows), paces, paces.square()], 3)
        self.own = paces / largest.unsqueeze(2) if rows.shape[2] > 1 else None
        c, s = CENTRE, SLOPE
        taylor = (-(32 * c**3 - 16 * c) * s, (48 * c**2 - 8) * s**2, -32 * c * s**3, 8 * s**4)
        self.weights = torch.cat([-t / T4 * largest**n for n, t in enumerate(taylor, 1)], 2)

    def grams(self, U: Tensor) -> Tensor:
        """(N, 3, P*P): B^T D B for D = 1 and the paces and their squares; U (N, G, H, P)."""
        B = self.rows * U
        if self.own is None:
            return self.powers.flatten(1, 2).mT @ (B.mT @ B).flatten(2)
        B = B.flatten(1, 2)
        return (B.mT.unsqueeze(1) @ (self.powers.flatten(1, 2).mT.unsqueeze(3) * B.unsqueeze(1))).flatten(2)


def _less(U: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
    """What U (N, G, H, P) loses on its way to ||rows U||_2 <= 1, and whether it is outside (N, 1, 1)."""
    P = U.shape[3]
    grams = gates.grams(U)
    A, M, _ = grams.unflatten(2, (P, P)).unbind(1)
    A.diagonal(dim1=1, dim2=2).sub_(1)
    outer, most = _outer(A)
    X = outer @ A @ outer
    diagonal = X.diagonal(dim1=1, dim2=2).unsqueeze(1)
    outside = diagonal.amax(2, keepdim=True) > 64 * torch.finfo(U.dtype).eps  # v^T A v > 0 for some v
    zeroth, first, second = (grams @ X.flatten(1).unsqueeze(2)).split(1, 1)
    spread = (zeroth + diagonal.sum(2, keepdim=True)) * second / first.square()
    square = X @ X
    F = torch.addcmul(X, (0.5 + SURPLUS * (spread.clamp(1, SPREAD) - 1)) / (1 + _size(square).sqrt() / 4), square)
    most = 1 + most
    L = _balanced(outer @ M @ outer / most, F / (2 * most))
    less = U @ _lost(L, gates.weights)
    return less if gates.own is None else less * gates.own, outside


def _outer(A: Tensor) -> tuple[Tensor, Tensor]:
    """The projector (1 + sign A) / 2 onto the eigenvectors of the symmetric A with positive eigenvalues, between 0 and 1 on those whose
    eigenvalues are too close to 0; and a bound of ||A||_2, at most P^(1/8) times as large."""
    most = _size(A)
    X = A / most
    square = X @ X
    over = _size(square @ square).pow(0.25)
    X = X / over
    for a, b, c in SIGN:
        square = X @ X
        X = torch.baddbmm(X, X, torch.baddbmm(square, square, square, beta=b, alpha=c), beta=a)
    X = X / 2
    X.diagonal(dim1=1, dim2=2).add_(0.5)
    return X, most * over


def _balanced(M: Tensor, F: Tensor) -> Tensor:
    """L >= 0, nearly that of M L + L M = 2 F and as a rule less: C F C with C near M^(-1/2), for 0 <= M <= 1, F >= 0."""
    (a, b, c), (d, e, f) = ROOT
    C = torch.baddbmm(M, M, M, beta=b, alpha=c)
    C.diagonal(dim1=1, dim2=2).add_(a)
    M = C @ M @ C
    last = torch.baddbmm(M, M, M, beta=e, alpha=f)
    last.diagonal(dim1=1, dim2=2).add_(d)
    C = C @ last
    return C @ F @ C.mT


def _lost(L: Tensor, weights: Tensor) -> Tensor:
    """1 - exp(-p_g L), nearly, of each gate: (N, G, P, P)."""
    square = L @ L
    over = (_size(square).sqrt() / REACH).clamp(min=1)
    powers = torch.stack([L, square, square @ L, square @ square], 1).flatten(2)
    weights = weights * over.reciprocal().expand(-1, -1, 4).cumprod(2)
    lost = (weights @ powers).unflatten(2, L.shape[1:])
    lost = (2 * T4**2 / T8) * (2 * lost - lost @ lost)  # T_8 = 2 T_4^2 - 1
    return 2 * lost - lost @ lost


def _size(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True)
