"""Inputs of the right kind where no recording may be had: speech-like and music-like sound, text, all from a fixed seed. Voiced stretches
have moving pitch and formants, between noise and pauses; notes have attacks on a beat; the sentences are Penn Treebank's."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..sets import DATA
from .fetch import Missing

RATE = 16_000  # Hz


@cache
def speech(seconds: float) -> Tensor:
    """(N,) at 16 kHz, |x| <= 1."""
    draw = torch.Generator().manual_seed(0)
    n, parts, done = int(seconds * RATE), [], 0
    while done < n:
        length = int(RATE * (0.05 + 0.35 * torch.rand((), generator=draw).item()))
        kind = torch.rand((), generator=draw).item()
        if kind < 0.6:  # voiced: harmonics of a gliding pitch under three formants
            pitch = 90 + 130 * torch.rand(2, generator=draw)
            phase = torch.cumsum(pitch[0] + (pitch[1] - pitch[0]) * torch.linspace(0, 1, length), 0) / RATE
            formants = torch.tensor([300.0, 900, 2200]) + torch.tensor([500.0, 1400, 1000]) * torch.rand(
                3, generator=draw
            )
            sound = torch.zeros(length)
            for k in range(1, 30):
                weight = torch.exp(-(((k * pitch.mean() - formants) / 180) ** 2)).sum() + 0.03
                sound += weight * torch.sin(2 * math.pi * k * phase) / k**0.5
        elif kind < 0.8:  # unvoiced
            noise = torch.randn(length, generator=draw)
            sound = noise - 0.9 * torch.cat([noise[:1], noise[:-1]])
        else:
            sound = torch.zeros(length)
        sound = sound * torch.sin(math.pi * torch.arange(length) / length) ** 0.5
        parts.append(0.25 * torch.rand((), generator=draw).item() * sound / sound.abs().max().clamp_min(1e-3))
        done += length
    return (torch.cat(parts)[:n] + 0.003 * torch.randn(n, generator=draw)).clamp(-1, 1)


@cache
def music(frames: int, bands: int, per_second: float = 50.0) -> Tensor:
    """Logarithmic spectrogram (frames, bands): notes on a beat of 120 a minute that decay, over noise."""
    draw = torch.Generator().manual_seed(1)
    x = 0.05 * torch.rand(frames, bands, generator=draw)
    beat, place = per_second / 2, torch.arange(bands).float()
    decay = torch.exp(-torch.arange(int(4 * beat)) / beat)
    at = 0.0
    while at < frames:
        for _ in range(1 + int(3 * torch.rand((), generator=draw).item())):
            center = bands * torch.rand((), generator=draw).item()
            shape = sum(torch.exp(-(((place - center - shift) / 1.5) ** 2)) for shift in (0, bands / 8, bands / 5))
            end = min(frames, int(at) + len(decay))
            loud = 0.5 + 1.5 * torch.rand((), generator=draw).item()
            x[int(at) : end] += loud * decay[: end - int(at), None] * shape
        at += beat * [0.5, 1.0, 1.0][int(3 * torch.rand((), generator=draw).item())]
    return torch.log1p(10 * x) / 2.4


def differences(x: Tensor) -> Tensor:
    """A spectrogram beside its rises from frame to frame."""
    return torch.cat([x, torch.cat([x[:1] * 0, (x[1:] - x[:-1]).clamp(min=0)])], 1)


@cache
def text(length: int) -> str:
    if not (DATA / "test.txt").exists():
        raise Missing(f"{Path(DATA) / 'test.txt'}, the text of Penn Treebank, is not here")
    return (DATA / "test.txt").read_text()[:length]


@cache
def mel(sound: Tensor, size: int, hop: int, bands: int) -> Tensor:
    """Power in mel bands (frames, bands)."""
    power = torch.stft(sound, size, hop, window=torch.hann_window(size), return_complex=True).abs().square().mT
    edges = 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + RATE / 2 / 700), bands + 2) / 2595) - 1)
    bins = torch.linspace(0, RATE / 2, power.shape[1])
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    weights = torch.minimum(rise, fall).clamp(min=0) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return power @ weights.mT
