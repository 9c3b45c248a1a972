"""Recurrence kernels in Triton for small H: a program runs a tile of lanes through all their steps, and everything stays on chip.

H units are padded to UNITS, a power of two. A program holds W_hh, loaded once, and the state of its LANES lanes in registers; lanes that
have ended keep their state. Per lane and step: 2 G UNITS^2 operations (G = 1 or 4 gates); G H elements read and H written, backward
G H + 2 H read and G H written, each of the saved gates and cells once more.
"""

import triton
import triton.language as tl

from .triton_cells import FORGETS, GATES, HAS_CELL, SAVED, forget, hidden, sums, vjp
from .triton_cells import step as cell_step
from .triton_parts import (
    backward_run,
    begins_anew,
    cast,
    columns,
    forward_run,
    keep,
    load,
    products,
    start,
    store_columns,
)

NUMBERS = ("count", "steps", "batch", "step", "stride", "warmup")  # no value of these compiles anything anew


@triton.jit(do_not_specialize=NUMBERS)
def forward(
    xp,
    w_hh,
    h0,
    c0,
    h_init,
    c_init,
    base,
    lengths,
    resets,
    ids,
    y,
    h_n,
    c_n,
    saved,
    cells,
    h_start,
    c_start,
    h_end,
    c_end,
    decay,
    cap,
    count,
    steps,
    batch,
    step,
    stride,
    warmup,
    H: tl.constexpr,
    UNITS: tl.constexpr,
    LANES: tl.constexpr,
    CELL: tl.constexpr,
    PRECISION: tl.constexpr,
    hidden_bias=None,
):
    entry = (tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES))[
        :, None
    ]  # (LANES, 1), as all that belongs to a lane
    id, b, first, n, warm, given, last = forward_run(
        entry, count, ids, base, lengths, steps, batch, step, stride, warmup, h_init
    )
    unit, k = tl.arange(0, UNITS)[None, :], tl.arange(0, UNITS)[:, None]
    there = (unit < H) & (entry < count)  # (LANES, UNITS)
    gates: tl.constexpr = GATES(CELL)
    has_cell: tl.constexpr = HAS_CELL(CELL)
    kept: tl.constexpr = SAVED(CELL)
    w = columns(w_hh + unit * H + k, H * H, (unit < H) & (k < H), gates)  # (k, unit)
    h = start(h0, h_init, b * H + unit, entry * H + unit, given, there)
    c = h
    if has_cell:
        c = start(c0, c_init, b * H + unit, entry * H + unit, given, there)
    product = tl.full((LANES, UNITS), 1.0, tl.float32)  # of the forget gates
    x = columns(xp + first * (gates * H) + unit, H, there & (n > 0), gates)
    anew = begins_anew(resets, first, n > 0)
    for s in range(0, tl.max(n).to(tl.int32)):
        row = first + s * step.to(tl.int64)
        later = columns(
            xp + (row + step) * (gates * H) + unit, H, there & (s < n - 1), gates
        )  # of the next step, on their way meanwhile
        anew_later = begins_anew(resets, row + step, s < n - 1)
        live = there & (s < n)
        begins, writes = live & (s == warm), live & (s >= warm)
        keep(h_start, id * H + unit, h, begins)
        if has_cell:
            keep(c_start, id * H + unit, c, begins)
        h, c = tl.where(anew, 0.0, h), tl.where(anew, 0.0, c)
        before = h.to(w_hh.dtype.element_ty)
        z = products(before, w, sums(x, hidden_bias, unit, unit < H, CELL), PRECISION, gates)
        h_new, c_new = cell_step(
            z, x, h, c, cap, saved, cells, row * (kept * H) + unit, row * H + unit, writes, H, CELL
        )
        if decay is not None:
            product = tl.where(writes, tl.where(anew, 0.0, product * forget(z, cap, CELL)), product)
        if has_cell:
            c = tl.where(live, c_new, c)
        h_new = h_new.to(w_hh.dtype.element_ty)
        keep(y, row * H + unit, h_new, writes)
        h = tl.where(live, h_new.to(tl.float32), h)
        x, anew = later, anew_later
    keep(h_end, id * H + unit, h, there & (n > 0))
    keep(h_n, b * H + unit, h, there & last)
    keep(decay, id * H + unit, product, there & (n > 0))
    if has_cell:
        keep(c_end, id * H + unit, c, there & (n > 0))
        keep(c_n, b * H + unit, c, there & last)


