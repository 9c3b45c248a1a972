"""Recurrence kernels in Triton for small H: a program runs a tile of lanes through all their steps, and everything stays on chip.

H units are padded to UNITS, a power of two. A program holds W_hh, loaded once, and the state of its LANES lanes in registers; lanes that
have ended keep their state. Per lane and step: 2 G UNITS^2 operations (G = 1 or 4 gates); G H elements read and H written, backward
G H + 2 H read and G H written, each of the saved gates and cells once more.
"""
import triton
import triton.language as tl

from .triton_parts import backward_run, forward_run, keep, load, lstm_step, lstm_vjp, rnn_step, rnn_vjp, start

NUMBERS = ("count", "steps", "batch", "step", "stride", "warmup")  # no value of these compiles anything anew


@triton.jit
def inputs(x, mask, H: tl.constexpr, CELL: tl.constexpr):
    """The input projection of every gate, in the storage type; the RNN's only one is the first."""
    xi = tl.load(x, mask=mask, other=0.0)
    xf, xg, xo = xi, xi, xi
    if CELL == "lstm":
        xf = tl.load(x + H, mask=mask, other=0.0)
        xg = tl.load(x + 2 * H, mask=mask, other=0.0)
        xo = tl.load(x + 3 * H, mask=mask, other=0.0)
    return xi, xf, xg, xo


@triton.jit(do_not_specialize=NUMBERS)
def forward(xp, w_hh, h0, c0, h_init, c_init, base, lengths, ids,
            y, h_n, c_n, gates, cells, h_start, c_start, h_end, c_end,
            cap, count, steps, batch, step, stride, warmup,
            H: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, CELL: tl.constexpr, PRECISION: tl.constexpr):
    entry = (tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES))[:, None]  # (LANES, 1), as all that belongs to a lane
    id, b, first, n, warm, given, last = forward_run(entry, count, ids, base, lengths, steps, batch, step, stride, warmup, h_init)
    unit, k = tl.arange(0, UNITS)[None, :], tl.arange(0, UNITS)[:, None]
    there = (unit < H) & (entry < count)  # (LANES, UNITS)
    w, square = w_hh + unit * H + k, (unit < H) & (k < H)
    w_i = tl.load(w, mask=square, other=0.0)  # (k, unit); the RNN's only one
    h = start(h0, h_init, b * H + unit, entry * H + unit, given, there)
    c = h
    if CELL == "lstm":
        w_f = tl.load(w + H * H, mask=square, other=0.0)
        w_g = tl.load(w + 2 * H * H, mask=square, other=0.0)
        w_o = tl.load(w + 3 * H * H, mask=square, other=0.0)
        c = start(c0, c_init, b * H + unit, entry * H + unit, given, there)
    gates_of: tl.constexpr = 4 if CELL == "lstm" else 1
    xi, xf, xg, xo = inputs(xp + first * (gates_of * H) + unit, there & (n > 0), H, CELL)
    for s in range(0, tl.max(n).to(tl.int32)):
        row = first + s * step.to(tl.int64)
        later = inputs(xp + (row + step) * (gates_of * H) + unit, there & (s < n - 1), H, CELL)  # of the next step, on their way meanwhile
        live = there & (s < n)
        begins, writes = live & (s == warm), live & (s >= warm)
        before = h.to(w_hh.dtype.element_ty)
        keep(h_start, id * H + unit, h, begins)
        if CELL == "lstm":
            keep(c_start, id * H + unit, c, begins)
            at = row * (4 * H) + unit
            c_new, h_new = lstm_step(
                tl.dot(before, w_i, xi.to(tl.float32), input_precision=PRECISION),
                tl.dot(before, w_f, xf.to(tl.float32), input_precision=PRECISION),
                tl.dot(before, w_g, xg.to(tl.float32), input_precision=PRECISION),
                tl.dot(before, w_o, xo.to(tl.float32), input_precision=PRECISION),
                c, cap, gates, cells, at, row * H + unit, writes, H)
            c = tl.where(live, c_new, c)
        else:
            h_new = rnn_step(tl.dot(before, w_i, xi.to(tl.float32), input_precision=PRECISION), CELL)
        h_new = h_new.to(w_hh.dtype.element_ty)
        keep(y, row * H + unit, h_new, writes)
        h = tl.where(live, h_new.to(tl.float32), h)
        xi, xf, xg, xo = later
    keep(h_end, id * H + unit, h, there & (n > 0))
    keep(h_n, b * H + unit, h, there & last)
    if CELL == "lstm":
        keep(c_end, id * H + unit, c, there & (n > 0))
        keep(c_n, b * H + unit, c, there & last)


