"""Micro-benchmarks: `pytest benchmarks/test_micro.py` prints a table by group; nothing here asserts a time."""

import pytest
import torch
from torch import nn

from benchmarks import baselines
from benchmarks.speed.contestants import backends_of, label
from stable_rnn import (
    Chunked,
    Recurrent,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    Verified,
    Windowed,
    use_plan,
)
from stable_rnn.functional import SpectralState, spectral_project_

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
PLACES = [(device, backend) for device in DEVICES for backend in backends_of(device) if backend != "torch"]


def timed(benchmark, device, run):
    """A call is over when the device is done."""
    benchmark(run if device == "cpu" else lambda: (run(), torch.cuda.synchronize()))


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def same(plain, ours):
    ours.load_state_dict(plain.state_dict())
    return {"torch": plain, "stable_rnn": ours}


@pytest.mark.parametrize("which", ["torch", "stable_rnn"])
@pytest.mark.parametrize("hidden", [64, 256])
def test_lstm_step(benchmark, no_grad, which, hidden):
    benchmark.group = f"one LSTM step, B=1, H={hidden}"
    m = same(nn.LSTMCell(hidden, hidden), StableLSTMCell(hidden, hidden, stability=None))[which]
    x, hx = torch.randn(1, hidden), (torch.randn(1, hidden), torch.randn(1, hidden))
    benchmark(m, x, hx)


@pytest.mark.parametrize("which", ["torch", "stable_rnn"])
@pytest.mark.parametrize("plain,ours", [(nn.LSTM, StableLSTM), (nn.RNN, StableRNN)])
@pytest.mark.parametrize("device", DEVICES)
def test_recurrent(benchmark, no_grad, which, plain, ours, device):
    benchmark.group = f"{plain.__name__}, B=1, T=512, H=256, {device}"
    m = same(plain(256, 256).to(device), ours(256, 256, stability=None).to(device))[which]
    x = torch.randn(512, 1, 256, device=device)
    timed(benchmark, device, lambda: m(x))


@pytest.mark.parametrize("plan", [Recurrent(), Chunked(256, 32), Windowed(32), Verified()], ids=label)
@pytest.mark.parametrize("device, backend", PLACES)
def test_plans(benchmark, no_grad, plan, device, backend):
    steps = 512 if backend == "reference" else 2048
    benchmark.group = f"LSTM plans, B=1, T={steps}, H=256, {device}"
    m, x = StableLSTM(256, 256, backend=backend).to(device), torch.randn(steps, 1, 256, device=device)
    with use_plan(m, plan):
        timed(benchmark, device, lambda: m(x))


@pytest.mark.parametrize("plan", [Recurrent(), Chunked(256, 32), Windowed(16)], ids=label)
@pytest.mark.parametrize("device, backend", [place for place in PLACES if place[1] != "reference"])
def test_training(benchmark, plan, device, backend):
    benchmark.group = f"LSTM plans, forward + backward, B=1, T=1024, H=128, {device}"
    m, x = StableLSTM(128, 128, backend=backend).to(device), torch.randn(1024, 1, 128, device=device)
    with use_plan(m, plan):
        timed(benchmark, device, lambda: m(x)[0].sum().backward())


WINDOWS = {
    "stable_rnn": None,
    "shifted GEMMs": baselines.shifted_products,
    "unfold + nn.LSTM": baselines.unfolded_windows,
}


@pytest.mark.parametrize("which", WINDOWS)
@pytest.mark.parametrize("device", DEVICES)
def test_windows(benchmark, no_grad, which, device):
    benchmark.group = f"LSTM, windows of 16, B=1, T=1024, H=128, {device}"
    plain, x = nn.LSTM(128, 128).to(device), torch.randn(1024, 1, 128, device=device)
    ours = same(plain, StableLSTM(128, 128, stability=None, plan=Windowed(16)).to(device))["stable_rnn"]
    timed(benchmark, device, WINDOWS[which](plain, x, 16) if WINDOWS[which] else lambda: ours(x))


@pytest.mark.parametrize("which", ["stable_rnn", "overlap chunks"])
@pytest.mark.parametrize("device", DEVICES)
def test_chunks(benchmark, no_grad, which, device):
    benchmark.group = f"LSTM, chunks of 128 + 32, B=1, T=4096, H=128, {device}"
    plain, x = nn.LSTM(128, 128).to(device), torch.randn(4096, 1, 128, device=device)
    ours = same(plain, StableLSTM(128, 128, stability=None, plan=Chunked(128, 32)).to(device))["stable_rnn"]
    timed(
        benchmark, device, baselines.overlap_chunks(plain, x, 128, 32) if which == "overlap chunks" else lambda: ours(x)
    )


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_spectral_projection(benchmark, no_grad, certify, device):
    benchmark.group = f"projection of 4 gate blocks, H=256, {device}"
    state = SpectralState()
    ws = [torch.randn(256, 256, device=device) / 16 for _ in range(4)]
    spectral_project_(ws, 0.99, state=state)
    start = [w + 1e-3 * torch.randn_like(w) for w in ws]

    def run():
        for w, s in zip(ws, start, strict=True):
            w.copy_(s)
        spectral_project_(ws, 0.99, certify=certify, state=state)

    timed(benchmark, device, run)
