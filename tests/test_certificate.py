"""Certificates: bounds that search can't pass and sometimes reaches, the figures of the mathematics, and every kind of input."""

import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from stable_rnn import (
    Certified,
    Chunked,
    ForgetCap,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    Windowed,
    certificate,
    use_plan,
)
from stable_rnn.stability import certificate_from_state_dict
from stable_rnn.stability.bounds import LstmBounds, drive_of_bound, drive_of_data, lstm_bounds, rnn_bounds
from stable_rnn.stability.certificate import certify
from stable_rnn.stability.contraction import joint, lstm_contractions, lstm_step, lstm_two_at, norm2
from stable_rnn.stability.weights import LayerWeights, read_module

torch.set_num_threads(1)


# ---- the oracle: plain loops in float64


def step(w, xp, h, c, cap):
    """One step of a batch: xp (N, G*H), h (N, P), c (N, H)."""
    u = xp + h @ w.w_hh.mT
    if w.cell != "lstm":
        return u.tanh() if w.cell == "rnn_tanh" else u.relu(), c
    i, f, g, o = u.chunk(4, 1)
    c = f.sigmoid().clamp(max=cap) * c + i.sigmoid() * g.tanh()
    m = o.sigmoid() * c.tanh()
    return (m if w.w_hr is None else m @ w.w_hr.mT), c


def outputs(levels, x, k, cap=1.0):
    """x (T, I) -> (T, D*P). Each output of a layer from its last k inputs and a zero state: T runs side by side."""
    times = torch.arange(len(x))
    for level in levels:
        found = []
        for w in level:
            xp = (x.flip(0) if w.tag.endswith("reverse") else x) @ w.w_ih.mT + w.bias
            h, c = x.new_zeros(len(x), w.w_hh.shape[1]), x.new_zeros(len(x), w.hidden)
            for back in range(min(k, len(x)) - 1, -1, -1):
                at = times - back
                h1, c1 = step(w, xp[at.clamp(min=0)], h, c, cap)
                h, c = torch.where(at[:, None] >= 0, h1, h), torch.where(at[:, None] >= 0, c1, c)
            found.append(h.flip(0) if w.tag.endswith("reverse") else h)
        x = torch.cat(found, 1)
    return x


def worst(levels, k, bound=1.0, cap=1.0, steps=10, rounds=10):
    """The largest |windowed - recurrent| that gradient ascent over inputs within the bound finds."""
    best = 0.0
    for sign in (1.0, -1.0):
        p = (torch.randn(steps, levels[0][0].w_ih.shape[1], dtype=torch.float64) + sign).requires_grad_()
        optimizer = torch.optim.Adam([p], lr=0.3)
        for _ in range(rounds):
            x = bound * p.tanh()
            error = (outputs(levels, x, k, cap) - outputs(levels, x, steps, cap)).abs().max()
            best = max(best, error.item())
            optimizer.zero_grad()
            (-error).backward()
            optimizer.step()
    return best