@triton.jit(do_not_specialize=NUMBERS)
def backward(dy, y, gates, cells, w_hh, c0, dh_n, dc_n, dh_init, dc_init, base, lengths, ids,
             dz, dh0, dc0, dh_start, dc_start, dh_end, dc_end,
             cap, count, steps, batch, step, stride, warmup,
             H: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, CELL: tl.constexpr, PRECISION: tl.constexpr):
    entry = (tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES))[:, None]
    id, b, first, n, warm, given, last = backward_run(entry, count, ids, base, lengths, steps, batch, step, stride, warmup, dh_init)
    unit, k = tl.arange(0, UNITS)[None, :], tl.arange(0, UNITS)[:, None]
    there = (unit < H) & (entry < count)
    w, square = w_hh + k * H + unit, (unit < H) & (k < H)
    w_i = tl.load(w, mask=square, other=0.0)  # (unit of the gate, unit)
    dh = start(dh_n, dh_init, b * H + unit, entry * H + unit, given, there)
    dc = dh
    if CELL == "lstm":
        w_f = tl.load(w + H * H, mask=square, other=0.0)
        w_g = tl.load(w + 2 * H * H, mask=square, other=0.0)
        w_o = tl.load(w + 3 * H * H, mask=square, other=0.0)
        dc = start(dc_n, dc_init, b * H + unit, entry * H + unit, given, there)
    for s in range(0, tl.max(n).to(tl.int32)):
        row = first - s * step.to(tl.int64)
        live = there & (s < n)
        begins, writes = live & (s == warm), live & (s >= warm)
        keep(dh_start, id * H + unit, dh, begins)
        total = dh + load(dy + row * H + unit, live)
        if CELL == "lstm":
            keep(dc_start, id * H + unit, dc, begins)
            at = row * (4 * H) + unit
            opens = last & (s == n - 1)  # time 0
            zi, zf, zg, zo, dc_new = lstm_vjp(total, dc, cap, gates, cells, c0, at, row * H + unit, (row - step) * H + unit, b * H + unit,
                                              live, opens, H)
            zi, zf, zg, zo = (zi.to(w_hh.dtype.element_ty), zf.to(w_hh.dtype.element_ty), zg.to(w_hh.dtype.element_ty),
                              zo.to(w_hh.dtype.element_ty))
            keep(dz, at, zi, writes)
            keep(dz, at + H, zf, writes)
            keep(dz, at + 2 * H, zg, writes)
            keep(dz, at + 3 * H, zo, writes)
            carried = tl.dot(zi, w_i, input_precision=PRECISION)
            carried = tl.dot(zf, w_f, carried, input_precision=PRECISION)
            carried = tl.dot(zg, w_g, carried, input_precision=PRECISION)
            carried = tl.dot(zo, w_o, carried, input_precision=PRECISION)
            dc = tl.where(live, dc_new, dc)
        else:
            z = rnn_vjp(total, load(y + row * H + unit, live), CELL).to(w_hh.dtype.element_ty)
            keep(dz, row * H + unit, z, writes)
            carried = tl.dot(z, w_i, input_precision=PRECISION)
        dh = tl.where(live, carried, dh)
    keep(dh_end, id * H + unit, dh, there & (n > 0))
    keep(dh0, b * H + unit, dh, there & last)
    if CELL == "lstm":
        keep(dc_end, id * H + unit, dc, there & (n > 0))
        keep(dc0, b * H + unit, dc, there & last)
