"""What the Triton kernels share: the non-linearities, tuples of tiles, where a lane's data lie, and the barrier.

The formulas are those of `csrc/include/stable_rnn/cell.h` and `lanes.h`. A tile is LANES lanes by UNITS hidden units.
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
    shifter: tl.constexpr = (
        12582912.0 + 127.0
    )  # adding 1.5 * 2^23 rounds to an integer, held in the low bits; 127 is for the exponent
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
def begins_anew(resets, row, there):
    """Of lanes that are `there`: whether the state is zero before the step of this buffer row."""
    anew = tl.full(row.shape, False, tl.int1)
    if resets is not None:
        anew = tl.load(resets + row, mask=there, other=0) != 0
    return anew


@triton.jit
def columns(at, gap, mask, COUNT: tl.constexpr):
    """A tuple of COUNT tiles in the storage type, each `gap` elements after the one before: of a row's gates, or of their weights."""
    tiles = (tl.load(at, mask=mask, other=0.0),)
    for gate in tl.static_range(1, COUNT):
        tiles = tiles + (tl.load(at + gate * gap, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_columns(tensor, at, gap, tiles, mask, COUNT: tl.constexpr):
    for gate in tl.static_range(COUNT):
        keep(tensor, at + gate * gap, tiles[gate], mask)


@triton.jit
def cast(tiles, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    made = (tiles[0].to(DTYPE),)
    for gate in tl.static_range(1, COUNT):
        made = made + (tiles[gate].to(DTYPE),)
    return made


@triton.jit
def products(a, tiles, sums, PRECISION: tl.constexpr, COUNT: tl.constexpr):
    """a @ tile + sum, for each tile."""
    made = (tl.dot(a, tiles[0], sums[0], input_precision=PRECISION),)
    for gate in tl.static_range(1, COUNT):
        made = made + (tl.dot(a, tiles[gate], sums[gate], input_precision=PRECISION),)
    return made


@triton.jit
def streamed_products(a, at, gap, mask, sums, PRECISION: tl.constexpr, COUNT: tl.constexpr):
    """The same of tiles `gap` elements apart, each loaded for its product only: all at once would cost registers."""
    made = (tl.dot(a, tl.load(at, mask=mask, other=0.0), sums[0], input_precision=PRECISION),)
    for gate in tl.static_range(1, COUNT):
        made = made + (
            tl.dot(a, tl.load(at + gate * gap, mask=mask, other=0.0), sums[gate], input_precision=PRECISION),
        )
    return made


@triton.jit
def keep(tensor, offsets, values, mask):
    """Stores, where there is a tensor to store in."""
    if tensor is not None:
        tl.store(tensor + offsets, values, mask=mask)


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
def multiply_decay(at, forget, more, mask):
    """One more forget gate times the product of those before, where there are `more`. That stands where the caller wants it: between two
    steps lies a barrier."""
    product = tl.load(at, mask=mask & more, other=1.0) * forget
    tl.debug_barrier()  # whoever holds an element has read it before one writes
    tl.store(at, product, mask=mask)


@triton.jit
def meet(arrivals, goal, ALONE: tl.constexpr):
    """A barrier of the team: after it, all members see what each has written before it."""
    tl.debug_barrier()
    if not ALONE:
        tl.atomic_add(arrivals, 1, sem="release", scope="gpu")
        while tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu") < goal:
            pass
        tl.debug_barrier()
