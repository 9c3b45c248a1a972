"""The models that are timed, one layer each, and their certificates; made once and kept."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from stable_rnn import Cascade, Certified, StableGRU, StableLSTM, StableRNN
from stable_rnn.stability import Certificate

from .cases import DTYPES

MODELS = {
    "certified": "torch's initialization, projected: what StableLSTM(), StableGRU() and StableRNN() start from",
    "border": "orthogonal weights projected to the border of Certified(0.95): remembers for as long as the set lets it",
    "plain": "torch's initialization; no certificate",
    "chrono": "torch's initialization with the gates' biases for memories of up to 1000 steps (Tallec & Ollivier 2018); LSTM and GRU",
    "cascade": "torch's initialization without what a cascade of 8 groups does not have",
}
_STABILITY = {"certified": Certified(), "border": Certified(0.95), "cascade": Cascade(8, forget=0.999999)}


def stable_module(cell: str, hidden: int, **options):
    if cell in ("lstm", "gru"):
        return (StableLSTM if cell == "lstm" else StableGRU)(hidden, hidden, **options)
    return StableRNN(hidden, hidden, nonlinearity=cell.removeprefix("rnn_"), **options)


@cache
def weights(cell: str, hidden: int, model: str, seed: int) -> dict[str, torch.Tensor]:
    """The state dict, float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        m = stable_module(cell, hidden, stability=_STABILITY.get(model))
        if model == "chrono":
            keeps = torch.log(1 + 1000 * torch.rand(hidden))
            with torch.no_grad():
                m.bias_hh_l0.zero_()
                m.bias_ih_l0[hidden : 2 * hidden] = keeps
                if cell == "lstm":
                    m.bias_ih_l0[:hidden] = -keeps
        if model == "border":
            with torch.no_grad():
                for block in m.weight_hh_l0.split(hidden):
                    nn.init.orthogonal_(block)
                if cell in ("lstm", "gru"):  # the gate that forgets
                    m.bias_ih_l0[hidden : 2 * hidden] += 1
            m.project_()
        return m.state_dict()


def plain_module(cell: str, hidden: int, model: str, dtype: torch.dtype, device: str, seed: int) -> nn.RNNBase:
    """nn.LSTM, nn.GRU or nn.RNN with these weights."""
    if cell in ("lstm", "gru"):
        m = (nn.LSTM if cell == "lstm" else nn.GRU)(hidden, hidden)
    else:
        m = nn.RNN(hidden, hidden, nonlinearity=cell.removeprefix("rnn_"))
    m.load_state_dict(weights(cell, hidden, model, seed))
    return m.to(device, dtype)


@cache
def certificate_of(cell: str, hidden: int, model: str, dtype: str, seed: int) -> Certificate | None:
    """Of the weights as rounded to the dtype, for |inputs| <= 1; None where nothing is proven."""
    m = stable_module(cell, hidden, stability=_STABILITY.get(model))
    m.load_state_dict(weights(cell, hidden, model, seed))
    found = m.to(DTYPES[dtype]).certificate()
    return found if found.stable else None
