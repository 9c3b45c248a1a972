"""The recurrence as a graph of torch's own operations, in which T and B stay free: what `decompositions()` puts in the op's place, for
programs that run without this package.

All lanes step together. `Windowed` is feed-forward, its k steps unrolled; other plans are one `scan`, over the T steps of the whole
recurrence or the warmup + chunk steps of the lanes. `Verified` and `Scanned` are the whole recurrence, which they equal. The values are
those of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from .problem import Inputs, row_base, row_length, unpack
from .reference import _mask, _with_bias, arithmetic


def recurrence(*arguments: Any) -> tuple[Tensor, ...]:
    """The op `recurrence`, but for what the backward pass saves and the report of a checked plan, which are empty."""
    inputs, p, _ = unpack(Inputs, arguments)
    xp, w_hh, w_hr, hidden_bias, h0, c0, base, lengths, resets = inputs
    kind, cell, batch, steps, device = arithmetic(xp.dtype), p.spec, h0.shape[0], p.steps, xp.device
    weight, bias = w_hh.to(kind).T, None if hidden_bias is None else hidden_bias.to(kind)
    c0 = h0.new_zeros(batch, w_hh.shape[0] // cell.gates) if c0 is None else c0
    first = row_base(p, batch, base, device)  # buffer row of each row's time 0
    length = row_length(p, batch, lengths, device)
    whole = p.stride <= 0 or p.checked
    p = p.resolved() if isinstance(steps, int) else p  # no lane is longer than a sequence whose length is fixed
    count, stride, warmup = (1, steps, 0) if whole else ((steps + p.stride - 1) // p.stride, p.stride, p.warmup)
    lane, n, times_each = torch.arange(count * batch, device=device), *_sizes(device, batch, stride)
    b, begin = lane % n, lane // n * stride - warmup

    def step(h: Tensor, c: Tensor, s: Tensor, rows: Tensor, *read: Any) -> tuple[Tensor, Tensor]:
        """Each lane's step s, `rows` buffer rows after its first: h (n, P), c (n, H)."""
        xp, begin, origin, length, weight, w_hr, bias, resets = read
        live = (begin + s >= 0) & (begin + s < length)
        row = torch.where(live, origin + rows, 0)
        x = xp[row].to(kind)
        if resets is not None:
            fresh = (resets[row] & live)[:, None]
            h, c = h.masked_fill(fresh, 0), c.masked_fill(fresh, 0)
        h_new, c_new, _ = cell.step(x, _with_bias(h @ weight, bias, cell), h, c, p.cap)
        h_new = h_new if w_hr is None else h_new @ w_hr
        return _mask(live, h_new.to(xp.dtype).to(kind), h), _mask(live, c_new, c) if cell.has_cell else c.clone()

    h, c = (torch.where((begin <= 0)[:, None], t[b].to(kind), 0) for t in (h0, c0))
    read = (
        xp,
        begin,
        first[b] + begin * p.step,
        length[b],
        weight,
        None if w_hr is None else w_hr.to(kind).T,
        bias,
        resets,
    )
    times = torch.arange(warmup + stride, device=device)
    if p.windowed:
        for s in times.unbind():
            h, c = step(h, c, s, s * p.step, *read)
        found, warmup = (h[None], c[None]), 0
    else:
        found = _scan(step, (h, c), (times, times * p.step), read, (batch, steps))

    def at(states: Tensor, time: Tensor) -> Tensor:
        """Of each row at these times, (..., B): in the lane that writes them."""
        lanes = time // times_each * batch + torch.arange(batch, device=device)
        return states.flatten(0, 1)[(warmup + time % times_each) * count * batch + lanes]

    h, c = found
    time = torch.arange(steps, device=device)[:, None].expand(steps, batch)
    rows = torch.where(time < length, first + time * p.step, xp.shape[0]).flatten()  # the last one is dropped
    y = xp.new_zeros(xp.shape[0] + 1, h.shape[2]).index_copy(0, rows, at(h, time).flatten(0, 1).to(xp.dtype))[:-1]
    last, some, empty = (length - 1).clamp(min=0), length > 0, xp.new_empty(0)
    h_n, c_n = (_mask(some, at(t, last).to(start.dtype), start) for t, start in ((h, h0), (c, c0)))
    return y, h_n, c_n if cell.has_cell else empty, empty, empty, empty


def _sizes(device: torch.device, *sizes: int) -> list[Tensor]:
    """As tensors, which ONNX divides by where sizes are free."""
    return [torch.full((1,), size, device=device) for size in sizes]


def _scan(
    step: Callable[..., tuple[Tensor, Tensor]],
    state: tuple[Tensor, Tensor],
    over: tuple[Tensor, ...],
    read: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """The states after each of S steps, (S, n, P) and (S, n, H). Sizes that are free are read too: AOTInductor finds in them how large
    its results are."""
    given, own = [t for t in read if t is not None], len(state) + len(over)

    def body(*arguments: Tensor) -> list[Tensor]:
        left = iter(arguments[own:])
        after = step(*arguments[:own], *(None if t is None else next(left) for t in read))
        return [*after, *(t.clone() for t in after)]  # none of them share memory

    free = [size for size in sizes if isinstance(size, torch.SymInt)]
    _, _, h, c = scan_op(body, [*state], [*over], (*given, *free))
    return h, c
