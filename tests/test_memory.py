"""`memory(module, input)` on modules whose memory is known, and beside runs of torch's modules."""

import dataclasses
import math
import re
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import stable_rnn
from stable_rnn import (
    Cascade,
    Chunked,
    ForgetCap,
    Recurrent,
    Scanned,
    StableLSTM,
    StableRNN,
    Verified,
    Windowed,
    memory,
)
from stable_rnn.cells import MODES

PARTS = sys.modules["stable_rnn.memory"]
LayerMemory, advise = PARTS.LayerMemory, PARTS.advise
EPS = (1e-3, 1e-6)


def torch_module(mode, *sizes, **options):
    if mode.startswith("RNN"):
        return nn.RNN(*sizes, nonlinearity=mode[4:].lower(), **options)
    return getattr(nn, mode)(*sizes, **options)


def filled(module, **values):
    """Weights and biases of these values (numbers or tensors), all others zero."""
    with torch.no_grad():
        for name, w in module.double().named_parameters():
            w.copy_(torch.as_tensor(values.get(name.removesuffix("_l0"), 0.0), dtype=w.dtype).expand_as(w))
    return module


def gates(units, *values):
    """LSTM biases (4H,), one value each for i, f, g, o or one for each unit."""
    return torch.cat([torch.as_tensor(value, dtype=torch.float64).expand(units) for value in values])


def logit(p):
    return math.log(p / (1 - p))


# ---- known answers


@pytest.mark.parametrize("forget", [0.5, 0.9, 0.97])
def test_a_forget_gate_at_f_remembers_log_eps_by_log_f_steps(forget):
    steps, big = 2000, 100.0  # i = o = 1 and g = 1: c goes to 1 / (1 - f), from where other runs are f^t of it away
    module = filled(nn.LSTM(1, 3), bias_ih=gates(3, big, logit(forget), big, big))
    (layer,) = memory(module, torch.zeros(steps, 1, 1).double()).layers
    for eps in EPS:  # relative to c > 1
        assert layer.states[eps] == math.ceil(math.log(eps) / math.log(forget))
        assert layer.outputs[eps] <= layer.states[eps]
    assert layer.exponent == pytest.approx(math.log(forget), rel=1e-9)
    assert layer.slow == ((0, 1, 2) if forget**128 > 1e-3 else ()) and layer.units == 3


def test_clamps_of_forget_gates_count():
    module = filled(StableLSTM(1, 2, stability=ForgetCap(0.8)), bias_ih=gates(2, 100.0, 100.0, 100.0, 100.0))
    (layer,) = memory(module, torch.zeros(500, 1, 1).double()).layers
    assert layer.states[1e-6] == math.ceil(math.log(1e-6) / math.log(0.8)) and layer.slow == ()
    assert layer.exponent == pytest.approx(math.log(0.8), rel=1e-9)


def test_a_linear_rnn_forgets_by_its_largest_factor():
    factors = torch.tensor([0.3, 0.9, 0.5], dtype=torch.float64)
    module = filled(nn.RNN(1, 3, nonlinearity="relu"), weight_hh=factors.diag(), bias_ih=1 - factors)  # h goes to 1
    (layer,) = memory(module, torch.zeros(1000, 2, 1).double()).layers
    assert layer.outputs == layer.states == {eps: math.ceil(math.log(eps) / math.log(0.9)) for eps in EPS}
    assert layer.exponent == pytest.approx(math.log(0.9), rel=1e-9) and layer.slow is None and layer.groups is None


