"""A certified set is a promise: a module that was trained out of reach of any projection says so, once, and nobody else does."""

import copy
import warnings

import pytest
import torch
from torch import nn

from stable_rnn import (
    Certified,
    ForgetCap,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    project_after_step,
    stabilize,
    watch,
)

MODULES = [
    lambda **options: StableLSTM(3, 4, **options),
    lambda **options: StableRNN(3, 4, **options),
    lambda **options: StableLSTMCell(3, 4, **options),
    lambda **options: StableRNNCell(3, 4, **options),
]


def train(m, steps=1, forward=None, zero=True, rate=0.1):
    optimizer = torch.optim.SGD([w for w in m.parameters() if w.requires_grad], rate)
    for _ in range(steps):
        out = (m if forward is None else forward)(
            torch.randn(5, 3) if isinstance(m, nn.RNNCellBase) else torch.randn(5, 2, 3)
        )
        (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
        optimizer.step()
        if zero:
            optimizer.zero_grad()


def said(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [w for w in caught if "trained and not projected" in str(w.message)]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("make", MODULES)
def test_said_once(make, zero):
    m = make()
    train(m, 2, zero=zero)
    found = said(m.eval)
    assert len(found) == 1 and "project_()" in str(found[0].message) and found[0].filename == __file__
    assert not said(m.eval)
    m.train()
    train(m)
    assert not said(m.eval)


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize(
    "settle",
    [
        lambda m: m.project_(),
        lambda m: m.project_(certify=False),
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: m.load_state_dict({name: w.clone() for name, w in m.state_dict().items()}, assign=True),
        lambda m: setattr(m, "stability", None),
    ],
)
def test_not_after_a_projection_or_a_load(make, settle):
    m = make()
    train(m)
    settle(m)
    assert not said(m.eval)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_not_under_project_after_step(every):
    net = nn.Sequential(StableLSTM(3, 4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    handle = project_after_step(optimizer, net, every=every)

    def step():
        net(torch.randn(5, 2, 3))[0].sum().backward()
        optimizer.step()

    for _ in range(3):
        net.train(), step()
        assert not said(net.eval)
    handle.remove()
    net.train(), step()
    assert len(said(net.eval)) == 1


def test_not_without_training():
    """Values set by hand, evaluation, moves, copies, frozen weights, gradients alone, sets that promise nothing."""
    m = StableLSTM(3, 4)
    nn.init.orthogonal_(m.weight_hh_l0)
    assert not said(m.eval)
    m.train()
    with torch.no_grad():
        m(torch.randn(5, 2, 3))
        m.weight_hh_l0.mul_(0.5)
    assert not said(m.eval)
    m.train()(torch.randn(5, 2, 3))[0].sum().backward()
    m.double().to(torch.float32).to("cpu")
    assert not said(m.eval) and not said(copy.deepcopy(m.train()).eval)
    for stability in (None, ForgetCap(0.9)):
        m = StableLSTM(3, 4, stability=stability)
        train(m)
        assert not said(m.eval)
    m = StableRNN(3, 4)
    m.weight_hh_l0.requires_grad_(False)
    train(m, 3)  # of what the set says nothing of
    assert not said(m.eval)
    with torch.inference_mode():
        m = StableLSTM(3, 4).requires_grad_(False)
    m(torch.randn(5, 2, 3))
    assert not said(m.eval)


def test_a_move_does_not_hide_it():
    m = StableLSTM(3, 4)
    train(m)
    assert len(said(m.double().eval)) == 1


@pytest.mark.parametrize("make", MODULES)
def test_weights_that_torch_swaps(make):
    m = make()
    train(m)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        m.double()  # raises where a weak reference is held
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert m.weight_hh_l0.dtype == torch.float64


def test_models_and_what_cannot_be_projected():
    net = nn.Sequential(nn.LSTM(3, 3), nn.LSTM(3, 4))
    stabilize(net, stability=Certified())
    train(net, forward=lambda x: net[1](net[0](x)[0])[0])
    net[0].project_()
    assert len(said(net.eval)) == 1
    m = StableLSTM(3, 4, stability=None)
    nn.utils.parametrizations.weight_norm(m, "weight_hh_l0")
    m.stability = Certified()
    train(m)
    assert not said(m.eval)


def test_transforms_and_graphs_are_left_alone():
    m = StableLSTM(3, 4)
    weights = dict(m.named_parameters())
    torch.func.grad(lambda w: torch.func.functional_call(m, w, (torch.randn(5, 2, 3),))[0].sum())(weights)
    assert m not in watch._noted
    torch._dynamo.reset()
    train(m, forward=torch.compile(m, fullgraph=True, backend="aot_eager"))
    assert m not in watch._noted and not said(m.eval)
