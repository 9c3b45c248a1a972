"""What the inputs of a layer can do, and sums in float64, rounded outwards. See README.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .weights import LayerWeights

ROUNDS = 8  # of sharpening a state's bound by itself
GATE = 1 + 2.0**-45  # covers the rounding of one sigmoid or tanh in float64


@dataclass(frozen=True)
class Drive:
    """What the inputs alone can do: low <= W_ih x + b <= high per row (G*H,), and `norm` >= ||W_ih x + b||_2."""

    low: Tensor
    high: Tensor
    norm: float


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