def weights(module, kind, scale):
    """Random, of one sign, or orthogonal recurrent blocks, times a scale."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if kind == "positive":
                p.abs_()
            if kind == "orthogonal" and "weight_hh" in name:
                for block in p.split(module.hidden_size):
                    nn.init.orthogonal_(block)
            p.mul_(scale if "weight_h" in name else 1.0)
    return module.double()


def in_norm(found, norm):
    """The certificate as it would be with the contractions of one norm alone."""
    levels = tuple(tuple(replace(layer, contractions=tuple(c for c in layer.contractions if c.norm == norm)) for layer in level)
                   for level in found.levels)
    return replace(found, levels=levels)


RNN = [
    dict(hidden_size=3), dict(hidden_size=3, nonlinearity="relu"), dict(hidden_size=2, num_layers=2, bidirectional=True),
    dict(hidden_size=2, num_layers=3, nonlinearity="relu", bias=False),
]
LSTM = [
    dict(hidden_size=3), dict(hidden_size=1), dict(hidden_size=3, proj_size=2), dict(hidden_size=2, num_layers=2, bidirectional=True),
    dict(hidden_size=3, num_layers=2, proj_size=1, bias=False),
]


def modules(kind):
    for options in RNN:
        yield weights(nn.RNN(2, **options), kind, 0.7)
    for options in LSTM:
        yield weights(nn.LSTM(2, **options), kind, 0.5)


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


@pytest.mark.parametrize("make", [
    lambda: StableLSTM(2, 3, 2, bidirectional=True), lambda: StableLSTM(2, 4, proj_size=2),
    lambda: StableLSTM(3, 3, stability=Certified(cap=True)), lambda: StableLSTM(2, 3, stability=Certified(norm="inf")),
    lambda: StableRNN(2, 4, 2, "relu"), lambda: StableRNN(2, 4, 2),
])
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
@pytest.mark.parametrize("cap", [0.6, 1.0])
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
def test_the_norm_of_the_2_norm_contraction_shrinks(proj, seed):
    """Gradient ascent on V(after) / V(before) over pairs of states and an input, V^2 = sum_j weight_j dc_j^2 + |dh|^2."""
    torch.manual_seed(seed)
    w = read_module(weights(nn.LSTM(2, 3, proj_size=proj), "orthogonal" if proj == 0 else "random", 0.6))[0][0]
    b = lstm_bounds(w, drive_of_bound(w, torch.ones(2, dtype=torch.float64), 2**0.5, norm2(w.w_ih)), 0.7)
    kappa = 1.0 if proj == 0 else norm2(w.w_hr)
    rate = 0.9 + 0.3 * seed
    found = lstm_two_at(w, b, rate, torch.full_like(b.o, 0.3), kappa, upper=True)
    weight = (kappa * b.o) ** 2 * b.f / (rate - b.f)
    size = lambda dh, dc: ((weight * dc**2).sum() + (dh**2).sum()).sqrt()  # noqa: E731
    p = torch.randn(2 + 2 * (len(b.h) + 3), dtype=torch.float64).requires_grad_()
    optimizer, best = torch.optim.Adam([p], lr=0.1), 0.0
    for _ in range(120):
        x, h, h1, c, c1 = p.split([2, len(b.h), len(b.h), 3, 3])
        h, h1, c, c1 = b.h * h.tanh(), b.h * (h + h1 / 5).tanh(), b.c * c.tanh(), b.c * (c + c1 / 5).tanh()
        xp = (x.tanh() @ w.w_ih.mT + w.bias)[None]
        (one, two), (three, four) = step(w, xp, h[None], c[None], 0.7), step(w, xp, h1[None], c1[None], 0.7)
        ratio = size(one - three, two - four) / size(h - h1, c - c1)
        best = max(best, ratio.item())
        optimizer.zero_grad()
        (-ratio.log()).backward()
        optimizer.step()
    assert 0.3 * found.rate < best <= found.rate


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


# ---- the functions of a certificate


def test_window_is_the_least():
    for module in (StableLSTM(4, 8, 2), StableRNN(4, 8), StableLSTM(3, 5, bidirectional=True, stability=Certified(rate=0.8))):
        found = module.certificate()
        for eps in (0.3, 1e-2, 1e-6, 1e-12):
            k = found.window(eps)
            assert found.truncation_error(k) <= eps
            assert k == 1 or found.truncation_error(k - 1) > eps


def test_without_stability_the_trivial_bound_is_left():
    lstm, rnn, relu = nn.LSTM(8, 64), nn.RNN(8, 64), nn.RNN(8, 64, nonlinearity="relu")
    for module, bound in ((lstm, 2.0), (rnn, 2.0), (relu, math.inf)):
        with torch.no_grad():
            module.weight_hh_l0.mul_(5)
        found = certificate(module)
        assert not found.stable and found.rate >= 1
        assert found.truncation_error(100) == pytest.approx(bound, rel=1e-3)
        with pytest.raises(ValueError, match="not certified stable"):
            found.window(1e-3)
        assert "NOT certified stable" in str(found)
    assert certificate(lstm).window(2.5) == 1


def test_forget_cap_alone_still_has_a_bound():
    found = StableLSTM(8, 64, stability=ForgetCap(0.9)).certificate()
    assert found.layers[0].forget == 0.9 and not found.stable


def test_inputs_of_any_size():
    assert certificate(StableRNN(4, 8), input_bound=math.inf).stable
    assert certificate(StableLSTM(4, 8, stability=Certified(cap=True))).stable
    assert not certificate(StableLSTM(4, 8), input_bound=math.inf).stable
    relu = certificate(StableRNN(4, 8, nonlinearity="relu"), input_bound=math.inf)
    assert relu.stable and relu.truncation_error(50) == math.inf
    with pytest.raises(ValueError, match="stays at inf"):
        relu.window(0.1)


def test_a_larger_bound_gives_a_larger_rate():
    module = StableLSTM(4, 8)
    rates = [module.certificate(input_bound=bound).rate for bound in (0.0, 0.5, 1.0, 2.0)]
    assert rates == sorted(rates) and rates[1] < rates[2]


def test_data_sharpen_and_hold():
    torch.manual_seed(3)
    module = StableLSTM(3, 4, 2, bidirectional=True).double()
    x = torch.rand(40, 3, dtype=torch.float64) * 0.4 + 0.3
    known, blind = module.certificate(x), module.certificate()
    levels = read_module(module)
    assert known.rate < blind.rate
    for k in (1, 3, 9):
        error = (outputs(levels, x, k) - outputs(levels, x, 40)).abs().max().item()
        assert error <= known.truncation_error(k) < blind.truncation_error(k)
    w = levels[0][0]
    u = x @ w.w_ih.mT + w.bias
    drive = drive_of_data(w, x)
    assert (drive.low <= u.amin(0)).all() and (u.amax(0) <= drive.high).all() and u.norm(dim=1).max() <= drive.norm


def test_every_form_of_input():
    x, lengths = torch.rand(6, 3, 2), torch.tensor([6, 2, 4])
    padded = x.clone()
    for row, n in enumerate(lengths):
        padded[n:, row] = 100.0  # padding must not count
    module, batch_first = StableLSTM(2, 4), StableLSTM(2, 4, batch_first=True)
    batch_first.load_state_dict(module.state_dict())
    packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
    rows = torch.cat([x[:n, row] for row, n in enumerate(lengths)])
    masked = certificate(module, padded, lengths=lengths), batch_first.certificate(padded.transpose(0, 1), lengths=lengths)
    rates = {found.rate for found in (*masked, module.certificate(packed), module.certificate(rows))}
    assert len(rates) == 1
    assert module.certificate(padded).rate > rates.pop()


def test_cells_and_plain_modules_agree_with_the_stable_ones():
    lstm = StableLSTM(3, 5)
    plain = nn.LSTM(3, 5)
    plain.load_state_dict(lstm.state_dict())
    rate = lstm.certificate().rate
    assert certificate(plain).rate == pytest.approx(rate, rel=1e-2)
    for cell in (nn.LSTMCell(3, 5), StableLSTMCell(3, 5)):
        cell.load_state_dict({name.removesuffix("_l0"): p for name, p in lstm.state_dict().items()})
        assert certificate(cell).rate == pytest.approx(rate, rel=1e-2)
    for cell in (nn.RNNCell(3, 5, nonlinearity="relu"), StableRNNCell(3, 5, nonlinearity="relu")):
        assert certificate(cell).layers[0].cell == "rnn_relu"


def test_state_dicts():
    lstm, rnn = StableLSTM(3, 5, 2, bidirectional=True, proj_size=2), nn.RNN(3, 4)
    model = nn.ModuleDict({"enc": lstm, "dec": rnn, "gru": nn.GRU(3, 4), "cell": nn.LSTMCell(2, 3), "lin": nn.Linear(2, 2)})
    with pytest.warns(UserWarning, match="gru looks like a GRU"):
        found = certificate_from_state_dict(model.state_dict())
    assert set(found) == {"enc", "dec", "cell"}
    assert [layer.name for layer in found["enc"].layers] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert found["enc"].rate == pytest.approx(lstm.certificate().rate, rel=1e-2)
    assert found["dec"].rate == certificate(rnn).rate and "tanh cells" in str(found["dec"])
    assert certificate_from_state_dict(rnn.state_dict())[""].rate == certificate(rnn).rate
    with pytest.warns(UserWarning, match="the model has no weight_ih_l0; skipped"):
        assert certificate_from_state_dict({"weight_hh_l0": torch.zeros(3, 4), "other": torch.zeros(2)}) == {}
    blind = certificate_from_state_dict(lstm.state_dict(), 5.0)[""]
    assert blind.rate == pytest.approx(certify(read_module(lstm), 5.0).rate) and "|inputs| <= 5" in str(blind)


def test_str_states_the_assumptions():
    text = str(StableLSTM(3, 4, 2).certificate())
    for part in ("stable: rate", "l0:", "l1:", "forget gate <=", "window for an error of 0.001", "|inputs| <= 1", "zero initial state",
                 "eval mode", "exact arithmetic"):
        assert part in text
    assert pickle.loads(pickle.dumps(StableLSTM(3, 4).certificate())).stable


def test_torchs_defaults_do_not_matter():
    module = StableLSTM(3, 8)
    rate = module.certificate().rate
    with torch.device("meta"):
        assert module.certificate().rate == rate
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert module.certificate().rate == rate
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert module.certificate().rate == rate and StableLSTM(3, 8).certificate().stable
    finally:
        torch.set_default_dtype(before)


# ---- rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [
    lambda: nn.RNN(64, 64), lambda: nn.RNN(8, 32, 2), lambda: nn.RNN(4, 32, nonlinearity="relu"), lambda: nn.LSTM(16, 32),
    lambda: nn.LSTM(8, 16, 2, bidirectional=True), lambda: nn.LSTM(8, 16, proj_size=4),
])
def test_rounding_of_real_runs(make, dtype):
    """Runs of torch's own modules against float64 stay within half of the term, which stands for two runs."""
    module = make()
    if isinstance(module, nn.RNN):
        with torch.no_grad():
            for name, p in module.named_parameters():
                if "weight_hh" in name:
                    nn.init.orthogonal_(p).mul_(0.9)
    else:
        Certified(rate=0.9).project_(module)
    module.to(dtype)
    found = certificate(module)
    x = (torch.rand(200, 4, module.input_size) * 2 - 1).to(dtype)
    with torch.no_grad():
        low = module(x)[0]
        exact = module.double()(x.double())[0]
    measured = (low.double() - exact).abs().max().item()
    assert 0 < measured <= found.rounding_error(dtype) / 2
    if isinstance(module, nn.RNN) and module.num_layers == 1 and module.nonlinearity == "tanh":
        assert found.rounding_error(dtype) < 200 * measured
    k = found.window(1e-9)
    assert found.truncation_error(k, dtype=dtype) >= found.rounding_error(dtype) * 0.999 or found.truncation_error(k, dtype) >= 1
    with pytest.raises(ValueError, match="rounding in"):
        found.window(found.rounding_error(torch.float32) / 10, dtype=torch.float32)


