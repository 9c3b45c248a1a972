"""A training step's projection on a GPU: what it leaves outside beside the one of the CPU, and that no part of it waits for the device."""

import math

import pytest
import torch
from waiting import NoWaiting, no_waiting

from stable_rnn import Cascade, Certified, ForgetCap, StableGRU, StableLSTM, StableLSTMCell
from stable_rnn.ops import cuda_device
from stable_rnn.stability import products, project_all_, projection
from stable_rnn.stability.cascade import into_cascade_
from stable_rnn.stability.late import PERIOD
from stable_rnn.stability.nearest import Directions, step_into_ball
from stable_rnn.stability.products import step_of_products
from stable_rnn.stability.weights import layer_names, named_weights

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SCALES = torch.tensor([0.3, 1.0, 0.9, 0.1], dtype=torch.float64)


def norm(w, scales=SCALES):
    return float(torch.linalg.matrix_norm(scales.repeat_interleave(len(w) // len(scales))[:, None] * w.double(), 2))


def step(w, bound, scales=SCALES):
    return step_of_products(w[None], scales[None, :, None], bound)[0]


def drifting(shape, size=0.1, seed=1):
    """Endless updates: a part that is the same in each, one that changes, both of a few directions, as gradients have."""
    draw = torch.Generator().manual_seed(seed)
    few = torch.randn(6, shape[1], generator=draw)
    drift = torch.randn(shape[0], 6, generator=draw) @ few / shape[1] ** 0.5
    while True:
        other = few + torch.randn(6, shape[1], generator=draw)
        yield size * (drift + torch.randn(shape[0], 6, generator=draw) @ other / shape[1] ** 0.5)


@pytest.mark.parametrize("shape", [(256, 64), (192, 96), (52, 40)])
def test_outside_no_more_than_the_step_with_eigenvectors(shape):
    """Updates as large as the weights, each projected in either way: afterwards as near to the bound, by ways as short."""
    updates, found = drifting(shape), []
    ours, theirs, kept = torch.zeros(shape), torch.zeros(shape), Directions()
    for _ in range(60):
        update = next(updates)
        grown = ours + update, theirs + update
        ours, theirs = step(grown[0], 1.0), step_into_ball(grown[1], SCALES.float(), 1.0, kept)
        ways = [float((new - old).norm()) for new, old in zip((ours, theirs), grown)]
        found.append([norm(grown[0]), norm(ours), norm(theirs), *ways])
    before, after, others, way, their_way = torch.tensor(found[5:]).mean(0).tolist()
    assert before > 1.3 and after < max(1.05, others + 0.01) and way < 1.1 * their_way


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0, 10.0])
def test_rest_within_of_the_bound(size):
    """Without updates a few more steps end at the bound, and the matrix is not shorter than it has to be."""
    w = torch.zeros(128, 32)
    for _, update in zip(range(20), drifting((128, 32), size)):
        w = step(w + update, 0.9)
    for _ in range(12):
        w = step(w, 0.9)
    assert 0.9 * 0.99 < norm(w) <= 0.9 * 1.005


def test_inside_bitwise_untouched():
    for shape in ((128, 32), (4, 1), (12, 3)):
        w = torch.randn(shape)
        for nearly in (0.5, 0.999, 1 - 2e-6):
            assert torch.equal(step(w, norm(w) / nearly), w)
    assert torch.equal(step(torch.zeros(12, 3), 0.9), torch.zeros(12, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_size_and_what_is_not_finite(dtype):
    """A stack: a matrix that is not finite is left alone, the others are as they would be without it."""
    ws = torch.randn(5, 12, 3, dtype=dtype) * torch.tensor([1e-3, 10.0, 1e30, 1.0, 3.0], dtype=dtype)[:, None, None]
    ws[3, 2, 1], ws[4, 7, 0] = math.nan, math.inf
    found = step_of_products(ws, SCALES[None, :, None].expand(5, 4, 1), 0.9)
    assert torch.equal(found[0], ws[0]) and all(norm(w) <= 0.9 * 1.5 for w in found[1:3])
    assert torch.equal(found[3:].nan_to_num(7.0), ws[3:].nan_to_num(7.0))
    alone = step_of_products(ws[1:2], SCALES[None, :, None], 0.9)
    torch.testing.assert_close(alone[0], found[1])


@pytest.mark.parametrize("size, least", [(1.05, 0.999), (1.3, 0.99), (2.0, 0.9), (5.0, 0.9)])
def test_single_directions_come_to_the_bound(size, least):
    """And not far inside, from wherever; nor does what is inside."""
    draw = torch.Generator().manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(64, 16, generator=draw).double(), full_matrices=False)
    S = torch.linspace(0.9, 0.2, 16).double()
    S[0] = size
    found = step_of_products(((U * S) @ Vh)[None], torch.ones(1, 1, 1), 1.0)[0]
    sizes = (found @ Vh.mT).norm(dim=0)
    assert least < sizes[0] < 1.01 and (sizes[1:] / S[1:] > 0.999).all()


def test_weights_that_float32_just_holds():
    w = torch.randn(256, 64) * 1e37
    assert norm(step(w, 0.9)) < 0.9 * 1.5


def test_scales_by_row():
    """Equal ones do what the gate's do; unequal ones lead to the bound, too."""
    w = torch.randn(24, 8)
    rows = SCALES[None, :, None].expand(1, 4, 6)
    by_gate = step_of_products(w[None], SCALES[None, :, None], 1.0)
    rounding = dict(rtol=1e-5, atol=1e-5)  # float32: two rounds of products that take the scales in another order
    torch.testing.assert_close(step_of_products(w[None], rows, 1.0), by_gate, **rounding)
    rows = torch.rand(1, 4, 6, dtype=torch.float64) + 0.01
    for _ in range(10):
        w = step_of_products(w[None], rows, 1.0)[0]
    assert 0.99 < norm(w, rows.flatten()) < 1.005


@pytest.mark.parametrize(
    "scales, steps, most",
    [
        (torch.tensor([6.3, 105.0, 25.0, 0.25]).reshape(4, 1), 100, 1.1),  # an LSTM's, forget=0.95
        (torch.tensor([[12.0] + 15 * [0.6], 16 * [1.8]]), 5, 1.02),  # a GRU's, one r with a large b_hn
    ],
    ids=["gate", "rows"],
)
def test_weights_in_rows_of_small_scales_alone(scales, steps, most):
    """What hardly counts comes in as well where nothing else is outside, and no further than it has to."""
    draw, every = torch.Generator().manual_seed(0), scales.expand(len(scales), 16).flatten().double()
    rows = every == every.min()
    w = torch.where(rows[:, None], 1.0, 1e-3) * torch.randn(len(every), 16, generator=draw) / every.float()[:, None]
    short, found = w[rows].double(), w
    U, S, Vh = torch.linalg.svd(short * every[rows, None], full_matrices=False)
    way = (U * (S - 1).clamp(min=0) @ Vh / every[rows, None]).norm()
    for _ in range(steps):
        found = step_of_products(found[None], scales[None].double(), 1.0)[0]
    assert S[0] > 5 and norm(found, every) < most
    assert (found[rows] - short).norm() < 1.1 * way


def spectra(count):
    """(scales (G, 1) or (G, H), matrix, its norm), singular values of many kinds: all at the bound, few or many outside, near or far."""
    draw = torch.Generator().manual_seed(0)
    for number in range(count):
        G, H, P = (int(torch.randint(1, most, (1,), generator=draw)) for most in (5, 50, 50))
        gates, rows = torch.rand(G, 1, generator=draw), torch.rand(G, H if number % 2 else 1, generator=draw)
        scales = 10 ** (-2 * gates - rows / 2).double()
        every = scales.expand(G, H).reshape(-1, 1)
        U, S, Vh = torch.linalg.svd(every * torch.randn(G * H, P, generator=draw), full_matrices=False)
        spread = torch.rand(len(S), generator=draw).double()
        found = (spread * 0.99, 1 + spread * 1e-3, 1 - spread * 1e-6, 1 + spread / 2, 3 * spread, spread)[
            number // 2 % 6
        ]
        found[0] += (0.0, 0.01, 1.0, 20.0)[number % 4]
        yield scales, ((U * found) @ Vh / every).float(), float(found.max())


def test_no_step_leads_outwards():
    """Whatever the spectrum is, and three of them take most of what is outside. Gates of scales apart by 100 are brought in slowly where
    most of a direction lies in those that hardly count, but they are."""
    for scales, w, before in spectra(240):
        after, norms = [w], [before]
        for _ in range(3):
            after.append(step_of_products(after[-1][None], scales[None], 1.0)[0])
            norms.append(norm(after[-1], scales.expand(len(scales), len(w) // len(scales)).flatten()))
        assert all(new < max(old, 1.0) * 1.005 for old, new in zip(norms, norms[1:]))
        assert norms[3] < 1.02 * (1 + 0.4 * max(before - 1, 0))
        assert before > 1 - 1e-6 or torch.equal(after[1], w)


def test_polynomials_do_what_is_said_of_them():
    x = torch.linspace(0.005, 1, 4001, dtype=torch.float64)
    y = x
    for a, b, c in products.SIGN:
        y = a * y + b * y**3 + c * y**5
        assert 0 < y.min() and y.max() < 1.001
    assert (y - 1).abs().max() < 2e-3
    x = y = x[x >= 0.1]
    for a, b, c in products.ROOT:
        y = a * y + b * y**3 + c * y**5
    assert (y - 1).abs().max() < 0.12
    weights = products.Gates(torch.ones(1, 1, 1, 1, dtype=torch.float64)).weights
    y = torch.linspace(0, products.REACH * (1 - 1e-9), 2001, dtype=torch.float64)
    kept = 1 - torch.stack([products._lost(each.reshape(1, 1, 1), weights).flatten()[0] for each in y])
    assert kept[0] == 1 and -1e-9 < kept.min() and kept[y > 5].max() < 1 / 12.5
    slope = products._lost(torch.full((1, 1, 1), 1e-6, dtype=torch.float64), weights)
    second_order = dict(rtol=1e-6, atol=0)  # of a difference quotient at 1e-6
    torch.testing.assert_close(slope.flatten(), torch.tensor([1e-6], dtype=torch.float64), **second_order)


# ---- modules: on a GPU where there is one, else on CPU tensors that are taken for a GPU's


@pytest.fixture
def gpu(monkeypatch):
    if not GPU:
        monkeypatch.setattr(cuda_device, "on_gpu", lambda t: t.device.type == "cpu")


MODULES = {
    "LSTM": lambda: StableLSTM(3, 8, stability=Certified()),
    "LSTM, clamped, two layers, both ways": lambda: StableLSTM(
        3, 8, 2, bidirectional=True, stability=Certified(clamp=True)
    ),
    "LSTM in bfloat16": lambda: StableLSTM(8, 8, 2, dtype=torch.bfloat16),
    "LSTM cell": lambda: StableLSTMCell(3, 5),
    "GRU": lambda: StableGRU(3, 8, 2),
    "GRU, clamped": lambda: StableGRU(3, 8, stability=Certified(clamp=True)),
    "LSTM cascade": lambda: StableLSTM(3, 8, stability=Cascade(3)),
    "GRU cascade": lambda: StableGRU(3, 8, 2, stability=Cascade(3)),
    "cap": lambda: StableLSTM(3, 8, stability=ForgetCap(0.9)),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_no_step_waits(make, gpu):
    """After the first, which looks for NaN at once; what was sent is read when it has long arrived."""
    module = make().to(DEVICE)
    module.project_(certify=False)
    look = projection.warm_of(module).look
    for call in range(2, 40):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        if look.sent is not None and call >= look.sent.call + 4:
            assert call in (PERIOD + 4, 2 * PERIOD + 4)
            module.project_(certify=False)
            continue
        with no_waiting(GPU):
            project_all_([module], certify=False)  # what the hook of `project_after_step` calls
    module.project_()


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("kind", [StableLSTM, StableGRU])
def test_steps_on_a_device_without_values(kind, clamp, monkeypatch):
    """The meta device in the place of a GPU: whatever reads a value raises, and what is on the CPU cannot be mixed in by a copy."""
    monkeypatch.setattr(cuda_device, "on_gpu", lambda t: t.device.type == "meta")
    module = kind(3, 8, 2, bidirectional=True, stability=Certified(clamp=clamp), device="meta")
    weights = {name: w.detach() for name, w in named_weights(module).items()}
    versions = {name: w._version for name, w in weights.items()}
    cell = "lstm" if kind is StableLSTM else "gru"
    with NoWaiting("meta"):
        projection._step(weights, layer_names(module), module.stability, cell, projection._Warm())
    written = {name for name, w in weights.items() if w._version > versions[name]}
    assert written == {name for name in weights if "weight_hh" in name or not clamp}


def test_the_mode_notices():
    with NoWaiting("cpu"):
        w = torch.randn(4, 4)
        for wait in (
            lambda: float(w[0, 0]),
            lambda: bool((w > 0).all()),
            lambda: w[w > 0],
            lambda: torch.linalg.eigh(w @ w.mT),
            lambda: torch.linalg.qr(w),
            lambda: w.nonzero(),
        ):
            with pytest.raises(AssertionError, match="waits"):
                wait()


@pytest.mark.parametrize("kind", [StableLSTM, StableGRU])
@pytest.mark.parametrize("clamp", [False, True])
def test_training_steps_stay_near_the_set(kind, clamp, gpu):
    """As `test_the_cheap_step_brings_training_steps_back`, and the other rules of the set hold exactly."""
    module = kind(4, 24, 2, stability=Certified(clamp=clamp)).to(DEVICE)
    for _ in range(30):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p), alpha=0.01)
        module.project_(certify=False)
    assert module.certificate().rate < 1.0
    module.project_()
    assert module.certificate().rate <= 0.99


def test_autocast_is_off(gpu):
    modules = [StableLSTM(4, 16).to(DEVICE) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    for number, module in enumerate(modules):
        with torch.no_grad():
            module.weight_hh_l0.mul_(1.5)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bool(number)):
            module.project_(certify=False)
    assert all(torch.equal(a, b) for a, b in zip(modules[0].parameters(), modules[1].parameters()))


def test_forget_rules_do_not_depend_on_the_device(monkeypatch):
    modules = [StableLSTM(4, 16, 2), StableLSTM(4, 16, 2)]
    modules[1].load_state_dict(modules[0].state_dict())
    for number, module in enumerate(modules):
        with torch.no_grad():
            module.weight_ih_l0[16:32] *= 50
            module.bias_ih_l1[16:32] += 5
        if number:
            monkeypatch.setattr(cuda_device, "on_gpu", lambda t: True)
        module.project_(certify=False)
    assert all(torch.equal(a, b) for a, b in zip(modules[0].parameters(), modules[1].parameters()))


def test_cascades_are_the_same_bits(gpu):
    module = StableGRU(3, 9, stability=None).to(DEVICE)
    before = module.weight_hh_l0.detach().clone()
    into_cascade_(module, ["weight_hh_l0"], 3, certify=False)
    unit = torch.arange(9, device=DEVICE) // 3
    want = torch.where(unit[:, None] > unit, before.view(3, 9, 9), 0.0).view(27, 9)
    assert torch.equal(module.weight_hh_l0, want)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1", "bias_hh_l0"])
def test_what_is_not_finite_is_left_alone_and_named_late(name, value, gpu):
    module = StableLSTM(3, 5, 2).to(DEVICE)
    module.project_(certify=False)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with torch.no_grad():
        getattr(module, name).view(-1)[8] = value
    for _ in range(2, PERIOD + 4):
        module.project_(certify=False)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite values"):
        module.project_(certify=False)
    with torch.no_grad():
        getattr(module, name).view(-1)[8] = before[name].view(-1)[8]
    for n, p in module.named_parameters():
        torch.testing.assert_close(
            p, before[n], rtol=1e-5, atol=1e-6
        )  # a GPU's sums may put a layer outside by a rounding
    for _ in range(2 * PERIOD):
        module.project_(certify=False)


def test_the_first_step_looks_at_once(gpu):
    module = StableLSTM(3, 5).to(DEVICE)
    with torch.no_grad():
        module.bias_ih_l0[0] = math.nan
    for certify in (False, True):
        with pytest.raises(ValueError, match="bias_ih_l0 holds NaN"):
            module.project_(certify=certify)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_a_graph_repeats_the_step():
    module = StableLSTM(16, 32, 2).cuda()
    module.project_(certify=False)
    start = {n: p.detach() * 2 for n, p in module.named_parameters()}

    def again():
        with torch.no_grad():
            for n, p in module.named_parameters():
                p.copy_(start[n])
        module.project_(certify=False)

    again()
    want = [p.detach().clone() for p in module.parameters()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again()
    for p in module.parameters():
        p.detach().zero_()
    graph.replay()
    for p, w in zip(module.parameters(), want):
        torch.testing.assert_close(p.detach(), w)
