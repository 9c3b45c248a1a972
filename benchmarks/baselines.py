"""The strongest ways to run long sequences or windows with what torch itself offers. Each returns a function of no arguments."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .timing import race


def overlap_chunks(m: nn.RNNBase, x: Tensor, chunk: int, warmup: int) -> Callable[[], Tensor]:
    """Chunks with warm-up as one batch through stock nn.LSTM: x (T, 1, I), T a multiple of chunk. The first chunk runs beside them."""

    def run() -> Tensor:
        first = m(x[:chunk])[0]
        lanes = x[chunk - warmup :, 0].unfold(0, chunk + warmup, chunk)  # (lanes, I, chunk + warmup)
        rest = m(lanes.permute(2, 0, 1).contiguous())[0][warmup:]
        return torch.cat([first[:, 0], rest.transpose(0, 1).flatten(0, 1)])

    return run


def shifted_products(m: nn.LSTM, x: Tensor, k: int) -> Callable[[], Tensor]:
    """All windows of k at once by k shifted batched GEMMs with eager gate arithmetic: x (T, 1, I). Its windows at t < k - 1 are padded
    with zero projections, a shortcut that only helps it."""
    hidden = m.hidden_size

    def run() -> Tensor:
        steps = x.shape[0]
        xp = F.pad(F.linear(x[:, 0], m.weight_ih_l0, m.bias_ih_l0 + m.bias_hh_l0), (0, 0, k - 1, 0))
        h, c = None, None
        weight = m.weight_hh_l0.T
        for s in range(k):
            z = xp[s : s + steps] if h is None else torch.addmm(xp[s : s + steps], h, weight)
            gates = torch.sigmoid(z)
            g = torch.tanh(z[:, 2 * hidden : 3 * hidden])
            i, f, o = gates[:, :hidden], gates[:, hidden : 2 * hidden], gates[:, 3 * hidden :]
            c = i * g if c is None else f * c + i * g
            h = o * torch.tanh(c)
        return h

    return run


def product_rate(inner: int, columns: int, rows: tuple[int, ...] = (256, 1024, 4096, 16384)) -> float:
    """The best rate, in FLOP/s, of torch's own float32 product (rows, inner) x (inner, columns)."""
    weight = torch.randn(columns, inner)
    inputs = {str(n): torch.randn(n, inner) for n in rows}
    times = race({n: partial(F.linear, x, weight) for n, x in inputs.items()}, 2.0)
    return max(2 * int(n) * inner * columns / time.low for n, time in times.items())
