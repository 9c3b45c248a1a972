"""Dropout between layers draws the masks of nn.RNN, nn.GRU and nn.LSTM: the same seed, the same outputs and gradients."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from stable_rnn import (
    Chunked,
    StableGRU,
    StableLSTM,
    StableRNN,
    Windowed,
    _native,
)

KINDS = {
    "rnn": (nn.RNN, StableRNN, {}),
    "lstm": (nn.LSTM, StableLSTM, {}),
    "gru": (nn.GRU, StableGRU, {}),
    "projected": (nn.LSTM, StableLSTM, {"proj_size": 3}),
}
BACKENDS = ["reference", "torch"] + (["cpu"] if _native.lib else [])
LENGTHS = {"packed": (7, 5, 2), "unsorted": (2, 7, 5)}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def pair(kind, backend="auto", **options):
    theirs, ours, more = KINDS[kind]
    options = dict(num_layers=3, dropout=0.4) | more | options
    a, b = theirs(4, 6, **options), ours(4, 6, **options, stability=None, backend=backend)
    b.load_state_dict(a.state_dict())
    return a, b


def run(m, x, **more):
    """Outputs, gradients, and the next random number."""
    torch.manual_seed(3)
    y, hidden = m(x, **more)
    y = y.data if isinstance(y, PackedSequence) else y
    return [
        y,
        *(hidden if isinstance(hidden, tuple) else (hidden,)),
        *torch.autograd.grad(y.square().sum(), m.parameters()),
        torch.rand(1),
    ]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-5
        )  # float32, sums in another order; another mask differs in the first digit


@pytest.mark.parametrize("layout", ["padded", "unbatched", *LENGTHS])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_torch(kind, backend, both, first, layout):
    for layers in (2, 3):
        a, b = pair(kind, backend, num_layers=layers, bidirectional=both, batch_first=first)
        x = torch.randn(7, 4) if layout == "unbatched" else torch.randn(*((3, 7) if first else (7, 3)), 4)
        if layout in LENGTHS:
            x = pack_padded_sequence(
                x, torch.tensor(LENGTHS[layout]), batch_first=first, enforce_sorted=layout == "packed"
            )
        close(run(b, x), run(a, x))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_draw_the_masks_of_padded_input(kind, first):
    """Full lengths: nn's own run. Shorter ones: the same masks, so what a sequence gives does not depend on how long the others are."""
    a, b = pair(kind, batch_first=first)
    x = torch.randn(*((3, 7) if first else (7, 3)), 4)
    close(run(b, x, lengths=torch.tensor([7, 7, 7])), run(a, x))
    shorter = run(b, x, lengths=torch.tensor([7, 5, 2]))[0]
    whole = run(a, x)[0]
    for row, length in enumerate((7, 5, 2)):
        pick = (row, slice(length)) if first else (slice(length), row)
        torch.testing.assert_close(shorter[pick], whole[pick], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", [Windowed(50), Chunked(50, 2)], ids=str)
def test_every_plan_draws_them(plan):
    a, b = pair("lstm", batch_first=True)
    b.plan = plan
    x = torch.randn(3, 7, 4)
    close(run(b, x), run(a, x))


@pytest.mark.parametrize("first", [False, True])
def test_rows_of_every_layout_are_dropped(first):
    """Between the layers a relu RNN with identity weights only drops: what comes out is 0 or x / (1 - p)."""
    m = StableRNN(5, 5, 2, nonlinearity="relu", bias=False, batch_first=first, dropout=0.5, stability=None)
    with torch.no_grad():
        for name, w in m.named_parameters():
            w.copy_(torch.eye(5) if "ih" in name else torch.zeros(5, 5))
    x = torch.rand(4, 6, 5) + 1
    packed = pack_padded_sequence(
        x, torch.tensor([6, 3, 5, 1] if first else [4, 2, 4, 1, 3, 1]), batch_first=first, enforce_sorted=False
    )
    for y, whole in (
        (m(x)[0], x),
        (pad_packed_sequence(m(packed)[0], batch_first=first)[0], pad_packed_sequence(packed, first)[0]),
    ):
        assert torch.equal(y[y != 0], 2 * whole[y != 0]) and 0 < int((y != 0).sum()) < int((whole != 0).sum())


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(first, randomness):
    """One mask for all samples, or one for each."""
    m = StableRNN(4, 5, 2, batch_first=first, dropout=0.5, stability=None)
    x = torch.randn(2, 3, 4).expand(6, 2, 3, 4)
    weights = {name: w.detach() for name, w in m.named_parameters()}
    y = vmap(lambda x: functional_call(m, weights, (x,))[0], randomness=randomness)(x)
    assert torch.equal(y[0], y[1]) == (randomness == "same")