def test_jumps():
    """A run with a jump every 5 steps stays within the bound of the run without."""
    module = StableLSTM(2, 4, 2).double()
    levels, x, jump = read_module(module), torch.rand(40, 2, dtype=torch.float64), 1e-3
    clean = dirty = x
    for (w,) in levels:
        states = []
        for source, size in ((clean, 0.0), (dirty, jump)):
            h, c, ys = x.new_zeros(1, 4), x.new_zeros(1, 4), []
            for t in range(40):
                if t % 5 == 0 and t:
                    h, c = h + size * torch.randn(1, 4).sign(), c + size * torch.randn(1, 4).sign()
                h, c = step(w, source[t] @ w.w_ih.mT + w.bias, h, c, 1.0)
                ys.append(h[0])
            states.append(torch.stack(ys))
        clean, dirty = states
    error = (clean - dirty).abs().max().item()
    assert 0 < error <= module.certificate().jump_bound(jump, 5)
    assert certificate(nn.LSTM(8, 64)).jump_bound(1e-3, 5) <= 2.0


# ---- errors


def test_errors():
    lstm = StableLSTM(3, 4)
    found = lstm.certificate()
    for k in (0, -3):
        with pytest.raises(ValueError, match=f"at least 1, got {k}"):
            found.truncation_error(k)
    for k in (2.0, True, "3"):
        with pytest.raises(TypeError, match="must be an int"):
            found.truncation_error(k)
    for eps in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="eps must be positive"):
            found.window(eps)
    with pytest.raises(TypeError, match="floating torch.dtype"):
        found.truncation_error(3, dtype=torch.int32)
    for bound in (-1.0, math.nan):
        with pytest.raises(ValueError, match="input_bound"):
            lstm.certificate(input_bound=bound)
    with pytest.raises(TypeError, match="input_bound"):
        lstm.certificate(input_bound="1")
    with pytest.raises(ValueError, match="input or input_bound"):
        lstm.certificate(torch.rand(2, 1, 3), input_bound=1.0)
    with pytest.raises(ValueError, match=r"input size 3, got the shape \(2, 1, 4\)"):
        lstm.certificate(torch.rand(2, 1, 4))
    with pytest.raises(ValueError, match="NaN or infinite"):
        lstm.certificate(torch.full((2, 1, 3), math.nan))
    with pytest.raises(ValueError, match="no step"):
        lstm.certificate(torch.rand(0, 1, 3))
    with pytest.raises(TypeError, match="got list"):
        lstm.certificate([1.0])
    with pytest.raises(TypeError, match="GRU"):
        certificate(nn.GRU(3, 4))
    with pytest.raises(TypeError, match="Linear"):
        certificate(nn.Linear(3, 4))


