"""Weights that share memory: projected until every layer and module that holds them is certified, or refused by name."""

import copy
import itertools

import pytest
import torch
from torch import nn

from stable_rnn import Certified, StableLSTM, StableLSTMCell, StableRNN, StableRNNCell, project_after_step
from stable_rnn.functional import row_project_, spectral_norm_bound, spectral_project_
from stable_rnn.ops.spectral.memory import first_overlap, overlaps_itself
from stable_rnn.stability import project_all_, projection, together

KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
SETS = [
    Certified(),
    Certified(0.9, "inf"),
    Certified(0.95, "auto"),
    Certified(0.9, "radius"),
    Certified(0.8, "inf", clamp=True),
]


def tie(module, *pairs):
    for name, other in pairs:
        setattr(module, name, getattr(module, other))
    return module


def layers(module, kinds=KINDS, reverse=False):
    to = "l0_reverse" if reverse else "l1"
    return tie(module, *((f"{kind}_{to}", f"{kind}_l0") for kind in kinds))


def one_memory(module):
    for kind in KINDS:
        getattr(module, f"{kind}_l1").data = getattr(module, f"{kind}_l0").data
    return module


MODULES = {
    "two layers": lambda s: layers(StableLSTM(4, 4, 2, stability=s)),
    "two layers of an RNN": lambda s: layers(StableRNN(4, 4, 2, "relu", stability=s)),
    "W_hh alone": lambda s: layers(StableLSTM(3, 4, 2, stability=s), ["weight_hh"]),
    "biases of layers": lambda s: layers(StableLSTM(3, 4, 2, stability=s), ["bias_ih", "bias_hh"]),
    "directions": lambda s: layers(StableLSTM(3, 4, bidirectional=True, stability=s), reverse=True),
    "one memory": lambda s: one_memory(StableLSTM(4, 4, 2, stability=s)),
    "W_ih is W_hh of below": lambda s: tie(StableLSTM(3, 4, 2, stability=s), ("weight_ih_l1", "weight_hh_l0")),
    "biases across": lambda s: tie(StableLSTM(3, 4, 2, stability=s), ("bias_ih_l1", "bias_hh_l0")),
    "W_hr": lambda s: tie(
        StableLSTM(3, 4, 2, proj_size=2, stability=s), ("weight_hr_l1", "weight_hr_l0"), ("bias_hh_l1", "bias_hh_l0")
    ),
    "both biases of a cell": lambda s: tie(
        StableLSTMCell(4, 4, stability=s), ("bias_ih", "bias_hh"), ("weight_ih", "weight_hh")
    ),
    "an RNN's cell": lambda s: tie(StableRNNCell(4, 4, stability=s), ("weight_ih", "weight_hh")),
}


def spoil(module, scale):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * scale)
    return module


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def unchanged(module, before):
    return all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("stability", SETS, ids=str)
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_all_layers_that_share_weights_are_certified(make, stability):
    for scale in (1.0, 100.0):
        module = spoil(make(stability), scale)
        held = {name: p.data_ptr() for name, p in module.named_parameters(remove_duplicate=False)}
        module.project_()
        assert module.certificate().rate <= stability.rate
        assert all(p.data_ptr() == held[name] for name, p in module.named_parameters(remove_duplicate=False))
        before = snapshot(module)
        module.project_()
        assert unchanged(module, before)


@pytest.mark.parametrize("stability", SETS[:2], ids=str)
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_steps_keep_all_layers_that_share_weights(make, stability):
    module = make(stability)
    module.project_()
    for _ in range(6):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p), alpha=0.02)
        module.project_(certify=False)
    assert module.certificate().rate < 1.0


@pytest.mark.parametrize("norm", ["2", "inf", "radius"])
def test_a_step_projects_a_shared_weight_once(norm):
    """Two layers that share it end bitwise where one layer ends."""
    one, two = StableRNN(8, 40, stability=Certified(0.9, norm)), StableRNN(8, 40, 2, stability=Certified(0.9, norm))
    layers(two, ["weight_hh"])
    for _ in range(5):
        with torch.no_grad():
            one.weight_hh_l0.add_(torch.randn(40, 40), alpha=0.05)
            two.weight_hh_l0.copy_(one.weight_hh_l0)
        one.project_(certify=False), two.project_(certify=False)
        assert torch.equal(one.weight_hh_l0, two.weight_hh_l0)


def test_both_biases_in_one_are_scaled_once():
    """Tied or not, biases of the same values end the same: the forget gate is brought to its bound and no further."""
    tied, loose = StableLSTMCell(3, 4), StableLSTMCell(3, 4)
    with torch.no_grad():
        tied.bias_hh.fill_(3.0)
        tied.bias_ih = tied.bias_hh
        for name, p in tied.named_parameters(remove_duplicate=False):
            getattr(loose, name).copy_(p)
    for certify in (False, True):
        tied.project_(certify), loose.project_(certify)
        assert all(torch.equal(getattr(loose, name), p) for name, p in tied.named_parameters(remove_duplicate=False))
    assert tied.bias_hh[4:8].min() > 0


