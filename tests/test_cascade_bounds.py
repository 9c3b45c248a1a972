"""What is certified of cascades: no inputs, starts or jumps that a search finds pass it, and it is not far above what they reach."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from certificate_search import growth, kept_apart, step, worst
from torch import nn

from stable_rnn import Cascade, StableLSTM, StableRNN, Windowed, certificate, use_plan
from stable_rnn.stability import certificate_from_state_dict
from stable_rnn.stability.bounds import drive_of_bound
from stable_rnn.stability.comparison import Comparison, depth
from stable_rnn.stability.contraction import norm2
from stable_rnn.stability.lstm import _growing as lstm_weights
from stable_rnn.stability.lstm import lstm_bounds
from stable_rnn.stability.rnn import _growing as rnn_weights
from stable_rnn.stability.weights import read_module


def scaled(module, scale, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(-1, 1).mul_(scale / module.hidden_size**0.5)
    return module.project_().double()


def compared(found):
    """With the comparisons alone."""
    kinds = [[type(c) for c in layer.contractions] for layer in found.layers]
    assert all(kind.count(Comparison) == 1 and len(kind) > 4 for kind in kinds)
    return replace(
        found,
        levels=tuple(
            tuple(replace(m, contractions=tuple(c for c in m.contractions if isinstance(c, Comparison))) for m in level)
            for level in found.levels
        ),
    )


# ---- the structure


def test_any_order_of_the_units_is_found():
    module = scaled(StableLSTM(3, 9, stability=Cascade(4)), 3.0)
    expected, order = certificate(module), torch.randperm(9)
    rows = (torch.arange(4)[:, None] * 9 + order).flatten()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(p[rows][:, order] if "weight_hh" in name else p[rows])
    found = certificate(module)
    assert found.layers[0].depth == expected.layers[0].depth == 4
    assert found.rate == pytest.approx(expected.rate) and found.window(1e-3) == expected.window(1e-3)


def test_circles_are_no_cascades():
    module = scaled(StableRNN(3, 6, stability=Cascade(6)), 1.0)
    assert depth(read_module(module)[0][0]) == 6
    for row, column, wanted in ((0, 5, None), (2, 2, None), (4, 3, 6)):
        changed = copy.deepcopy(module)
        with torch.no_grad():
            changed.weight_hh_l0[row, column] = 1e-30
        assert depth(read_module(changed)[0][0]) == wanted
        assert any(isinstance(c, Comparison) for c in certificate(changed).layers[0].contractions) == (
            wanted is not None
        )
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    assert depth(read_module(module)[0][0]) == 1
    assert depth(read_module(nn.LSTM(3, 4, proj_size=2))[0][0]) is None


# ---- windows


@pytest.mark.parametrize("groups, forget, scale", [(4, 0.8, 3.0), (4, 0.8, 12.0), (2, 0.6, 3.0)])
def test_windows_of_lstms_are_near_to_what_inputs_reach(groups, forget, scale):
    module = scaled(StableLSTM(2, 8, stability=Cascade(groups, forget)), scale)
    found, steps = certificate(module), 50
    bounds = torch.tensor([compared(found).truncation_error(k) for k in range(1, steps + 1)])
    apart = kept_apart(read_module(module), steps, bound=1.5, cap=forget)
    assert (apart <= bounds).all() and (bounds.diff() <= 0).all()
    kept = int((apart >= 1e-3).nonzero().max()) + 1
    assert kept < found.window(1e-3) <= 4 * kept
    assert (apart / bounds).max() > 0.3


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("hidden, groups", [(9, 3), (8, 8), (5, 1)])
def test_rnns_remember_as_many_steps_as_they_have_groups(nonlinearity, hidden, groups):
    module = scaled(StableRNN(2, hidden, nonlinearity=nonlinearity, stability=Cascade(groups)), 3.0)
    with torch.no_grad():
        for p in module.parameters() if nonlinearity == "relu" else ():
            p.abs_()  # units that live
    found = certificate(module)
    assert found.layers[0].depth == groups and found.window(1e-9) == groups and found.rate < 0.06
    assert found.truncation_error(groups) == 0 and (groups == 1 or found.truncation_error(groups - 1) > 1e-3)
    apart = kept_apart(read_module(module), groups + 2, rounds=20)
    assert not apart[groups - 1 :].any() and (apart[: groups - 1] > 1e-3).all()
    assert all(a <= found.truncation_error(k + 1) for k, a in enumerate(apart.tolist()))
    x = torch.randn(20, 3, 2, dtype=torch.float64)
    with torch.no_grad(), use_plan(module, Windowed(groups)) as windowed:
        windows = windowed(x)[0]
    torch.testing.assert_close(windows, module(x)[0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    "make",
    [
        partial(StableLSTM, num_layers=2, bidirectional=True, stability=Cascade(2, 0.5)),
        partial(StableLSTM, num_layers=3, stability=Cascade(3, 0.7)),
        partial(StableRNN, num_layers=2, bidirectional=True, stability=Cascade(2)),
        partial(StableRNN, num_layers=3, nonlinearity="relu", bias=False, stability=Cascade(2)),
    ],
)
def test_no_input_passes_the_bound_of_a_stack(make):
    module = scaled(make(2, 4), 2.0)
    found = certificate(module, input_bound=1.0)
    for k in (1, 3, 6, 10):
        assert worst(read_module(module), k, cap=module._cap, steps=14) <= compared(found).truncation_error(k)
        assert found.truncation_error(k) <= compared(found).truncation_error(k)
    assert found.stable and found.window(1e-6) < 200


# ---- rates


@pytest.mark.parametrize("rate", [0.81, 0.84])
@pytest.mark.parametrize("seed", range(3))
def test_the_growing_weights_make_an_lstm_contract(rate, seed):
    w = read_module(scaled(StableLSTM(2, 6, stability=Cascade(3)), 3.0, seed))[0][0]
    drive = drive_of_bound(w, torch.ones(2, dtype=torch.float64), 2**0.5, norm2(w.w_ih))
    b = lstm_bounds(w, drive, 0.8)
    v = lstm_weights(w, b, rate, 3)

    def advance(state, u):
        h, c = step(w, w.bias + u.tanh() @ w.w_ih.mT, state[:, 6:], state[:, :6], 0.8)
        return torch.cat([c, h], 1)

    assert 0.8 < growth(advance, v, torch.cat([b.c, b.h]), 2) <= rate


def test_the_growing_weights_make_an_rnn_contract():
    w = read_module(scaled(StableRNN(2, 6, stability=Cascade(3)), 3.0))[0][0]
    v = rnn_weights(w, 0.1, 3)
    found = growth(lambda h, u: step(w, u, h, h, 1.0)[0], v, torch.ones(6, dtype=torch.float64), 6)
    assert 0.05 < found <= 0.1


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e6])
@pytest.mark.parametrize("make", [StableLSTM, StableRNN])
def test_weights_of_any_size_keep_the_promise(make, scale):
    stability = Cascade(16, 0.7)
    module = scaled(make(3, 32, 2, bidirectional=True, stability=stability), scale)
    found = certificate(module)
    assert found.stable and found.rate <= stability.rate and found.truncation_error(2000) < 1e-3
    half = scaled(make(3, 32, stability=stability), min(scale, 30.0)).to(torch.bfloat16)
    assert certificate(half).rate <= stability.rate


def test_weights_whose_norm_no_number_holds():
    """64 groups of large weights: the norm's own weights would pass 1e308. It contracts; what is left is too small to be computed with."""
    found = certificate(scaled(StableLSTM(1, 64, stability=Cascade(64, 0.7)), 1e6))
    assert found.stable and found.rate == pytest.approx(0.715)
    with pytest.raises(ValueError, match="no window brings the error under 0.001: the bound stays at 1.9"):
        found.window(1e-3)


