"""Stable sets: what `project_` guarantees, what it leaves alone, and which arguments make no set."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from stable_rnn import (
    Certified,
    ForgetCap,
    StableGRU,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    certificate,
)
from stable_rnn.stability.nearest import Directions, into_ball, step_into_ball
from stable_rnn.stability.radius import into_radius, radius

NORMS = ("2", "inf", "auto", "radius")


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def unchanged(module, before):
    return all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def spoil(module, scale):
    """Random weights and biases of the given size, W_ih and biases too."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p, dtype=torch.float32) * scale)
    return module


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "make",
    [
        lambda s: StableRNN(3, 9, stability=s),
        lambda s: StableRNN(3, 4, 2, "relu", bidirectional=True, bias=False, stability=s),
        lambda s: StableLSTM(3, 8, stability=s),
        lambda s: StableLSTM(3, 4, 2, bidirectional=True, stability=s),
        lambda s: StableLSTM(3, 8, 2, proj_size=3, stability=s),
        lambda s: StableLSTM(5, 4, bias=False, stability=s),
        lambda s: StableLSTMCell(3, 4, stability=s),
        lambda s: StableRNNCell(3, 4, stability=s),
    ],
)
def test_any_weights_become_certified(make, norm, scale):
    stability = Certified(rate=0.9, norm=norm)
    module = spoil(make(stability), scale)
    module.project_()
    found = module.certificate()
    assert found.rate <= stability.rate and found.stable
    assert all(torch.isfinite(p).all() for p in module.parameters())
    before = snapshot(module)
    module.project_()
    assert unchanged(module, before)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e6])
@pytest.mark.parametrize("rate, forget", [(0.99, None), (0.5, 0.4), (0.95, 0.9), (0.05, None)])
def test_with_a_clamp_no_input_weight_is_touched(scale, rate, forget):
    module = spoil(StableLSTM(3, 6, 2, stability=Certified(rate, forget=forget, clamp=True)), scale)
    before = snapshot(module)
    module.project_()
    assert module.certificate().rate <= rate
    assert module.certificate(input_bound=math.inf).rate <= rate
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters() if "weight_hh" not in name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_other_dtypes(dtype, norm):
    for make in (
        lambda s: StableLSTM(6, 16, dtype=dtype, stability=s),
        lambda s: StableRNN(6, 16, dtype=dtype, stability=s),
    ):
        module = spoil(make(Certified(0.95, norm)), 3.0)
        module.project_()
        assert module.certificate().rate <= 0.95
        before = snapshot(module)
        module.project_()
        assert unchanged(module, before)


@pytest.mark.parametrize("hidden", [1, 2, 31, 128])
@pytest.mark.parametrize("kind", [StableLSTM, StableRNN, StableGRU])
def test_a_fresh_default_module_is_certified(kind, hidden):
    module = kind(hidden, hidden)
    assert module.certificate().stable and module.certificate().rate <= 0.99
    before = snapshot(module)
    module.project_()
    assert unchanged(module, before)


@pytest.mark.parametrize("make", [lambda: StableLSTM(512, 512), lambda: StableRNN(512, 512)])
def test_a_fresh_large_module_is_certified(make):
    assert make().certificate().rate <= 0.99


def test_weights_inside_are_left_alone():
    """Just inside in the plain sense, ||W|| = rate (1 - 1e-3), nothing moves; just outside, only W_hh does."""
    rnn = StableRNN(4, 12, stability=Certified(0.9))
    with torch.no_grad():
        nn.init.orthogonal_(rnn.weight_hh_l0).mul_(0.9 * (1 - 1e-3))
    before = snapshot(rnn)
    rnn.project_()
    rnn.project_(certify=False)
    assert unchanged(rnn, before)
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(1.01)
    before = snapshot(rnn)
    rnn.project_()
    assert {name for name, p in rnn.named_parameters() if not torch.equal(p, before[name])} == {"weight_hh_l0"}
    assert torch.linalg.matrix_norm(rnn.weight_hh_l0.detach().double(), 2) > 0.89  # and not far


def test_only_the_layer_outside_moves():
    module = StableLSTM(3, 8, 3)
    before = snapshot(module)
    with torch.no_grad():
        module.weight_hh_l1.mul_(4)
    module.project_()
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("_l1" in name for name in moved)


