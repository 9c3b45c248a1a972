"""Certificates: bounds that search can't pass and sometimes reaches, and the figures of the mathematics."""

import math
from dataclasses import replace

import pytest
import torch
from certificate_search import in_norm, modules, outputs, step, weights, worst
from torch import nn

from stable_rnn import (
    Certified,
    StableLSTM,
    StableRNN,
    certificate,
)
from stable_rnn.stability.bounds import drive_of_bound
from stable_rnn.stability.contraction import norm2
from stable_rnn.stability.lstm import (
    LstmBounds,
    forget_slope,
    joint,
    lstm_bounds,
    lstm_contractions,
    lstm_step,
    lstm_two_at,
)
from stable_rnn.stability.radius import SHORT, proven, radius, weighing
from stable_rnn.stability.rnn import rnn_bounds
from stable_rnn.stability.weights import LayerWeights, read_module


@pytest.mark.parametrize("kind", ["random", "positive", "orthogonal"])
def test_no_input_passes_the_bound(kind):
    reached = []
    for module in modules(kind):
        found, levels = certificate(module), read_module(module)
        for k in (1, 4):
            error = worst(levels, k)
            for bound in (found, in_norm(found, "2"), in_norm(found, "inf")):
                assert error <= bound.truncation_error(k)
            reached.append(error / found.truncation_error(k))
    assert max(reached) > 0.2


@pytest.mark.parametrize(
    "make",
    [
        lambda: StableLSTM(2, 3, 2, bidirectional=True),
        lambda: StableLSTM(2, 4, proj_size=2),
        lambda: StableLSTM(3, 3, stability=Certified(clamp=True)),
        lambda: StableLSTM(2, 3, stability=Certified(norm="inf")),
        lambda: StableRNN(2, 4, 2, "relu"),
        lambda: StableRNN(2, 4, 2),
    ],
)
def test_no_input_passes_the_bound_of_a_projected_module(make):
    module = make()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3)
    module.project_()
    found, levels = module.certificate(), read_module(module)
    assert found.stable
    for k in (1, 5):
        error = worst(levels, k, bound=5.0 if module.stability.cap < 1 else 1.0, cap=module.stability.cap)
        for bound in (found, in_norm(found, "2"), in_norm(found, "inf")):
            assert error <= bound.truncation_error(k) * (1 + 1e-12)


def test_the_bound_is_reached():
    """A relu unit that only adds up: the error is exactly |w|^k times what the inputs pile up."""
    module = nn.RNN(1, 1, nonlinearity="relu", bias=False).double()
    with torch.no_grad():
        module.weight_hh_l0.fill_(0.5), module.weight_ih_l0.fill_(3.0)
    error = (outputs(read_module(module), torch.ones(60, 1, dtype=torch.float64), 4)[-1] - 6).abs().item()
    assert error == pytest.approx(6 / 16)
    assert error <= certificate(module).truncation_error(4) <= error * (1 + 1e-9)


def test_two_layers_reach_their_bound():
    """The same, twice: layer 1 also adds up the error of layer 0, here over a window long enough."""
    module = nn.RNN(1, 1, 2, nonlinearity="relu", bias=False).double()
    with torch.no_grad():
        [p.fill_(0.5 if "hh" in name else 1.0) for name, p in module.named_parameters()]
    error = (outputs(read_module(module), torch.ones(120, 1, dtype=torch.float64), 12)[-1] - 4).abs().item()
    bound = certificate(module).truncation_error(12)
    assert error <= bound <= 1.01 * error