@pytest.mark.parametrize("lengths, error, text", [
    (torch.tensor([6, 2]), ValueError, r"shape \(3,\), one per sequence; got \(2,\)"),
    (torch.tensor([[6, 2, 1]]), ValueError, r"shape \(3,\)"),
    (torch.tensor([6, 7, 1]), ValueError, r"0\.\.6, got \[6, 7, 1\]"),
    (torch.tensor([6, -1, 1]), ValueError, r"0\.\.6"),
    (torch.tensor([6.0, 2.0, 1.0]), TypeError, "integers"),
    ([6, 2, 1], TypeError, "must be a Tensor"),
])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_that_do_not_fit(lengths, error, text, batch_first):
    module = nn.LSTM(2, 4, batch_first=batch_first)
    with pytest.raises(error, match=text):
        certificate(module, torch.rand(3, 6, 2) if batch_first else torch.rand(6, 3, 2), lengths=lengths)


def test_lengths_need_an_input_without_its_own():
    module, lengths = nn.LSTM(2, 4), torch.tensor([3, 2])
    with pytest.raises(ValueError, match="lengths need an input"):
        certificate(module, lengths=lengths)
    with pytest.raises(ValueError, match="PackedSequence has its own lengths"):
        certificate(module, pack_padded_sequence(torch.rand(3, 2, 2), lengths), lengths=lengths)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1_reverse", "bias_hh_l1", "weight_hr_l0"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(name, value):
    module = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    with torch.no_grad():
        getattr(module, name).view(-1)[0] = value
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite"):
        certificate(module)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite"):
        certificate_from_state_dict(module.state_dict())


@pytest.mark.parametrize("make", [
    lambda: StableLSTM(3, 6, 2, bidirectional=True), lambda: StableRNN(3, 6, 2), lambda: StableLSTM(3, 6, proj_size=2),
])
def test_plans_of_a_module_stay_within_the_bound(make):
    module = make().double()
    x = torch.rand(50, 2, 3, dtype=torch.float64) * 2 - 1
    found = module.certificate()
    with torch.no_grad():
        truth = module(x)[0]
        for k in (1, 4, 16):
            with use_plan(module, Windowed(k)):
                error = (module(x)[0] - truth).abs().max().item()
            assert 0 < error <= found.truncation_error(k, dtype=torch.float64)
            with use_plan(module, Chunked(5, k - 1)):
                assert (module(x)[0] - truth).abs().max().item() <= found.truncation_error(k, dtype=torch.float64)