def test_auto_accepts_either_norm():
    """Rows inside, singular values outside: only "2" moves it."""
    w = torch.full((8, 8), 0.0)
    w[:, 0] = 0.8  # row sums 0.8, norm 0.8 sqrt(8)
    for norm, moves in (("auto", False), ("inf", False), ("2", True)):
        rnn = StableRNN(4, 8, stability=Certified(0.9, norm))
        with torch.no_grad():
            rnn.weight_hh_l0.copy_(w)
        rnn.project_()
        assert torch.equal(rnn.weight_hh_l0, w) is not moves


def test_radius_accepts_norms_above_one():
    """torch's own weights: a 2-norm above 1, a numerical radius well below. "radius" leaves them, and moves W_hh alone when it must."""
    torch.manual_seed(0)
    rnn = StableRNN(4, 64, stability=None)
    before = snapshot(rnn)
    assert torch.linalg.matrix_norm(rnn.weight_hh_l0.detach(), 2) > 1.05
    rnn.stability = Certified(norm="radius")
    rnn.project_(), rnn.project_(certify=False)
    assert unchanged(rnn, before) and rnn.certificate().rate < 0.9
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(1.4)
    before = snapshot(rnn)
    rnn.project_()
    assert {name for name, p in rnn.named_parameters() if not torch.equal(p, before[name])} == {"weight_hh_l0"}
    assert 0.9 < rnn.certificate().rate <= 0.99 and torch.linalg.matrix_norm(rnn.weight_hh_l0.detach(), 2) > 1.2


def test_radius_holds_for_more_units_than_a_certificate_searches(monkeypatch):
    monkeypatch.setattr("stable_rnn.stability.rnn.LARGEST", 20)
    torch.manual_seed(0)
    rnn = StableRNN(4, 24, stability=Certified(0.7, norm="radius"))
    assert rnn.certificate().rate <= 0.7 < torch.linalg.matrix_norm(rnn.weight_hh_l0.detach(), 2)


SCALES = torch.tensor([0.3, 1.0, 0.9, 0.1], dtype=torch.float64)