@pytest.mark.parametrize("proj", [0, 2])
@pytest.mark.parametrize("cap", [0.6, 0.9, 1.0])
def test_a_step_obeys_the_comparison_system_unit_by_unit(proj, cap):
    """Pairs of reachable states, near and far, and pairs of inputs: |dc|, |dh| after a step against `lstm_step`."""
    tightest = 0.0
    for seed in range(20):
        torch.manual_seed(seed)
        w = read_module(weights(nn.LSTM(2, 3, proj_size=proj), "random", 10 ** torch.rand(()).item()))[0][0]
        b = lstm_bounds(w, drive_of_bound(w, torch.ones(2, dtype=torch.float64), 2**0.5, norm2(w.w_ih)), cap)
        if b.f.max() > 0.999:
            continue
        after = lstm_step(w, b)
        draw = lambda bound: (torch.rand(2000, len(bound), dtype=torch.float64) * 2 - 1) * bound  # noqa: E731
        size = 10 ** (-4 * torch.rand(2000, 1, dtype=torch.float64))
        first = draw(torch.ones(2)), draw(b.h), draw(b.c)
        x, h, c = ((1 - size) * s + size * draw(bound) for s, bound in zip(first, (torch.ones(2), b.h, b.c)))
        pairs = [step(w, state[0] @ w.w_ih.mT + w.bias, state[1], state[2], cap) for state in (first, (x, h, c))]
        dh, dc = ((p - q).abs() for p, q in zip(*pairs))
        for row in range(0, 2000, 40):
            drive = w.abs_hh @ (h - first[1]).abs()[row] + w.abs_ih @ (x - first[0]).abs()[row]
            most_c, most_h = after((c - first[2]).abs()[row], drive)
            assert (dc[row] <= most_c * (1 + 1e-9) + 1e-15).all() and (dh[row] <= most_h * (1 + 1e-9) + 1e-15).all()
            tightest = max(tightest, (dc[row] / most_c).max().item())
    assert tightest > 0.5


@pytest.mark.parametrize("limit", [0.1, 0.6, 0.95, 1.0])
def test_the_change_of_a_gated_tanh(limit):
    """|d(sigmoid(x) tanh(y))| <= hypot(joint(t) slope |dx|, s |dy|) for |tanh y| <= t, and it is attained."""
    x, y = torch.randn(2, 2, 20000, dtype=torch.float64) * 3
    if limit < 1:
        y = y.clamp(-math.atanh(limit), math.atanh(limit))
    x[:, :100], y[:, :100] = torch.tensor([[1e-3], [-1e-3]]), y[0, :100]  # where only the gate moves
    change = (x[0].sigmoid() * y[0].tanh() - x[1].sigmoid() * y[1].tanh()).abs()
    joint_slope = joint(torch.tensor(limit, dtype=torch.float64)) / 4
    bound = torch.hypot(joint_slope * (x[0] - x[1]), x.sigmoid().amax(0) * (y[0] - y[1]))
    assert (change <= bound * (1 + 1e-9) + 1e-15).all()
    assert (change / bound).max() > (0.8 if limit > 0.9 else 0.1)


@pytest.mark.parametrize("proj", [0, 2])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cap", [0.7, 0.95])
def test_the_norm_of_the_2_norm_contraction_shrinks(proj, cap, seed):
    """Gradient ascent on V(after) / V(before) over pairs of states and an input, V^2 = sum_j weight_j dc_j^2 + |dh|^2."""
    torch.manual_seed(seed)
    w = read_module(weights(nn.LSTM(2, 3, proj_size=proj), "orthogonal" if proj == 0 else "random", 0.6))[0][0]
    b = lstm_bounds(w, drive_of_bound(w, torch.ones(2, dtype=torch.float64), 2**0.5, norm2(w.w_ih)), cap)
    kappa = 1.0 if proj == 0 else norm2(w.w_hr)
    rate = cap + (0.2 if cap < 0.9 else 0.4) + 0.3 * seed
    found = lstm_two_at(w, b, rate, torch.full_like(b.o, 0.3), kappa, upper=True)
    weight = (kappa * b.o) ** 2 * b.f / (rate - b.f)
    size = lambda dh, dc: ((weight * dc**2).sum() + (dh**2).sum()).sqrt()  # noqa: E731
    p = torch.randn(2 + 2 * (len(b.h) + 3), dtype=torch.float64).requires_grad_()
    optimizer, best = torch.optim.Adam([p], lr=0.1), 0.0
    for _ in range(120):
        x, h, h1, c, c1 = p.split([2, len(b.h), len(b.h), 3, 3])
        h, h1, c, c1 = b.h * h.tanh(), b.h * (h + h1 / 5).tanh(), b.c * c.tanh(), b.c * (c + c1 / 5).tanh()
        xp = (x.tanh() @ w.w_ih.mT + w.bias)[None]
        (one, two), (three, four) = step(w, xp, h[None], c[None], cap), step(w, xp, h1[None], c1[None], cap)
        ratio = size(one - three, two - four) / size(h - h1, c - c1)
        best = max(best, ratio.item())
        optimizer.zero_grad()
        (-ratio.log()).backward()
        optimizer.step()
    assert 0.3 * found.rate < best <= found.rate


