"""The scans of one group of a cascade in plain torch, for every cell, dtype and layout (see `scanned.py`).

They work on (T, B, units): of all sequences at once, where times past a sequence's end hand its state on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...cells import NOTHING, State, of_code
from .fields import Fields
from .problem import Problem, row_base, row_length


class _Times(NamedTuple):
    rows: Tensor  # (T, B) buffer rows; 0 where a sequence has no such time
    live: Tensor  # (T, B, 1) whether it has
    lengths: Tensor  # (B,)


def _times(f: Fields, device: torch.device) -> _Times:
    p = Problem("", f["steps"], f["step"])
    first, lengths = (of(p, f["batch"], f[name], device) for of, name in ((row_base, "base"), (row_length, "length")))
    t = torch.arange(p.steps, device=device)[:, None]
    live = t < lengths
    return _Times(torch.where(live, first + t * p.step, 0), live[..., None], lengths)


def _take(x: Tensor, rows: Tensor, parts: int, f: Fields, kind: torch.dtype) -> Tensor:
    """The group's columns of each of `parts` parts of x (N, parts*H), at rows (T, B): (T*B, parts*units)."""
    own = x.view(len(x), parts, f["hidden"])[:, :, f["unit"] : f["unit"] + f["units"]]
    return own[rows.flatten()].flatten(1).to(kind)


def _put(x: Tensor, rows: Tensor, live: Tensor, values: Tensor, parts: int, f: Fields) -> None:
    """Write values (T*B, parts*units) where `_take` reads, live times only."""
    used = live.flatten()
    own = x.view(len(x), parts, f["hidden"])[:, :, f["unit"] : f["unit"] + f["units"]]
    own[rows.flatten()[used]] = values[used].view(-1, parts, f["units"]).to(x.dtype)


def _gates(sums: Tensor | None, rows: Tensor, gates: int, like: Tensor) -> Tensor:
    """Sums unit by unit (N, units*G) as sums gate by gate (T*B, G*units)."""
    if sums is None:
        return torch.zeros_like(like)
    return sums[rows.flatten()].unflatten(1, (-1, gates)).transpose(1, 2).flatten(1)


