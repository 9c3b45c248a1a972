"""torch's GRU (Cho et al. 2014, with the reset gate behind the product), gate order r, z, n:

r, z = σ(x_r + q_r), min(σ(x_z + q_z), clamp);   n = tanh(x_n + r q_n), q_n with a bias of its own;   h' = (1 - z) n + z h"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import hardtanh

from .spec import NOTHING, Cell, State, Step


class Gru(Cell):
    name, mode, code = "gru", "GRU", 3
    family = "gru"
    gates, saved, has_cell, h_after, projects, forgets = 3, 4, False, False, False, 1
    hidden_bias, carries = 2, True

    def step(self, x: Tensor, q: Tensor, h: Tensor, c: Tensor, clamp: float) -> Step:
        (x_r, x_z, x_n), (q_r, q_z, q_n) = x.chunk(3, 1), q.chunk(3, 1)
        r, z = torch.sigmoid(x_r + q_r), torch.sigmoid(x_z + q_z)
        if clamp < 1:
            z = hardtanh(z, 0.0, clamp)  # a clamp whose gradient is one kernel
        n = torch.tanh(x_n + r * q_n)
        return n + z * (h - n), c, (r, z, n, q_n)

    def vjp(
        self, dh: Tensor, dc: Tensor, saved: Tensor, after: State, before: State, clamp: float
    ) -> tuple[Tensor, State]:
        r, z, n, q_n = saved.chunk(4, 1)
        dn = dh * (1 - z) * (1 - n * n)
        dz = dh * (before.h - n) * z * (1 - z)
        if clamp < 1:
            dz = torch.where(z < clamp, dz, 0.0)
        return torch.cat([dn * q_n * r * (1 - r), dz, dn], 1), State(dh * z, NOTHING.c)

    def joined(self, x: Tensor, q: Tensor) -> Tensor:
        (x_r, x_z, x_n), (q_r, q_z, q_n) = x.chunk(3, 1), q.chunk(3, 1)
        return torch.cat([x_r + q_r, x_z + q_z, x_n + torch.sigmoid(x_r + q_r) * q_n], 1)

    def parted(self, saved: Tensor, q: Tensor) -> Tensor:
        return torch.cat([*saved.chunk(4, 1)[:3], q.chunk(3, 1)[2]], 1)

    def hidden(self, dz: Tensor, saved: Tensor) -> Tensor:
        dr, dz, dn = dz.chunk(3, 1)
        return torch.cat([dr, dz, dn * saved.chunk(4, 1)[0]], 1)
