"""The stable sets as values: their arguments and errors, sets of one's own, and what no projection may write."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from test_project import snapshot, spoil

from stable_rnn import (
    Certified,
    ForgetCap,
    StableGRU,
    StableLSTM,
    StableRNN,
)
from stable_rnn.stability import Stability, check_stability


def test_sets_are_values():
    a, b = Certified(0.9, forget=0.6), Certified(rate=0.9, norm="2", forget=0.6, input_bound=1.0, clamp=False)
    assert a == b and hash(a) == hash(b) and a != Certified(0.8) and a != ForgetCap(0.6)
    assert pickle.loads(pickle.dumps(a)) == copy.deepcopy(a) == a
    assert eval(repr(a)) == a
    assert eval(repr(ForgetCap(0.5))) == ForgetCap(0.5) and eval(repr(Certified(clamp=True))) == Certified(clamp=True)
    for c in (Certified(0.3), Certified(0.4, clamp=True), Certified(0.8, "inf", 0.6, 0.5)):
        assert eval(repr(c)) == dataclasses.replace(c) == c
        assert dataclasses.replace(c, norm="radius").norm == "radius"
    assert dataclasses.replace(Certified(), rate=0.8) == Certified(0.8)
    assert dataclasses.replace(Certified(clamp=True), rate=0.9) == Certified(0.9, clamp=True)
    assert dataclasses.replace(Certified(forget=0.6), clamp=True) == Certified(forget=0.6, clamp=True)
    with pytest.raises(AttributeError):
        a.rate = 0.5
    assert isinstance(a, Stability) and isinstance(ForgetCap(0.5), Stability)
    assert a.cap == 1.0 and Certified(clamp=True, forget=0.7).cap == 0.7
    for rate in (0.51, 0.6, 0.9, 0.999):
        assert 0.5 < Certified(rate).forget < rate
        assert 0 < Certified(rate, clamp=True).forget < rate


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        (dict(rate=1.0), ValueError, "between 0 and 1, got 1.0"),
        (dict(rate=0), ValueError, "got 0"),
        (dict(rate=-0.5), ValueError, "-0.5"),
        (dict(rate=math.nan), ValueError, "nan"),
        (dict(rate="0.9"), TypeError, "'0.9'"),
        (dict(norm="1"), ValueError, "2, inf, auto, radius, got '1'"),
        (dict(norm=2), ValueError, "got 2"),
        (dict(forget=0.5), ValueError, "between 0.5 and the rate"),
        (dict(forget=0.99), ValueError, "0.99"),
        (dict(forget=0.6, rate=0.6), ValueError, "0.6"),
        (dict(forget=0.0, clamp=True), ValueError, "between 0 and"),
        (dict(forget=1.0, clamp=True), ValueError, "got 1.0"),
        (dict(input_bound=-1), ValueError, "input_bound"),
        (dict(input_bound=math.inf), ValueError, "finite"),
        (dict(cap=0.9), TypeError, "True or False"),
    ],
)
def test_arguments_that_make_no_set(arguments, error, text):
    with pytest.raises(error, match=text):
        Certified(**arguments)


def test_other_errors():
    for value in (0, 1, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"got {value}"):
            ForgetCap(value)
    with pytest.raises(TypeError):
        ForgetCap("0.9")
    with pytest.raises(ValueError, match="ForgetCap is for the LSTM and the GRU; rnn_tanh"):
        check_stability(ForgetCap(0.9), "RNN_TANH")
    with pytest.raises(TypeError, match="got 0.9"):
        check_stability(0.9, "LSTM")
    with pytest.raises(ValueError, match="above 1/2"):
        check_stability(Certified(0.4), "LSTM")
    assert check_stability(Certified(0.4), "RNN_RELU").rate == 0.4
    assert check_stability(Certified(0.4, clamp=True), "LSTM").cap < 0.4
    assert check_stability(None, "LSTM") is None


def test_a_set_of_ones_own():
    """All that a module asks of a set is the base class."""

    class Halved(Stability):
        def project_(self, module, certify=True):
            with torch.no_grad():
                module.weight_hh_l0.mul_(0.5)

    module = StableLSTM(3, 4, stability=Halved())
    before = snapshot(module)
    module.project_()
    assert torch.equal(module.weight_hh_l0, before["weight_hh_l0"] * 0.5)


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("make", [StableRNN, StableLSTM, StableGRU])
def test_a_backward_through_overwritten_weights_raises(make, certify):
    module = spoil(make(3, 16), 1.0)
    y = module(torch.randn(6, 2, 3))[0]
    module.project_(certify=certify)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
