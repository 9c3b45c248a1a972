"""The Elman cell: h' = tanh(x + q) or max(x + q, 0) (Elman 1990)."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import NOTHING, Cell, State, Step


class Tanh(Cell):
    name, mode, code = "rnn_tanh", "RNN_TANH", 0
    family = "rnn"
    gates, saved, has_cell, h_after, projects, forgets = 1, 0, False, True, False, None

    def step(self, x: Tensor, q: Tensor, h: Tensor, c: Tensor, clamp: float) -> Step:
        return torch.tanh(x + q), c, ()

    def vjp(
        self, dh: Tensor, dc: Tensor, saved: Tensor, after: State, before: State, clamp: float
    ) -> tuple[Tensor, State]:
        return dh * (1 - after.h * after.h), NOTHING


class Relu(Tanh):
    name, mode, code = "rnn_relu", "RNN_RELU", 1

    def step(self, x: Tensor, q: Tensor, h: Tensor, c: Tensor, clamp: float) -> Step:
        return torch.relu(x + q), c, ()

    def vjp(
        self, dh: Tensor, dc: Tensor, saved: Tensor, after: State, before: State, clamp: float
    ) -> tuple[Tensor, State]:
        return torch.where(after.h > 0, dh, 0.0), NOTHING
