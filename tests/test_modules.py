"""StableRNN, StableGRU and StableLSTM are nn.RNN, nn.GRU and nn.LSTM: every option, outputs, gradients, errors."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from stable_rnn import (
    Certified,
    ForgetCap,
    Recurrent,
    StableGRU,
    StableLSTM,
    StableRNN,
    Windowed,
    stabilize,
)

KINDS = [
    ("rnn_tanh", nn.RNN, StableRNN, dict(nonlinearity="tanh")),
    ("rnn_relu", nn.RNN, StableRNN, dict(nonlinearity="relu")),
    ("lstm", nn.LSTM, StableLSTM, {}),
    ("gru", nn.GRU, StableGRU, {}),
]
IDS = [k[0] for k in KINDS]
OPTIONS = [
    dict(),
    dict(bias=False),
    dict(num_layers=2),
    dict(bidirectional=True),
    dict(batch_first=True),
    dict(num_layers=2, bidirectional=True, batch_first=True),
    dict(proj_size=3),
    dict(proj_size=2, num_layers=2, bidirectional=True),
]

CASES = [
    pytest.param(kind, options, id=f"{kind[0]}-{options}")
    for kind in KINDS
    for options in OPTIONS
    if kind[0] == "lstm" or "proj_size" not in options
]


def pair(kind, dtype=torch.float64, backend="reference", plan=Recurrent(), **options):
    """A torch module and ours with the same weights."""
    _, theirs, ours, extra = kind
    a = theirs(4, 6, **extra, **options, dtype=dtype)
    b = ours(4, 6, **extra, **options, dtype=dtype, stability=None, backend=backend, plan=plan)
    b.load_state_dict(a.state_dict(), strict=True)
    a.load_state_dict(b.state_dict(), strict=True)
    return a, b


def flat(result):
    """All tensors of (output, hidden)."""
    y, hidden = result
    return [y.data if isinstance(y, PackedSequence) else y, *(hidden if isinstance(hidden, tuple) else (hidden,))]


def compare(a, b, make_input, hx=None, rtol=1e-9):
    """Outputs and all gradients of two modules on the same input."""
    found = []
    for m in (a, b):
        x, data = make_input()
        state = None if hx is None else tuple(h.clone().requires_grad_() for h in hx)
        outputs = flat(m(x, state if state is None or m.mode == "LSTM" else state[0]))
        g = torch.Generator().manual_seed(1)
        loss = sum((o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
        leaves = [data, *m.parameters()] + ([] if state is None else list(state if m.mode == "LSTM" else state[:1]))
        found.append(outputs + list(torch.autograd.grad(loss, leaves)))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(right, left, rtol=rtol, atol=rtol)


def state_for(m, batch, dtype=torch.float64, unbatched=False):
    count = m.num_layers * (2 if m.bidirectional else 1)
    h, c = (
        torch.randn(count, batch, m.proj_size or m.hidden_size, dtype=dtype),
        torch.randn(count, batch, m.hidden_size, dtype=dtype),
    )
    return (h[:, 0], c[:, 0]) if unbatched else (h, c)


@pytest.mark.parametrize("kind,options", CASES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_torch(kind, options, backend):
    a, b = pair(kind, backend=backend, **options)
    shape = (3, 7, 4) if options.get("batch_first") else (7, 3, 4)

    def batched():
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
        return x, x

    def unbatched():
        x = torch.randn(7, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
        return x, x

    compare(a, b, batched)
    compare(a, b, batched, state_for(a, 3))
    compare(a, b, unbatched)
    compare(a, b, unbatched, state_for(a, 1, unbatched=True))


@pytest.mark.parametrize("kind,options", CASES, ids=str)
@pytest.mark.parametrize("ordered", [True, False])
def test_packed_equals_torch(kind, options, ordered):
    a, b = pair(kind, **options)

    def packed():
        g = torch.Generator().manual_seed(3)
        parts = [
            torch.randn(n, 4, generator=g, dtype=torch.float64) for n in ((7, 5, 5, 1) if ordered else (2, 7, 1, 5))
        ]
        x = pack_sequence(parts, enforce_sorted=ordered)
        data = x.data.requires_grad_()
        return PackedSequence(data, *x[1:]), data

    compare(a, b, packed)
    compare(a, b, packed, state_for(a, 4))
    y = b(packed()[0])[0]
    theirs = a(packed()[0])[0]
    assert torch.equal(y.batch_sizes, theirs.batch_sizes)
    for mine, other in ((y.sorted_indices, theirs.sorted_indices), (y.unsorted_indices, theirs.unsorted_indices)):
        assert (mine is None) == (other is None) and (mine is None or torch.equal(mine, other))


@pytest.mark.parametrize("kind,options", CASES, ids=str)
def test_lengths_equal_packed(kind, options):
    """Padded input with lengths: the packed run, zeros past each length, and lengths of 0 hand the state through."""
    _, m = pair(kind, **options)
    first = m.batch_first
    lengths = torch.tensor([4, 7, 1])
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    x = x if first else x.transpose(0, 1)
    hx = state_for(m, 3)
    hx = hx if m.mode == "LSTM" else hx[0]
    y, hidden = m(x, hx, lengths=lengths)
    expected, hidden_expected = m(pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False), hx)
    torch.testing.assert_close(
        y, pad_packed_sequence(expected, batch_first=first)[0], rtol=1e-12, atol=1e-12
    )  # float64: the same steps,
    torch.testing.assert_close(hidden, hidden_expected, rtol=1e-12, atol=1e-12)  # products of other shapes

    y, hidden = m(x, hx, lengths=torch.tensor([0, 7, 0]))
    assert not y.select(0 if first else 1, 0).any()
    for h, h0 in zip(flat((y, hidden))[1:], hx if m.mode == "LSTM" else (hx,), strict=True):
        assert torch.equal(h[:, 0], h0[:, 0])


@pytest.mark.parametrize("batch, steps, hidden", [(1, 40, 33), (3, 20, 64)])
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_compiled_kernels_equal_torch_to_rounding(kind, batch, steps, hidden):
    """On the backend that `auto` takes here, forward and backward: at most twice torch's own error, and a few roundings."""
    theirs, ours = (
        kind[1](9, hidden, num_layers=2, **kind[3]),
        kind[2](9, hidden, num_layers=2, stability=None, **kind[3]),
    )
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(steps, batch, 9)

    def results(m, dtype):
        m = copy.deepcopy(m).to(dtype)
        given = x.to(dtype).requires_grad_()
        outputs = flat(m(given))
        loss = sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape).to(dtype)).sum() for o in outputs)
        return outputs + list(torch.autograd.grad(loss, [given, *m.parameters()]))

    exact, plain, found = results(theirs, torch.float64), results(theirs, torch.float32), results(ours, torch.float32)
    for want, eager, value in zip(exact, plain, found, strict=True):
        limit = 2 * (eager - want).abs().max() + 4 * torch.finfo(torch.float32).eps * want.abs().max()
        assert (value - want).abs().max() <= limit


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_no_sequence_at_all(kind):
    a, b = pair(kind, dtype=torch.float32)
    for left, right in zip(flat(a(torch.zeros(5, 0, 4))), flat(b(torch.zeros(5, 0, 4))), strict=True):
        assert left.shape == right.shape


