"""The GRU's certificates and sets, from its weights: no states, gates or inputs that a search finds pass them, and some come close."""

import copy
import math

import pytest
import torch
from certificate_search import growth, kept_apart, outputs, step, weights, worst
from torch import nn

from stable_rnn import Cascade, Certified, ForgetCap, certificate
from stable_rnn.cells import CELLS, MODES
from stable_rnn.cells.spec import Cell
from stable_rnn.stability import certificate_from_state_dict, gru
from stable_rnn.stability.bounds import drive_of_bound
from stable_rnn.stability.cells import STABILITY
from stable_rnn.stability.comparison import Comparison
from stable_rnn.stability.contraction import norm2
from stable_rnn.stability.gru import GruBounds, gru_bounds, gru_scales, gru_step
from stable_rnn.stability.weights import read_module

F64 = dict(dtype=torch.float64)


@pytest.fixture(autouse=True)
def _cell(monkeypatch):
    """The certificate needs no more of a cell than its table says."""
    if "gru" not in CELLS:
        cell = type("Gru", (Cell,), dict(name="gru", mode="GRU", family="gru", gates=3, has_cell=False, forgets=1))()
        monkeypatch.setitem(CELLS, "gru", cell)
        monkeypatch.setitem(MODES, "GRU", cell)
        monkeypatch.setitem(STABILITY, "gru", gru.CELLS["gru"])