@pytest.mark.parametrize("rate", [0.9995, 1.4, 30.0])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.98])
def test_the_forget_gates_share(rate, share):
    """f dc + f (1 - f) q + r, squared, is at most rate F dc^2 + (q^2 s^2 + r^2/(1 - share)) / (1 - F/rate) for all gates f <= F, with
    s of `forget_slope`, at the worst dc and r; and s is no larger than it has to be."""
    most = torch.tensor([1e-6, 0.05, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99], dtype=torch.float64)
    found = forget_slope(most, rate, torch.tensor(share, dtype=torch.float64))
    f = torch.linspace(0, 1, 100001, dtype=torch.float64)[:, None] * most
    spare = 1 - most / rate
    worst = f**2 / (rate * most) + spare * (
        (f * (1 - f) / found) ** 2 + (1 - share)
    )  # the largest ratio, by Cauchy-Schwarz
    assert (worst.amax(0) <= 1 + 1e-12).all() and (worst.amax(0) > 1 - 1e-6).all()


SHIFT = torch.diag(torch.ones(3, dtype=torch.float64), 1)


@pytest.mark.parametrize("cell", ["tanh", "relu"])
@pytest.mark.parametrize("seed", range(4))
def test_the_norm_of_the_radius_shrinks(cell, seed):
    """Gradient ascent on V(after) / V(before) over pairs of states and an input, V^2 = dh^T P dh."""
    torch.manual_seed(seed)
    w = SHIFT * 1.2 if seed == 0 else torch.randn(4, 4, dtype=torch.float64) / 2
    rate = SHORT * radius(w)
    p = weighing(w, rate)
    assert proven(w, p, rate) and rate < norm2(w)
    size = lambda d: (d @ p @ d).sqrt()  # noqa: E731
    act, best = getattr(torch, cell), 0.0
    x = torch.randn(3, 4, dtype=torch.float64).mul(0.3)
    x[0] += 1.0 if cell == "relu" else 0.0  # no unit starts dead
    optimizer = torch.optim.Adam([x.requires_grad_()], lr=0.05)
    for _ in range(300):
        ratio = size(act(x[0] + w @ x[1]) - act(x[0] + w @ (x[1] + x[2] / 9))) / size(x[2] / 9)
        best = max(best, ratio.item())
        optimizer.zero_grad()
        (-ratio).backward()
        optimizer.step()
    assert 0.7 * rate < best <= rate


@pytest.mark.parametrize("options", [dict(), dict(nonlinearity="relu"), dict(num_layers=2, bidirectional=True)])
def test_no_input_passes_the_bound_of_the_radius(options):
    """Weights of 2-norms above 1, certified by nothing but the radius."""
    torch.manual_seed(2)
    module = nn.RNN(2, 4, **options).double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(
                SHIFT * 1.1 + 0.02 * torch.randn(4, 4) if "weight_hh" in name else p.abs()
            )  # no unit of the relu is dead
    found, levels = certificate(module), read_module(module)
    assert norm2(levels[0][0].w_hh) > 1.05 and found.rate < 1
    kept = tuple(
        tuple(
            replace(layer, contractions=tuple(c for c in layer.contractions if c.norm == "2" and c.rate < 1))
            for layer in level
        )
        for level in found.levels
    )
    assert all(layer.contractions for level in kept for layer in level)
    for k in (1, 4, 8):
        assert 0 < worst(levels, k, steps=16) <= replace(found, levels=kept).truncation_error(k)


