"""The backward pass of windows, composed from a backend's `forward` and `backward`: what the GPU backends use.

A group of windows is gathered into a bounded workspace as sequences of k steps, end to end; they run forward again, saving their
states, and back. The overlaps add up one step of the windows after the other, and dW by one GEMM a group: a fixed order, no two
additions to one place at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .compiled import Kernels
from .problem import Inputs, Needs, Problem, WindowedInputs, backward_inputs, row_base, row_length, weight_gradients

WORKSPACE = 1 << 25  # elements that a group may use at once


def windowed_backward(backend: ModuleType | Kernels, inputs: WindowedInputs, p: Problem) -> tuple[Tensor | None, ...]:
    """As `reference.windowed_backward`, by `backend.forward` and `backend.backward`."""
    dy, dh_n, dc_n, xp, w_hh, w_hr, hidden_bias, h0, c0, base, lengths, resets = inputs
    n, batch, k, device = xp.shape[0], h0.shape[0], p.warmup + 1, xp.device
    first_row, length = row_base(p, batch, base, device), row_length(p, batch, lengths, device)
    windows = p.lanes() * batch
    width = 2 * xp.shape[1] + w_hh.shape[0] + 3 * w_hh.shape[1]  # xp, what is saved, dz; y, dy and the cells
    group = max(1, min(windows, WORKSPACE // (k * max(1, width))))
    f32: dict[str, Any] = dict(dtype=torch.float32, device=device)
    dxp = torch.zeros(n + 1, xp.shape[1], **f32)  # the last row takes what belongs to no time
    totals = [None if w is None else torch.zeros(w.shape, **f32) for w in (w_hh, w_hr, hidden_bias)]
    from_start = min(k, p.steps)
    early = from_start * batch  # ids of the windows from time 0
    dh0, dc0 = (None if t is None else torch.zeros(early, t.shape[1], **f32) for t in (h0, c0))
    local = Problem(p.cell, k, 1, stride=k, cap=p.cap, backend=p.backend)

    for first in range(0, windows, group):
        ids = torch.arange(first, min(first + group, windows), device=device)
        t, b = ids // batch, ids % batch
        begin = (t - k + 1).clamp(min=0)
        last = t + 1 == length[b]
        steps = torch.where(t < length[b], t + 1 - begin, 0)  # of each window
        q = torch.arange(k, device=device)
        rows = torch.where(q < steps[:, None], first_row[b][:, None] + (begin[:, None] + q) * p.step, n)  # (windows, k)
        some: Callable = lambda x, keep: None if x is None else torch.where(keep[:, None], x[b], 0)  # noqa: B023, E731
        h_begin, c_begin = (some(x, t < k) for x in (h0, c0))
        dh_end, dc_end = (some(x, last) for x in (dh_n, dc_n))
        xs = _rows(xp, rows.flatten())
        dys = torch.zeros(len(ids), k, dy.shape[1], dtype=dy.dtype, device=device)
        at_end = (steps - 1).clamp(min=0)
        dys[torch.arange(len(ids), device=device), at_end] = _rows(dy, rows.gather(1, at_end[:, None])[:, 0])
        places = torch.arange(len(ids), device=device) * k
        anew = None if resets is None else _rows(resets[:, None], rows.flatten())[:, 0]
        given = Inputs(xs, w_hh, w_hr, hidden_bias, h_begin, c_begin, places, steps, anew)
        out = backend.forward(given, local)
        kept = out.y, out.saved, out.cells
        back = backend.backward(backward_inputs(dys.flatten(0, 1), dh_end, dc_end, *kept, given, local), local)
        dz = back.dz.view(len(ids), k, -1)
        for j in range(k):  # the steps that are j before a window's last: no two windows share their rows
            at = steps - 1 - j
            here = rows.gather(1, at.clamp(min=0)[:, None])[:, 0]
            dxp.index_add_(
                0, torch.where(at >= 0, here, n), dz[torch.arange(len(ids), device=device), at.clamp(min=0)].float()
            )
        for total, part in zip(totals, weight_gradients(Needs(), back, *kept, given, local)):
            if total is not None and part is not None:
                total += part
        for total, part in ((dh0, back.dh0), (dc0, back.dc0)):
            if total is not None and first < early:
                total[first : first + len(ids)] = part[: early - first]
    starts = [None if x is None else x.view(from_start, batch, x.shape[1]).sum(0) for x in (dh0, dc0)]
    if lengths is not None:  # empty sequences: dh0 = dh_n, dc0 = dc_n
        none, ends = (lengths == 0)[:, None], (dh_n, dc_n)
        starts = [x if x is None or end is None else torch.where(none, end.float(), x) for x, end in zip(starts, ends)]
    return tuple(None if x is None else x.to(xp.dtype) for x in (dxp[:n], *totals, *starts))


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x, zeros for the number behind the last."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, rows)
