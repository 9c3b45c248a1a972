"""What a state dict says of the cell that its weights were trained in, and what it is silent about."""

import copy
import io
import warnings

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
    stabilize,
)

CLAMPS = [None, Certified(), ForgetCap(0.5), ForgetCap(0.9), Certified(clamp=True, forget=0.5)]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def said(load):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("cls", [StableLSTM, StableLSTMCell, StableGRU])
@pytest.mark.parametrize(
    "carry", [lambda state: state, copy.deepcopy, through_a_file], ids=["as it is", "copy", "file"]
)
def test_another_clamp_is_said(cls, carry):
    for a in CLAMPS:
        for b in CLAMPS:
            source, target = (
                nn.Sequential(nn.Identity(), cls(3, 4, stability=a)),
                nn.Sequential(nn.Identity(), cls(3, 4, stability=b)),
            )
            found = said(lambda: target.load_state_dict(carry(source.state_dict())))  # noqa: B023
            here, there = target[1]._cap, source[1]._cap
            assert len(found) == (here != there)
            for text in found:
                assert "load_state_dict: 1 computes another function" in text
                assert all(
                    str(cap) in text.replace(str(b), "") if cap < 1 else "no clamp" in text for cap in (here, there)
                )
    root = cls(3, 4, stability=ForgetCap(0.5))
    assert "this " + cls.__name__ in said(lambda: root.load_state_dict(cls(3, 4).state_dict()))[0]


def test_the_clamp_is_todays():
    m = StableLSTM(3, 4, stability=ForgetCap(0.5))
    m.stability = None
    state = m.state_dict()
    m.stability = ForgetCap(0.5)
    assert len(said(lambda: m.load_state_dict(state))) == 1
    net = nn.Sequential(nn.LSTM(3, 4))
    clamped = nn.Sequential(StableLSTM(3, 4, stability=ForgetCap(0.5))).state_dict()
    stabilize(net)
    assert len(said(lambda: net.load_state_dict(clamped))) == 1
    net[0].stability = ForgetCap(0.5)
    assert not said(lambda: net.load_state_dict(clamped))


def test_nothing_is_said_where_nothing_is_known():
    """torch's own weights, dictionaries without metadata, other modules' weights, cells without a forget gate."""
    m = StableLSTM(3, 4, stability=ForgetCap(0.5))
    other = StableLSTM(3, 4, stability=None)
    assert not said(lambda: m.load_state_dict(nn.LSTM(3, 4).state_dict()))
    assert not said(lambda: m.load_state_dict(dict(other.state_dict())))
    assert not said(
        lambda: StableRNN(3, 4, stability=Certified(clamp=True)).load_state_dict(StableRNN(3, 4).state_dict())
    )
    net, half = (
        nn.ModuleDict({"a": m, "b": nn.Linear(1, 1)}),
        nn.ModuleDict({"a": other, "b": nn.Linear(1, 1)}).state_dict(),
    )
    for name in [name for name in half if name.startswith("a")]:
        del half[name]
    assert not said(lambda: net.load_state_dict(half, strict=False))


@pytest.mark.parametrize("assign", [False, True])
def test_torch_loads_ours_and_we_load_torchs(assign):
    ours, plain = StableLSTM(3, 4, 2, stability=ForgetCap(0.5)), nn.LSTM(3, 4, 2)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(through_a_file(ours.state_dict()), strict=True, assign=assign)
    ours.load_state_dict(plain.state_dict(), strict=True, assign=assign)
    nn.LSTM(3, 4, 2).load_state_dict(ours.state_dict(), strict=True, assign=assign)
    cell = StableLSTMCell(3, 4)
    nn.LSTMCell(3, 4).load_state_dict(cell.state_dict(), strict=True, assign=assign)
    plain = {}
    ours.state_dict(destination=plain, prefix="a.")  # a caller's own dictionary, without metadata
    assert len(plain) == 8
