"""What the Triton kernels share: the non-linearities, one step of each cell and its adjoint, where a lane's data lie, and the barrier.

The formulas are those of `csrc/include/stable_rnn/cells/` and `lanes.h`. A tile is LANES lanes by UNITS hidden units.
"""
import triton
import triton.language as tl


@triton.jit
def clamped(x, low: tl.constexpr, high: tl.constexpr):
    """x in [low, high]; a NaN stays, where tl.clamp would lose it."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def exponential(x, a: tl.constexpr):
    """(scale, p) with e^(a x) = scale (1 + p), for a = 1 or 2 and |a x| <= 87: no cancellation in p near x = 0."""
    shifter: tl.constexpr = 12582912.0 + 127.0  # adding 1.5 * 2^23 rounds to an integer, held in the low bits; 127 is for the exponent
    t = tl.fma(x, a * 1.44269504, shifter)
    n = t - shifter
    r = tl.fma(n, -0.693145751953125 / a, x)  # ln 2 in two parts; the first product is exact
    r = tl.fma(n, -1.42860682e-6 / a, r)
    q = tl.fma(r, a * a * a * a * a * a * 0.00139510981, a * a * a * a * a * 0.00836923905)
    q = tl.fma(q, r, a * a * a * a * 0.0416661985)
    q = tl.fma(q, r, a * a * a * 0.166665152)
    q = tl.fma(q, r, a * a * 0.5)
    scale = (t.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return scale, r * tl.fma(q, r, a * 1.0)


@triton.jit
def sigmoid(x):
    """e^x / (1 + e^x)"""
    scale, p = exponential(clamped(x, -87.0, 40.0), 1)
    power = tl.fma(scale, p, scale)
    return power / (power + 1.0)


@triton.jit
def tanh(x):
    """(e^2x - 1) / (e^2x + 1)"""
    scale, p = exponential(clamped(x, -10.0, 10.0), 2)
    minus_one = tl.fma(scale, p, scale - 1.0)
    return minus_one / (minus_one + 2.0)


@triton.jit
def load(at, mask):
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def keep(tensor, offsets, values, mask):
    """Stores, where there is a tensor to store in."""
    if tensor is not None:
        tl.store(tensor + offsets, values, mask=mask)


@triton.jit
def rnn_step(z, CELL: tl.constexpr):
    if CELL == "rnn_relu":
        h = tl.where(z < 0, 0.0, z)
    else:
        h = tanh(z)
    return h


@triton.jit
def rnn_vjp(dh, h, CELL: tl.constexpr):
    if CELL == "rnn_relu":
        dz = tl.where(h <= 0, 0.0, dh)
    else:
        dz = dh * tl.fma(-h, h, 1.0)
    return dz


# The LSTM's step and its adjoint take up and give away one gate after the other: all at once would not fit in registers.
@triton.jit
def lstm_step(zi, zf, zg, zo, c, cap, gates, cells, at, at_cell, mask, H: tl.constexpr):
    """The new c and h. Gates and cells are stored on the way, the gates from `at` on."""
    i = sigmoid(zi)
    keep(gates, at, i, mask)
    g = tanh(zg)
    keep(gates, at + 2 * H, g, mask)
    f = sigmoid(zf)
    f = tl.where(f > cap, cap, f)
    keep(gates, at + H, f, mask)
    c = tl.fma(f, c, i * g)
    keep(cells, at_cell, c, mask)
    o = sigmoid(zo)
    keep(gates, at + 3 * H, o, mask)
    return c, o * tanh(c)


@triton.jit
def lstm_vjp(dh, dc, cap, gates, cells, c0, at, at_cell, at_prev, at_c0, live, opens, H: tl.constexpr):
    """Adjoints of the gates' inputs and of c_prev, which comes from c0 where the step `opens` a row. From `cap` on f is constant."""
    t = tanh(load(cells + at_cell, live))
    o = load(gates + at + 3 * H, live)
    dc = tl.fma(dh * o, tl.fma(-t, t, 1.0), dc)
    zo = dh * t * (o * (1.0 - o))
    i, g = load(gates + at, live), load(gates + at + 2 * H, live)
    zi, zg = dc * g * (i * (1.0 - i)), dc * i * tl.fma(-g, g, 1.0)
    f = load(gates + at + H, live)
    c_prev = load(cells + at_prev, live & ~opens) + load(c0 + at_c0, live & opens)
    zf = tl.where(f >= cap, 0.0, dc * c_prev * (f * (1.0 - f)))
    return zi, zf, zg, zo, dc * f


@triton.jit
def span(entry, count, ids, base, lengths, steps, batch, step, stride):
    """Of each lane (LANES,) int64: id, row of the batch, place of that row's time 0, the times [begin, end) that the lane writes, and
    the row's length. Entries from `count` on are no lanes: they begin behind the end of an empty row."""
    there = entry < count
    id = entry
    if ids is not None:
        id = tl.load(ids + entry, mask=there, other=0)
    b = id % batch
    begin = tl.where(there, id // batch * stride, 1)
    length = tl.zeros_like(entry) + steps
    if lengths is not None:
        length = tl.load(lengths + b, mask=there, other=0)
    length = tl.where(there, length, 0)
    if base is not None:
        origin = tl.load(base + b, mask=there, other=0)
    else:
        origin = tl.where(step < 0, b + (steps - 1).to(tl.int64) * batch, b)
    return id, b, origin, begin, tl.minimum(begin + stride, length), length


@triton.jit
def forward_run(entry, count, ids, base, lengths, steps, batch, step, stride, warmup, init):
    """Of each lane: id, row of the batch, buffer row of step 0, number of steps, how many of them write nothing, whether it starts from
    h0, c0, and whether it ends at its row's end. The first lane of a row without any time has no steps, and goes from start to end."""
    id, b, origin, begin, end, length = span(entry, count, ids, base, lengths, steps, batch, step, stride)
    warm = tl.minimum(begin, warmup)
    given = begin <= warmup
    last = (end == length) & ((begin < length) | (begin == 0))
    if init is not None:
        warm = tl.zeros_like(begin)
        last = (end == length) & (begin < length)
    n = tl.where(begin < length, end - begin + warm, 0)
    return id, b, origin + (begin - warm) * step, n, warm, given, last


@triton.jit
def backward_run(entry, count, ids, base, lengths, steps, batch, step, stride, warmup, init):
    """As `forward_run`, in reverse time: buffer row of the last time; starts from dh_n, dc_n; ends at time 0."""
    id, b, origin, begin, end, length = span(entry, count, ids, base, lengths, steps, batch, step, stride)
    warm = tl.minimum(length - end, warmup)
    given = end + warm == length
    last = begin == 0
    if init is not None:
        warm = tl.zeros_like(begin)
        last = (begin == 0) & (length > 0)
    n = tl.where(begin < length, end - begin + warm, 0)
    return id, b, origin + (end + warm - 1) * step, n, warm, given, last


@triton.jit
def start(state, init, rows, entries, given, there):
    """A state of a tile before its first step: from `init` by entry, from the caller's where `given`, else zeros."""
    if init is not None:
        x = load(init + entries, there)
    else:
        x = load(state + rows, given & there)
    return x


@triton.jit
def meet(arrivals, goal, ALONE: tl.constexpr):
    """A barrier of the team: after it, all members see what each has written before it."""
    tl.debug_barrier()
    if not ALONE:
        tl.atomic_add(arrivals, 1, sem="release", scope="gpu")
        while tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu") < goal:
            pass
        tl.debug_barrier()
