"""The products of the gradients, C = A B: against float64, on every instruction set, for any threads, and where Python takes them."""

import lane_loop as loop
import pytest
import torch
from test_native_threads import leaving

from stable_rnn import StableLSTM, _native
from stable_rnn.ops.recurrence import native

pytestmark = pytest.mark.skipif(_native.lib is None, reason=f"compiled module: {_native.reason}")


def product(a, b, transposed, threads=1, onto=None):
    """a (m, k), stored by columns where `transposed`. What lies behind the result in memory must stay as it is."""
    (m, k), n = a.shape, b.shape[1]
    stored = a.T.contiguous() if transposed else a.contiguous()
    memory = torch.full((m * n + 16,), loop.NAN)
    c = memory[: m * n].view(m, n)
    if onto is not None:
        c.copy_(onto)
    _native.lib.product(threads, transposed, onto is not None, m, k, n, *map(loop.at, (stored, b, c)))
    assert memory[m * n :].isnan().all()
    return c


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "m, k, n", [(0, 3, 2), (1, 1, 1), (5, 255, 3), (33, 256, 31), (29, 257, 64), (200, 600, 70), (7, 1030, 130)]
)
def test_against_float64(m, k, n, transposed, isa):  # noqa: F811
    a, b, before = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    for onto in (None, before):
        found = product(a, b, transposed, onto=onto)
        start = 0.0 if onto is None else onto.double()
        exact, eager = start + a.double() @ b.double(), a @ b if onto is None else onto + a @ b
        if m:
            error, theirs = (float((c.double() - exact).abs().max()) for c in (found, eager))
            assert error <= 2 * theirs + torch.finfo(torch.float32).eps * k**0.5
        for threads in (2, 3, 7):
            assert torch.equal(product(a, b, transposed, threads, onto), found)
        if m > 4:  # a row does not depend on those beside it
            assert torch.equal(product(a[3:4], b, transposed, onto=onto if onto is None else onto[3:4]), found[3:4])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_torch(value):
    a, b = torch.randn(40, 300), torch.randn(300, 20)
    a[3, 290], b[7, 5] = value, value
    a[9], b[:, 11] = 0, 0
    for transposed in (False, True):
        assert torch.equal(product(a, b, transposed).isfinite(), (a @ b).isfinite())


@pytest.mark.skipif(not (_native.lib and _native.lib.cpu_features()["openmp"]), reason="no threads")
@pytest.mark.parametrize("transposed", [False, True])
def test_threads_may_leave(transposed):
    a, b = torch.randn(90, 600), torch.randn(600, 70)
    expected = product(a, b, transposed)
    for round in range(6 if transposed else 2):
        with leaving(round):
            assert torch.equal(product(a, b, transposed, 3), expected)


def test_bad_sizes_are_refused():
    with pytest.raises(RuntimeError, match="inner must be positive"):
        _native.lib.product(1, False, False, 2, 0, 2, 0, 0, 0)


def test_any_strides_and_dtypes():
    """By the kernel or by torch, and added to."""
    wide = torch.randn(96, 160)
    for a in (wide, wide.T.contiguous().T, torch.randn(96, 320)[:, ::2], wide.T[:64].T, wide.double(), wide.bfloat16()):
        for columns in (1, 50):
            b = torch.randn(columns, a.shape[1], dtype=a.dtype).T
            before = torch.randn(a.shape[0], columns, dtype=a.dtype)
            tolerance = dict(rtol=1e-2, atol=0.3) if a.dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(native.product(a, b), a @ b, **tolerance)
            torch.testing.assert_close(native.product(a, b, before.clone()), before + a @ b, **tolerance)


def test_gradients_take_it(monkeypatch):
    """The three products of a layer's backward pass, but none where they have to be differentiable."""
    taken, module = [], _native.lib

    class Watched:
        def __getattr__(self, name):
            return getattr(module, name)

        def product(self, **fields):
            taken.append(fields["transposed"])
            module.product(**fields)

    monkeypatch.setattr(native, "_WORK", 1)
    monkeypatch.setattr(_native, "lib", Watched())
    ours, exact = StableLSTM(17, 19, stability=None), StableLSTM(17, 19, stability=None, backend="reference").double()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(20, 3, 17)
    found = torch.autograd.grad(ours(a := x.clone().requires_grad_())[0].square().sum(), [a, *ours.parameters()])
    assert sorted(taken) == [False, True, True]
    expected = torch.autograd.grad(exact(b := x.double().requires_grad_())[0].square().sum(), [b, *exact.parameters()])
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-4, atol=1e-4)
    y = ours(a)[0].square().sum()
    assert torch.autograd.grad(y, a, create_graph=True)[0].requires_grad and len(taken) == 3