def test_too_many_rounds_write_nothing(monkeypatch):
    monkeypatch.setattr(projection, "ROUNDS", 1)
    module = spoil(MODULES["two layers"](Certified()), 5.0)
    before = snapshot(module)
    with pytest.raises(ValueError, match="layers that share weights don't come to rest in the set Certified"):
        module.project_()
    assert unchanged(module, before)


# ---- modules that share


def two_modules():
    """They share a bias: the first is inside; what the second needs raises the (negative) bias, and that takes the first one out."""
    first, second = StableLSTM(3, 4), StableLSTM(3, 4, stability=Certified(0.95))
    second.bias_hh_l0 = first.bias_ih_l0
    with torch.no_grad():
        first.bias_ih_l0.fill_(-12.0), first.bias_hh_l0.fill_(12.1), second.bias_ih_l0.fill_(20.0)
        for module in (first, second):
            module.weight_ih_l0.fill_(0.001), module.weight_hh_l0.fill_(0.001)
    return nn.ModuleList([first, second])


def test_modules_that_share_weights_are_projected_until_both_rest():
    model, in_turn = two_modules(), two_modules()
    assert model[0].certificate().rate <= 0.99
    for module in in_turn:
        module.project_()
    assert in_turn[0].certificate().rate > 0.99  # once each is not enough
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    project_after_step(optimizer, model, certify=True)
    optimizer.step()
    assert model[0].certificate().rate <= 0.99 and model[1].certificate().rate <= 0.95
    assert model[0].bias_ih_l0 is model[1].bias_hh_l0
    before = snapshot(model)
    optimizer.step()
    assert unchanged(model, before)


def test_modules_that_never_rest_are_named(monkeypatch):
    monkeypatch.setattr(together, "ROUNDS", 1)
    with pytest.raises(
        ValueError,
        match=r"modules that share weights don't come to rest in their sets \(Certified\(rate=0.99.*rate=0.95",
    ):
        project_all_(list(two_modules()), certify=True)


@pytest.mark.parametrize("certify", [True, False])
def test_a_module_without_a_set_is_named_before_anything_moves(certify):
    inside, outside = two_modules()
    outside.stability = None
    with torch.no_grad():
        inside.weight_hh_l0.mul_(9)
    before = snapshot(inside)
    for plain in (outside, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"this {type(plain).__name__} has no stable set"):
            project_all_([inside, plain], certify=certify)
    assert unchanged(inside, before)


# ---- memory that is shared in part


def set_data(module, name, value):
    setattr(module, name, nn.Parameter(value))
    return module


def partly():
    """Modules with two weights that overlap, and their names."""
    flat = torch.randn(40)
    yield (
        set_data(set_data(StableLSTM(3, 4), "bias_ih_l0", flat[:16]), "bias_hh_l0", flat[8:24]),
        ("bias_ih_l0", "bias_hh_l0"),
    )
    w = torch.randn(5, 5)
    yield (
        set_data(set_data(StableRNN(5, 5, 2), "weight_hh_l0", w), "weight_hh_l1", w.mT),
        ("weight_hh_l0", "weight_hh_l1"),
    )
    yield set_data(set_data(StableRNN(5, 5), "weight_ih_l0", w), "weight_hh_l0", w.mT), ("weight_ih_l0", "weight_hh_l0")
    rows = torch.randn(60)
    module = set_data(StableRNN(5, 5, 2, stability=Certified(norm="inf")), "weight_hh_l0", rows[:50].view(10, 5)[::2])
    yield set_data(module, "weight_hh_l1", rows[5:].as_strided((5, 5), (10, 1))), None  # rows of both alternate
    module = set_data(StableRNN(5, 5, 2), "weight_hh_l0", rows[:50].view(10, 5)[::2])
    yield set_data(module, "weight_hh_l1", rows.as_strided((5, 5), (5, 1), 20)), ("weight_hh_l0", "weight_hh_l1")


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("number", range(5))
def test_memory_that_is_shared_in_part_is_refused(number, certify):
    module, names = next(itertools.islice(partly(), number, None))
    spoil(module, 10.0)
    before = snapshot(module)
    if names is None:
        module.project_(certify=certify)
        assert unchanged(module, before) is False and module.certificate().rate <= 0.99
        return
    with pytest.raises(ValueError, match=f"project_: {names[0]} and {names[1]} share a part of their memory"):
        module.project_(certify=certify)
    assert unchanged(module, before)


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("norm", ["2", "inf", "radius"])
def test_slices_of_one_matrix_and_other_strides_are_written_through(norm, certify):
    """What shares a storage and no entry: the columns of one matrix, one flat buffer; transposed weights."""
    for make, gates in ((StableLSTM, 4), (StableRNN, 1)):
        plain = spoil(make(3, 5, stability=Certified(norm=norm)), 1.0)
        joined, turned, flat = copy.deepcopy(plain), copy.deepcopy(plain), copy.deepcopy(plain)
        both = torch.cat([plain.weight_ih_l0, plain.weight_hh_l0], 1).detach()
        set_data(set_data(joined, "weight_ih_l0", both[:, :3]), "weight_hh_l0", both[:, 3:])
        set_data(turned, "weight_hh_l0", plain.weight_hh_l0.detach().mT.contiguous().mT)
        buffer = torch.cat([p.detach().flatten() for p in plain.parameters()])
        start = 0
        for name, p in plain.named_parameters():
            set_data(flat, name, buffer[start : start + p.numel()].view(p.shape))
            start += p.numel()
        plain.project_(certify=certify)
        for module in (joined, turned, flat):
            module.project_(certify=certify)
            for name, p in plain.named_parameters():
                torch.testing.assert_close(getattr(module, name), p, rtol=1e-4, atol=1e-5)
        assert joined.weight_hh_l0.data_ptr() == both[:, 3:].data_ptr() and turned.weight_hh_l0.stride() == (
            1,
            5 * gates,
        )
        if certify:
            assert max(m.certificate().rate for m in (plain, joined, turned, flat)) <= 0.99


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize(
    "name, value",
    [
        ("weight_hh_l0", torch.full((1, 4), 3.0).expand(16, 4)),
        ("bias_hh_l0", torch.ones(1).expand(16)),
        ("weight_ih_l0", torch.arange(40.0).as_strided((16, 3), (2, 1))),
    ],
)
def test_weights_that_overlap_themselves_are_refused(name, value, certify):
    module = spoil(StableLSTM(3, 4), 10.0)
    setattr(module, name, nn.Parameter(value))
    before = snapshot(module)
    with pytest.raises(ValueError, match=f"project_: {name} overlaps itself"):
        module.project_(certify=certify)
    with pytest.raises(ValueError, match=f"project_: {name} overlaps itself"):
        project_after_step(torch.optim.SGD(module.parameters(), 0.1), module)
    assert unchanged(module, before)
    module.certificate()  # reading is fine