def rows_of(scales, w):
    return scales.to(w.dtype).repeat_interleave(len(w) // 4)[:, None]


def clip(w, bound, scales=SCALES):
    rows = rows_of(scales, w)
    u, s, vh = torch.linalg.svd(rows * w, full_matrices=False)
    return (u * s.clamp(max=bound)) @ vh / rows


@pytest.mark.parametrize("way", ["at once", "step by step"])
@pytest.mark.parametrize("seed", range(3))
def test_steps_end_at_the_nearest_weights(seed, way):
    """Gradient steps towards weights outside, each projected, come to rest at the point of the set that is nearest to these: proven
    by the dual, whose value for any L >= 0 is a lower bound. Clipping the singular values of D W rests elsewhere."""
    torch.manual_seed(seed)
    goal, bound, kept = torch.randn(24, 6, dtype=torch.float64), 0.5, Directions()
    rows, one = rows_of(SCALES, goal), torch.eye(6, dtype=torch.float64)

    def rest(project):
        w = project(torch.zeros_like(goal))
        for _ in range(400):
            w = project(w + 0.02 * (goal - w))
        return clip(w, bound)

    project = (
        (lambda w: into_ball(w, SCALES, bound))
        if way == "at once"
        else (lambda w: step_into_ball(w, SCALES, bound, kept))
    )
    near, other = rest(project), rest(lambda w: clip(w, bound))
    u, s, vh = torch.linalg.svd(rows * near, full_matrices=False)
    push = vh.mT @ (u.mT @ ((goal - near) / rows) @ vh.mT / s) @ vh  # goal - near = D^2 near push
    found, v = torch.linalg.eigh((push + push.mT) / 2)
    push = (v * found.clamp(min=0)) @ v.mT
    w = torch.stack([torch.linalg.solve(one + d * d * push, row) for d, row in zip(rows[:, 0], goal)])
    least = (w - goal).square().sum() + (push @ (w.mT @ (rows * rows * w) - bound**2 * one)).trace()
    assert least <= (goal - near).square().sum() <= least * (1.002 if way == "at once" else 1.01)
    assert (goal - other).square().sum() > least * 1.2


@pytest.mark.parametrize("shape", [(256, 64), (192, 96), (400, 80)])
def test_steps_with_kept_directions_do_what_all_of_them_do(shape):
    """Steps larger than the weights, in random directions: the block finds most of what crosses the bound at once, the rest soon."""
    torch.manual_seed(1)
    bound, kept, used, outside = 1.0, Directions(), 0, []
    few = torch.randn(6, shape[1])
    drift, w = torch.randn(shape[0], 6) @ few / shape[1] ** 0.5, torch.zeros(shape)
    for _ in range(40):
        noise = torch.randn(shape[0], 6) @ (few + torch.randn(6, shape[1])) / shape[1] ** 0.5
        grown = w + 0.1 * drift + 0.1 * noise
        used += kept.block is not None
        w, all_ways = (
            step_into_ball(grown, SCALES.float(), bound, kept),
            step_into_ball(grown, SCALES.float(), bound, Directions()),
        )
        outside.append(
            [float(torch.linalg.matrix_norm(rows_of(SCALES, w) * each, 2)) - bound for each in (grown, w, all_ways)]
        )
        assert (w - grown).norm() < 1.05 * (clip(all_ways, bound) - grown).norm()
    before, after, best = torch.tensor(outside).mean(0).tolist()
    assert used > 30 and before > 1.3 and after < 0.13 and after < best + 0.07


def test_projections_return_what_is_inside():
    w = torch.randn(12, 3, dtype=torch.float64)
    assert into_ball(w, torch.full((4,), 0.5, dtype=torch.float64), 100.0) is w
    assert step_into_ball(w, torch.full((4,), 0.5, dtype=torch.float64), 100.0, Directions()) is w
    assert into_radius(v := w[:3], 100.0) is v
    for scale in (1e-3, 10.0, 1e200):
        far = w[:3] * scale
        assert radius(into_radius(far, 0.9)) <= 0.9 * (1 + 1e-6)
        for near in (into_ball(w * scale, SCALES, 0.9), step_into_ball(w * scale, SCALES, 0.9, Directions())):
            assert torch.linalg.matrix_norm(rows_of(SCALES, w) * near, 2) <= 0.9 * 1.5
    assert not step_into_ball(torch.zeros(12, 3), SCALES.float(), 0.9, Directions()).any()


def test_the_forget_gate_is_bounded_by_its_weights():
    """The default LSTM: no input within the bound and no state opens the gate further; a negative bias stays."""
    module = spoil(StableLSTM(3, 8, stability=Certified(forget=0.6, input_bound=2.0)), 2.0)
    before = snapshot(module)
    module.project_()
    rows = lambda name: getattr(module, name).detach().double()[8:16]  # noqa: E731
    bias = rows("bias_ih_l0") + rows("bias_hh_l0")
    high = 2 * rows("weight_ih_l0").abs().sum(1) + rows("weight_hh_l0").abs().sum(1) + bias
    assert high.sigmoid().max() <= 0.6
    old = (before["bias_ih_l0"].double() + before["bias_hh_l0"].double())[8:16]
    assert torch.equal(bias[old < 0], old[old < 0]) and (bias[old > 0] >= 0).all()
    for gate in (0, 2, 3):  # i, g, o keep their input weights
        assert torch.equal(
            module.weight_ih_l0[8 * gate : 8 * gate + 8], before["weight_ih_l0"][8 * gate : 8 * gate + 8]
        )


def test_the_cheap_step_brings_training_steps_back():
    """Small steps out of the set and one uncertified step each, in all norms: the certificate is missed by little, if at all."""
    for norm in NORMS:
        for module in (
            StableLSTM(4, 24, 2, stability=Certified(norm=norm)),
            StableRNN(4, 24, stability=Certified(norm=norm)),
        ):
            for _ in range(30):
                with torch.no_grad():
                    for p in module.parameters():
                        p.add_(torch.randn_like(p), alpha=0.01)
                module.project_(certify=False)
            assert module.certificate().rate < 1.0, norm
            module.project_()
            assert module.certificate().rate <= 0.99


def test_the_cheap_step_leaves_weights_inside_alone():
    module = StableLSTM(4, 8)
    with torch.no_grad():
        (
            module.weight_hh_l0.mul_(0.5),
            module.weight_ih_l0.mul_(0.5),
            module.bias_ih_l0.mul_(0.5),
            module.bias_hh_l0.mul_(0.5),
        )
    before = snapshot(module)
    for _ in range(3):
        module.project_(certify=False)
    assert unchanged(module, before)


def test_no_trace_in_state_dict_copy_or_pickle():
    module = StableLSTM(4, 8)
    names = set(module.state_dict())
    module.project_(certify=False)
    assert set(module.state_dict()) == names == set(nn.LSTM(4, 8).state_dict())
    twin = copy.deepcopy(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (twin, loaded, pickle.loads(pickle.dumps(module))):
        assert other.stability == module.stability
        other.project_(certify=False)


def test_plain_modules():
    """A set projects torch's own modules too, but for a clamp that they don't have."""
    lstm = nn.LSTM(3, 6, 2)
    Certified().project_(lstm)
    assert certificate(lstm).rate <= 0.99
    with pytest.raises(ValueError, match="needs a cell that clamps"):
        Certified(clamp=True).project_(lstm)
    with pytest.raises(TypeError, match="Linear"):
        Certified().project_(nn.Linear(3, 4))


def test_weights_that_are_no_numbers():
    module = StableLSTM(3, 4, 2)
    with torch.no_grad():
        module.weight_hh_l1[0, 0] = math.nan
    with pytest.raises(ValueError, match="weight_hh_l1 holds NaN"):
        module.project_()
    with pytest.raises(ValueError, match="NaN or infinite"):
        module.project_(certify=False)


def test_forget_cap_moves_nothing():
    module = StableLSTM(3, 4, stability=ForgetCap(0.9))
    before = snapshot(module)
    module.project_(), module.project_(certify=False)
    assert unchanged(module, before) and module.stability.cap == 0.9


def huge(module, scale):
    """All weights and biases random and as large as `scale`, up to the dtype's largest number."""
    with torch.no_grad():
        for p in module.parameters():
            most = torch.finfo(p.dtype).max
            p.copy_((torch.randn_like(p, dtype=torch.float64) * scale).clamp(-most, most))
    return module


@pytest.mark.parametrize(
    "dtype, scale",
    [
        (torch.float32, 1e7),
        (torch.float32, 3e38),
        (torch.float64, 1e15),
        (torch.float64, 1e300),
        (torch.bfloat16, 300.0),
        (torch.bfloat16, 1e38),
        (torch.float16, 1e3),
        (torch.float16, 6e4),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda d: StableLSTM(3, 9, dtype=d),
        lambda d: StableLSTM(3, 8, 2, bidirectional=True, proj_size=3, dtype=d, stability=Certified(norm="inf")),
        lambda d: StableLSTM(20, 10, dtype=d, stability=Certified(0.9, input_bound=1e3)),
    ],
)
def test_weights_as_large_as_the_dtype_holds(make, dtype, scale):
    module = huge(make(dtype), scale)
    module.project_(certify=False)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    module = huge(module, scale)
    module.project_()
    assert module.certificate().rate <= module.stability.rate
    before = snapshot(module)
    module.project_()
    assert unchanged(module, before)


def test_a_projection_that_fails_writes_nothing(monkeypatch):
    module = huge(StableLSTM(3, 4), 10.0)
    before = snapshot(module)
    monkeypatch.setattr("stable_rnn.stability.lstm.lower_forget", lambda *a: None)
    with pytest.raises(
        RuntimeError, match=r"weight_hh_l0 does not reach the set: .*forget gate may reach .*allowed: 0.55"
    ):
        module.project_()
    assert unchanged(module, before)


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1", "weight_hh_l1", "bias_hh_l0", "bias_ih_l1"])
@pytest.mark.parametrize("make", [StableLSTM, StableRNN, StableGRU])
def test_values_that_are_no_numbers_are_named_and_nothing_is_written(make, name, value, certify):
    module = spoil(make(3, 5, 2), 10.0)
    with torch.no_grad():
        getattr(module, name).view(-1)[3] = value
    before = snapshot(module)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite values"):
        module.project_(certify=certify)
    assert all(torch.equal(p.nan_to_num(7.0), before[n].nan_to_num(7.0)) for n, p in module.named_parameters())


@pytest.mark.parametrize("certify", [False, True])
def test_weights_without_values(certify):
    for make in (StableLSTM, StableRNN, StableGRU, StableLSTMCell):
        module = make(3, 5, device="meta")
        for call in (lambda m=module: m.project_(certify=certify), lambda m=module: certificate(m)):
            with pytest.raises(ValueError, match="weight_.* is on the meta device and holds no values"):
                call()


def weight_normed(module, name):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module, name)


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("compute", [nn.utils.parametrizations.weight_norm, weight_normed])
def test_computed_weights_are_refused(compute, certify):
    module = compute(spoil(StableLSTM(3, 5), 10.0), "weight_ih_l0")
    before = snapshot(module)
    with pytest.raises(ValueError, match="weight_ih_l0 of .*LSTM is computed from other parameters"):
        module.project_(certify=certify)
    assert unchanged(module, before)
    module = compute(StableRNN(3, 5), "weight_ih_l0")
    module.project_(certify=certify)  # never writes W_ih
