"""The linear scans of a cascade's group in Triton: s[t] = a[t] s[t-1] + b[t] for every sequence and unit (see `scanned.py`).

A program has TIMES times of a sequence by UNITS units. `*_totals` makes of each such chunk one map s -> a s + b; `starts` runs over the
chunks of a sequence, few numbers; `forward` and `backward` scan the maps of the chunk once more, each time's shifted by one so that a time
gets the state before it, and take the step. A cell that keeps nothing of its own needs the last only. No chunk depends on how many
sequences there are. Per unit and step: the gates' arithmetic three times, xp and sums from memory twice, outputs once.

Times are counted as the recurrence visits them: backward from a sequence's end. A time before which a reset stands has a = 0, and in the
backward pass b = 0.
"""

import triton
import triton.language as tl

from .triton_cells import CARRIES, FORGETS, GATES, HAS_CELL, SAVED, forget, hidden, step, sums, vjp
from .triton_parts import begins_anew, columns, load, store_columns

NUMBERS = ("unit0", "units", "steps", "batch", "step_rows", "chunks")  # no value of these compiles anything anew


@triton.jit
def then(a, b, next_a, next_b):
    """One map after another."""
    return a * next_a, next_a * b + next_b


@triton.jit
def then_anew(a, b, next_a, next_b):
    """The same; a map of a = 0 forgets a NaN too."""
    return tl.where(next_a == 0, 0.0, a * next_a), applied(next_a, next_b, b, True)


@triton.jit
def applied(a, b, s, ANEW: tl.constexpr):
    """a s + b; where there are resets, b for a = 0 whatever s is."""
    moved = a * s + b
    if ANEW:
        moved = tl.where(a == 0, b, moved)
    return moved


@triton.jit
def joined(a, b, ANEW: tl.constexpr):
    """The maps (TIMES, UNITS) up to each time as one."""
    if ANEW:
        a, b = tl.associative_scan((a, b), 0, then_anew)
    else:
        a, b = tl.associative_scan((a, b), 0, then)
    return a, b


@triton.jit
def place(base, lengths, unit0, units, steps, batch, step_rows, TIMES: tl.constexpr, UNITS: tl.constexpr):
    """A program's sequence and chunk; buffer row of its time 0, its length; columns of its units, and which there are."""
    b = (tl.program_id(1) % batch).to(tl.int64)
    unit = tl.program_id(1) // batch * UNITS + tl.arange(0, UNITS)[None, :]
    origin = b
    if base is not None:
        origin = tl.load(base + b)
    elif step_rows < 0:
        origin = b + (steps - 1).to(tl.int64) * batch
    length = steps.to(tl.int64)
    if lengths is not None:
        length = tl.load(lengths + b)
    time = tl.program_id(0).to(tl.int64) * TIMES + tl.arange(0, TIMES)[:, None]
    return b, origin, length, time, unit0 + unit, unit, unit < units


@triton.jit
def fresh(resets, row, live):
    """Whether a reset stands before each time (TIMES, UNITS)."""
    return begins_anew(resets, row + tl.zeros(live.shape, tl.int64), live)


@triton.jit
def gates_of(xp, q, hidden_bias, row, column, unit, units, live, H: tl.constexpr, CELL: tl.constexpr):
    """x of each gate, and the sums as a cell's `step` takes them."""
    gates: tl.constexpr = GATES(CELL)
    x = columns(xp + row * (gates * H) + column, H, live, gates)
    z = sums(x, hidden_bias, column, live, CELL)
    if q is not None:
        more = columns(q + (row * units + unit) * gates, 1, live, gates)
        added = (z[0] + more[0],)
        for gate in tl.static_range(1, gates):
            added = added + (z[gate] + more[gate],)
        z = added
    return x, z


@triton.jit
def forward_maps(xp, q, hidden_bias, resets, row, column, unit, units, cap, live, H: tl.constexpr, CELL: tl.constexpr):
    """a and b of each time; the identity where it is not live."""
    x, z = gates_of(xp, q, hidden_bias, row, column, unit, units, live, H, CELL)
    zero = tl.zeros_like(z[0])
    h, c = step(z, x, zero, zero, cap, None, None, row, row, live, H, CELL)
    b = h
    if HAS_CELL(CELL):
        b = c
    a = tl.where(fresh(resets, row, live), 0.0, forget(z, cap, CELL))
    return tl.where(live, a, 1.0), tl.where(live, b, 0.0)


