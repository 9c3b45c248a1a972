"""Weights brought in at once: near to where they were, inside, and judged by less than a certificate."""

import pytest
import torch
from torch import nn

from stable_rnn import Certified, StableGRU, StableLSTM, StableRNN
from stable_rnn.stability.bounds import length
from stable_rnn.stability.cells import STABILITY
from stable_rnn.stability.nearest import _less, into_ball
from stable_rnn.stability.projection import _certificate
from stable_rnn.stability.weights import read_module

SCALES = torch.tensor([0.3, 1.0, 0.9, 0.1], dtype=torch.float64)
ROWS = SCALES.repeat_interleave(64)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.02, 0.2, 3.0])
def test_the_nearest_weights_are_inside_up_to_rounding(size, dtype):
    """A few, many and all directions outside: W D is within the bound by no more than rounding takes, and nearly the closest."""
    torch.manual_seed(0)
    bound, w = 0.9, torch.randn(256, 64, dtype=dtype) * size
    w[:, :3] *= 4
    near = into_ball(w, SCALES.to(dtype), bound).double()
    norm = float(torch.linalg.matrix_norm(ROWS * near, 2))
    assert bound * (1 - 400 * torch.finfo(dtype).eps) < norm < bound * (1 - 16 * torch.finfo(dtype).eps)
    exact = w.double()
    for _ in range(40):  # the rounds alone, until nothing is left outside
        squares, v = torch.linalg.eigh(exact.mT @ (ROWS.square() * exact))
        over = squares > bound**2
        if not over.any():
            break
        exact = exact + _less(exact @ v[:, over], squares[over], SCALES, bound) @ v[:, over].mT
    assert (near - w).norm() < (exact - w).norm()


@pytest.mark.parametrize("scales", [(1.0, 1e-3, 1e-6, 1e-6), (1e-3, 1.0, 1.0, 1e-3)])
def test_odd_weights_come_in(scales):
    """Gates that hardly count, directions without length, and next to none."""
    torch.manual_seed(1)
    scales, bound = torch.tensor(scales), 0.9
    w = torch.randn(64, 16)
    w[:16] *= 1e-7
    w[:, 1] *= 1e-12
    w[:, 0] = 0
    for size in (1.0, 30.0, 1e6):
        near = into_ball(w * size, scales, bound)
        scaled = scales.double().repeat_interleave(16)[:, None] * near.double()
        assert torch.linalg.matrix_norm(scaled, 2) <= bound
        assert (near - w * size).norm() <= (w * size).norm() and not near[:, 0].any()


@pytest.mark.parametrize("module", [StableLSTM, StableGRU])
def test_rows_come_first(module):
    """Without a clamp, rows of the forget gate end small for reasons of their own: others keep the room that these don't need, but for what
    little the rows' bound of the norm takes."""
    torch.manual_seed(2)
    plain = {StableLSTM: nn.LSTM, StableGRU: nn.GRU}[module](32, 32)
    stable = module(32, 32, stability=None)
    stable.load_state_dict(plain.state_dict())
    stable.stability = Certified()
    assert stable.project_().certificate().rate <= 0.99
    left = [
        float(w.norm() / v.norm())
        for w, v in zip(*(m.weight_hh_l0.chunk(len(m.weight_hh_l0) // 32) for m in (stable, plain)))
    ]
    assert left[1] < 0.1 and left[2] > 0.5  # gates f and g, z and n


@pytest.mark.parametrize("limits", [Certified(), Certified(0.8, clamp=True), Certified(0.9, input_bound=0.1)])
@pytest.mark.parametrize(
    "make",
    [
        StableLSTM,
        lambda *sizes, **options: StableLSTM(*sizes, proj_size=3, **options),
        StableGRU,
        StableRNN,
        lambda *sizes, **options: StableRNN(*sizes, nonlinearity="relu", **options),
    ],
)
def test_a_cheap_verdict_is_that_of_the_certificate(limits, make):
    """On the way from a layer inside to one far outside, and close to the border."""
    module, said = make(5, 12, stability=limits), []
    cell = module.mode.lower()
    x = torch.full((5,), limits.input_limit(cell), dtype=torch.float64)
    w_hh = module.weight_hh_l0.detach().clone()
    for factor in [0.1, 0.9, 1 - 1e-5, 1.0, *(1 + 10.0**-i for i in range(9, 0, -1)), 1.5, 3, 30, 1e30]:
        module.weight_hh_l0.data = w_hh * factor
        found = STABILITY[cell].verdict(read_module(module)[0][0], x, limits)
        certified, h = _certificate(read_module(module)[0][0], x, length(x), limits)
        if found is not None:
            said.append(found.inside)
            assert found.inside == (certified.rate <= limits.rate)
            assert found.h2 >= certified.bound2 and (found.h >= h).all()
            assert "rnn" in cell or found.h2 == certified.bound2 and torch.equal(found.h, h)
    assert said.count(True) >= 3 and said.count(False) >= 3