def linear_scan(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """s[t] = a[t] s[t-1] + b[t] over the first axis, from s[-1] = start: log2(T) rounds, in each of which what a time knows of its
    past doubles (Hillis & Steele 1986)."""
    b = torch.cat([b[:1] + a[:1] * start, b[1:]])
    step = 1
    while step < len(b):
        b = torch.cat([b[:step], b[step:] + a[step:] * b[:-step]])
        a = torch.cat([a[:step], a[step:] * a[:-step]])
        step *= 2
    return b


def _earlier(states: Tensor, start: Tensor) -> Tensor:
    return torch.cat([start[None], states[:-1]])


def scan(f: Fields) -> None:
    """Forward: y, saved, cells, h_n, c_n of the group's units, and h one step later in `before`."""
    cell, kind = of_code(f["cell"]), f["cells"].dtype if f["cells"].numel() else _kind(f["xp"])
    rows, live, lengths = _times(f, f["xp"].device)
    units = slice(f["unit"], f["unit"] + f["units"])
    shape = (*rows.shape, f["units"])
    x = _take(f["xp"], rows, cell.gates, f, kind)
    q = _gates(f["sums"], rows, cell.gates, x)
    if f["hidden_bias"] is not None and cell.hidden_bias is not None:
        q.unflatten(1, (cell.gates, -1))[:, cell.hidden_bias] += f["hidden_bias"][units].to(kind)
    zero = x.new_zeros(len(x), f["units"])
    h, c, kept = cell.step(x, q, zero, zero, f["cap"])
    saved = torch.cat(kept, 1) if kept else x[:, :0]
    start = (f["c0"] if cell.has_cell else f["h0"])[:, units].to(kind)
    if cell.has_cell or cell.carries:
        states = linear_scan(
            torch.where(live, cell.forget_gate(saved).view(shape), 1.0),
            torch.where(live, (c if cell.has_cell else h).view(shape), 0.0),
            start,
        )
        c = states.flatten(0, 1)
        h = cell.output(saved, c) if cell.has_cell else c
    h = h.view(shape).to(f["xp"].dtype)
    _put(f["y"], rows, live, h.flatten(0, 1), 1, f)
    if f["saved"].numel():
        _put(f["saved"], rows, live, saved, cell.saved, f)
    if f["cells"].numel():
        _put(f["cells"], rows, live, c, 1, f)
    h0 = f["h0"][:, units]
    later = torch.cat([h0[None], h[:-1]])
    _put(f["before"], rows, live, later.flatten(0, 1), 1, f)
    last = (lengths - 1).clamp_min(0)
    own = torch.arange(len(lengths), device=last.device)
    f["h_n"][:, units] = torch.where(lengths[:, None] > 0, h[last, own], h0)
    if cell.has_cell:
        f["c_n"][:, units] = states[-1].to(f["c_n"].dtype)


def scan_backward(f: Fields) -> None:
    """Backward: dz of the group's units, dc0, what a cell carries of dh0, and d_hidden one step earlier in `after`."""
    cell, kind = of_code(f["cell"]), _kind(f["y"])
    rows, live, lengths = _times(f, f["y"].device)
    units = slice(f["unit"], f["unit"] + f["units"])
    shape = (*rows.shape, f["units"])
    clamp = (
        f["cap"] if f["cap"] == 1 else float(torch.tensor(f["cap"], dtype=f["y"].dtype))
    )  # as the saved gate was rounded
    ends = torch.arange(f["steps"], device=rows.device)[:, None, None] == lengths[:, None] - 1
    dh = _take(f["dy"], rows, 1, f, kind).view(shape)
    dh = torch.where(ends, dh + f["dh_n"][:, units].to(kind), dh)
    if f["sums"] is not None:
        dh = dh + f["sums"][rows.flatten()].view(shape)
    dh = dh.flatten(0, 1)
    h = c = h_before = c_before = saved = NOTHING.h
    if cell.saved:
        saved = _take(f["saved"], rows, cell.saved, f, kind)
    if cell.h_after or cell.carries:
        h = _take(f["y"], rows, 1, f, kind)
    if cell.carries:
        h_before = _earlier(h.view(shape), f["h0"][:, units].to(kind)).flatten(0, 1)
    if cell.has_cell:
        c = _take(f["cells"], rows, 1, f, kind)
        c_before = _earlier(c.view(shape), f["c0"][:, units].to(kind)).flatten(0, 1)
    after, before = State(h, c), State(h_before, c_before)
    dc = torch.zeros_like(dh)
    dz, handed = cell.vjp(dh, dc, saved, after, before, clamp)
    if cell.has_cell or cell.carries:
        state = handed.c if cell.has_cell else handed.h
        a = torch.where(live, cell.forget_gate(saved).view(shape), 1.0)
        b = torch.where(live, state.view(shape), 0.0)
        end = f["dc_n"][:, units].to(kind) if cell.has_cell else torch.zeros_like(b[0])
        found = linear_scan(a.flip(0), b.flip(0), end).flip(0)  # at the start of each time
        arriving = torch.cat([found[1:], end[None]]).flatten(0, 1)
        if cell.has_cell:
            dz, _ = cell.vjp(dh, arriving, saved, after, before, clamp)
            f["dc0"][:, units] = found[0].to(f["dc0"].dtype)
        else:
            dz, _ = cell.vjp(dh + arriving, dc, saved, after, before, clamp)
            f["dh0"][:, units] = found[0]
    _put(f["dz"], rows, live, dz, cell.gates, f)
    d_hidden = cell.hidden(dz, saved).unflatten(1, (cell.gates, -1)).transpose(1, 2).unflatten(0, rows.shape)
    own = f["after"].view(len(f["after"]), f["hidden"], cell.gates)[:, units]
    used = live[1:].flatten()
    own[rows[:-1].flatten()[used]] = d_hidden[1:].flatten(0, 1)[used].to(own.dtype)


def _kind(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
