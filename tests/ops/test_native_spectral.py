"""The compiled step against the float64 projection, no worse than the reference; on every instruction set of this machine."""

import pytest
import torch
from spectra import norm, projected, with_spectrum

from stable_rnn import _native
from stable_rnn.functional import SpectralState, spectral_project_
from stable_rnn.ops.spectral import native, reference

pytestmark = pytest.mark.skipif(_native.lib is None, reason=f"compiled module: {_native.reason}")
SHAPES = ((1, 1), (2, 2), (1, 9), (9, 1), (5, 3), (31, 33), (63, 127), (200, 16), (16, 200), (256, 256), (1100, 20))


def block(W, k=16):
    return torch.randn(W.shape[1], min(k, *W.shape))


def gapped(m, n):
    """Few singular values outside 0.9, the others far inside: eight iterations converge to rounding."""
    few = min(5, m, n)
    return with_spectrum(torch.cat([torch.linspace(2, 1.2, few), torch.linspace(0.4, 0, min(m, n) - few)]), m, n)


@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [False, True])
def test_no_worse_than_the_reference(isa, scale, dtype, size):
    Ws = [gapped(*shape).mul(size).to(dtype) for shape in SHAPES]
    bounds = [0.9 * size] * len(Ws)
    found, plain = [W.clone() for W in Ws], [W.clone() for W in Ws]
    blocks = [block(W) for W in Ws]
    norms, near = native.spectral_step(found, blocks, bounds, 2, scale, 8, 7)
    reference.spectral_step(plain, [block(W) for W in Ws], bounds, 2, scale, 8, 7)
    for W, V, R, X, b, shape in zip(Ws, found, plain, blocks, bounds, SHAPES):
        want = projected(W, b, "scale" if scale else "clip")
        # float32 arithmetic: sums over a side, growing like a random walk; then the rounding of what is stored.
        rounding = 2.0**-24 * max(shape) ** 0.5 * W.double().norm() + torch.finfo(dtype).eps / 2 * want.norm()
        assert (V.double() - want).norm() <= 2 * (R.double() - want).norm() + rounding, shape
        gram = (
            X.double().T @ X.double()
        )  # orthonormal, but for columns dropped (zero) where W maps the block to fewer dimensions
        assert (gram - gram.diagonal().round().diag()).abs().max() <= 2.0**-24 * 8 * max(shape) ** 0.5
        assert gram.diagonal()[: min(5, *shape)].min() > 0.9
    assert near.tolist() == [min(5, *shape) for shape in SHAPES]
    assert torch.allclose(norms, torch.tensor(bounds, dtype=torch.float64), rtol=1e-12)


def test_estimates_from_below(isa):
    for shape in SHAPES:
        W = gapped(*shape).float()
        before = W.clone()
        norms, near = native.spectral_step([W], [block(W)], [5.0], 2, False, 8, 0)
        assert float(norms) == pytest.approx(norm(W), rel=1e-5) and int(near) == 0
        assert torch.equal(W, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_matter(isa, dtype):
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)  # what the kernel asks for
        torch.manual_seed(0)
        Ws = [torch.randn(300, 70).to(dtype), torch.randn(20, 20).to(dtype), torch.randn(65, 130).to(dtype)]
        blocks = [block(W) for W in Ws]
        for seed in range(3):
            native.spectral_step(Ws, blocks, [0.5] * 3, 2, False, 2, seed)
        results.append([*Ws, *blocks])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_nothing_is_written_where_one_is_not_finite(isa):
    for bad in (float("nan"), float("inf"), -float("inf")):
        for where in ((0, 0), (69, 39), (33, 38)):
            Ws = [torch.randn(50, 30) * 9, torch.randn(70, 40) * 9]
            Ws[1][where] = bad
            blocks = [block(W) for W in Ws]
            kept = [x.clone() for x in (*Ws, *blocks)]
            with pytest.raises(ValueError, match=r"\(70, 40\)"):
                native.spectral_step(Ws, blocks, [1.0, 1.0], 2, False, 2, 0)
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(kept, (*Ws, *blocks)))


def test_dependent_columns(isa):
    """A block that the matrix maps to fewer dimensions than it has vectors."""
    for rank in (0, 1, 3):
        W = with_spectrum(torch.tensor([3.0] * rank + [0.0] * (40 - rank)), 40, 50).float()
        want = projected(W, 1.0, "clip")
        X = block(W)
        for seed in range(3):
            native.spectral_step([W], [X], [1.0], 2, False, 2, seed)
        assert torch.isfinite(X).all() and (W.double() - want).norm() <= 2.0**-24 * 50 * 3 * rank


def test_forced_backends(monkeypatch):
    W = torch.randn(5, 5, dtype=torch.float64) * 9
    monkeypatch.setenv("STABLE_RNN_BACKEND", "cpu")
    with pytest.raises(ValueError, match="'cpu' cannot run this projection.*float64"):
        spectral_project_(W, 1.0, certify=False)
    state = SpectralState(kept=30)
    with pytest.raises(ValueError, match="16 vectors"):
        spectral_project_(torch.randn(40, 40), 1.0, certify=False, state=state)
    spectral_project_(W.float(), 1.0, certify=False)
    called = []
    monkeypatch.setattr(native, "spectral_step", lambda *a: called.append(a))
    monkeypatch.setenv("STABLE_RNN_BACKEND", "reference")
    spectral_project_(W.float(), 1.0, certify=False)
    monkeypatch.setattr(_native, "lib", None)
    monkeypatch.setenv("STABLE_RNN_BACKEND", "auto")
    with pytest.warns(RuntimeWarning, match="missing"):
        spectral_project_(W.float(), 1.0, certify=False)
    assert not called
