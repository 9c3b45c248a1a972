"""The LSTM (Hochreiter & Schmidhuber 1997, with forget gates: Gers et al. 2000), gate order i, f, g, o:

i, f, g, o = σ(z_i), min(σ(z_f), clamp), tanh(z_g), σ(z_o) of z = x + q;   c' = f c + i g;   h' = o tanh(c')"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import hardtanh

from .spec import NOTHING, Cell, State, Step


class Lstm(Cell):
    name, mode, code = "lstm", "LSTM", 2
    family = "lstm"
    gates, saved, has_cell, h_after, projects, forgets = 4, 4, True, False, True, 1

    def step(self, x: Tensor, q: Tensor, h: Tensor, c: Tensor, clamp: float) -> Step:
        i, f, g, o = (x + q).chunk(4, 1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        if clamp < 1:
            f = hardtanh(f, 0.0, clamp)  # a clamp whose gradient is one kernel
        c = f * c + i * g
        return o * torch.tanh(c), c, (i, f, g, o)

    def vjp(
        self, dh: Tensor, dc: Tensor, saved: Tensor, after: State, before: State, clamp: float
    ) -> tuple[Tensor, State]:
        i, f, g, o = saved.chunk(4, 1)
        tanh_c = torch.tanh(after.c)
        dc = dc + dh * o * (1 - tanh_c * tanh_c)
        df = dc * before.c * f * (1 - f)
        if clamp < 1:
            df = torch.where(f < clamp, df, 0.0)
        dz = torch.cat([dc * g * i * (1 - i), df, dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)], 1)
        return dz, State(NOTHING.h, dc * f)

    def output(self, saved: Tensor, c: Tensor) -> Tensor:
        return saved.chunk(4, 1)[3].to(c.dtype) * torch.tanh(c)