def test_a_tanh_rnn_in_its_linear_regime_has_the_exponent_log_a():
    module = filled(nn.RNN(1, 4), weight_hh=0.7 * torch.eye(4), weight_ih=1e-6)
    (layer,) = memory(module, torch.randn(400, 1, 1).double()).layers
    assert layer.exponent == pytest.approx(math.log(0.7), rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_nilpotent_rnn_remembers_exactly_k_steps(k):
    module = filled(nn.RNN(1, k), weight_hh=torch.ones(k - 1).diag(-1), weight_ih=0.5)
    found = memory(module, torch.randn(300, 1, 1).double())
    (layer,) = found.layers
    assert layer.outputs == layer.states == {1e-3: k, 1e-6: k}
    assert layer.exponent == -math.inf and layer.groups == k
    assert found.plan == Scanned()


def test_a_chaotic_rnn_never_agrees():
    module = filled(nn.RNN(2, 32), weight_hh=torch.randn(32, 32) * 3 / 32**0.5, weight_ih=torch.randn(32, 2))
    found = memory(module, torch.randn(600, 1, 2).double())
    (layer,) = found.layers
    assert layer.outputs == layer.states == {1e-3: None, 1e-6: None} and layer.exponent > 0.1
    assert found.plan == Recurrent() and "grow in l0" in found.reason and str(found).count("not in T") == 4


def test_slow_cells_are_named_and_verified_is_advised():
    forget = torch.zeros(8)
    forget[[2, 5]] = 12.0
    module = filled(nn.LSTM(1, 8), bias_ih=gates(8, 0.0, forget, 0.0, 0.0), weight_ih=0.02, weight_hh=1e-6)
    found = memory(module, torch.randn(400, 2, 1).double(), chunk=64)
    (layer,) = found.layers
    assert layer.slow == (2, 5) and layer.outputs[1e-6] is None and abs(layer.exponent) < 1e-4
    assert found.plan == Verified() and "2 slow cells" in found.reason and found.chunk == 64
    assert "2 of 8" in str(found) and "slow cells of l0: 2, 5" in str(found)


def test_a_start_that_is_not_zero_is_forgotten_too():
    module = filled(nn.RNN(1, 1, nonlinearity="relu"), weight_hh=0.5)
    x, h0 = torch.zeros(100, 1, 1).double(), torch.full((1, 1, 1), 64.0).double()
    assert memory(module, x).layers[0].outputs == {1e-3: 1, 1e-6: 1}  # all states are 0
    found = memory(module, x, h0).layers[0].outputs  # 64 / 2^t within eps, as it is less than 1 then
    assert found == {eps: math.ceil(math.log2(64 / eps)) for eps in EPS}
    assert memory(module, x[:, 0], h0[:, 0]).layers[0].outputs == found


# ---- beside torch's modules


def by_hand(module, x):
    """Steps of outputs, one layer forward, from runs at the same starts: x (T, 1, I)."""
    whole, last = module(x)[0], dict.fromkeys(EPS, 0)
    for part in range(1, 9):
        first = len(x) * part // 9
        off = (module(x[first:])[0] - whole[first:]).abs().amax((1, 2))
        for eps in EPS:
            apart = (off > eps).nonzero()
            last[eps] = max(last[eps], int(apart[-1]) + 1 if len(apart) else 0)
    return {eps: n + 1 for eps, n in last.items()}


@pytest.mark.parametrize("mode", MODES)
def test_outputs_of_every_cell_agree_when_those_of_torchs_modules_do(mode):
    module, x = torch_module(mode, 3, 16).double().requires_grad_(False), torch.randn(500, 1, 3).double()
    (layer,) = memory(module, x).layers
    assert layer.outputs == by_hand(module, x) and 1 < layer.outputs[1e-3] < layer.outputs[1e-6] < 60
    assert layer.states[1e-6] >= layer.outputs[1e-6] and (layer.slow is None) == (MODES[mode].forgets is None)
    assert (layer.states == layer.outputs) == (not MODES[mode].has_cell)

    h = torch.randn(1, 1, 16).double()  # a tangent that turned, and one that is followed in float64 through the module
    hx, steps = (h, torch.randn(1, 1, 16).double()) if MODES[mode].has_cell else h, 256
    growth = tangent_growth(module, x[:steps], hx)
    assert memory(module, x[:steps], hx).layers[0].exponent == pytest.approx(growth, rel=0.05)


def tangent_growth(module, x, hx):
    """Mean logarithm of the growth of a difference of 1e-6, made small again after each step, after a quarter of x."""
    parts = hx if isinstance(hx, tuple) else (hx,)
    off, logs = [torch.randn_like(s) for s in parts], []
    for row in x[:, None]:
        size = torch.stack([d.square().sum() for d in off]).sum().sqrt() * 1e6
        moved = [s + d / size for s, d in zip(parts, off)]
        runs = [module(row, tuple(s) if len(s) > 1 else s[0])[1] for s in (parts, moved)]
        parts, moved = (run if isinstance(run, tuple) else (run,) for run in runs)
        off = [b - a for a, b in zip(parts, moved)]
        logs.append(math.log(1e6 * torch.stack([d.square().sum() for d in off]).sum().sqrt()))
    return sum(logs[len(x) // 4 :]) / (len(x) - len(x) // 4)


def test_stacks_in_both_directions_are_the_layers_one_by_one():
    module = nn.LSTM(3, 6, 2, bidirectional=True, proj_size=4).double()
    x = torch.randn(200, 2, 3).double()
    found = memory(module, x)
    assert [layer.name for layer in found.layers] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    for level in range(2):
        for back in (False, True):
            one = nn.LSTM(x.shape[2], 6, proj_size=4).double()
            tag = f"_l{level}{'_reverse' * back}"
            one.load_state_dict(
                {name: module.state_dict()[name.removesuffix("_l0") + tag] for name in one.state_dict()}
            )
            (layer,) = memory(one, x.flip(0) if back else x).layers
            assert dataclasses.replace(layer, name=tag[1:]) == found.layers[2 * level + back]
        if level == 0:  # what the upper layer reads
            below = nn.LSTM(3, 6, bidirectional=True, proj_size=4).double()
            below.load_state_dict({name: module.state_dict()[name] for name in below.state_dict()})
            x = below(x)[0].detach()


def test_packed_padded_and_batch_first_input_give_the_same():
    module, used = StableLSTM(3, 8, 2, bidirectional=True, stability=None).double(), torch.tensor([60, 200, 1])
    x, hx = torch.randn(200, 3, 3).double(), (torch.randn(4, 3, 8).double(), torch.randn(4, 3, 8).double())
    packed = memory(module, pack_padded_sequence(x, used, enforce_sorted=False), hx)
    for b, length in enumerate(used):
        x[length:, b] = torch.nan
    padded = memory(module, x, hx, lengths=used)
    turned = nn.LSTM(3, 8, 2, bidirectional=True, batch_first=True).double()
    turned.load_state_dict(module.state_dict())
    assert packed == padded == memory(turned, x.transpose(0, 1), hx, lengths=used) and padded.steps == 200


def test_runs_in_blocks_of_time_and_in_one_go_give_the_same(monkeypatch):
    module, x = nn.LSTM(3, 8).double(), torch.randn(333, 2, 3).double()
    whole = memory(module, x)
    monkeypatch.setattr(PARTS, "WORKSPACE", 1)  # 16 steps at a time
    assert memory(module, x) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_measured_in_float32(dtype):
    module, x = StableLSTM(3, 8, stability=Cascade(2)).to(dtype), torch.randn(300, 1, 3, dtype=dtype)
    (layer,) = memory(module, x).layers
    (wide,) = memory(module.double(), x.double()).layers
    assert layer.groups == 2 and all(abs(layer.outputs[eps] - wide.outputs[eps]) <= 1 for eps in EPS)


def test_the_advised_window_holds_on_this_input():
    module, x = StableRNN(3, 16), torch.randn(4000, 1, 3)
    plan = memory(module, x).plan
    assert isinstance(plan, Chunked)
    truth = module(x)[0]
    with stable_rnn.use_plan(module, plan):
        assert (module(x)[0] - truth).abs().max() <= 1e-6


# ---- advice, words and errors


def layer(name="l0", after=20, exponent=-0.1, slow=(), groups=None):
    return LayerMemory(name, {1e-3: after, 1e-6: after}, {1e-3: after, 1e-6: after}, exponent, slow, 8, groups)


@pytest.mark.parametrize(
    ("layers", "steps", "plan", "why"),
    [
        ([layer(), layer("l1", 40)], 1000, Chunked(256, 59), "after 40 steps at most .l1.; 60 leave"),
        ([layer(after=4)], 1000, Windowed(8), "8 leave a margin"),
        ([layer(), layer("l1", 60)], 1000, Verified(), "only after 60 of 1000 steps .l1."),
        (
            [layer(), layer("l1", None, slow=(3,))],
            1000,
            Verified(),
            "don't agree to 1e-6 within 1000 steps .l1; 1 slow cell.,",
        ),
        ([layer(), layer("l1", None, 0.2)], 1000, Recurrent(), "grow in l1, like exp.0.2 t."),
        ([layer(after=1)], 100, Recurrent(), "100 steps are too few"),
    ],
)
def test_advice(layers, steps, plan, why):
    found, reason = advise(layers, steps)
    assert found == plan and re.search(why, reason)


def test_cascades_in_the_order_of_their_units_are_scanned():
    module, x = StableLSTM(3, 16, 2, stability=Cascade(4)), torch.randn(300, 1, 3)
    found = memory(module, x)
    assert found.plan == stable_rnn.Scanned() and "a cascade of 4 groups" in found.reason
    with stable_rnn.use_plan(module, found.plan):
        module(x)
    with torch.no_grad():  # the units the other way round: a cascade, but no triangle
        for name, w in module.named_parameters():
            turned = w.view(4, 16, -1).flip(1).flip(2 if name == "weight_hh_l0" else ()).reshape(w.shape)
            w.copy_(turned if name.endswith("l0") else w)
    module.stability = None
    assert isinstance(memory(module, x).plan, Verified) and memory(module, x).layers[0].groups == 4


def test_it_is_frozen_and_reads_as_a_table():
    found = memory(nn.LSTM(3, 4, bidirectional=True), torch.randn(50, 1, 3))
    lines = str(found).splitlines()
    assert len({len(line) for line in lines[1:5]}) == 1 and lines[4].startswith("l0_reverse ")
    assert lines[0].startswith("measured on 50 steps") and lines[-2] == "advice: Recurrent()"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.steps = 1
    assert stable_rnn.memory is memory is PARTS.memory


X = torch.randn(20, 2, 3)


@pytest.mark.parametrize(
    ("module", "arguments", "error", "text"),
    [
        (nn.LSTMCell(3, 4), (X,), TypeError, "one recurrent module over time.*got LSTMCell"),
        (nn.Sequential(nn.LSTM(3, 4)), (X,), TypeError, "got Sequential"),
        (nn.LSTM(3, 4), (X.tolist(),), TypeError, "tensor or a PackedSequence, got list"),
        (nn.LSTM(3, 4), (X.long(),), TypeError, "real floating dtype, got .*int64"),
        (nn.LSTM(3, 4), (X[0, 0],), ValueError, "3 dimensions, or 2 unbatched, got .3,."),
        (nn.LSTM(5, 4), (X,), ValueError, "input size 5, got .20, 2, 3."),
        (nn.LSTM(3, 4), (X[:1],), ValueError, "at least 2 steps is needed, got .1, 2, 3."),
        (nn.RNN(3, 4), (X[:1], torch.ones(1, 2, 4)), ValueError, "at least 2 steps"),
        (nn.LSTM(3, 4), (X[:, :0],), ValueError, "at least 2 steps"),
        (nn.LSTM(3, 4), (X / 0,), ValueError, "input holds NaN or infinite"),
        (nn.LSTM(3, 4), (X.to("meta"),), ValueError, "on the module's device cpu, got .*meta"),
        (nn.LSTM(3, 4), (X, torch.zeros(1, 2, 4)), TypeError, "pair of tensors .h, c., got .1, 2, 4."),
        (nn.LSTM(3, 4), (X, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 5))), ValueError, r"c_0 must be \(1, 2, 4\).*got .1, 2, 5."),
        (nn.RNN(3, 4), (X, torch.zeros(2, 4)), ValueError, r"h_0 must be \(1, 2, 4\)"),
        (nn.RNN(3, 4), (X, torch.full((1, 2, 4), torch.nan)), ValueError, "h_0 holds NaN"),
        (nn.RNN(3, 4, device="meta"), (X.to("meta"),), ValueError, "weight_ih_l0 is on the meta device"),
        (filled(nn.RNN(3, 4, nonlinearity="relu"), weight_hh=1e200, weight_ih=1.0), (X.double(),), ValueError, "states of l0 become"),
        (filled(nn.RNN(3, 4), weight_hh=torch.nan), (X.double(),), ValueError, "weight_hh_l0 holds NaN"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(module, arguments, error, text):
    with pytest.raises(error, match=text):
        memory(module, *arguments)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"chunk": 0}, ValueError, "memory: chunk must be at least 1"),
        ({"lengths": [3, 4]}, TypeError, "lengths must be a Tensor"),
        ({"lengths": torch.tensor([3, 40])}, ValueError, "lengths must lie in 0..20"),
        ({"lengths": torch.tensor([1, 0])}, ValueError, "at least 2 steps"),
    ],
)
def test_wrong_options_are_named(options, error, text):
    with pytest.raises(error, match=text):
        memory(nn.LSTM(3, 4), X, **options)
    if "lengths" in options:
        with pytest.raises(ValueError, match="its own lengths"):
            memory(nn.LSTM(3, 4), pack_padded_sequence(X, torch.tensor([20, 3])), **options)
