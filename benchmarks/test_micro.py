"""Micro-benchmarks: `pytest benchmarks/test_micro.py` prints a table by group; nothing here asserts a time."""
import pytest
import torch
from torch import nn

from stable_rnn import Chunked, SpectralState, StableLSTM, StableLSTMCell, StableRNN, Windowed, spectral_project_, use_plan


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def same(plain, ours):
    ours.load_state_dict(plain.state_dict())
    return {"torch": plain, "stable_rnn": ours}


@pytest.mark.parametrize("which", ["torch", "stable_rnn"])
@pytest.mark.parametrize("hidden", [64, 256])
def test_lstm_step(benchmark, which, hidden):
    benchmark.group = f"one LSTM step, B=1, H={hidden}"
    m = same(nn.LSTMCell(hidden, hidden), StableLSTMCell(hidden, hidden, stability=None))[which]
    x, hx = torch.randn(1, hidden), (torch.randn(1, hidden), torch.randn(1, hidden))
    benchmark(m, x, hx)


@pytest.mark.parametrize("which", ["torch", "stable_rnn"])
@pytest.mark.parametrize("plain,ours", [(nn.LSTM, StableLSTM), (nn.RNN, StableRNN)])
def test_recurrent(benchmark, which, plain, ours):
    benchmark.group = f"{plain.__name__}, B=1, T=512, H=256"
    m = same(plain(256, 256), ours(256, 256, stability=None))[which]
    benchmark(m, torch.randn(512, 1, 256))


@pytest.mark.parametrize("plan", [Chunked(256, 32), Windowed(32)], ids=str)
def test_plans(benchmark, plan):
    benchmark.group = "LSTM plans, B=1, T=2048, H=256"
    m = StableLSTM(256, 256)
    with use_plan(m, plan):
        benchmark(m, torch.randn(2048, 1, 256))


@pytest.mark.parametrize("certify", [False, True])
def test_spectral_projection(benchmark, certify):
    benchmark.group = "projection of 4 gate blocks, H=256"
    state = SpectralState()
    ws = [torch.randn(256, 256) / 16 for _ in range(4)]
    spectral_project_(ws, 0.99, state=state)
    start = [w + 1e-3 * torch.randn_like(w) for w in ws]

    def run():
        for w, s in zip(ws, start, strict=True):
            w.copy_(s)
        spectral_project_(ws, 0.99, certify=certify, state=state)

    benchmark(run)