# ---- jumps and roundings


def test_no_jumps_pass_their_bound():
    module = scaled(StableLSTM(2, 6, stability=Cascade(3, 0.5)), 2.0)
    (w,) = read_module(module)[0]
    found, jump, chunk, steps = certificate(module, input_bound=1.0), 0.01, 4, 16
    bound = found.jump_bound(jump, chunk)
    assert 0 < bound < 0.6 and compared(found).jump_bound(jump, chunk) == bound
    x, j = torch.randn(steps, 32, 2, dtype=torch.float64), torch.randn(steps, 2, 32, 6, dtype=torch.float64)
    params, best = [x.requires_grad_(), j.requires_grad_()], 0.0
    optimizer = torch.optim.Adam(params, lr=0.1)
    for _ in range(60):
        states = [torch.zeros(2, 32, 6, dtype=torch.float64)] * 2
        for t in range(steps):
            if t % chunk == 0:
                states[1] = states[1] + jump * j[t].tanh()
            u = x[t].tanh() @ w.w_ih.mT + w.bias
            states = [torch.stack(step(w, u, h, c, 0.5)) for h, c in states]
        apart = (states[0] - states[1])[0].abs().amax(1)
        best = max(best, float(apart.detach().max()))
        optimizer.zero_grad()
        (-apart.sum()).backward()
        optimizer.step()
    assert bound / 20 < best <= bound
    assert found.jump_bound(jump, 1) >= bound >= found.jump_bound(jump, 1000)


def test_rounding_is_bounded_through_the_stack():
    mild = certificate(scaled(StableLSTM(2, 8, 2, stability=Cascade(2, 0.5)), 1.0))
    error = mild.rounding_error(torch.float32)
    assert 1e-7 < error < 1e-3
    assert mild.truncation_error(200, torch.float32) == pytest.approx(error, rel=1e-3)
    assert mild.window(1e-3, torch.float32) >= mild.window(1e-3)


# ---- what is said of it


def test_the_text_says_what_is_poor():
    wild, mild = (certificate(scaled(StableLSTM(2, 32, stability=Cascade(8)), scale)) for scale in (20.0, 0.5))
    text = str(wild)
    assert "poor sensitivity: of small errors at every step (rounding, jumps under Verified)" in text
    assert "a cascade of 8 groups" in text and "poor" not in str(mild)
    assert wild.layers[0].amplified > 1e5 > mild.layers[0].amplified
    assert "cascade" not in str(certificate(nn.LSTM(2, 4))) and "poor" not in str(certificate(nn.LSTM(2, 4)))


def test_certificates_of_state_dicts_copies_and_pickles():
    module = scaled(StableLSTM(3, 8, 2, stability=Cascade(4)), 3.0)
    found = certificate(module, input_bound=1.0)
    saved = certificate_from_state_dict(module.state_dict())[""]
    windows = [each.window(1e-3) for each in (found, saved, copy.deepcopy(found), pickle.loads(pickle.dumps(found)))]
    assert len(set(windows)) == 1 and saved.layers[0].depth == 4 and "clamped at 0.8" in str(saved)
    unclamped = certificate_from_state_dict(dict(module.state_dict()))[""]  # without the metadata
    assert unclamped.layers[0].depth == 4 and unclamped.layers[0].forget > 0.8


def test_given_inputs_sharpen_it():
    module = scaled(StableLSTM(3, 8, stability=Cascade(4)), 3.0)
    x = torch.randn(20, 2, 3, dtype=torch.float64) * 0.1
    found = module.certificate(x)
    assert found.window(1e-3) < module.certificate().window(1e-3)
