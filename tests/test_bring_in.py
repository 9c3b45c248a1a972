"""LSTM weights brought in at once: near to where they were, inside, and judged by less than a certificate."""

import pytest
import torch

from stable_rnn import Certified, StableLSTM
from stable_rnn.stability.cells import STABILITY
from stable_rnn.stability.nearest import _less, into_ball
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
    assert (near - w).norm() < 1.005 * (exact - w).norm()


@pytest.mark.parametrize("limits", [Certified(), Certified(0.8, clamp=True), Certified(0.9, input_bound=0.1)])
@pytest.mark.parametrize("proj_size", [0, 3])
def test_a_cheap_verdict_is_that_of_the_certificate(limits, proj_size):
    """On the way from a layer inside to one far outside, and close to the border."""
    module, said = StableLSTM(5, 12, proj_size=proj_size, stability=limits), []
    x = torch.full((5,), limits.input_limit("lstm"), dtype=torch.float64)
    w_hh = module.weight_hh_l0.detach().clone()
    for factor in [0.1, 0.9, 1 - 1e-5, 1.0, *(1 + 10.0**-i for i in range(9, 0, -1)), 1.5, 3, 30, 1e30]:
        module.weight_hh_l0.data = w_hh * factor
        found = STABILITY["lstm"].verdict(read_module(module)[0][0], x, limits)
        certified = module.certificate()
        if found is not None:
            said.append(found.inside)
            assert found.inside == (certified.rate <= limits.rate)
            assert found.h2 == certified.layers[0].bound2 and float(found.h.max()) == certified.layers[0].bound
    assert said.count(True) >= 3 and said.count(False) >= 3
