"""`row_project_`: the exact projection onto the l1 ball, sums never above the bound, rows inside untouched."""

import math
from fractions import Fraction

import pytest
import torch

from stable_rnn.functional import row_project_

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
METHODS = ("l1", "scale")


def exact_sum(row):
    return sum((abs(Fraction(x)) for x in row.double().tolist()), Fraction(0))


def l1_projection(row, bound):
    """Bisection for the threshold, in float64: slow and plain."""
    w = row.double()
    if math.fsum(w.abs().tolist()) <= bound:
        return w
    low, high = 0.0, float(w.abs().max())
    for _ in range(200):
        theta = (low + high) / 2
        low, high = (theta, high) if float((w.abs() - theta).clamp(min=0).sum()) > bound else (low, theta)
    return w.sign() * (w.abs() - high).clamp(min=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 31, 33, 200])
def test_projection(n, method, dtype):
    W = torch.randn(25, n, dtype=torch.float64) * torch.logspace(-3, 3, 25, dtype=torch.float64)[:, None]
    W[3], W[4], W[5] = 2.0, 0.0, 0.0
    W[5, 0] = 9.0
    W = W.to(dtype)
    before, bound = W.clone(), 0.7
    assert row_project_(W, bound, method) is W
    for row, old in zip(W, before):
        assert exact_sum(row) <= Fraction(bound)
        if exact_sum(old) <= Fraction(bound):
            assert torch.equal(row, old)
            continue
        want = l1_projection(old, bound) if method == "l1" else old.double() * (bound / float(exact_sum(old)))
        # Rounding towards zero: one unit in the last place of each entry (or the smallest number), and float64 sums.
        last = torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((row.double() - want).abs() <= last + 1e-12).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_exactly_at_the_bound_is_inside(method, dtype):
    W = torch.tensor([[0.5, -0.5, 0.0], [0.25, 0.25, 0.5], [1.0, 0.0, 0.0]], dtype=dtype)
    before = W.clone()
    assert torch.equal(row_project_(W, 1.0, method), before)
    W[0, 2] = torch.finfo(dtype).smallest_normal  # by the least bit above
    row_project_(W, 1.0, method)
    assert exact_sum(W[0]) <= 1 and exact_sum(W[0]) > Fraction(98, 100) and torch.equal(W[1:], before[1:])


@pytest.mark.parametrize("method", METHODS)
def test_again_changes_nothing(method):
    W = torch.randn(50, 40)
    once = row_project_(W, 1.0, method).clone()
    assert torch.equal(row_project_(W, 1.0, method), once)


@pytest.mark.parametrize("method", METHODS)
def test_any_size(method):
    for size, bound in ((1e305, 1.0), (1e305, 1e307), (1e-310, 1e-310), (1e300, 1e-300), (1.0, 1e-300)):
        W = torch.randn(6, 30, dtype=torch.float64) * size
        row_project_(W, bound, method)
        assert torch.isfinite(W).all() and all(exact_sum(row) <= Fraction(bound) for row in W)
    W = torch.tensor([[1e30, 1e30, 5.0], [1e30, 3.0, 2.0]], dtype=torch.float64)
    row_project_(W, 1.0)
    assert torch.allclose(W, torch.tensor([[0.5, 0.5, 0], [1, 0, 0]], dtype=torch.float64), rtol=1e-12)


def test_bounds_per_row_batches_and_views():
    big = torch.randn(8, 9, 10)
    view, bounds = big[:, 2:6, ::2], torch.rand(8, 4) + 0.1
    dense, outside = view.clone(), big.clone()
    row_project_(view, bounds)
    for i in range(8):
        for j in range(4):
            assert exact_sum(view[i, j]) <= Fraction(float(bounds[i, j]))
            assert torch.equal(view[i, j], row_project_(dense[i, j : j + 1].clone(), float(bounds[i, j]))[0])
    outside[:, 2:6, ::2] = view
    assert torch.equal(big, outside)
    parameter = torch.nn.Parameter(torch.randn(8, 5))
    row_project_(parameter[4:8], [0.1, 0.2, 0.3, 0.4])
    assert parameter.abs().sum(-1)[7] <= 0.4 < parameter.abs().sum(-1)[:4].min()
    for shape in ((0, 3), (3, 0), (0, 2, 3)):
        row_project_(torch.zeros(shape), 1.0)


@pytest.mark.parametrize(
    "W, bound, method, error, word",
    [
        (torch.tensor([[9.0], [float("nan")]]), 1.0, "l1", ValueError, "NaN"),
        (torch.ones(2, 2), 0.0, "l1", ValueError, "0.0"),
        (torch.ones(2, 2), -1.0, "l1", ValueError, "-1"),
        (torch.ones(2, 2), float("inf"), "l1", ValueError, "inf"),
        (torch.ones(2, 2), [1.0, float("nan")], "l1", ValueError, "nan"),
        (torch.ones(2, 2), [1.0, 1.0, 1.0], "l1", ValueError, r"\(3,\)"),
        (torch.ones(2, 2), 1.0, "l2", ValueError, "l2"),
        (torch.ones(2), 1.0, "l1", ValueError, r"\(2,\)"),
        (torch.ones(2, 2).long(), 1.0, "l1", TypeError, "int64"),
        ([[1.0]], 1.0, "l1", TypeError, "list"),
    ],
)
def test_errors_write_nothing(W, bound, method, error, word):
    before = W.clone() if isinstance(W, torch.Tensor) else W
    with pytest.raises(error, match=word):
        row_project_(W, bound, method)
    assert (
        W is before or torch.equal(torch.nan_to_num(W, 7), torch.nan_to_num(before, 7))
        if isinstance(W, torch.Tensor)
        else True
    )


@pytest.mark.parametrize(
    "W, error, text",
    [
        (torch.ones(3, 3, device="meta"), ValueError, "W is on the meta device"),
        (torch.ones(3, 3).to_sparse(), TypeError, "sparse_coo"),
        (torch.ones(3).expand(3, 3), ValueError, "W overlaps itself"),
    ],
)
def test_what_cannot_be_projected(W, error, text):
    with pytest.raises(error, match=text):
        row_project_(W, 1.0)