def clamped(stability, *sizes, scale=1.0, seed=1, project=True, **options):
    torch.manual_seed(seed)
    module = nn.GRU(*sizes, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(scale)
    module.stability = stability
    if project:
        stability.project_(module)
    return module.double()


def of_layer(module, cap, x=1.0):
    w = read_module(module)[0][0]
    inputs = w.w_ih.shape[1]
    return w, gru_bounds(w, drive_of_bound(w, torch.full((inputs,), x, **F64), x * inputs**0.5, norm2(w.w_ih)), cap)


# ---- the closed forms


@pytest.mark.parametrize("zeta", [27 / 64, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("z", [0.05, 0.3, 0.6, 0.8, 0.95, 0.99])
def test_alpha_against_all_gates(z, zeta):
    """alpha a^2 + W^2 >= (z' a + (1 - z') sqrt((1 - t^2)^2 + z'^2 (1 + t)^2 / zeta) W)^2 for all a, W, t <= 1 and z' <= z."""
    t, below = torch.linspace(0, 1, 801, **F64), torch.linspace(0, 1, 801, **F64)[1:, None] * z
    needed = below**2 / (1 - (1 - below) ** 2 * ((1 - t**2) ** 2 + below**2 * (1 + t) ** 2 / zeta))
    found = float(gru._alpha(torch.tensor([z], **F64), zeta))
    assert float(needed.max()) <= found <= float(needed.max()) + 0.0125
    if zeta <= 2 * z * z:
        assert found == pytest.approx(float(needed.max()), rel=1e-4)


def test_the_reset_gates_constant():
    r = torch.linspace(0, 1, 100_001, **F64)[:-1]
    assert gru.RESET == pytest.approx(float((r**2 * (1 - r) / (1 + r)).max()), rel=1e-9)


def test_a_step_in_the_max_norm_against_all_gates():
    """gru_step is the largest of (1) over gates and |n|: never less, and hardly more (it takes a chord for a convex function of z)."""
    torch.manual_seed(0)
    a, v, s, u = 10 ** (torch.rand(4, 300, **F64) * 3 - 2)
    z, m, r = torch.rand(300, **F64) * 0.98 + 0.01, torch.rand(300, **F64) * 4, torch.rand(300, **F64).clamp(min=0.3)
    found = gru_step(GruBounds(r, z, m, torch.ones_like(z)), a, torch.cat([v, s, u]), torch.zeros_like(a))
    at = torch.linspace(0, 1, 401, **F64)[:, None]
    q = (at * r * u + m * at * r * (1 - at * r) * v).amax(0)
    best = torch.zeros_like(a)
    for t in torch.linspace(0, 1, 201, **F64):
        best = torch.maximum(best, (at * z * a + (1 - at * z) * ((1 - t * t) * q + (1 + t) * at * z * s)).amax(0))
    assert (best <= found).all() and (found <= best * 1.2).all() and float((found / best - 1).median()) < 1e-5
    still = torch.zeros(1, **F64)
    assert float(gru_step(GruBounds(*torch.ones(4, 1, **F64)), still, still.repeat(3), still)) == 0


# ---- theorem A


def attacked(rate, z, H, seed, rounds, zeta=2.0):
    """The largest V(after)/V(before) of the tangent of one step that gradient ascent over weights on the boundary of ||D W_hh||_2 <= rate,
    states, gates (inputs can bring any) and differences finds."""
    torch.manual_seed(seed)
    params = [torch.randn(size, **F64).requires_grad_() for size in ((3 * H, H), (H,), (3, 16, H), (16, H), (16, H))]
    optimizer, best = torch.optim.Adam(params, lr=0.05), 0.0
    for _ in range(rounds):
        A, bias, gates, state, dh = params
        D, p = gru_scales(torch.ones(H, **F64), torch.full((H,), z, **F64), rate, zeta)
        B = A * (rate / torch.linalg.matrix_norm(A, 2)) / D[:, None]
        of_r, of_z, of_n = B.chunk(3)
        of_r = of_r / (of_n.abs().sum(1) + bias.abs())[:, None]  # m, by which the scales of r grow
        h, (r, zt), n = state.tanh(), gates[:2].sigmoid(), gates[2].tanh()
        zt, m = z * zt, h @ of_n.mT + bias
        dn = (1 - n * n) * (r * (dh @ of_n.mT) + m * r * (1 - r) * (dh @ of_r.mT))
        after = zt * dh + (1 - zt) * dn + (h - n) * zt * (1 - zt) * (dh @ of_z.mT)
        ratio = ((p * after**2).sum(1) / (p * dh**2).sum(1)).sqrt()
        best = max(best, float(ratio.detach().max()))
        optimizer.zero_grad()
        (-ratio.sum()).backward()
        optimizer.step()
    return best


@pytest.mark.parametrize("rate, z, H", [(0.99, 0.8, 8), (0.99, 0.5, 4), (0.95, 0.8, 8)])
def test_no_weights_in_the_set_expand_and_some_come_close(rate, z, H):
    found = attacked(rate, z, H, seed=0, rounds=400)
    assert 0.97 * rate < found <= rate


@pytest.mark.parametrize("seed", range(6))
def test_certified_layers_contract(seed):
    """Real steps of pairs of states, in the norm that the certificate used."""
    H = 2 + seed
    stability = Certified(0.97, clamp=True, forget=0.7) if seed % 2 else Certified(0.97, forget=0.6)
    module = clamped(stability, 3, H, scale=3.0, seed=seed, bias=seed != 3)
    w, b = of_layer(module, stability.cap)
    zeta = torch.full((H,), 2.0, **F64)
    c = gru.gru_two_at(w, b, 0.97, zeta, True)
    assert c.rate <= 0.97 * (1 + 1e-9)
    p = gru_scales(b.m, b.z, 0.97, zeta)[1]
    x = torch.rand(2, 4000, 3, **F64) * 2 - 1
    h = (torch.rand(2, 4000, H, **F64) * 2 - 1) * b.h
    h[1] = h[0] + (h[1] - h[0]) * 10 ** (-4 * torch.rand(4000, 1, **F64))
    xp = x @ w.w_ih.mT + w.bias
    size = lambda d: (p * d * d).sum(-1).sqrt()  # noqa: E731
    same = [step(w, xp[0], each, each, stability.cap)[0] for each in h]
    ratio = size(same[0] - same[1]) / size(h[0] - h[1])
    assert 0.3 < ratio.max() <= c.rate
    other = step(w, xp[1], h[0], h[0], stability.cap)[0]
    assert (size(same[0] - other) <= c.gain * torch.linalg.vector_norm(x[0] - x[1], dim=1)).all()
    assert (torch.linalg.vector_norm(same[0] - same[1], dim=1) <= c.out[1] * size(same[0] - same[1])).all()
    assert (size(h[0]) <= c.start).all()


# ---- theorem B


@pytest.mark.parametrize("seed", range(3))
def test_no_states_pass_the_rate_of_the_max_norm(seed):
    w, b = of_layer(weights(clamped(ForgetCap(0.7), 3, 5, seed=seed), "positive", 0.4), 0.7)
    plain = next(iter(gru._gru_inf(w, b, None)))
    reached = growth(lambda h, u: step(w, 3 * u, h, h, 0.7)[0], torch.ones(5, **F64), torch.ones(5, **F64), 15)
    assert 0.6 * plain.rate < reached <= plain.rate
    # the closed form of rows: z + (1 - z) L
    of_r, of_z, of_n = (part.abs().sum(1) for part in w.w_hh.chunk(3))
    L = of_n + b.m * of_r / 4 + of_z + of_z**2 / (4 * of_n)
    assert plain.rate <= float((0.7 + 0.3 * L).max()) or L.max() > 1


# ---- theorem C


@pytest.mark.parametrize("groups, scale", [(4, 3.0), (2, 5.0)])
def test_windows_of_cascades_are_near_to_what_inputs_reach(groups, scale):
    module = clamped(Cascade(groups), 2, 8, scale=scale)
    found, steps = certificate(module), 30
    bounds = torch.tensor([found.truncation_error(k) for k in range(1, steps + 1)])
    apart = kept_apart(read_module(module), steps, warm=20, rounds=40, bound=1.5, cap=0.7)
    kept = int((apart >= 1e-3).nonzero().max()) + 1
    assert (apart <= bounds).all() and kept < found.window(1e-3) <= 4 * kept
    assert (
        found.layers[0].depth == groups
        and found.layers[0].forget == 0.7
        and found.rate <= Cascade().cap_of("gru") + 0.03
    )


@pytest.mark.parametrize("rate", [0.715, 0.76])
def test_the_growing_weights_make_it_contract(rate):
    w, b = of_layer(clamped(Cascade(3), 2, 6, scale=4.0), 0.7)
    v = gru._growing(w, b, rate, 3)
    assert 0.69 < growth(lambda h, u: step(w, 2 * u, h, h, 0.7)[0], v, b.h, 18) <= rate
    assert float((gru._gru_units(w, b, v) / v).max()) <= rate * (1 + 1e-12)


@pytest.mark.parametrize("options", [dict(num_layers=2, bidirectional=True), dict(num_layers=3, bias=False)])
@pytest.mark.parametrize("stability", [Cascade(2, 0.6), Certified(0.8, forget=0.51), Certified(0.9, "inf", clamp=True)])
def test_no_input_passes_the_bound_of_a_stack(options, stability):
    module = clamped(stability, 2, 4, scale=2.0, **options)
    found, levels = certificate(module, input_bound=1.0), read_module(module)
    assert found.stable
    for k in (1, 4, 8):
        assert worst(levels, k, cap=stability.cap_of("gru"), steps=12) <= found.truncation_error(k)


# ---- bounds, sets, what stands around them


def test_the_oracle_is_torchs_gru():
    module = nn.GRU(3, 4, 2, bidirectional=True).double()
    x = torch.randn(7, 3, **F64)
    torch.testing.assert_close(outputs(read_module(module), x, 7), module(x)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_gates_and_states_stay_within_their_bounds(bias):
    module = weights(nn.GRU(3, 6, bias=bias), "random", 2.0)
    w, b = of_layer(module, 0.9, x=1.5)
    h = torch.zeros(500, 6, **F64)
    b_hn = 0 if w.bias_hh is None else w.bias_hh[12:]
    largest = [torch.zeros(6, **F64) for _ in range(4)]
    for _ in range(60):
        u = (torch.rand(500, 3, **F64) * 2 - 1).sign() * 1.5 @ w.w_ih.mT + w.bias
        gates, m = u + h @ w.w_hh.mT, h @ w.w_hh[12:].mT + b_hn
        h, _ = step(w, u, h, h, 0.9)
        now = gates[:, :6].sigmoid(), gates[:, 6:12].sigmoid().clamp(max=0.9), m.abs(), h.abs()
        largest = [torch.maximum(old, each.amax(0)) for old, each in zip(largest, now)]
    for bound, reached in zip((b.r, b.z, b.m, b.h), largest):
        assert (reached <= bound).all() and (reached > 0.3 * bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "stability",
    [
        Certified(),
        Certified(clamp=True, forget=0.8),
        Certified(0.8, forget=0.6),
        Certified(0.9, "inf", clamp=True),
        Certified(0.9, "inf"),
        Certified(norm="auto"),
        Certified(norm="radius", clamp=True),
    ],
)
def test_weights_from_outside_are_brought_in(stability, dtype):
    for scale, seed in ((0.1, 0), (30.0, 1)):
        module = clamped(stability, 3, 7, scale=scale, seed=seed, bidirectional=seed == 1, project=False).to(dtype)
        before = copy.deepcopy(module)
        stability.project_(module)
        found = certificate(module)
        assert found.rate <= stability.rate and all(layer.forget <= stability.forget for layer in found.layers)
        inside = [p.clone() for p in module.parameters()]
        stability.project_(module)
        assert all(torch.equal(p, old) for p, old in zip(module.parameters(), inside))
        moved = any(not torch.equal(p, old) for p, old in zip(module.parameters(), before.parameters()))
        assert moved == (scale > 1) or dtype == torch.bfloat16


def test_training_steps_come_near_the_set():
    stability = Certified(0.9, clamp=True, forget=0.7)
    module = clamped(stability, 3, 16).float()
    for _ in range(20):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p) * 0.02)
        stability.project_(module, certify=False)
    assert certificate(module).rate < 0.92


def test_sets_that_no_weights_reach():
    for stability, text in (
        (Certified(0.5, clamp=True, forget=0.4), "needs a lower bound than forget=0.4"),
        (Certified(0.6), "needs a lower bound than forget=0.55, with clamp=True"),
        (Certified(0.4, "inf"), "forget must be below the rate"),
    ):
        with pytest.raises(ValueError, match=text):
            stability.project_(clamped(stability, 2, 3, project=False))
    with pytest.raises(ValueError, match="clamps its forget gate at 0.7"):
        Cascade().project_(nn.GRU(2, 3))


def test_a_unit_without_weights_of_its_candidate():
    module = clamped(Certified(), 3, 4, scale=5.0, project=False)
    with torch.no_grad():
        module.weight_hh_l0[8], module.bias_hh_l0[8] = 0, 0
    Certified().project_(module)
    assert certificate(module).rate <= 0.99 and all(torch.isfinite(p).all() for p in module.parameters())


def test_the_masks_of_a_cascade_and_state_dicts():
    module = clamped(Cascade(3), 3, 7, scale=2.0)
    assert not (module.weight_hh_l0.view(3, 7, 7).triu() != 0).any()
    state = module.state_dict()
    state._metadata[""]["forget_clamp"] = 0.7
    found = certificate_from_state_dict(state)[""]
    assert found.layers[0].depth == 3 and found.window(1e-3) == certificate(module, input_bound=1.0).window(1e-3)
    assert Comparison in map(type, found.layers[0].contractions) and "a cascade of 3 groups" in str(found)


def test_a_gate_that_may_stay_open_certifies_nothing():
    found = certificate(nn.GRU(3, 4), input_bound=math.inf)
    assert not found.stable and found.truncation_error(100) == 2.0
    mild = certificate(nn.GRU(3, 4), input_bound=0.1)
    assert mild.layers[0].forget < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_of_real_runs(dtype):
    stability = Certified(0.9, clamp=True, forget=0.6)
    module = clamped(stability, 8, 32, scale=2.0).to(dtype)
    w = read_module(module)[0][0]
    x = torch.randn(60, 8).clamp(-1, 1).to(dtype)
    h = torch.zeros(1, 32, dtype=dtype)
    exact, worst_error = torch.zeros(1, 32, **F64), 0.0
    low = [t.to(dtype) for t in (w.w_ih, w.w_hh, w.bias_ih, w.bias_hh)]
    for row in x:
        exact, _ = step(w, row.double() @ w.w_ih.mT + w.bias, exact, exact, 0.6)
        (xr, xz, xn), (qr, qz, qn) = (
            nn.functional.linear(each, weight, bias).chunk(3, -1)
            for each, weight, bias in ((row[None], low[0], low[2]), (h, low[1], low[3]))
        )
        z = (xz + qz).sigmoid().clamp(max=0.6)
        h = (1 - z) * (xn + (xr + qr).sigmoid() * qn).tanh() + z * h
        worst_error = max(worst_error, float((h.double() - exact).abs().max()))
    bound = certificate(module, input_bound=1.0).rounding_error(dtype) / 2
    assert bound / 2000 < worst_error <= bound / 2
