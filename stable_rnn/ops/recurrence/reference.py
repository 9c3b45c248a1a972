"""The recurrence on lanes in plain torch: every plan, dtype and layout, differentiable any number of times.

It is what the kernels are tested against, what runs where no kernel does, and the path of double backward, vmap and forward mode.
Arithmetic in float32 (float64 for float64 inputs); h is rounded to the storage dtype at each step, as in the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...cells import NOTHING, Cell, State
from . import reference_scan
from .problem import (
    Adjoint,
    BackwardInputs,
    Inputs,
    Needs,
    Output,
    Problem,
    WindowedInputs,
    backward_inputs,
    row_base,
    row_length,
    weight_gradients,
)
from .scanned import Scanned


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _lanes(
    p: Problem, batch: int, base: Tensor | None, lengths: Tensor | None, ids: Tensor | None, device: torch.device
):
    """Per lane: its row, first written time, the row's base and length; (n,) each."""
    if ids is None:
        ids = torch.arange(p.lanes() * batch, device=device)
    b = ids % max(batch, 1)
    return (
        b,
        ids // max(batch, 1) * p.stride,
        row_base(p, batch, base, device)[b],
        row_length(p, batch, lengths, device)[b],
    )


def _place(values: list[Tensor], rows: Tensor, into: Tensor) -> Tensor:
    """Write values (S x (n, F)) at buffer rows (S, n); the row number len(into) is dropped."""
    flat = torch.stack(values).to(into.dtype).flatten(0, 1)
    return torch.cat([into, into.new_zeros(1, into.shape[1])]).index_copy(0, rows.flatten(), flat)[: into.shape[0]]


