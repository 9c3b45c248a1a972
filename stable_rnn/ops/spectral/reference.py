"""The block power iteration in torch: works on every device and in every dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import scaled

NEAR = 1 - 1e-3  # singular values above NEAR * bound are at the bound, or outside


def rayleigh_ritz(A: Tensor, X: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate top triplets (U, S, V) of A after `iterations` applications of A^T A to the block X, S descending.

    A (m, n), X (n, k) -> U (m, k), S (k,), V (n, k) with A V = U S exactly (up to rounding): each S lies at or below the true value.
    """
    for _ in range(iterations):
        X = torch.linalg.qr(A.mT @ (A @ X)).Q
    U, S, Wh = torch.linalg.svd(A @ X, full_matrices=False)
    return U, S, X @ Wh.mT


def krylov(A: Tensor, X: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `rayleigh_ritz`, from the whole space spanned by X, G X, ..., G^depth X with G = A^T A: more work in a block, but it converges
    like a polynomial of that degree instead of a power (block Lanczos; Golub and Van Loan, Matrix Computations, section 10.3)."""
    basis = torch.linalg.qr(X).Q
    for _ in range(depth):
        Z = A.mT @ (A @ basis[:, -X.shape[1] :])
        basis = torch.cat([basis, torch.linalg.qr(Z - basis @ (basis.mT @ Z)).Q], dim=1)
    U, S, V = rayleigh_ritz(A, torch.linalg.qr(basis).Q, 0)
    kept = X.shape[1]
    return U[..., :kept], S[..., :kept], V[..., :kept]


def fresh_vectors(block: Tensor, count: int, seed: int) -> Tensor:
    """The block (n, k) with its last `count` columns replaced by random ones that depend only on the seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    fresh = (
        torch.randn(block.shape[0], count, generator=generator, dtype=torch.float32, device="cpu")
        / block.shape[0] ** 0.5
    )
    return torch.cat([block[:, : block.shape[1] - count], fresh.to(block)], dim=1)


def spectral_step(
    matrices: list[Tensor],
    blocks: list[Tensor],
    bounds: list[float],
    fresh: int,
    scale: bool,
    iterations: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """One uncertified projection step, in place in every matrix (m, n) and in its block (n, k). See `registration.py`."""
    work = []
    for W in matrices:
        A, exponent = scaled(W)
        if not torch.isfinite(A).all():
            raise ValueError(f"a matrix of shape {tuple(W.shape)} holds NaN or infinite values")
        work.append((A, exponent))
    norms = torch.zeros(len(matrices), dtype=torch.float64, device="cpu")
    near = torch.zeros(len(matrices), dtype=torch.int64, device="cpu")
    for i, (W, X, bound, (A, exponent)) in enumerate(zip(matrices, blocks, bounds, work)):
        if A.numel() == 0:
            continue
        unit = torch.exp2(exponent.double())
        A = A.to(X.dtype)
        X_start = fresh_vectors(X, min(fresh, X.shape[1]), seed + i)
        U, S, V = rayleigh_ritz(A, X_start, iterations)
        limit = (bound / unit).to(S)
        X.copy_(V)
        near[i] = (S > NEAR * limit).sum()
        if S[0] > limit:
            if scale:
                A = A * (limit / S[0])
            else:
                A = A - (U * (S - limit).clamp(min=0)) @ V.mT
            W.copy_(A.double() * unit)
        norms[i] = (S[0].double() * unit).clamp(max=bound)
    return norms, near


def top_singular(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value and its vectors, converged: (..., m, n) -> sigma (...), u (..., m), v (..., n). See `registration.py`."""
    A, exponent = scaled(W)
    if not torch.isfinite(A).all():
        raise ValueError(f"W of shape {tuple(W.shape)} holds NaN or infinite values")
    A = A.to(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
    *batch, m, n = W.shape
    if A.numel() == 0:
        return A.new_zeros(batch), A.new_zeros(*batch, m), A.new_zeros(*batch, n)
    sigmas, u, v = zip(*map(_top, A.reshape(-1, m, n)))
    unit = torch.exp2(exponent.double()).to(W.device)
    sigma = (torch.stack(sigmas).reshape(batch).double() * unit).to(A.dtype)
    return sigma, torch.stack(u).reshape(*batch, m), torch.stack(v).reshape(*batch, n)


def _top(A: Tensor, rounds: int = 4, depth: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    if min(A.shape) > 100:  # else an SVD is as fast
        V = fresh_vectors(A.new_empty(A.shape[1], 8), 8, seed=0)
        for _ in range(rounds):
            U, S, V = krylov(A, V, depth)
            residual = torch.linalg.vector_norm(A.mT @ U[:, 0] - V[:, 0] * S[0])
            if residual <= 64 * torch.finfo(A.dtype).eps * S[0]:
                return S[0], U[:, 0], V[:, 0]
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return S[0], U[:, 0], Vh[0]
