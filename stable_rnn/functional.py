"""The recurrences of one layer and direction as functions, and the spectral ops: for modules of one's own.

`lstm`, `gru` and `rnn` take torch's weights and a plan; gradients, `torch.func`, `torch.compile` and `torch.export` go through them as
through the modules. `spectral_*` and `row_project_` bring matrices into norm balls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import layout
from .cells import CELLS
from .common import autocast_dtype
from .ops.backends import check_name
from .ops.recurrence.function import layer
from .ops.recurrence.problem import Problem
from .ops.spectral import SpectralState, row_project_, spectral_norm_bound, spectral_project_, spectral_projection
from .plans import Plan, Recurrent, check_plan
from .validate import describe, suits

__all__ = [
    "SpectralState",
    "gru",
    "lstm",
    "rnn",
    "row_project_",
    "spectral_norm_bound",
    "spectral_project_",
    "spectral_projection",
]


def lstm(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    plan: Plan = Recurrent(),
    clamp: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer and direction of an LSTM (gate order i, f, g, o) under a plan.

        i, f, g, o = split(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        c_t = min(sigmoid(f), clamp) c_{t-1} + sigmoid(i) tanh(g);   h_t = sigmoid(o) tanh(c_t), then W_hr h_t where w_hr is given

    input (T, B, I), or (B, T, I) with batch_first; w_ih (4H, I), w_hh (4H, P), b_ih, b_hh (4H,), w_hr (P, H) or None, then P = H;
    h0 (B, P), c0 (B, H), zeros when not given; lengths (B,) integers on the input's device; resets (T, B), or (B, T), booleans:
    new sequences begin at these times (see `StableLSTM`); reverse: from each sequence's end to its start.
    Returns output, like the input with P columns, zero past each length, and (h_n (B, P), c_n (B, H)), the states after the last step run.
    Equivalent to, without lengths, resets and clamp and with `Recurrent()`: one layer of `torch.nn.LSTM`.

    Raises ValueError for shapes, dtypes or devices that do not fit, naming the tensor; a clamp outside of (0, 1]; a backend that cannot
    run the problem. TypeError for what is no tensor or plan. RuntimeError for a sequence without steps."""
    y, h, c = _run(
        "lstm", input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, resets, reverse, batch_first, plan, clamp, backend
    )
    return y, (h, c)


def gru(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    plan: Plan = Recurrent(),
    clamp: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One layer and direction of a GRU (gate order r, z, n) under a plan.

        x_r, x_z, x_n = split(W_ih x_t + b_ih);   q_r, q_z, q_n = split(W_hh h_{t-1} + b_hh)
        r, z = sigmoid(x_r + q_r), min(sigmoid(x_z + q_z), clamp);   n = tanh(x_n + r q_n);   h_t = (1 - z) n + z h_{t-1}

    input (T, B, I), or (B, T, I) with batch_first; w_ih (3H, I), w_hh (3H, H), b_ih, b_hh (3H,), h0 (B, H), zeros when not given;
    lengths, resets and reverse as for `lstm`, errors too. Returns output, like the input with H columns, and h_n (B, H). Equivalent to,
    without lengths, resets and clamp and with `Recurrent()`: one layer of `torch.nn.GRU`."""
    y, h, _ = _run(
        "gru",
        input,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        None,
        h0,
        None,
        lengths,
        resets,
        reverse,
        batch_first,
        plan,
        clamp,
        backend,
    )
    return y, h


def rnn(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    plan: Plan = Recurrent(),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One layer and direction of an RNN under a plan: h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu.

    input (T, B, I), or (B, T, I) with batch_first; w_ih (H, I), w_hh (H, H), b_ih, b_hh (H,), h0 (B, H), zeros when not given; lengths,
    resets and reverse as for `lstm`, errors too. Returns output, like the input with H columns, and h_n (B, H)."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    cell = "rnn_" + nonlinearity
    y, h, _ = _run(
        cell, input, w_ih, w_hh, b_ih, b_hh, None, h0, None, lengths, resets, reverse, batch_first, plan, 1.0, backend
    )
    return y, h


def _run(
    cell: str,
    x: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    batch_first: bool,
    plan: Plan,
    clamp: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    name = cell.partition("_")[0]
    given = dict(input=x, w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, w_hr=w_hr, h0=h0, c0=c0)
    for key, t in given.items():
        needed = key in ("input", "w_ih", "w_hh")
        if not isinstance(t, Tensor) and (needed or t is not None):
            raise TypeError(f"{name}: {key} must be a Tensor{'' if needed else ' or None'}, got {type(t).__name__}")
    if not 0 < clamp <= 1:
        raise ValueError(f"{name}: clamp must lie in (0, 1], got {clamp}")
    check_plan(plan), check_name(backend)
    if x.dim() != 3 or w_ih.dim() != 2 or w_hh.dim() != 2:
        raise ValueError(
            f"{name}: input must have 3 dimensions, w_ih and w_hh 2; got {tuple(x.shape)}, {tuple(w_ih.shape)}, "
            f"{tuple(w_hh.shape)}"
        )
    if not x.is_floating_point() or x.layout is not torch.strided:
        raise ValueError(f"{name}: input must be dense and of a real floating dtype, got {describe(x)}")
    batch, steps = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
    if steps == 0:
        raise RuntimeError(f"{name}: expected a sequence of at least one step, got input {tuple(x.shape)}")
    rows, out = w_hh.shape
    gates, has_cell = CELLS[cell].gates, CELLS[cell].has_cell
    hidden = rows // gates
    expected = dict(
        w_ih=(rows, x.shape[2]),
        w_hh=(gates * hidden, hidden if w_hr is None else out),
        b_ih=(rows,),
        b_hh=(rows,),
        w_hr=(out, hidden),
        h0=(batch, out),
        c0=(batch, hidden),
    )
    kind = autocast_dtype(x)
    for key, shape in expected.items():
        t = given[key]
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(
                f"{name}: {key} must have shape {shape}, got {tuple(t.shape)} (input {tuple(x.shape)}, "
                f"w_hh {tuple(w_hh.shape)})"
            )
        if not suits(t, x, kind is not None):
            raise ValueError(f"{name}: {key} must be dense, {x.dtype} on {x.device} as the input is, got {describe(t)}")
    if kind is not None:
        x, w_ih, w_hh = x.to(kind), w_ih.to(kind), w_hh.to(kind)
        b_ih, b_hh, w_hr, h0, c0 = (None if t is None else t.to(kind) for t in (b_ih, b_hh, w_hr, h0, c0))
    x, lengths, resets = layout.checked(x, batch_first, lengths, resets)
    way = layout.padded(x.shape, batch_first, lengths, resets, x.device)
    way = way.reversed(x.device) if reverse else way
    bias, hidden_bias = CELLS[cell].biases(b_ih, b_hh)
    h0 = x.new_zeros(batch, out) if h0 is None else h0
    if c0 is None and has_cell:
        c0 = x.new_zeros(batch, hidden)
    p = Problem(cell, way.steps, way.step, **plan.numbers(x), cap=clamp, backend=backend)
    tensors = x.reshape(-1, x.shape[2]), w_ih, bias, w_hh, w_hr, hidden_bias, h0, c0
    y, h, c, _ = layer(*tensors, way.base, way.lengths, way.resets, p)
    return y.view(*x.shape[:2], out), h, c if has_cell else torch.empty(0)