@triton.jit(do_not_specialize=NUMBERS)
def backward(
    dy,
    y,
    saved,
    cells,
    w_hh,
    c0,
    dh_n,
    dc_n,
    dh_init,
    dc_init,
    base,
    lengths,
    resets,
    ids,
    dz,
    dh0,
    dc0,
    dh_start,
    dc_start,
    dh_end,
    dc_end,
    decay,
    cap,
    count,
    steps,
    batch,
    step,
    stride,
    warmup,
    H: tl.constexpr,
    UNITS: tl.constexpr,
    LANES: tl.constexpr,
    CELL: tl.constexpr,
    PRECISION: tl.constexpr,
    h0=None,
):
    entry = (tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES))[:, None]
    id, b, first, n, warm, given, last = backward_run(
        entry, count, ids, base, lengths, steps, batch, step, stride, warmup, dh_init
    )
    unit, k = tl.arange(0, UNITS)[None, :], tl.arange(0, UNITS)[:, None]
    there = (unit < H) & (entry < count)
    gates: tl.constexpr = GATES(CELL)
    has_cell: tl.constexpr = HAS_CELL(CELL)
    kept: tl.constexpr = SAVED(CELL)
    w = columns(w_hh + k * H + unit, H * H, (unit < H) & (k < H), gates)  # (unit of the gate, unit)
    dh = start(dh_n, dh_init, b * H + unit, entry * H + unit, given, there)
    dc = dh
    if has_cell:
        dc = start(dc_n, dc_init, b * H + unit, entry * H + unit, given, there)
    product = tl.full((LANES, UNITS), 1.0, tl.float32)  # of the forget gates
    anew = begins_anew(resets, first, n > 0)
    for s in range(0, tl.max(n).to(tl.int32)):
        row = first - s * step.to(tl.int64)
        anew_later = begins_anew(resets, row - step, s < n - 1)  # of the next step, on its way meanwhile
        live = there & (s < n)
        begins, writes = live & (s == warm), live & (s >= warm)
        keep(dh_start, id * H + unit, dh, begins)
        total = dh
        if dy is not None:
            total += load(dy + row * H + unit, live)
        if has_cell:
            keep(dc_start, id * H + unit, dc, begins)
        at, at_cell = row * (kept * H) + unit, row * H + unit
        opens, reads = last & (s == n - 1), live & ~anew  # time 0; there is a state before
        dz_new, carried, dc_new = vjp(
            total,
            dc,
            cap,
            y,
            saved,
            cells,
            h0,
            c0,
            at,
            at_cell,
            (row - step) * H + unit,
            b * H + unit,
            live,
            reads & ~opens,
            reads & opens,
            H,
            CELL,
        )
        dq = cast(hidden(dz_new, saved, at, live, H, CELL), w_hh.dtype.element_ty, gates)
        store_columns(dz, row * (gates * H) + unit, H, cast(dz_new, w_hh.dtype.element_ty, gates), writes, gates)
        if decay is not None:
            f = load(saved + at + FORGETS(CELL) * H, writes)
            product = tl.where(writes, tl.where(anew, 0.0, product * f), product)
        for gate in tl.static_range(gates):
            carried = tl.dot(dq[gate], w[gate], carried, input_precision=PRECISION)
        if has_cell:
            dc = tl.where(live, tl.where(anew, 0.0, dc_new), dc)
        dh = tl.where(live, tl.where(anew, 0.0, carried), dh)
        anew = anew_later
    keep(dh_end, id * H + unit, dh, there & (n > 0))
    keep(dh0, b * H + unit, dh, there & last)
    keep(decay, id * H + unit, product, there & (n > 0))
    if has_cell:
        keep(dc_end, id * H + unit, dc, there & (n > 0))
        keep(dc0, b * H + unit, dc, there & last)