def test_inference_mode():
    m = StableLSTM(4, 6)
    x = torch.randn(5, 2, 4)
    with torch.inference_mode():
        y = m(x)[0]
    torch.testing.assert_close(y, m(x)[0].detach())


def test_dropout_acts_between_layers_in_training_only():
    m = StableLSTM(4, 6, num_layers=2, dropout=0.5)
    x = torch.randn(5, 2, 4)
    assert not torch.equal(m(x)[0], m(x)[0])
    m.eval()
    assert torch.equal(m(x)[0], m(x)[0])
    with pytest.warns(UserWarning, match="dropout option"):
        StableLSTM(4, 6, dropout=0.5)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_same_errors_as_torch(kind):
    """Type and message of torch's own errors, constructor and forward."""
    _, theirs, ours, extra = kind
    bad = [
        dict(hidden_size=0),
        dict(input_size=-1),
        dict(num_layers=0),
        dict(dropout=2),
        dict(dropout=True),
        dict(bias=1),
        dict(batch_first=0),
        dict(hidden_size=2.5),
        dict(input_size="a"),
    ]
    bad += (
        [dict(proj_size=-1), dict(proj_size=6)] if theirs is nn.LSTM else [dict(nonlinearity="gelu"), dict(proj_size=1)]
    )
    for change in bad:
        arguments = dict(input_size=4, hidden_size=6, **extra) | change
        errors = []
        for cls in (theirs, ours):
            try:
                errors.append(cls(**arguments) and None)
            except (ValueError, TypeError, RuntimeError) as error:
                errors.append((type(error), str(error)))
        assert errors[0] == errors[1]
        assert errors[0] or torch.__version__ < (2, 6), change  # torch 2.5 takes some of these
    a, b = pair(kind, dtype=torch.float32)
    h = lambda *s: torch.zeros(*s) if a.mode != "LSTM" else (torch.zeros(*s), torch.zeros(*s))  # noqa: E731
    calls = [
        (torch.zeros(2, 3, 4, 5), None),
        (torch.zeros(2, 3, 5), None),
        (torch.zeros(2, 3, 4, dtype=torch.float64), None),
        (torch.zeros(2, 3, 4), h(1, 2, 6)),
        (torch.zeros(2, 3, 4), h(3, 6)),
        (torch.zeros(2, 4), h(1, 1, 6)),
        (torch.zeros(0, 3, 4), None),
    ]
    for x, hx in calls:
        errors = []
        for m in (a, b):
            with pytest.raises((ValueError, RuntimeError)) as caught:
                m(x, hx)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


