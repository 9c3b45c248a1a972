"""Recurrence kernels in Triton for any H: W_hh is streamed from L2 at every step, by a team of programs for each tile of LANES lanes.

A member of a team takes every `members`-th block of UNITS hidden units, with all gates of a unit, so that the cell's update is its own. The
team exchanges the state (forward h, backward dz, in the storage type) through two planes of global memory, of which each step reads one
and writes the other (so are the cells kept), and meets in between: one program by a barrier of its threads, several by a counter in L2. The
number of members changes no sum: each product runs over INNER units at a time, in ascending order.

A launch does the steps [begin, end), after the start where begin < 0: all of them in one launch where programs may wait for each other,
else the start and each step in launches of their own.

Per lane and step: 2 G H^2 operations (G = 1 or 4 gates), and beside the tensors of `triton_small.py` 2 H elements of state (backward
2 G H) and 2 H of the cell. W is read once per team and step: 2 LANES operations for each element of it.
"""

import triton
import triton.language as tl

from . import triton_small
from .triton_cells import CARRIES, FORGETS, GATES, HAS_CELL, SAVED, forget, hidden, sums, vjp
from .triton_cells import step as cell_step
from .triton_parts import (
    backward_run,
    begins_anew,
    columns,
    forward_run,
    keep,
    load,
    meet,
    multiply_decay,
    start,
    store_columns,
    streamed_products,
)