@triton.jit
def backward_maps(
    dy, q, dh_n, cap, y, saved, cells, h0, c0, resets, time, used, origin, column, unit, units, b, step_rows, live,
    H: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    """As `forward_maps`, of what a step hands to the state before it."""
    kept: tl.constexpr = SAVED(CELL)
    t = used - 1 - time
    row = origin + t * step_rows
    reads = live & ~fresh(resets, row, live)
    dh = adjoint_of_h(dy, q, dh_n, row, time, column, unit, units, b, live, H)
    _, carried, dc = vjp(
        dh, tl.zeros_like(dh), cap, y, saved, cells, h0, c0, row * (kept * H) + column, row * H + column,
        (row - step_rows) * H + column, b * H + column, live, reads & (t > 0), reads & (t == 0), H, CELL,
    )  # fmt: skip
    if HAS_CELL(CELL):
        carried = dc
    a = load(saved + (row * kept + FORGETS(CELL)) * H + column, reads)
    return tl.where(live, a, 1.0), tl.where(reads, carried, 0.0)


@triton.jit
def adjoint_of_h(dy, q, dh_n, row, time, column, unit, units, b, live, H: tl.constexpr):
    """dh of each time but for what its own unit hands on."""
    dh = load(dy + row * H + column, live)
    if q is not None:
        dh += load(q + row * units + unit, live)
    return dh + load(dh_n + b * H + column, live & (time == 0))


@triton.jit
def total(a, b, at_a, at_b, there, ANEW: tl.constexpr):
    """Stores the map of all times together."""
    a, b = joined(a, b, ANEW)
    last = tl.arange(0, a.shape[0])[:, None] == a.shape[0] - 1
    tl.store(at_a, tl.sum(tl.where(last, a, 0.0), 0)[None, :], mask=there)
    tl.store(at_b, tl.sum(tl.where(last, b, 0.0), 0)[None, :], mask=there)


@triton.jit(do_not_specialize=NUMBERS)
def forward_totals(
    xp, q, hidden_bias, base, lengths, resets, maps, cap, unit0, units, steps, batch, step_rows, chunks,
    H: tl.constexpr, TIMES: tl.constexpr, UNITS: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    b, origin, length, time, column, unit, there = place(
        base, lengths, unit0, units, steps, batch, step_rows, TIMES, UNITS
    )
    live = there & (time < length)
    a, s = forward_maps(
        xp, q, hidden_bias, resets, origin + time * step_rows, column, unit, units, cap, live, H, CELL
    )  # fmt: skip
    at = maps + ((b * chunks + tl.program_id(0)) * 2) * units + unit
    total(a, s, at, at + units, there, resets is not None)


@triton.jit(do_not_specialize=NUMBERS)
def backward_totals(
    dy, q, dh_n, y, saved, cells, h0, c0, base, lengths, resets, maps, cap, unit0, units, steps, batch, step_rows, chunks,
    H: tl.constexpr, TIMES: tl.constexpr, UNITS: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    b, origin, length, time, column, unit, there = place(
        base, lengths, unit0, units, steps, batch, step_rows, TIMES, UNITS
    )
    a, s = backward_maps(
        dy, q, dh_n, cap, y, saved, cells, h0, c0, resets, time, length, origin, column, unit, units, b, step_rows,
        there & (time < length), H, CELL,
    )  # fmt: skip
    at = maps + ((b * chunks + tl.program_id(0)) * 2) * units + unit
    total(a, s, at, at + units, there, resets is not None)


@triton.jit(do_not_specialize=NUMBERS)
def starts(
    state, resets, maps, unit0, units, batch, chunks, H: tl.constexpr, TIMES: tl.constexpr, UNITS: tl.constexpr
):  # fmt: skip
    """The state at the start of each chunk, in the place of its a; from `state` (B, H), or zeros."""
    b = (tl.program_id(0) % batch).to(tl.int64)
    unit = tl.program_id(0) // batch * UNITS + tl.arange(0, UNITS)[None, :]
    there = unit < units
    s = tl.zeros((1, UNITS), tl.float32)
    if state is not None:
        s = load(state + b * H + unit0 + unit, there)
    for first in range(0, chunks, TIMES):
        chunk = first + tl.arange(0, TIMES)[:, None]
        live = there & (chunk < chunks)
        at = maps + ((b * chunks + chunk) * 2) * units + unit
        earlier = live & (chunk > first)  # each chunk's map is that of the one before
        a = tl.load(at - 2 * units, mask=earlier, other=1.0)
        m = tl.load(at - units, mask=earlier, other=0.0)
        last = there & (0 * unit + (first + TIMES) <= chunks)
        at_last = maps + ((b * chunks + first + TIMES - 1) * 2) * units + unit
        last_a, last_m = tl.load(at_last, mask=last, other=1.0), tl.load(at_last + units, mask=last, other=0.0)
        a, m = joined(a, m, resets is not None)
        found = applied(a, m, s, resets is not None)
        tl.debug_barrier()  # whoever holds a map has read it before one writes
        tl.store(at, found, mask=live)
        final = tl.arange(0, TIMES)[:, None] == TIMES - 1
        s = applied(last_a, last_m, tl.sum(tl.where(final, found, 0.0), 0)[None, :], resets is not None)


@triton.jit
def before_each(a, m, start, ANEW: tl.constexpr):
    """The states before the times whose maps are those one time earlier."""
    a, m = joined(a, m, ANEW)
    return applied(a, m, start, ANEW)


@triton.jit(do_not_specialize=NUMBERS)
def forward(
    xp, q, hidden_bias, h0, c0, base, lengths, resets, maps, y, h_n, c_n, saved, cells, before,
    cap, unit0, units, steps, batch, step_rows, chunks,
    H: tl.constexpr, TIMES: tl.constexpr, UNITS: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    b, origin, length, time, column, unit, there = place(
        base, lengths, unit0, units, steps, batch, step_rows, TIMES, UNITS
    )
    has_cell: tl.constexpr = HAS_CELL(CELL)
    kept: tl.constexpr = SAVED(CELL)
    row, live = origin + time * step_rows, there & (time < length)
    first = tl.arange(0, TIMES)[:, None] == 0
    state = tl.zeros((TIMES, UNITS), tl.float32)
    if maps is not None:
        a, m = forward_maps(
            xp, q, hidden_bias, resets, row - step_rows, column, unit, units, cap, live & ~first, H, CELL
        )  # fmt: skip
        start = tl.load(maps + ((b * chunks + tl.program_id(0)) * 2) * units + unit, mask=there, other=0.0)
        state = before_each(a, m, start, resets is not None)
    anew = fresh(resets, row, live)
    state = tl.where(anew, 0.0, state)
    x, z = gates_of(xp, q, hidden_bias, row, column, unit, units, live, H, CELL)
    h, c = step(z, x, state, state, cap, saved, cells, row * (kept * H) + column, row * H + column, live, H, CELL)
    h = h.to(y.dtype.element_ty)
    tl.store(y + row * H + column, h, mask=live)
    later = live & (time < length - 1)
    tl.store(before + (row + step_rows) * H + column, h, mask=later & ~fresh(resets, row + step_rows, later))
    tl.store(h_n + b * H + column + 0 * time, h, mask=live & (time == length - 1))
    opens, none = live & (time == 0), there & (time == 0) & (time >= length)
    h_first = tl.load(h0 + b * H + column + 0 * time, mask=there & (time == 0), other=0.0)
    tl.store(before + row * H + column, h_first, mask=opens & ~anew)
    tl.store(h_n + b * H + column + 0 * time, h_first, mask=none)
    if has_cell:
        tl.store(c_n + b * H + column + 0 * time, c, mask=live & (time == length - 1))
        c_first = tl.load(c0 + b * H + column + 0 * time, mask=none, other=0.0)
        tl.store(c_n + b * H + column + 0 * time, c_first, mask=none)


@triton.jit(do_not_specialize=NUMBERS)
def backward(
    dy, q, dh_n, dc_n, y, saved, cells, h0, c0, base, lengths, resets, maps, dz, dh0, dc0, after,
    cap, unit0, units, steps, batch, step_rows, chunks,
    H: tl.constexpr, TIMES: tl.constexpr, UNITS: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    b, origin, length, time, column, unit, there = place(
        base, lengths, unit0, units, steps, batch, step_rows, TIMES, UNITS
    )
    gates: tl.constexpr = GATES(CELL)
    kept: tl.constexpr = SAVED(CELL)
    t = length - 1 - time
    row, live = origin + t * step_rows, there & (time < length)
    first = tl.arange(0, TIMES)[:, None] == 0
    state = tl.zeros((TIMES, UNITS), tl.float32)
    if maps is not None:
        a, m = backward_maps(
            dy, q, dh_n, cap, y, saved, cells, h0, c0, resets, time - 1, length, origin, column, unit, units, b, step_rows,
            live & ~first, H, CELL,
        )  # fmt: skip
        start = tl.load(maps + ((b * chunks + tl.program_id(0)) * 2) * units + unit, mask=there, other=0.0)
        state = before_each(a, m, start, resets is not None)
    anew = fresh(resets, row, live)
    reads = live & ~anew
    dh = adjoint_of_h(dy, q, dh_n, row, time, column, unit, units, b, live, H)
    if CARRIES(CELL):
        dh += state
    zs, carried, dc = vjp(
        dh, state, cap, y, saved, cells, h0, c0, row * (kept * H) + column, row * H + column,
        (row - step_rows) * H + column, b * H + column, live, reads & (t > 0), reads & (t == 0), H, CELL,
    )  # fmt: skip
    store_columns(dz, row * (gates * H) + column, H, zs, live, gates)
    dq = hidden(zs, saved, row * (kept * H) + column, live, H, CELL)
    store_columns(after, ((row - step_rows) * H + column) * gates, 1, dq, reads & (t > 0), gates)
    if HAS_CELL(CELL):
        none = there & (time == 0) & (time >= length)
        tl.store(dc0 + b * H + column + 0 * time, tl.where(anew, 0.0, dc), mask=live & (t == 0))
        tl.store(dc0 + b * H + column + 0 * time, tl.load(dc_n + b * H + column + 0 * time, mask=none), mask=none)
    if CARRIES(CELL):
        tl.store(dh0 + b * H + column + 0 * time, tl.where(anew, 0.0, carried), mask=live & (t == 0))