def test_numerical_radii():
    torch.manual_seed(0)
    for w in (
        SHIFT,
        torch.randn(1, 1),
        torch.randn(30, 30),
        nn.init.orthogonal_(torch.empty(9, 9)),
        torch.zeros(3, 3),
        SHIFT * 1e300,
    ):
        angles = torch.linspace(0, math.pi, 700, dtype=torch.float64)[:, None, None] * 1j
        parts = torch.exp(angles) * (w.double() / w.abs().max().clamp(min=1e-9)).to(torch.complex128)
        exact = float(torch.linalg.eigvalsh((parts + parts.mH) / 2).max()) * float(w.double().abs().max())
        assert exact / SHORT <= radius(w) <= exact * (1 + 1e-5)
    assert radius(SHIFT) == pytest.approx(math.cos(math.pi / 5), rel=0.01)


def test_what_is_not_so_is_not_proven():
    """Just below the radius no P does, whatever it is; just above, the proof needs the right one."""
    torch.manual_seed(1)
    w, one = torch.randn(20, 20, dtype=torch.float64), torch.eye(20, dtype=torch.float64)
    angles = torch.linspace(0, math.pi, 2000, dtype=torch.float64)[:, None, None] * 1j
    parts = torch.exp(angles) * w
    exact = float(torch.linalg.eigvalsh((parts + parts.mH) / 2).max())
    p = weighing(w, exact * 1.0001)
    assert proven(w, p, exact * 1.0001) and not proven(w, p, exact * 0.9999) and weighing(w, exact * 0.9999) is None
    for wrong in (one, p + 0.2 * one, p - 0.2 * one, 2 * one, 0 * one, p * math.nan):
        assert not proven(w, wrong, exact * 1.0001)
    assert proven(w, one, norm2(w) * (1 + 1e-9)) and not proven(w, one, norm2(w) * (1 - 1e-7))


@pytest.mark.parametrize("make", [lambda: nn.RNN(3, 5), lambda: nn.LSTM(3, 5), lambda: nn.LSTM(3, 5, proj_size=2)])
def test_gates_and_states_stay_within_their_bounds(make):
    """At the corners of the box of inputs and states, each unit driven as far as it goes, both ways."""
    w = read_module(weights(make(), "random", 1.5))[0][0]
    drive = drive_of_bound(w, torch.full((3,), 1.5, dtype=torch.float64), 1.5 * 3**0.5, norm2(w.w_ih))
    b = rnn_bounds(w, drive) if w.cell == "rnn_tanh" else lstm_bounds(w, drive, 0.9)
    for sign in (1, -1):
        u = w.bias + sign * (1.5 * w.w_ih.abs().sum(1) + w.w_hh.abs() @ b.h)
        if w.cell == "rnn_tanh":
            assert (u.tanh().abs() <= b.h * (1 + 1e-3)).all()  # the bound is iterated, not to its limit
            continue
        i, f, g, o = u.chunk(4)
        gates = [(i.sigmoid(), b.i), (f.sigmoid().clamp(max=0.9), b.f), (o.sigmoid(), b.o), (g.tanh().abs(), b.z)]
        for gate, (value, bound) in enumerate(gates):
            assert (value <= bound).all(), gate
            assert sign < 0 or gate == 3 or torch.allclose(value, bound, rtol=0.05)
    if w.cell == "lstm":
        assert torch.allclose(b.c, b.i * b.z / (1 - b.f)) and torch.allclose(b.m, b.o * b.c.tanh())


# ---- the figures


def paper(f=0.64):
    """The constants of Prop. 2 of arXiv 1805.10369 at f = 0.64, as a layer of one unit with all gates at their largest."""
    one, c = torch.ones(1, dtype=torch.float64), 1 / (1 - f)
    w = torch.tensor([[1 - f], [(1 - f) ** 2], [(1 - f) / 4], [1 - f]], dtype=torch.float64)
    t = math.tanh(c) * one
    bounds = LstmBounds(i=one, f=f * one, o=one, z=one, si=one / 4, sf=one / 4, so=one / 4, c=c * one, t=t, m=t, h=t)
    return LayerWeights("lstm", "l0", w, w, torch.zeros(4, dtype=torch.float64), None), bounds


