"""`spectral_projection`: values, derivatives of first and second order, vmap, compile, and the registered ops."""

import pytest
import torch
from spectra import norm, projected, with_spectrum
from torch.autograd import gradcheck, gradgradcheck

from stable_rnn.functional import SpectralState, spectral_projection

ops = torch.ops.stable_rnn


@pytest.mark.parametrize("bound", [0.3, 50.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (5, 4), (3, 7), (2, 3, 4), (2, 1, 3, 3)])
def test_gradients(shape, bound):
    W = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda w: spectral_projection(w, bound), (W,))
    assert gradgradcheck(lambda w: spectral_projection(w, bound), (W,))


def test_gradient_with_a_large_block():
    """More singular values than the block holds: convergence, not exhaustion."""
    W = with_spectrum(torch.cat([torch.tensor([2.0]), torch.linspace(1.7, 0, 104)]), 105, 110).requires_grad_()
    assert gradcheck(lambda w: spectral_projection(w, 1.0), (W,), fast_mode=True)
    assert gradgradcheck(lambda w: spectral_projection(w, 1.0), (W,), fast_mode=True)


@pytest.mark.parametrize(
    "W", [torch.zeros(3, 3), torch.eye(3) * 0.4, torch.zeros(3, 0), torch.zeros(0, 3), torch.zeros(0, 3, 3)]
)
def test_inside_it_is_the_identity_even_where_values_coincide(W):
    W = W.double().requires_grad_()
    assert torch.equal(spectral_projection(W, 0.5), W)
    assert gradcheck(lambda w: spectral_projection(w, 0.5), (W,))
    assert W.numel() == 0 or gradgradcheck(lambda w: spectral_projection(w, 0.5), (W,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values(dtype):
    # Converged to 64 eps of the precision of the iteration; each entry is then rounded to half an eps of its own.
    error = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps + torch.finfo(dtype).eps / 2
    for n in (40, 120):  # by SVD, by iteration
        check_values(dtype, error, n)


def test_huge_weights():
    W = torch.randn(4, 4) * 1e30
    assert norm(spectral_projection(W, 1.0)) == pytest.approx(1, rel=1e-5)


def check_values(dtype, error, n):
    for values in (
        torch.linspace(3, 0, n),
        torch.full((n,), 2.0),
        torch.cat([torch.tensor([2.0]), torch.full((n - 1,), 1.9999)]),
        torch.linspace(0.9, 0, n),
    ):
        W = with_spectrum(values, n, n + 20).to(dtype)
        found, want = spectral_projection(W, 1.0), projected(W, 1.0, "scale")
        assert found.dtype == dtype and (found.double() - want).norm() <= error * want.norm()


def loss(W):
    y = spectral_projection(W, 0.5)
    return y.pow(2).sum() + y[..., 0, 0].sum() + y.sin().sum()


def test_vmap():
    W = torch.randn(6, 5, 4, dtype=torch.float64)
    W[0] *= 0.01
    gradient, hessian = torch.func.grad(loss), torch.func.jacrev(torch.func.grad(loss))
    for batched, single in ((torch.func.vmap(gradient)(W), gradient), (torch.func.vmap(hessian)(W), hessian)):
        alone = torch.stack([single(w) for w in W])
        assert torch.allclose(batched, alone, rtol=1e-9, atol=1e-12)  # float64: iterated to convergence
    assert torch.allclose(torch.func.vmap(gradient, in_dims=1)(W.movedim(0, 1)), torch.func.vmap(gradient)(W))
    batch = W.clone().requires_grad_()
    loss(batch).backward()
    assert torch.allclose(batch.grad, torch.func.vmap(gradient)(W))


def test_compile():
    W = torch.randn(6, 5, requires_grad=True)
    (want,) = torch.autograd.grad(loss(W), W)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(W), W)
    assert torch.equal(found, want)


def test_third_derivative():
    """Every backward is differentiable: the third derivative along a line equals that of central differences."""
    W, D = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    along = lambda t: loss(W + t * D)  # noqa: E731
    second = torch.func.grad(torch.func.grad(along))
    zero, h = torch.zeros((), dtype=torch.float64), 1e-5
    assert float(torch.func.grad(second)(zero)) == pytest.approx(
        float(second(zero + h) - second(zero - h)) / (2 * h), rel=1e-6
    )


def test_as_parametrization():
    from torch.nn.utils import parametrize

    class Bounded(torch.nn.Module):
        def forward(self, W):
            return spectral_projection(W, 0.9)

    layer = torch.nn.Linear(6, 6)
    torch.nn.init.normal_(layer.weight)
    parametrize.register_parametrization(layer, "weight", Bounded())
    layer(torch.randn(2, 6)).sum().backward()
    assert norm(layer.weight.detach()) <= 0.9 * (1 + 1e-5) and layer.parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    for shape in ((3, 5, 4), (4, 4), (2, 0, 3)):
        torch.library.opcheck(ops.top_singular.default, (torch.randn(shape).to(dtype),))
    Ws = [torch.randn(20, 30).to(dtype), torch.randn(5, 9).to(dtype)]
    state = SpectralState()
    state.prepare(Ws)
    for scale in (False, True):
        torch.library.opcheck(ops.spectral_step_.default, (Ws, state.blocks, [0.9, 0.2], 2, scale, 1, 3))
    with pytest.raises(ValueError, match="iterations"):
        ops.spectral_step_(Ws, state.blocks, [0.9, 0.2], 2, False, 0, 3)


@pytest.mark.parametrize(
    "W, bound, error, word",
    [
        (torch.tensor([[1.0, float("nan")]]), 1.0, ValueError, "NaN"),
        (torch.tensor([[float("inf")]]), 1.0, ValueError, "infinite"),
        (torch.ones(3), 1.0, ValueError, r"\(3,\)"),
        (torch.ones(2, 2), 0.0, ValueError, "0.0"),
        (torch.ones(2, 2), float("nan"), ValueError, "nan"),
        (torch.ones(2, 2).int(), 1.0, TypeError, "int32"),
        ([[1.0]], 1.0, TypeError, "list"),
        (torch.ones(2, 2), [1.0], TypeError, r"bound must be a number, got \[1.0\]"),
        (torch.ones(2, 2), torch.tensor([1.0, 2.0]), TypeError, r"bound must be a number, got tensor"),
    ],
)
def test_errors(W, bound, error, word):
    with pytest.raises(error, match=word):
        spectral_projection(W, bound)
