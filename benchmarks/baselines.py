"""The strongest ways to run long sequences or windows with what torch itself offers. Each returns a function of no arguments.

m is a plain nn.LSTM, nn.GRU or nn.RNN of one layer and direction, x is (T, B, I); the function gives y (T, B, H).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .timing import race

_ACT = {"RNN_TANH": torch.tanh, "RNN_RELU": torch.relu}


def overlap_chunks(m: nn.RNNBase, x: Tensor, chunk: int, warmup: int) -> Callable[[], Tensor]:
    """Chunks with warm-up as one batch through stock nn.LSTM: T a multiple of chunk, warmup <= chunk.

    The first chunk needs no warm-up: in the same batch it runs over its own chunk + warmup times, and its first outputs are taken."""
    steps, batch, _ = x.shape
    if steps % chunk or warmup > chunk:
        raise ValueError(
            f"overlap chunks: T={steps} must be a multiple of chunk={chunk}, and warmup={warmup} at most chunk"
        )
    if steps <= chunk + warmup:
        return lambda: m(x)[0]
    starts = (torch.arange(0, steps, chunk, device=x.device) - warmup).clamp(min=0)
    times = starts + torch.arange(chunk + warmup, device=x.device)[:, None]  # (chunk + warmup, lanes)

    def run() -> Tensor:
        y = m(x[times].flatten(1, 2))[0].unflatten(1, (-1, batch))  # (chunk + warmup, lanes, B, H)
        return torch.cat([y[:chunk, 0], y[warmup:, 1:].transpose(0, 1).flatten(0, 1)])

    return run


def unfolded_windows(m: nn.RNNBase, x: Tensor, k: int) -> Callable[[], Tensor]:
    """Every window of k inputs as an entry of one large batch through stock nn.LSTM. The first k - 1 outputs, whose windows are
    shorter, come from one run: zero inputs in front would move the state through the biases."""
    batch = x.shape[1]

    def run() -> Tensor:
        if x.shape[0] < k:
            return m(x)[0]
        windows = x.unfold(0, k, 1).permute(3, 0, 1, 2).flatten(1, 2)  # (k, (T - k + 1) * B, I)
        h = m(windows)[1]
        last = (h[0] if isinstance(h, tuple) else h)[0].unflatten(0, (-1, batch))
        return last if k == 1 else torch.cat([m(x[: k - 1])[0], last])

    return run


def shifted_products(m: nn.RNNBase, x: Tensor, k: int) -> Callable[[], Tensor]:
    """All windows of k at once by k shifted GEMMs with eager gate arithmetic. Windows at t < k - 1 start with zero projections, which
    leave a zero state at zero: no trap as zero inputs are, and exact."""
    batch, hidden, lstm = x.shape[1], m.hidden_size, isinstance(m, nn.LSTM)
    if isinstance(m, nn.GRU):
        return partial(_shifted_gru, m, x, k)

    def run() -> Tensor:
        rows = x.shape[0] * batch
        bias = m.bias_ih_l0 + m.bias_hh_l0
        xp = F.pad(F.linear(x.flatten(0, 1), m.weight_ih_l0, bias), (0, 0, (k - 1) * batch, 0))
        h, c = None, None
        weight = m.weight_hh_l0.T
        for s in range(0, k * batch, batch):
            z = xp[s : s + rows] if h is None else torch.addmm(xp[s : s + rows], h, weight)
            if not lstm:
                h = _ACT[m.mode](z)
                continue
            gates = torch.sigmoid(z)
            g = torch.tanh(z[:, 2 * hidden : 3 * hidden])
            i, f, o = gates[:, :hidden], gates[:, hidden : 2 * hidden], gates[:, 3 * hidden :]
            c = i * g if c is None else f * c + i * g
            h = o * torch.tanh(c)
        return h.unflatten(0, (-1, batch))

    return run


def _shifted_gru(m: nn.GRU, x: Tensor, k: int) -> Tensor:
    """n's bias would move a zero state: in front of the sequence the reset gate is closed."""
    batch, H = x.shape[1], m.hidden_size
    rows, ahead = x.shape[0] * batch, (k - 1) * batch
    b_hh = m.bias_hh_l0
    bias = m.bias_ih_l0 + torch.cat([b_hh[: 2 * H], torch.zeros_like(b_hh[2 * H :])])
    closed = torch.cat([x.new_full((ahead, H), -torch.inf), x.new_zeros(ahead, 2 * H)], 1)
    xp = torch.cat([closed, F.linear(x.flatten(0, 1), m.weight_ih_l0, bias)])
    gates, new = m.weight_hh_l0[: 2 * H].T, m.weight_hh_l0[2 * H :].T
    h = None
    for s in range(0, k * batch, batch):
        z = xp[s : s + rows, : 2 * H]
        q = b_hh[2 * H :]
        if h is not None:
            z, q = torch.addmm(z, h, gates), torch.addmm(q, h, new)
        z = torch.sigmoid(z)
        r, keep = z[:, :H], z[:, H:]
        n = torch.tanh(xp[s : s + rows, 2 * H :] + r * q)
        h = n - keep * n if h is None else n + keep * (h - n)
    return h.unflatten(0, (-1, batch))


def product_rate(
    inner: int,
    columns: int,
    rows: tuple[int, ...] = (256, 1024, 4096, 16384),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 2.0,
) -> float:
    """The best rate, in FLOP/s, of torch's own product (rows, inner) x (inner, columns)."""
    weight = torch.randn(columns, inner).to(device, dtype)
    inputs = {str(n): torch.randn(n, inner).to(device, dtype) for n in rows}
    times = race({n: partial(F.linear, x, weight) for n, x in inputs.items()}, seconds, device=device)
    return max(2 * int(n) * inner * columns / time.low for n, time in times.items())
