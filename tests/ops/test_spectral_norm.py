"""`spectral_norm_bound`: never below the norm, in exact rational arithmetic; and tight."""

from fractions import Fraction

import pytest
import torch
from spectra import norm, with_spectrum

from stable_rnn.functional import spectral_norm_bound
from stable_rnn.ops.spectral.norm import gram

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rayleigh(W):
    """A rational lower bound of ||W||^2, off by the square of the rounding error of the top singular vector: about 1e-30."""
    rows = [[Fraction(x) for x in row] for row in W.double().tolist()]
    x = [Fraction(c) for c in torch.linalg.svd(W.double()).Vh[0].tolist()]
    y = [sum((a * b for a, b in zip(row, x)), Fraction(0)) for row in rows]
    return sum(c * c for c in y) / sum(c * c for c in x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (6, 6), (12, 5), (5, 12), (16, 16)])
def test_never_below(shape, dtype):
    for trial in range(5):
        W = torch.randn(shape, dtype=torch.float64).mul(10.0 ** (trial - 2)).to(dtype)
        assert Fraction(float(spectral_norm_bound(W))) ** 2 >= rayleigh(W)


@pytest.mark.parametrize(
    "values",
    [[0.9] * 12, [1.0 + 1e-15] * 12, [1] + [0] * 11, [1, 1 - 1e-9] + [1e-8] * 10, [10.0**-i for i in range(12)]],
)
def test_never_below_on_hard_spectra(values):
    for shape in ((12, 12), (15, 12), (12, 15)):
        W = with_spectrum(values, *shape)
        assert Fraction(float(spectral_norm_bound(W))) ** 2 >= rayleigh(W)


def test_norms_known_exactly():
    H = torch.ones(1, 1)
    for _ in range(7):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])  # H^T H = 128 I
    a, b = torch.arange(1.0, 41), torch.arange(-7.0, 13)
    for W, square in (
        (H, 128),
        (torch.outer(a, b), int(a @ a) * int(b @ b)),
        (torch.eye(33), 1),
        (torch.tensor([[3.0, 4.0]]), 25),
    ):
        bound = Fraction(float(spectral_norm_bound(W)))
        assert square <= bound**2 <= square * (1 + Fraction(1, 10**8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 31), (127, 63), (63, 200), (256, 256)])
def test_tight(shape, dtype):
    for values in (torch.linspace(1, 0, min(shape)), torch.full((min(shape),), 0.999)):
        W = with_spectrum(values, *shape).to(dtype)
        assert 1 - 1e-12 <= float(spectral_norm_bound(W)) / norm(W) <= 1 + 1e-8


def test_scales_exactly_by_powers_of_two():
    W = torch.randn(7, 5, dtype=torch.float64)
    bound = spectral_norm_bound(W)
    for power in (-1000, -300, 300, 1000):
        found = spectral_norm_bound(W * 2.0**power)
        assert bound * 2.0**power <= found * (1 + 1e-15) and found <= bound * 2.0**power * (1 + 1e-15)


def test_the_ends_of_the_range():
    tiny, huge = 5e-324, torch.finfo(torch.float64).max
    assert spectral_norm_bound(torch.full((3, 3), tiny, dtype=torch.float64)) >= 3 * tiny
    assert spectral_norm_bound(torch.tensor([[huge]], dtype=torch.float64)) >= huge
    assert spectral_norm_bound(torch.full((2, 2), huge, dtype=torch.float64)) == torch.inf
    float32 = torch.finfo(torch.float32).max
    assert 4 * float32 <= spectral_norm_bound(torch.full((4, 4), float32)) <= 4 * float32 * (1 + 1e-8)
    assert 1 <= spectral_norm_bound(torch.tensor([[1.0, 0], [0, 1e-300]], dtype=torch.float64)) <= 1 + 1e-8


def test_zero_empty_and_batches():
    for shape in ((3, 4), (0, 4), (4, 0), (2, 0, 3, 4), (5, 0, 3)):
        assert torch.equal(spectral_norm_bound(torch.zeros(shape)), torch.zeros(shape[:-2], dtype=torch.float64))
    W = torch.randn(2, 3, 6, 4)
    W[1, 2] = 0
    found = spectral_norm_bound(W)
    assert found.shape == (2, 3) and found.dtype == torch.float64 and found[1, 2] == 0
    for i in range(2):
        for j in range(3):
            assert found[i, j] == pytest.approx(float(spectral_norm_bound(W[i, j])), rel=1e-9)


def test_needs_no_correct_cholesky(monkeypatch):
    """A wrong factor widens the bound; it cannot make it too small."""
    W = torch.randn(9, 7, dtype=torch.float64)
    cholesky = torch.linalg.cholesky_ex

    def wrong(M):
        L, info = cholesky(M)
        return L * (1 + 1e-3 * torch.rand_like(L)), info

    good = spectral_norm_bound(W)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", wrong)
    assert spectral_norm_bound(W) > good * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (300, 257), (2, 130, 129), (300, 600)])
def test_products_use_symmetry(shape):
    A = torch.randn(shape, dtype=torch.float64)
    G = gram(A)
    assert torch.allclose(G, A.mT @ A, rtol=1e-12, atol=1e-12)
    assert torch.equal(G[..., :64, 150:], G[..., 150:, :64].mT)
    U = A[..., : min(shape[-2:]), : min(shape[-2:])].triu()
    assert torch.allclose(gram(U, upper=True), U.mT @ U, rtol=1e-12, atol=1e-12)


def test_a_triangle_needs_no_zeros():
    """What a wrong factor holds below the diagonal is left out or counted: the product is still positive semidefinite."""
    A = torch.randn(300, 300, dtype=torch.float64)
    assert torch.linalg.eigvalsh(gram(A, upper=True))[0] > -1e-9


def test_leaves_the_graph_alone():
    W = torch.randn(3, 3, requires_grad=True)
    assert not spectral_norm_bound(W).requires_grad


@pytest.mark.parametrize(
    "bad, error, word",
    [
        (torch.tensor([[1.0, float("nan")]]), ValueError, "NaN"),
        (torch.tensor([[1.0, float("inf")]]), ValueError, "infinite"),
        (torch.ones(3), ValueError, r"\(3,\)"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, "int64"),
        (torch.ones(3, 3, dtype=torch.complex64), TypeError, "complex64"),
        ([[1.0]], TypeError, "list"),
        (torch.ones(3, 3, device="meta"), ValueError, "meta device"),
        (torch.ones(3, 3).to_sparse(), TypeError, "sparse_coo"),
    ],
)
def test_errors(bad, error, word):
    with pytest.raises(error, match=word):
        spectral_norm_bound(bad)