def test_expanded_weights_that_are_never_written_stay():
    module = StableLSTM(3, 4, stability=Certified(clamp=True))
    module.weight_ih_l0 = nn.Parameter(torch.ones(1, 3).expand(16, 3))
    spoil_hh = torch.randn(16, 4) * 5
    with torch.no_grad():
        module.weight_hh_l0.copy_(spoil_hh)
    module.project_(), module.project_(certify=False)
    assert module.certificate().rate <= 0.99


# ---- the projections of matrices


@pytest.mark.parametrize("certify", [False, True])
def test_matrices_that_share_memory_are_refused(certify):
    W = torch.randn(6, 6) * 5
    before = W.clone()
    for several in (
        [W, W],
        [W, W.mT],
        [W[:4], W[2:]],
        [torch.eye(3), W[:, :4], W[3:, 3:]],
        [W, W.view(torch.int32).view(torch.float32)],
    ):
        with pytest.raises(ValueError, match=rf"W\[{len(several) - 2}\] and W\[{len(several) - 1}\] share memory"):
            spectral_project_(several, 1.0, certify=certify)
        assert torch.equal(W, before)
    apart = [W[:3, :3], W[3:, :3], W[:, 3:]]
    spectral_project_(apart, [1.0, 2.0, 3.0], certify=certify)
    assert not certify or all(spectral_norm_bound(w) <= bound for w, bound in zip(apart, (1.0, 2.0, 3.0)))


def test_a_matrix_that_overlaps_itself_is_refused():
    base = torch.randn(20)
    for w in (base.as_strided((4, 4), (2, 1)), base.as_strided((3, 3), (1, 1)), base[:4].expand(4, 4)):
        for project in (row_project_, spectral_project_):
            with pytest.raises(ValueError, match="W overlaps itself"):
                project(w, 1.0)
    row_project_(base[:18].as_strided((3, 3), (6, 2)), 1.0)  # gaps, but no overlap


def test_overlaps_are_told_exactly():
    """Against a look at every entry's address, for random shapes and strides."""
    base = torch.zeros(400)
    found = set()
    for _ in range(150):
        pair = [
            base.as_strided(
                torch.randint(1, 5, (2,)).tolist(), torch.randint(0, 9, (2,)).tolist(), int(torch.randint(0, 30, ()))
            )
            for _ in range(2)
        ]
        places = [[w[i, j].data_ptr() for i in range(w.shape[0]) for j in range(w.shape[1])] for w in pair]
        for w, seen in zip(pair, places):
            assert overlaps_itself(w) is (len(set(seen)) < len(seen))
        meets = bool(set(places[0]) & set(places[1]))
        assert (first_overlap(pair) is not None) is meets
        found.add(meets)
    assert found == {False, True}