def _mask(live: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(live[:, None], new, old)


def _zeroed(fresh: Tensor | None, *states: Tensor) -> tuple[Tensor, ...]:
    """The states (n, F), or what a cell does not have, with zeros for lanes that begin anew."""
    if fresh is None:
        return states
    return tuple(_mask(fresh, torch.zeros_like(s), s) if s.dim() > 1 else s for s in states)


def _with_bias(q: Tensor, bias: Tensor | None, cell: Cell) -> Tensor:
    """The hidden product with the bias that is its own."""
    if bias is None or cell.hidden_bias is None:
        return q
    parts = list(q.chunk(cell.gates, 1))
    parts[cell.hidden_bias] = parts[cell.hidden_bias] + bias
    return torch.cat(parts, 1)


def _no_decay(cell: Cell, lanes: int, hidden: int, like: Tensor) -> Tensor:
    """The decay of lanes before their first step."""
    return like.new_ones(lanes, 0 if cell.forgets is None else hidden)


def _among(ids: Tensor, found: list[Tensor], lanes: int, others: Sequence[Tensor] | None) -> list[Tensor]:
    """The borders of all lanes, of which those of `ids` were found: zero where no lane ran, and a decay of 1."""
    if others is None:
        others = [new.new_zeros(lanes if new.dim() > 1 else 0, *new.shape[1:]) for new in found]
        others[-1] = others[-1] + 1
    return [old.index_copy(0, ids, new) if new.dim() > 1 else new for old, new in zip(others, found, strict=True)]


def forward(
    inputs: Inputs,
    p: Problem,
    save: bool = True,
    borders: bool = False,
    ids: Tensor | None = None,
    h_init: Tensor | None = None,
    c_init: Tensor | None = None,
    out: Output | None = None,
) -> Output:
    """Run the lanes `ids` (all of them by default). With `h_init` the lanes start at their first written time from those states.
    With `out`, the lanes' results are written into a copy of it. `p` is resolved."""
    xp, w_hh, w_hr, hidden_bias, h0, c0, base, lengths, resets = inputs
    kind, cell = arithmetic(xp.dtype), p.spec
    batch, hidden = h0.shape[0], w_hh.shape[0] // cell.gates
    c0 = h0.new_zeros(batch, hidden) if c0 is None else c0
    weight, project = w_hh.to(kind), None if w_hr is None else w_hr.to(kind)
    bias = None if hidden_bias is None else hidden_bias.to(kind)
    b, first, start, length = _lanes(p, batch, base, lengths, ids, xp.device)
    warmup = 0 if h_init is not None else p.warmup

    if h_init is None:
        from_h0 = first <= warmup
        h = _mask(from_h0, h0[b], torch.zeros_like(h0[b])).to(kind)
        c = _mask(from_h0, c0[b], torch.zeros_like(c0[b])).to(kind)
    else:
        h, c = h_init.to(kind), h0.new_zeros(len(b), hidden).to(kind) if c_init is None else c_init.to(kind)
    h_start, c_start, decay = h, c, _no_decay(cell, len(b), hidden, h)
    rows, hs, cs, kept = [], [], [], []
    skipped = max(0, warmup - (p.lanes() - 1) * p.stride)  # before every lane's time 0
    for s in range(skipped, warmup + p.stride) if xp.shape[0] and len(b) else ():
        t = first - warmup + s
        live = (t >= 0) & (t < length)
        row = torch.where(live, start + t * p.step, 0)
        if s == warmup:
            h_start, c_start = h, c
        fresh = None if resets is None else resets[row] & live
        h, c = _zeroed(fresh, h, c)
        x = _mask(live, xp[row], torch.zeros_like(xp[row])).to(
            kind
        )  # no NaN of another row, not even times a gradient of 0
        h_new, c_new, keep = cell.step(x, _with_bias(h @ weight.T, bias, cell), h, c, p.cap)
        h_new = h_new if project is None else h_new @ project.T
        h, c = _mask(live, h_new.to(xp.dtype).to(kind), h), _mask(live, c_new, c)
        if s >= warmup:
            rows.append(torch.where(live, row, xp.shape[0]))
            hs.append(h), cs.append(c)
            if save and cell.saved:
                kept.append(torch.cat(keep, 1))
            if borders and cell.forgets is not None:
                (decay,) = _zeroed(fresh, _mask(live, decay * keep[cell.forgets], decay))

    n = xp.shape[0]
    y = xp.new_zeros(n, w_hh.shape[1]) if out is None else out.y
    cells = xp.new_zeros(n, hidden, dtype=kind) if out is None or not out.cells.numel() else out.cells
    saved = xp.new_zeros(n, cell.saved * hidden) if out is None or not out.saved.numel() else out.saved
    c_n = c0 if out is None else out.c_n
    if rows:
        where = torch.stack(rows)
        y = _place(hs, where, y)
        cells = _place(cs, where, cells) if cell.has_cell else cells
        saved = _place(kept, where, saved) if kept else saved
    last, used = row_base(p, batch, base, xp.device), row_length(p, batch, lengths, xp.device)
    last, has = torch.where(used > 0, last + (used - 1) * p.step, 0), (used > 0)
    h_n = _mask(has, y[last], h0) if n else h0.clone()
    empty, ends = xp.new_empty(0), [xp.new_empty(0)] * 5
    if cell.has_cell and n:  # the lanes that reach a row's last time
        ending = (first < length) & (first + p.stride >= length)
        c_n = _place([c], torch.where(ending, b, batch)[None], c_n)
    if borders:
        ends = [h_start, c_start, h, c, decay]
        if ids is not None:
            ends = _among(ids, ends, p.lanes() * batch, None if out is None else out[5:])
    return Output(
        y,
        saved if save and cell.saved else empty,
        cells if save and cell.has_cell else empty,
        h_n,
        c_n if cell.has_cell else empty,
        *ends,
    )


def backward(
    inputs: BackwardInputs,
    p: Problem,
    borders: bool = False,
    ids: Tensor | None = None,
    dh_init: Tensor | None = None,
    dc_init: Tensor | None = None,
    out: Adjoint | None = None,
) -> Adjoint:
    """The adjoint recursion on lanes in reverse time over saved states: lane j starts `warmup` steps after its stretch ends, from a
    zero adjoint (from dh_n, dc_n at a row's last time). Exact for one lane a row. Arguments as in `forward`."""
    dy, dh_n, dc_n, y, saved, cells, w_hh, w_hr, h0, c0, base, lengths, resets = inputs
    kind, cell = arithmetic(y.dtype), p.spec
    batch, n, width = dh_n.shape[0], y.shape[0], w_hh.shape[0]
    hidden = width // cell.gates
    clamp = p.cap if p.cap == 1 else float(torch.tensor(p.cap, dtype=y.dtype))  # as the saved gate was rounded
    dc_n = dh_n.new_zeros(batch, hidden) if dc_n is None else dc_n
    weight, project = w_hh.to(kind), None if w_hr is None else w_hr.to(kind)
    b, first, start, length = _lanes(p, batch, base, lengths, ids, y.device)
    warmup = 0 if dh_init is not None else p.warmup

    if dh_init is None:
        from_end = first + p.stride + warmup >= length
        dh = _mask(from_end, dh_n[b], torch.zeros_like(dh_n[b])).to(kind)
        dc = _mask(from_end, dc_n[b], torch.zeros_like(dc_n[b])).to(kind)
    else:
        dh, dc = dh_init.to(kind), dh_n.new_zeros(len(b), hidden).to(kind) if dc_init is None else dc_init.to(kind)
    dh_start, dc_start, decay = dh, dc, _no_decay(cell, len(b), hidden, dh)
    rows, dzs, dhs = [], [], []
    for s in range(warmup + p.stride) if n and len(b) else ():
        t = first + p.stride + warmup - 1 - s
        live = t < length
        row = torch.where(live, start + t * p.step, 0)
        if s == warmup:
            dh_start, dc_start = dh, dc
        total = dh if dy is None else dh + dy[row].to(kind)
        dm = total if project is None else total @ project
        earlier = torch.where(live & (t > 0), row - p.step, 0)
        h = c = h_before = c_before = NOTHING.h
        if cell.has_cell:
            c, c_before = cells[row], _mask(t > 0, cells[earlier], c0[b].to(kind))
        if cell.h_after:
            h = y[row].to(kind)
        if cell.carries:
            h_before = _mask(t > 0, y[earlier], h0[b]).to(kind)
        fresh = None if resets is None else resets[row] & live
        h_before, c_before = _zeroed(fresh, h_before, c_before)
        kept = saved[row].to(kind) if cell.saved else NOTHING.h
        dz, carried = cell.vjp(dm, dc, kept, State(h, c), State(h_before, c_before), clamp)
        dc = _mask(live, carried.c, dc) if cell.has_cell else dc
        dh_new = cell.hidden(dz, kept) @ weight
        dh = _mask(live, dh_new + carried.h if cell.carries else dh_new, dh)
        if s >= warmup:
            rows.append(torch.where(live, row, n))
            dzs.append(dz), dhs.append(total)
            if borders and decay.numel():
                (decay,) = _zeroed(fresh, _mask(live, decay * cell.forget_gate(kept), decay))
        dh, dc = _zeroed(fresh, dh, dc)

    zs = y.new_zeros(n, width) if out is None else out.dz
    whole = y.new_zeros(n, w_hh.shape[1]) if out is None else out.dh
    dh0, dc0 = (dh_n, dc_n) if out is None else (out.dh0, out.dc0)
    if rows:
        where = torch.stack(rows)
        zs = _place(dzs, where, zs)
        whole = _place(dhs, where, whole) if w_hr is not None else whole
        opening = torch.where((first == 0) & (length > 0), b, batch)[None]
        dh0, dc0 = _place([dh], opening, dh0), _place([dc], opening, dc0) if cell.has_cell else dc0
    empty, ends = y.new_empty(0), [y.new_empty(0)] * 5
    if borders:
        ends = [dh_start, dc_start, dh, dc, decay]
        if ids is not None:
            ends = _among(ids, ends, p.lanes() * batch, None if out is None else out[4:])
    return Adjoint(zs, whole if w_hr is not None else empty, dh0, dc0 if cell.has_cell else empty, *ends)


def ends(inputs: Inputs, p: Problem, h_init: Tensor, c_init: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where rows end that start from `h_init` (B, P) and `c_init` (B, H), in the arithmetic's dtype: h_end, and c_end of cells that have
    c, else empty. Rows run whole; they may share their times of xp, for no output is stored but the ends. h0 and c0 are not read."""
    out = forward(inputs._replace(h0=h_init, c0=c_init), p.whole(), False, True, h_init=h_init, c_init=c_init)
    return out.h_end, out.c_end if p.spec.has_cell else h_init.new_empty(0)


def adjoint_ends(inputs: BackwardInputs, p: Problem, dh_init: Tensor, dc_init: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `ends`, of the adjoints in reverse time: of the states before each row's time 0. `dy` may be None, which stands for zeros; dh_n
    and dc_n are not read, h0 and c0 are."""
    given = inputs._replace(dh_n=dh_init, dc_n=dc_init)
    out = backward(given, p.whole(), True, dh_init=dh_init, dc_init=dc_init)
    return out.dh_end, out.dc_end if p.spec.has_cell else dh_init.new_empty(0)


def windowed_backward(inputs: WindowedInputs, p: Problem, group: int = 4096) -> tuple[Tensor | None, ...]:
    """The true gradient of windows (stride 1) in xp, the weights, h0 and c0: `group` lanes at a time run again and go back."""
    dy, dh_n, dc_n, *differentiable, base, lengths, resets = inputs
    xp, h0, c0 = inputs.xp, inputs.h0, inputs.c0
    batch, n = h0.shape[0], xp.shape[0]
    wanted = [x for x in differentiable if x is not None]
    used = row_length(p, batch, lengths, xp.device)
    last = torch.where(used > 0, row_base(p, batch, base, xp.device) + (used - 1) * p.step, n)
    grads = [dy + _place([dh_n], last[None], torch.zeros_like(dy))]  # the final state is the output of the last window
    if c0 is not None:
        grads.append(_place([dc_n], last[None], xp.new_zeros(n, c0.shape[1], dtype=arithmetic(xp.dtype))))

    def states(ids: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        moved = (None if x is None else next(left) for x in differentiable)
        out = forward(Inputs(*moved, base, lengths, resets), p, ids=ids)
        return (out.y,) if c0 is None else (out.y, out.cells)

    total = [torch.zeros_like(x) for x in wanted]
    for ids in torch.arange(p.lanes() * batch, device=xp.device).split(group) if n else ():
        _, back = torch.func.vjp(partial(states, ids), *wanted)
        total = [a + b for a, b in zip(total, back(tuple(grads)), strict=True)]
    found, none = iter(total), used == 0
    *weights, dh0, dc0 = (None if x is None else next(found) for x in differentiable)
    dh0 = dh0 + _mask(none, dh_n, torch.zeros_like(dh_n))
    dc0 = None if dc0 is None else dc0 + _mask(none, dc_n, torch.zeros_like(dc_n))
    return *weights, dh0, dc0


def gradients(inputs: WindowedInputs, p: Problem) -> tuple[Tensor | None, ...]:
    """Gradients in xp, the weights, h0 and c0 as a differentiable function of everything: what double backward runs.

    Windows: the derivative of the windowed function. Else the adjoint rule of `backward`; a checked or scanned plan stands for the
    whole recurrence, which it equals to its tolerance, or to rounding."""
    if p.windowed:
        return windowed_backward(inputs, p)
    p = p.differentiable()
    given = inputs.inputs
    out = forward(given, p)
    adjoint = backward(backward_inputs(inputs.dy, inputs.dh_n, inputs.dc_n, out.y, out.saved, out.cells, given, p), p)
    weights = weight_gradients(Needs(), adjoint, out.y, out.saved, out.cells, given, p)
    return adjoint.dz, *weights, adjoint.dh0, adjoint.dc0 if given.c0 is not None else None


scans = Scanned(reference_scan.scan, reference_scan.scan_backward, arithmetic, arithmetic)
scanned_forward, scanned_backward = scans.forward, scans.backward


takes_resets = False  # it does, and pieces take fewer steps of Python
in_place = False


def can_run(p: Problem | None, x: Tensor, w_hh: Tensor | None = None, w_hr: Tensor | None = None) -> tuple[bool, str]:
    return True, "plain torch, any dtype and device"