def test_own_errors_name_what_was_given():
    with pytest.raises(TypeError, match="Windowed"):
        StableLSTM(4, 6, plan="Windowed(3)")
    with pytest.raises(TypeError, match="an instance is needed"):
        StableLSTM(4, 6).plan = Recurrent
    with pytest.raises(TypeError, match="stability"):
        StableLSTM(4, 6).stability = 0.9
    with pytest.raises(ValueError, match="'gpu'"):
        StableLSTM(4, 6).backend = "gpu"
    with pytest.raises(TypeError, match="stability"):
        StableLSTM(4, 6, stability=0.9)
    with pytest.raises(ValueError, match="'gpu'"):
        StableLSTM(4, 6, backend="gpu")
    with pytest.raises(ValueError, match="ForgetCap"):
        StableRNN(4, 6, stability=ForgetCap(0.9))
    m, x = StableLSTM(4, 6), torch.zeros(5, 3, 4)
    for lengths, error, text in [
        (torch.tensor([5, 6, 1]), ValueError, "0..5"),
        (torch.tensor([5, 1]), ValueError, r"\(3,\)"),
        (torch.tensor([1.0, 2, 3]), TypeError, "float32"),
        ([1, 2, 3], TypeError, "list"),
        (torch.tensor([-1, 2, 3]), ValueError, "0..5"),
    ]:
        with pytest.raises(error, match=text):
            m(x, lengths=lengths)
    with pytest.raises(ValueError, match="PackedSequence"):
        m(pack_sequence([torch.zeros(3, 4)]), lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="stability=None"):
        StableLSTM(4, 6, stability=None).project_()
    with pytest.raises(ValueError, match="backend 'torch'"):
        StableLSTM(4, 6, plan=Windowed(3), backend="torch")(x)


def test_state_dict_copies_pickle():
    m = StableLSTM(4, 6, num_layers=2, bidirectional=True, stability=ForgetCap(0.9), plan=Windowed(5))
    x = torch.randn(7, 2, 4)
    expected = m(x)[0]
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x)[0], expected)
        assert other.plan == m.plan and other.stability == m.stability
    assert list(m.state_dict()) == list(nn.LSTM(4, 6, num_layers=2, bidirectional=True).state_dict())
    assert [[tuple(w.shape) for w in ws] for ws in m.all_weights] == [
        [tuple(w.shape) for w in ws] for ws in nn.LSTM(4, 6, num_layers=2, bidirectional=True).all_weights
    ]
    m.flatten_parameters()


def test_loading_never_changes_weights():
    big = {k: 5 * torch.randn_like(v) for k, v in nn.LSTM(4, 6).state_dict().items()}
    m = StableLSTM(4, 6)
    m.load_state_dict(big)
    assert all(torch.equal(v, big[k]) for k, v in m.state_dict().items())
    assert not m.certificate().stable
    m.project_()
    assert m.certificate().stable


def test_weights_are_not_cached():
    m = StableLSTM(4, 6).eval()
    x = torch.randn(5, 2, 4)
    with torch.no_grad():
        before = m(x)[0]
        m.weight_hh_l0.data.mul_(0.5)
        assert not torch.equal(m(x)[0], before)


