"""The stable set `Cascade`: its mask, in projections and in gradients."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from stable_rnn import (
    Cascade,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    project_after_step,
    stabilize,
    unstabilize,
)

SET = Cascade(3)


def groups_by_hand(hidden, groups):
    return [len(part) for part in torch.arange(hidden).tensor_split(min(groups, hidden))]


def mask_by_hand(hidden, groups):
    """1 where the unit of a row may read that of a column."""
    mask, start = torch.zeros(hidden, hidden), 0
    for size in groups_by_hand(hidden, groups):
        mask[start : start + size, :start] = 1
        start += size
    return mask


def recurrent_weights(module):
    return {name: p for name, p in module.named_parameters() if "weight_hh" in name}


def grown(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def inside(module, groups):
    H = module.hidden_size
    return all(not (w.view(-1, H, H) * (1 - mask_by_hand(H, groups))).any() for w in recurrent_weights(module).values())


MODULES = [
    lambda stability: StableLSTM(3, 7, 2, bidirectional=True, stability=stability),
    lambda stability: StableRNN(3, 7, 2, bidirectional=True, nonlinearity="relu", stability=stability),
    lambda stability: StableLSTMCell(3, 7, stability=stability),
    lambda stability: StableRNNCell(3, 7, stability=stability),
]
every_module = pytest.mark.parametrize("make", MODULES)


def run(module):
    x = torch.randn(6, 2, 3, dtype=next(module.parameters()).dtype)
    out = module(x[0] if isinstance(module, nn.RNNCellBase) else x)
    return out[0] if isinstance(out, tuple) else out


# ---- the projection


@pytest.mark.parametrize("certify", [True, False])
@pytest.mark.parametrize("hidden, groups", [(12, 4), (7, 3), (1, 8), (5, 8), (6, 1), (8, 8)])
@pytest.mark.parametrize("make", [StableLSTM, StableRNN])
def test_the_projection_is_the_mask(make, hidden, groups, certify):
    stability = Cascade(groups, 0.7)
    module = grown(make(3, hidden, 2, bidirectional=True, stability=stability))
    before = copy.deepcopy(module)
    module.project_(certify=certify)
    mask = mask_by_hand(hidden, groups)
    for (name, w), old in zip(module.named_parameters(), before.parameters()):
        wanted = (old.view(-1, hidden, hidden) * mask).view_as(old) if "weight_hh" in name else old
        assert torch.equal(w, wanted), name
    assert stability.borders(hidden)[-1] == hidden
    assert groups_by_hand(hidden, groups) == torch.tensor(stability.borders(hidden)).diff().tolist()


@every_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_inside_are_not_written(make, dtype):
    module = grown(make(SET)).to(dtype).project_()
    with torch.no_grad():
        for w in recurrent_weights(module).values():
            w[0, 0] = -0.0
    versions, values = [p._version for p in module.parameters()], [p.clone() for p in module.parameters()]
    module.project_(), module.project_(certify=False)
    assert versions == [p._version for p in module.parameters()]
    assert all(
        torch.equal(p.view(torch.int8), old.view(torch.int8)) for p, old in zip(module.parameters(), values)
    )  # bits


@every_module
def test_fresh_modules_and_reset_ones_are_inside(make):
    module = make(SET)
    assert inside(module, 3)
    module.reset_parameters()
    assert inside(module, 3) and all(w.any() for w in recurrent_weights(module).values())


def test_plain_rnns_are_projected_and_unclamped_lstms_refused():
    rnn = nn.RNN(3, 7, 2)
    SET.project_(rnn)
    assert inside(rnn, 3)
    with pytest.raises(ValueError, match="clamps its forget gate at 0.8; LSTM here doesn't"):
        SET.project_(nn.LSTM(3, 7))
    lstm = StableLSTM(3, 7, stability=Cascade(forget=0.6))
    SET.project_(lstm)  # a lower clamp will do
    with pytest.raises(ValueError, match="clamps its forget gate at 0.5"):
        Cascade(forget=0.5).project_(lstm)


def test_bad_weights_are_refused_before_anything_is_written():
    module = grown(StableLSTM(3, 7, 2, stability=SET))
    with torch.no_grad():
        module.weight_ih_l1[0, 0] = float("nan")
    old = module.weight_hh_l0.clone()
    for certify in (True, False):
        with pytest.raises(ValueError, match="weight_ih_l1 holds NaN"):
            module.project_(certify=certify)
    assert torch.equal(module.weight_hh_l0, old)


def test_proj_size_is_refused_with_the_reason():
    plain = nn.LSTM(3, 4, proj_size=2)
    module = stabilize(copy.deepcopy(plain))
    for call in (
        lambda: StableLSTM(3, 4, proj_size=2, stability=SET),
        lambda: stabilize(plain, SET),
        lambda: setattr(module, "stability", SET),
        lambda: SET.project_(module),
    ):
        with pytest.raises(ValueError, match="no form for proj_size=2, whose W_hr mixes the units"):
            call()
    assert type(plain) is nn.LSTM and module.stability is None


@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(groups=0), ValueError, "groups must be at least 1"),
        (dict(groups=2.5), TypeError, "groups must be"),
        (dict(forget=1.0), ValueError, "forget must lie between 0 and 1, got 1.0"),
        (dict(forget=0), ValueError, "forget must lie"),
        (dict(forget=float("nan")), ValueError, "forget must lie"),
        (dict(forget="half"), TypeError, "forget must be"),
    ],
)
def test_bad_arguments(options, error, text):
    with pytest.raises(error, match=text):
        Cascade(**options)


def test_how_it_is_written():
    assert repr(Cascade()) == "Cascade(groups=8)" and repr(Cascade(4, 0.9)) == "Cascade(groups=4, forget=0.9)"
    assert "stability=Cascade(groups=8, forget=0.8)" in repr(StableLSTM(2, 8, stability=Cascade(groups=8, forget=0.8)))
    assert Cascade(forget=0.8).cap == Cascade().cap_of("lstm") == 0.8 and Cascade(4) == Cascade(4) != Cascade(8)
    module = StableRNN(2, 8, stability=Cascade(forget=0.5))
    assert module._cap == 1.0  # no gate to clamp


def test_shared_weights_in_sets_of_different_groups():
    a, b = grown(StableRNN(4, 8, stability=Cascade(2))), StableRNN(4, 8, stability=Cascade(4))
    b.weight_hh_l0 = a.weight_hh_l0
    model = nn.ModuleList([a, b])
    project_after_step(torch.optim.SGD(model.parameters(), 0.0), model, certify=True)
    a.project_(), b.project_()
    assert inside(a, 2) and inside(b, 4)
    tied = grown(StableLSTM(7, 7, 2, stability=SET))
    tied.weight_hh_l1 = tied.weight_hh_l0
    assert inside(tied.project_(), 3)


# ---- gradients


def gradients_are_masked(module, groups=3):
    module.zero_grad()
    run(module).square().sum().backward()
    for name, w in recurrent_weights(module).items():
        grad, mask = w.grad.view(-1, module.hidden_size, module.hidden_size), mask_by_hand(module.hidden_size, groups)
        assert not (grad * (1 - mask)).any() and not torch.isnan(grad).any(), name
    last = grad * mask
    assert last.any() or isinstance(module, nn.RNNCellBase)  # from a zero state a cell's W_hh has no gradient
    return True


@every_module
def test_masked_entries_get_no_gradient(make, tmp_path):
    module = make(SET)
    assert gradients_are_masked(module)
    assert gradients_are_masked(copy.deepcopy(module))
    memory = io.BytesIO()
    torch.save(module, memory)
    memory.seek(0)
    assert gradients_are_masked(torch.load(memory, weights_only=False))
    other = make(SET)
    other.load_state_dict(module.state_dict())
    assert gradients_are_masked(other)
    assert gradients_are_masked(module.double()) and gradients_are_masked(module.float().eval())


def test_gradients_of_the_others_are_those_of_a_plain_module():
    module = StableLSTM(3, 7, 2, bidirectional=True, stability=SET).double()
    plain = copy.deepcopy(module)
    plain.stability = type("Unmasked", (Cascade,), {"trained": lambda self, w_hh, hidden: w_hh})(3)
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    for each in (module, plain):
        each(x)[0].square().sum().backward()
    mask = mask_by_hand(7, 3)
    for (name, p), q in zip(module.named_parameters(), plain.parameters()):
        wanted = (q.grad.view(4, 7, 7) * mask).view_as(q) if "weight_hh" in name else q.grad
        assert torch.equal(p.grad, wanted), name


def test_stabilized_in_place_and_back():
    model = nn.Sequential(nn.RNN(3, 7))
    x = torch.randn(5, 2, 3)
    expected = model(x)[0]
    stabilize(model, stability=SET)
    torch.testing.assert_close(model(x)[0], expected)  # outside as yet: the same function
    assert gradients_are_masked(model[0])
    stabilize(unstabilize(model), stability=SET, project=True)
    assert inside(model[0], 3) and gradients_are_masked(model[0])
    model[0].stability = None
    run(model[0]).square().sum().backward()
    assert (model[0].weight_hh_l0.grad * (1 - mask_by_hand(7, 3))).any()


def test_gradients_under_torch_func():
    module = StableLSTM(3, 7, stability=SET)
    x = torch.randn(5, 2, 3)

    def loss(weights):
        return torch.func.functional_call(module, weights, (x,))[0].square().sum()

    grads = torch.func.grad(loss)({name: p.detach() for name, p in module.named_parameters()})
    loss(dict(module.named_parameters())).backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)


def test_graphs_of_it():
    module = StableRNN(3, 7, stability=SET)
    x = torch.randn(5, 2, 3)
    expected = module(x)[0]
    torch.testing.assert_close(torch.jit.trace(module, (x,))(x)[0], expected)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x)[0], expected)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled(x)[0].square().sum().backward()
    grad = module.weight_hh_l0.grad
    assert gradients_are_masked(module) and grad.any() and not (grad * (1 - mask_by_hand(7, 3))).any()


@every_module
def test_training_alone_stays_inside(make):
    """Momentum, weight decay and clipping notwithstanding; and nothing warns that no projection was called."""
    module = make(SET)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        run(module).square().sum().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    assert inside(module, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.eval()


def test_the_optimizers_hook_brings_weights_in():
    model = nn.ModuleList([grown(StableLSTM(3, 7, stability=SET)), grown(StableRNN(3, 7, stability=SET))])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    project_after_step(optimizer, model)
    assert not inside(model[0], 3)
    sum(run(m).sum() for m in model).backward()
    optimizer.step()
    assert inside(model[0], 3) and inside(model[1], 3)
    assert all(m.certificate().stable for m in model)