NUMBERS = (*triton_small.NUMBERS, "members", "begin", "end")


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
    h_planes,
    c_planes,
    arrivals,
    cap,
    count,
    steps,
    batch,
    step,
    stride,
    warmup,
    members,
    begin,
    end,
    H: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    CELL: tl.constexpr,
    PRECISION: tl.constexpr,
    ALONE: tl.constexpr,
    hidden_bias=None,
):
    gates: tl.constexpr = GATES(CELL)
    has_cell: tl.constexpr = HAS_CELL(CELL)
    kept: tl.constexpr = SAVED(CELL)
    team, rank, teams = tl.program_id(0) // members, tl.program_id(0) % members, tl.num_programs(0) // members
    lane = tl.arange(0, LANES).to(tl.int64)[:, None]
    place, plane = (team * LANES + lane) * WIDTH, (teams * LANES).to(tl.int64) * WIDTH
    turn, met = tl.maximum(begin, 0), 0  # the parity of `turn` says which plane is read
    for tile in range(team, tl.cdiv(count, LANES), teams):
        if ALONE:
            tl.debug_barrier()  # the plane that the tile begins in was written by the last step of the one before
        entry = tile * LANES + lane  # (LANES, 1), as all that belongs to a lane
        id, b, first, n, warm, given, last = forward_run(
            entry, count, ids, base, lengths, steps, batch, step, stride, warmup, h_init
        )
        if begin < 0:
            for block in range(rank, tl.cdiv(H, UNITS), members):
                unit = block * UNITS + tl.arange(0, UNITS)[None, :]
                there = (unit < H) & (entry < count)
                h = start(h0, h_init, b * H + unit, entry * H + unit, given, there)
                tl.store(h_planes + turn % 2 * plane + place + unit, h, mask=unit < WIDTH)
                keep(h_n, b * H + unit, h, there & last & (n == 0))
                if has_cell:
                    c = start(c0, c_init, b * H + unit, entry * H + unit, given, there)
                    tl.store(c_planes + turn % 2 * plane + place + unit, c, mask=unit < WIDTH)
                    keep(c_n, b * H + unit, c, there & last & (n == 0))
        for s in range(tl.maximum(begin, 0), tl.minimum(end, tl.max(n).to(tl.int32))):
            row = first + s * step.to(tl.int64)
            anew = begins_anew(resets, row, s < n)
            if s > begin:
                met += 1
                meet(arrivals + team, met * members, ALONE)
            now, next = turn % 2 * plane + place, (turn + 1) % 2 * plane + place
            for block in range(rank, tl.cdiv(H, UNITS), members):
                unit = block * UNITS + tl.arange(0, UNITS)[None, :]
                live = (unit < H) & (s < n)
                begins, writes, ends = live & (s == warm), live & (s >= warm), live & (s == n - 1)
                if h_start is not None:
                    keep(h_start, id * H + unit, tl.load(h_planes + now + unit, mask=begins, other=0.0), begins)
                c = 0.0
                if has_cell:
                    c = tl.load(c_planes + now + unit, mask=unit < WIDTH, other=0.0)
                    keep(c_start, id * H + unit, c, begins)
                    c = tl.where(anew, 0.0, c)
                x = columns(xp + row * (gates * H) + unit, H, live, gates)
                z = sums(x, hidden_bias, unit, unit < H, CELL)
                for k0 in range(0, H, INNER):
                    k = k0 + tl.arange(0, INNER)
                    h = tl.load(h_planes + now + k[None, :], mask=(k[None, :] < WIDTH) & ~anew, other=0.0)
                    w, square = w_hh + unit * H + k[:, None], (unit < H) & (k[:, None] < H)
                    z = streamed_products(h, w, H * H, square, z, PRECISION, gates)
                before = load(h_planes + now + unit, (unit < WIDTH) & ~anew)  # read by cells that need it
                h, c = cell_step(
                    z, x, before, c, cap, saved, cells, row * (kept * H) + unit, row * H + unit, writes, H, CELL
                )
                if decay is not None:
                    multiply_decay(
                        decay + id * H + unit, tl.where(anew, 0.0, forget(z, cap, CELL)), ~anew & (s > warm), writes
                    )
                if has_cell:
                    tl.store(c_planes + next + unit, c, mask=unit < WIDTH)
                    keep(c_end, id * H + unit, c, ends)
                    keep(c_n, b * H + unit, c, ends & last)
                h = h.to(w_hh.dtype.element_ty)
                tl.store(h_planes + next + unit, h, mask=unit < WIDTH)
                keep(y, row * H + unit, h, writes)
                keep(h_end, id * H + unit, h, ends)
                keep(h_n, b * H + unit, h, ends & last)
            turn += 1


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
    dz_planes,
    dc_planes,
    arrivals,
    cap,
    count,
    steps,
    batch,
    step,
    stride,
    warmup,
    members,
    begin,
    end,
    H: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    CELL: tl.constexpr,
    PRECISION: tl.constexpr,
    ALONE: tl.constexpr,
    h0=None,
):
    gates: tl.constexpr = GATES(CELL)
    has_cell: tl.constexpr = HAS_CELL(CELL)
    kept: tl.constexpr = SAVED(CELL)
    carries: tl.constexpr = CARRIES(CELL)  # in the planes that other cells have for dc
    team, rank, teams = tl.program_id(0) // members, tl.program_id(0) % members, tl.num_programs(0) // members
    lane = tl.arange(0, LANES).to(tl.int64)[:, None]
    place, plane = (team * LANES + lane) * WIDTH, (teams * LANES).to(tl.int64) * WIDTH
    turn, met = tl.maximum(begin, 0), 0
    for tile in range(team, tl.cdiv(count, LANES), teams):
        if ALONE:
            tl.debug_barrier()  # the plane that the tile begins in was written by the last step of the one before
        entry = tile * LANES + lane
        id, b, first, n, warm, given, last = backward_run(
            entry, count, ids, base, lengths, steps, batch, step, stride, warmup, dh_init
        )
        if has_cell:
            if begin < 0:
                for block in range(rank, tl.cdiv(H, UNITS), members):
                    unit = block * UNITS + tl.arange(0, UNITS)[None, :]
                    dc = start(dc_n, dc_init, b * H + unit, entry * H + unit, given, (unit < H) & (entry < count))
                    tl.store(dc_planes + turn % 2 * plane + place + unit, dc, mask=unit < WIDTH)
        # after its last step a lane only hands on
        for s in range(tl.maximum(begin, 0), tl.minimum(end, tl.max(n).to(tl.int32) + 1)):
            row = first - s * step.to(tl.int64)
            anew = begins_anew(resets, row, s < n)
            ended = begins_anew(resets, row + step, (s > 0) & (s <= n))  # the step before handed nothing on
            if s > begin:
                met += 1
                meet(arrivals + team, met * members, ALONE)
            now, next = turn % 2 * plane + place, (turn + 1) % 2 * plane + place
            for block in range(rank, tl.cdiv(H, UNITS), members):
                unit = block * UNITS + tl.arange(0, UNITS)[None, :]
                there = (unit < H) & (entry < count)
                live, ends = there & (s < n), there & (s == n)
                begins, writes = live & (s == warm), live & (s >= warm)
                if carries:
                    dh = tl.load(dc_planes + now + unit, mask=(unit < WIDTH) & (s > 0), other=0.0)
                else:
                    dh = tl.zeros((LANES, UNITS), tl.float32)
                for k0 in range(0, tl.minimum(s, 1) * H, INNER):  # nothing is carried to step 0
                    k = k0 + tl.arange(0, INNER)
                    z, w = dz_planes + gates * now + k[None, :], w_hh + k[:, None] * H + unit
                    inside, square = k[None, :] < WIDTH, (k[:, None] < H) & (unit < H)
                    for gate in tl.static_range(gates):
                        dh = tl.dot(
                            tl.load(z + gate * WIDTH, mask=inside, other=0.0),
                            tl.load(w + gate * (H * H), mask=square, other=0.0),
                            dh,
                            input_precision=PRECISION,
                        )
                dh = tl.where(ended, 0.0, dh)
                dh += start(dh_n, dh_init, b * H + unit, entry * H + unit, given, there & (s == 0))
                keep(dh_start, id * H + unit, dh, begins)
                keep(dh_end, id * H + unit, dh, ends & (n > 0))
                keep(dh0, b * H + unit, dh, ends & last)
                total = dh
                if dy is not None:
                    total += load(dy + row * H + unit, live)
                dc = 0.0
                if has_cell:
                    dc = tl.load(dc_planes + now + unit, mask=(unit < WIDTH) & ~ended, other=0.0)
                    keep(dc_start, id * H + unit, dc, begins)
                    keep(dc_end, id * H + unit, dc, ends & (n > 0))
                    keep(dc0, b * H + unit, dc, ends & last)
                at, at_cell = row * (kept * H) + unit, row * H + unit
                opens, reads = last & (s == n - 1), live & ~anew  # time 0; there is a state before
                dz_new, carried, dc = vjp(
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
                if decay is not None:
                    f = load(saved + at + FORGETS(CELL) * H, writes)
                    multiply_decay(decay + id * H + unit, tl.where(anew, 0.0, f), ~anew & (s > warm), writes)
                if carries:
                    tl.store(dc_planes + next + unit, carried, mask=unit < WIDTH)
                if has_cell:
                    tl.store(dc_planes + next + unit, dc, mask=unit < WIDTH)
                dq = hidden(dz_new, saved, at, live, H, CELL)
                store_columns(dz_planes, gates * next + unit, WIDTH, dq, unit < WIDTH, gates)
                store_columns(dz, row * (gates * H) + unit, H, dz_new, writes, gates)
            turn += 1