@pytest.mark.parametrize("cls", [StableLSTM, StableGRU])
def test_clamp(cls):
    """With the clamp no gate that forgets passes f; where none would, nothing changes."""
    plain = cls(4, 6, stability=None, dtype=torch.float64)
    capped = cls(4, 6, stability=ForgetCap(0.5), dtype=torch.float64)
    capped.load_state_dict(plain.state_dict())
    x = torch.randn(9, 2, 4, dtype=torch.float64)
    assert not torch.equal(capped(x)[0], plain(x)[0])
    with torch.no_grad():
        for m in (plain, capped):
            m.bias_ih_l0[6:12] -= 30
    torch.testing.assert_close(capped(x)[0], plain(x)[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="allow_change"):
        capped.to_torch()
    torch.testing.assert_close(capped.to_torch(allow_change=True)(x)[0], plain(x)[0])


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_to_torch_and_back(kind):
    a, b = pair(kind, num_layers=2, bidirectional=True)
    b.weight_hh_l0.requires_grad_(False)
    back = b.eval().to_torch()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    assert type(back) is type(a) and not back.training and not back.weight_hh_l0.requires_grad
    torch.testing.assert_close(back(x)[0], b(x)[0])


def test_stabilize():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 6, num_layers=2, batch_first=True))
            self.other = nn.RNN(6, 5, nonlinearity="relu")
            self.same = self.other
            self.gru = nn.GRU(5, 5)

    net = Net()
    before = dict(net.named_parameters())
    assert stabilize(net, stability=Certified(), plan=Windowed(7)) is net
    assert (
        type(net.body[1]) is StableLSTM
        and type(net.other) is StableRNN
        and net.same is net.other
        and type(net.gru) is StableGRU
    )
    assert all(p is before[name] for name, p in net.named_parameters())
    assert net.body[1].plan == Windowed(7) and net.body[1].stability == Certified() and net.body[1].batch_first
    assert type(stabilize(nn.LSTM(3, 4))) is StableLSTM
    with pytest.raises(ValueError, match="Linear"):
        stabilize(nn.Linear(2, 2))
    net = Net()
    with pytest.raises(ValueError, match="ForgetCap"):
        stabilize(net, stability=ForgetCap(0.9))
    assert type(net.body[1]) is nn.LSTM  # nothing half done
    with pytest.raises(TypeError):
        stabilize("model")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda m: nn.utils.weight_norm(m, "weight_hh_l0"),
        lambda m: nn.utils.spectral_norm(m, "weight_hh_l0"),
        lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.3),
        lambda m: nn.utils.parametrizations.weight_norm(m, "weight_hh_l0"),
    ],
    ids=["weight_norm", "spectral_norm", "prune", "parametrization"],
)
def test_stabilize_leaves_computed_weights_alone(change):
    net = nn.Sequential(nn.LSTM(4, 4), nn.Identity(), nn.RNN(4, 4))
    change(net[0])
    left, x = net[0].eval(), torch.randn(5, 2, 4)
    expected = left(x)[0]
    with pytest.warns(UserWarning, match="stabilize: 0 is .*LSTM.* left alone"):
        stabilize(net)
    assert net[0] is left and type(net[2]) is StableRNN
    torch.testing.assert_close(left(x)[0], expected)
    with pytest.raises(ValueError, match="no nn.RNN, nn.GRU or nn.LSTM that can be swapped: 0 is .*LSTM"):
        stabilize(nn.Sequential(left))


def test_stabilize_projects_all_or_none():
    net = nn.Sequential(nn.LSTM(4, 6), nn.LSTM(6, 6))
    with torch.no_grad():
        net[0].weight_hh_l0.mul_(50)
        net[1].weight_hh_l0[0, 0] = float("nan")
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"1\.weight_hh_l0 holds NaN"):
        stabilize(net, stability=Certified(), project=True)
    assert type(net[0]) is type(net[1]) is nn.LSTM
    assert all(torch.equal(w.nan_to_num(7), before[name].nan_to_num(7)) for name, w in net.state_dict().items())
    with torch.no_grad():
        net[1].weight_hh_l0[0, 0] = 50.0
    assert all(m.certificate().stable for m in stabilize(net, stability=Certified(), project=True))


def test_reset_of_computed_weights_changes_nothing():
    m = StableLSTM(4, 6)
    nn.utils.parametrizations.weight_norm(m, "weight_hh_l0")
    before = {name: w.clone() for name, w in m.state_dict().items()}
    with pytest.raises(ValueError, match="weight_hh_l0 of .* is computed"):
        m.reset_parameters()
    assert all(torch.equal(w, before[name]) for name, w in m.state_dict().items())


def test_lengths_are_named():
    """A third positional argument is no lengths: nn.LSTM takes two, and clients hand on what they have by position."""
    for module in (StableRNN(3, 4), StableGRU(3, 4), StableLSTM(3, 4)):
        with pytest.raises(TypeError, match="positional"):
            module(torch.zeros(5, 2, 3), None, torch.tensor([5, 2]))
