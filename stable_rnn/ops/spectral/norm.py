"""A rigorous upper bound of the spectral norm: Gram matrix, Cholesky factor, and the residual that proves it. See README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import overlaps_itself

UNIT = 2.0**-53  # unit roundoff of float64
BLOCK = 128  # columns, at least, of a product that uses symmetry


def check_dtype(W: Tensor, name: str = "W") -> None:
    """Raises TypeError for what is no dense, real floating tensor, ValueError for fewer than two dimensions."""
    if not isinstance(W, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(W).__name__}")
    if not W.is_floating_point():
        raise TypeError(f"{name} must have a real floating dtype, got {W.dtype}")
    if W.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got the layout {W.layout}; pass {name}.to_dense()")
    if hasattr(W, "placements"):
        raise TypeError(
            f"{name} must be one machine's tensor, got a DTensor; pass {name}.full_tensor(), or project its module"
        )
    if W.dim() < 2:
        raise ValueError(f"{name} must have the shape (..., m, n), got {tuple(W.shape)}")


def check_values(W: Tensor, name: str = "W") -> None:
    """After `check_dtype`: raises ValueError for the meta device."""
    if W.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and holds no values; give it some first")


def check_writable(W: Tensor, name: str = "W") -> None:
    """After `check_dtype`: raises ValueError for what has one place in memory for several entries."""
    if overlaps_itself(W):
        raise ValueError(
            f"{name} overlaps itself, as an expanded tensor does, and cannot be written; pass {name}.clone()"
        )


def check_matrix(W: Tensor, name: str = "W") -> Tensor:
    """W detached, after the checks of `check_dtype`, `check_values` and one for NaN and infinite entries."""
    check_dtype(W, name)
    check_values(W, name)
    W = W.detach()
    if not torch.isfinite(W).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    return W


def check_bound(bound: object) -> None:
    """Raises TypeError for what is no number, list or tensor of numbers, ValueError for a tensor that requires grad. Values: elsewhere."""
    if isinstance(bound, Tensor) and bound.requires_grad:
        raise ValueError(
            "bound requires grad, and its gradient would be lost: it is a constant here, pass bound.detach()"
        )
    if hasattr(bound, "tolist"):  # tensors and arrays
        bound = bound.tolist()
    if isinstance(bound, (list, tuple)):
        for each in bound:
            check_bound(each)
    elif isinstance(bound, bool) or not isinstance(bound, (int, float)):
        raise TypeError(f"bound must be a number or several, got {bound!r}")


def shift(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2**exponent for float64 x, in two factors so that neither power overflows."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return (x * torch.exp2(half.double())).mul_(torch.exp2((exponent - half).double()))


def scaled(W: Tensor) -> tuple[Tensor, Tensor]:
    """(A, e) with W = A * 2**e, A float64 (..., m, n), max |A| in [1/2, 1), and e (...) int. A zero or empty matrix has e = 0.

    Exact, but for entries 2^1022 times smaller than the largest.
    """
    A = (W.cpu() if W.device.type == "mps" else W).double()  # MPS has no float64
    if A.numel() == 0:
        return A, torch.zeros(A.shape[:-2], dtype=torch.int32, device=A.device)
    exponent = torch.frexp(torch.maximum(A.amax((-2, -1)), -A.amin((-2, -1)))).exponent
    return shift(A, -exponent[..., None, None]), exponent


def tall(A: Tensor) -> Tensor:
    return A if A.shape[-2] >= A.shape[-1] else A.mT


def width(m: int, n: int) -> float:
    """How far, relatively, a proven bound of sigma^2 may lie above the number it was proven from; n the smaller side."""
    return 1e-9 + 4 * UNIT * n * (m + 3 * n)


def gram(A: Tensor, upper: bool = False) -> Tensor:
    """A^T A (..., n, n) of A (..., m, n), in blocks of columns of which five eighths are computed, the others mirrored.

    upper: A (..., n, n) is taken for upper triangular, up to a block; half of the rest are left."""
    n = A.shape[-1]
    G, wide = A.new_empty(*A.shape[:-2], n, n), max(BLOCK, -(-n // 4))
    for start in range(0, n, wide):
        stop = start + wide
        rows = A[..., : stop if upper else None, :]
        part = G[..., start:stop, start:] = rows[..., start:stop].mT @ rows[..., start:]
        G[..., stop:, start:stop] = part[..., wide:].mT
    return G


def prove(A: Tensor, t: Tensor, G: Tensor | None = None) -> Tensor:
    """An upper bound of ||A||_2^2 close to t, or infinity where t is too small to prove one.

    A (..., m, n) float64, m >= n, with max |A| in [1/2, 1) or A = 0;  t (...) float64, positive;  G = gram(A), if it is there.
    Rigorous for floating point arithmetic: with M = t I - G and any lower triangular L,

        t I - A^T A  =  L L^T + (M - L L^T) + (t I - G - M) + (G - A^T A),

    and L L^T is positive semidefinite, so ||A||^2 <= t + the norms of the three remainders. The computed first one is added, the
    others (and its own error) are bounded by gamma_k = k u / (1 - k u) (Higham, Accuracy and Stability, section 3.5), which holds
    for any order of summation. So nothing is assumed about the Cholesky routine; float64 products are assumed to be plain sums.
    """
    m, n = A.shape[-2:]
    G = gram(A) if G is None else G
    M = -G
    M.diagonal(dim1=-2, dim2=-1).add_(t[..., None])
    L, info = torch.linalg.cholesky_ex(M)
    residual = torch.linalg.matrix_norm(M - gram(L.mT, upper=True))
    squares_A, squares_L = G.diagonal(dim1=-2, dim2=-1).sum(-1), L.square().sum((-2, -1))
    diagonal = M.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    gamma_m, gamma_n = (m + 2) * UNIT / (1 - (m + 2) * UNIT), (n + 2) * UNIT / (1 - (n + 2) * UNIT)
    # The factor 2 covers the rounding of these few sums themselves; u * t covers underflow in the products.
    error = 2 * (residual + gamma_m * squares_A + gamma_n * squares_L + UNIT * (diagonal + t))
    return torch.where(info == 0, (t + error) * (1 + 4 * UNIT), torch.inf)


def spectral_norm_bound(W: Tensor) -> Tensor:
    """A rigorous upper bound of the spectral norm (largest singular value), rounded upwards.

    Shapes:  W (..., m, n), any real floating dtype  ->  (...) float64. Zero for zero and empty matrices; inf if the norm is beyond
    float64. Not differentiable.

    It lies above the norm of the stored matrix in exact arithmetic, by about 1e-9 relative (see `width`). An eigenvalue of the Gram
    matrix in float64 gives the estimate, and a Cholesky factorization with its residual proves it (`prove`; after Rump, "Verification
    of positive definiteness", BIT 46, 2006). So it may be used in a certificate, which a power iteration may not.

    Raises ValueError for NaN or infinite entries, the meta device or fewer than two dimensions, TypeError for other dtypes and sparse ones.
    """
    A, exponent = scaled(check_matrix(W))
    if A.numel() == 0:
        return A.new_zeros(A.shape[:-2])
    A = tall(A)
    m, n = A.shape[-2:]
    G = gram(A)
    estimate = torch.linalg.eigvalsh(G)[..., -1].clamp(min=0.25)  # max |A| >= 1/2, and so is the norm
    margin = width(m, n) / 2
    square = prove(A, estimate * (1 + margin), G)
    while torch.isinf(square).any():  # never seen; a wider margin must succeed in the end
        margin *= 16
        square = torch.where(torch.isinf(square), prove(A, estimate * (1 + margin), G), square)
    up = torch.full_like(square, torch.inf)
    norm = torch.nextafter(shift(torch.nextafter(square.sqrt(), up), exponent), up)
    return torch.where((A == 0).all(-1).all(-1), 0.0, norm).to(W.device if W.device.type != "mps" else "cpu")
