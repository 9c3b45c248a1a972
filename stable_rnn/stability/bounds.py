"""How large the gates, the cell and the state of a layer can get: intervals in float64, rounded outwards. See README.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .weights import LayerWeights

ROUNDS = 8  # of sharpening the state's bound by itself
GATE = 1 + 2.0**-45  # covers the rounding of one sigmoid or tanh in float64


@dataclass(frozen=True)
class Drive:
    """What the inputs alone can do: low <= W_ih x + b <= high per row (G*H,), and `norm` >= ||W_ih x + b||_2."""

    low: Tensor
    high: Tensor
    norm: float


@dataclass(frozen=True)
class RnnBounds:
    """`drive` (H,) >= |W_ih x + b|; `norm` the same in the 2-norm; `h` (H,) >= |h| or infinite where nothing is known."""

    drive: Tensor
    norm: float
    h: Tensor


@dataclass(frozen=True)
class LstmBounds:
    """Upper bounds per unit, all (H,) but `h` (P,).

    i, f, o, z: the gates and |tanh| of the candidate;  si, sf, so: the slopes of the gates' sigmoids;  c >= |c|, t >= |tanh c|,
    m >= |o tanh c|, h >= |h|.
    """

    i: Tensor
    f: Tensor
    o: Tensor
    z: Tensor
    si: Tensor
    sf: Tensor
    so: Tensor
    c: Tensor
    t: Tensor
    m: Tensor
    h: Tensor


def up(x: Tensor, terms: int) -> Tensor:
    """A non-negative float64 sum of `terms` products, rounded upwards."""
    return x * (1 + (terms + 8) * 2.0**-51)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Upper bound of matrix @ vector, both >= 0, the vector possibly infinite (0 * inf = 0): (m, n), (n,) -> (m,)."""
    if torch.isfinite(vector).all():
        return up(matrix @ vector, matrix.shape[1])
    return up(torch.where(matrix == 0, 0.0, matrix * vector).sum(1), matrix.shape[1])


def length(vector: Tensor) -> float:
    """Upper bound of the 2-norm of a vector."""
    return float(up(torch.linalg.vector_norm(vector), vector.numel()))


def drive_of_bound(w: LayerWeights, x: Tensor, x_norm: float, gain: float) -> Drive:
    """For all inputs with |x_t| <= x (I,) and ||x_t||_2 <= x_norm; gain >= ||W_ih||_2."""
    reach = times(w.abs_ih, x)
    pad = (reach + w.bias.abs()) * 2.0**-50
    low, high = w.bias - reach - pad, w.bias + reach + pad
    largest = torch.maximum(-low, high)
    apart = length(w.bias) + (0.0 if gain == 0 else gain * x_norm)
    return Drive(low, high, min(length(largest), apart * (1 + 2.0**-48)))


def drive_of_data(w: LayerWeights, data: Tensor) -> Drive:
    """For the very inputs `data` (N, I), N >= 1."""
    low = torch.full_like(w.bias, math.inf)
    high, norm = -low, 0.0
    for rows in data.split(4096):
        u = torch.addmm(w.bias, rows, w.w_ih.mT)  # (n, G*H)
        low, high = torch.minimum(low, u.amin(0)), torch.maximum(high, u.amax(0))
        norm = max(norm, float(torch.linalg.vector_norm(u, dim=1).max()))
    pad = (times(w.abs_ih, data.abs().amax(0)) + w.bias.abs()) * ((data.shape[1] + 8) * 2.0**-51)
    return Drive(low - pad, high + pad, (norm + length(pad)) * (1 + 2.0**-40))


def rnn_bounds(w: LayerWeights, drive: Drive) -> RnnBounds:
    """Of a tanh layer from |h| <= tanh(drive + |W_hh| |h|), started at 1; of a relu layer the state's bound needs its rate."""
    largest = torch.maximum(-drive.low, drive.high)
    h = torch.full_like(largest, 1.0 if w.cell == "rnn_tanh" else math.inf)
    if w.cell == "rnn_tanh":
        for _ in range(ROUNDS):
            h = torch.minimum(h, torch.tanh(largest + times(w.abs_hh, h)) * GATE)
    return RnnBounds(largest, drive.norm, h)


def lstm_bounds(w: LayerWeights, drive: Drive, cap: float) -> LstmBounds:
    """Each round is valid for all times, since it starts from a bound of |h| that is (at first |o tanh c| <= 1), and sharpens it."""
    abs_hr = w.abs_hr
    project: Callable[[Tensor], Tensor] = (lambda m: m) if abs_hr is None else (lambda m: times(abs_hr, m))
    h = project(torch.ones(w.hidden, dtype=torch.float64))
    for _ in range(ROUNDS):
        reach = times(w.abs_hh, h)
        pad = (torch.maximum(-drive.low, drive.high) + reach) * 2.0**-50
        low, high = (drive.low - reach - pad).chunk(4), (drive.high + reach + pad).chunk(4)
        i, f, o = (torch.sigmoid(high[gate]) * GATE for gate in (0, 1, 3))
        i, f, o = i.clamp(max=1.0), f.clamp(max=cap), o.clamp(max=1.0)
        z = torch.tanh(torch.maximum(-low[2], high[2])).mul(GATE).clamp(max=1.0)
        c = i * z / (1 - f) * (1 + 2.0**-50)
        t = torch.tanh(c).mul(GATE).clamp(max=1.0)
        m = o * t * (1 + 2.0**-50)
        h = torch.minimum(h, project(m))
    si, sf, so = (_slope(low[gate], high[gate]) for gate in (0, 1, 3))
    return LstmBounds(i, f, o, z, si, sf, so, c, t, m, h)


def _slope(low: Tensor, high: Tensor) -> Tensor:
    """The largest slope of the sigmoid between low and high: 1/4 where 0 lies between, else that at the nearer end."""
    nearest = torch.maximum(low, -high).clamp(min=0)
    return torch.sigmoid(nearest) * torch.sigmoid(-nearest) * (1 + 2.0**-40)