def test_the_papers_constants():
    """The linear comparison system has rate 0.9385 and needs 122 to 123 steps to 1e-3 there; one step in the max-norm gives 0.999.
    Ours bounds products of gates more sharply, so it must be below, in both norms."""
    w, b = paper()
    f, c, t = b.f.item(), b.c.item(), b.t.item()
    wi, wf, wg, wo = w.w_hh[:, 0].tolist()
    a = c * wf / 4 + wg + wi / 4
    matrix = torch.tensor([[f, a], [f, a + t * wo / 4]], dtype=torch.float64)
    linear = torch.linalg.eigvals(matrix).abs().max().item()
    assert linear == pytest.approx(0.9385, abs=2e-4) and matrix.sum(1).max() > 0.999
    v, steps = torch.tensor([c, t], dtype=torch.float64), 0
    while v[1] > 1e-3:
        v, steps = matrix @ v, steps + 1
    assert steps in (122, 123)
    for found in lstm_contractions(w, b, ("2", "inf"), True, None):
        assert found.rate < 0.86
        assert found.after(steps // 2, 0.0) * found.out[0] < 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_the_linear_system(seed):
    """M of the comparison system with plain norms, from the same gate bounds: our rate is at most its spectral radius."""
    torch.manual_seed(seed)
    w = read_module(weights(nn.LSTM(3, 6), "random", 0.6))[0][0]
    b = lstm_bounds(w, drive_of_bound(w, torch.ones(3, dtype=torch.float64), 3**0.5, norm2(w.w_ih)), 1.0)
    f, i, o, z, c, t = (x.max().item() for x in (b.f, b.i, b.o, b.z, b.c, b.t))
    found = lstm_contractions(w, b, ("2", "inf"), True, None)
    for norm, size in (("2", torch.linalg.matrix_norm), ("inf", lambda m, _: m.abs().sum(1).max())):
        wi, wf, wg, wo = (size(block, 2).item() for block in w.w_hh.chunk(4))
        a = c * wf / 4 + i * wg + z * wi / 4
        linear = torch.linalg.eigvals(torch.tensor([[f, a], [o * f, o * a + t * wo / 4]])).abs().max().item()
        assert min(each.rate for each in found if each.norm == norm) <= linear * 1.001


def test_rnn_rates():
    module = nn.RNN(4, 16).double()
    nn.init.orthogonal_(module.weight_hh_l0)
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.9)
    found = certificate(module)
    assert found.norm == "2" and 0.9 <= found.rate <= 0.9 * (1 + 1e-6)
    torch.manual_seed(0)
    fresh = nn.RNN(4, 64)  # torch's own weights
    assert norm2(fresh.weight_hh_l0.double()) > 1.1 and certificate(fresh).rate < 0.85
    module = nn.RNN(4, 3).double()
    with torch.no_grad():  # triangular: outside in both plain norms, inside in the max-norm with weights of the units
        module.weight_hh_l0.copy_(torch.eye(3) * 0.5 + torch.diag(torch.ones(2) * 0.9, 1))
    assert torch.linalg.matrix_norm(module.weight_hh_l0, 2) > 1.1 and module.weight_hh_l0.sum(1).max() > 1.3
    found = certificate(module)
    assert found.norm == "inf" and found.stable


def test_scaled_weights_never_beat_the_true_decay():
    """A rate is an upper bound of the spectral radius of the linearized map at the origin, where all slopes are 1."""
    for seed in range(10):
        torch.manual_seed(seed)
        module = weights(nn.RNN(2, 8), "random", 1.2)
        assert certificate(module).rate >= torch.linalg.eigvals(module.weight_hh_l0.detach()).abs().max() * (1 - 1e-9)
