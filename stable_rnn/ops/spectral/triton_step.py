"""The spectral step in Triton: block power iteration, Rayleigh-Ritz, clip or scale, for many matrices in one launch (see README.md).

A matrix W (m, n) belongs to a team of programs. The work goes in phases, each on chunks of BAND rows of W or of the block X (n, 16); a
member takes every `members`-th chunk, and the team meets in between. What is added up over chunks is added in their order, so the number
of members changes no sum. With I iterations the phases are

    0              the largest |W| of each chunk; X: the kept vectors and fresh random ones
    4 i + 1        Y = W X and W^T Y of each chunk                         i = 0 .. I-1
    4 i + 2        X = W^T Y over all chunks; X^T X of each chunk
    4 i + 3, + 4   X = X T with T from the Cholesky factor of X^T X, twice: then X is orthonormal
    4 I + 1        Y = W X; Y^T Y of each chunk
    4 I + 2        eigenvectors E of Y^T Y; the block becomes X E, and W loses (Y C) X^T or is scaled

W is read 2 I + 3 times and written once, with 64 m n operations an iteration. Sums of 16 x 16 are float64, products with W float32.
"""

import triton
import triton.language as tl

from ..recurrence.triton_parts import meet

FIELDS = (
    9  # of a matrix: its number, rows, columns, stride, vectors in the block, two addresses, places in the workspaces
)
NUMBERS = ("iterations", "fresh", "seed", "members", "begin", "end")
BAND = 32  # rows of a chunk, of W or of a block
TILE = 32  # columns of W at a time


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def squares(block, first, last):
    """X^T X in float64, for some rows of a block."""
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    found = tl.zeros((16, 16), tl.float64)
    for j in tl.range(first, last, loop_unroll_factor=8):
        found += tl.load(block + j * 16 + row).to(tl.float64) * tl.load(block + j * 16 + column).to(tl.float64)
    return found


@triton.jit
def total(grams, count):
    """The sum of `count` 16 x 16 matrices, in their order."""
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    found = tl.zeros((16, 16), tl.float64)
    for k in range(0, count):
        found += tl.load(grams + k * 256 + at)
    return found


@triton.jit
def orthogonalizer(G):
    """Upper triangular T with orthonormal X T, for G = X^T X. A column that depends on those before it gets a zero column."""
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    sizes = tl.sum(tl.where(row == column, G, 0.0), 0)[None, :]
    T = tl.where(row == column, 1.0, 0.0).to(tl.float64)
    for c in range(0, 16):
        pivot = tl.sum(tl.where((row == c) & (column == c), G, 0.0))
        kept = (pivot > 1e-12 * tl.sum(tl.where(tl.arange(0, 16)[None, :] == c, sizes, 0.0))) & (
            pivot > 1e-280
        )  # float32 carries no more
        over = tl.where(kept, 1.0 / tl.sqrt(tl.where(kept, pivot, 1.0)), 0.0)
        across = tl.sum(tl.where(row == c, G, 0.0), 0)[None, :] * over  # row c of the factor
        down = tl.sum(tl.where(column == c, G, 0.0), 1)[:, None] * over
        t = tl.sum(tl.where(column == c, T, 0.0), 1)[:, None] * over
        G = G - down * across
        T = tl.where(column == c, t, tl.where(column > c, T - t * across, T))
    return T


@triton.jit
def eigen(G):
    """Eigenvalues (1, 16) of the symmetric G, descending, and orthonormal eigenvectors in the columns of E.

    Jacobi rotations in float32, 8 disjoint pairs at a time as in a round-robin tournament (Brent and Luk, "The solution of singular-value
    and symmetric eigenvalue problems on multiprocessor arrays", SIAM J. Sci. Stat. Comput. 6, 1985); then Rayleigh quotients in float64,
    whose error is the square of the vectors'."""
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    eye = row == column
    largest = tl.max(tl.where(eye, G, 0.0))
    A = (G / tl.where(largest > 0, largest, 1.0)).to(tl.float32)
    E = tl.where(eye, 1.0, 0.0)
    left, sweeps = tl.max(tl.where(eye, 0.0, tl.abs(A))), 0
    while (left > 3e-7) & (sweeps < 12):
        for turn in range(0, 15):
            partner = (turn + 15 - row) % 15  # who does not move, 15, meets the one that would meet itself
            partner = tl.where(row == 15, turn * 8 % 15, tl.where(partner == row, 15, partner))
            pair = column == partner
            own = tl.sum(tl.where(eye, A, 0.0), 1)[:, None]
            others = tl.sum(tl.where(pair, tl.sum(tl.where(eye, A, 0.0), 0)[None, :], 0.0), 1)[:, None]
            shared = tl.sum(tl.where(pair, A + tl.trans(A), 0.0), 1)[:, None]  # twice the element between them
            slope = (others - own) / tl.where(shared == 0, 1.0, shared)
            ahead = (slope > 0) | ((slope == 0) & (row < partner))
            tangent = tl.where(ahead, 1.0, -1.0) / (tl.abs(slope) + tl.sqrt(slope * slope + 1.0))
            tangent = tl.where(shared == 0, 0.0, tangent)
            cosine = 1.0 / tl.sqrt(tangent * tangent + 1.0)
            J = tl.where(eye, cosine, tl.where(pair, tangent * cosine, 0.0))
            A = product(tl.trans(J), product(A, J))
            E = product(E, J)
        left, sweeps = tl.max(tl.where(eye, 0.0, tl.abs(A))), sweeps + 1
    values, E64 = tl.zeros((1, 16), tl.float64), E.to(tl.float64)
    for i in range(0, 16):  # e^T G e, row by row of G
        line = tl.sum(tl.where(row == i, G, 0.0), 0)[:, None]
        values += tl.sum(tl.where(row == i, E64, 0.0), 0)[None, :] * tl.sum(line * E64, 0)[None, :]
    values = values / tl.sum(E64 * E64, 0)[None, :]
    values = tl.where(values > 0, values, 0.0)
    across = tl.sum(tl.where(eye, values, 0.0), 1)[:, None]  # the same as a column
    place = tl.sum(tl.where((across > values) | ((across == values) & (row < column)), 1, 0), 0)[
        None, :
    ]  # how many come before
    order = tl.sum(tl.where(eye, place, 0), 1)[:, None] == column
    return tl.sum(tl.where(order, across, 0.0), 0)[None, :], product(E, tl.where(order, 1.0, 0.0))


@triton.jit
def load_w(w, rows, columns, m, n, stride, factor):
    """A tile of W, times a power of two."""
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    return tl.load(w + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32) * factor


@triton.jit
def times_block(w, x, rows, m, n, stride, factor, BAND: tl.constexpr, TILE: tl.constexpr):
    """Y = W X for some rows of W: (BAND, 16)."""
    k, y = tl.arange(0, 16)[None, :], tl.zeros((BAND, 16), tl.float32)
    for j in range(0, n, TILE):
        columns = j + tl.arange(0, TILE)
        block = tl.load(x + columns[:, None] * 16 + k, mask=columns[:, None] < n, other=0.0)
        y = tl.dot(load_w(w, rows, columns, m, n, stride, factor), block, y, input_precision="ieee")
    return y


@triton.jit
def unit_of(largest, chunks):
    """What divides W so that its powers stay in range: a power of two and its inverse; and whether W is finite."""
    most = 0.0
    for c in range(0, chunks):
        most = tl.maximum(most, tl.load(largest + c))
    exponent = (most.to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    unit = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    return unit, ((127 - exponent) << 23).to(tl.float32, bitcast=True), most < float("inf")


@triton.jit
def finish(
    w,
    kept,
    x,
    y,
    G,
    bound,
    norm_at,
    near_at,
    rank,
    members,
    m,
    n,
    stride,
    width,
    unit,
    inverse,
    SCALE: tl.constexpr,
    BAND: tl.constexpr,
    TILE: tl.constexpr,
):
    """From G = Y^T Y: the norm and the block; W, where it is outside."""
    k = tl.arange(0, 16)[None, :]
    values, E = eigen(G)
    s, limit = tl.sqrt(values), bound / unit
    norm = tl.max(s)
    if rank == 0:
        tl.store(norm_at, tl.where(norm > limit, bound, norm * unit))
        tl.store(near_at, tl.sum((s > 0.999 * limit).to(tl.int64)))  # NEAR of reference.py
    for c in range(rank, tl.cdiv(n, BAND), members):
        rows = c * BAND + tl.arange(0, BAND)[:, None]
        v = product(tl.load(x + rows * 16 + k, mask=rows < n, other=0.0), E)
        tl.store(kept + rows * width + k, v, mask=(rows < n) & (k < width))
    if norm > limit:
        excess = tl.where(s > limit, 1.0 - limit / tl.where(s > 0, s, 1.0), 0.0).to(tl.float32)
        C = product(E * excess, tl.trans(E))
        factor = (limit / norm).to(tl.float32)
        for c in range(rank, tl.cdiv(m, BAND), members):
            rows = c * BAND + tl.arange(0, BAND)
            lines = tl.load(y + rows[:, None] * 16 + k, mask=rows[:, None] < m, other=0.0)
            t = product(lines, C)
            for j in range(0, n, TILE):
                columns = j + tl.arange(0, TILE)
                a = load_w(w, rows, columns, m, n, stride, inverse)
                if SCALE:
                    a = a * factor
                else:
                    across = tl.load(
                        x + columns[None, :] * 16 + tl.arange(0, 16)[:, None], mask=columns[None, :] < n, other=0.0
                    )
                    a = a - product(t, across)
                tl.debug_barrier()
                inside = (rows[:, None] < m) & (columns[None, :] < n)
                tl.store(w + rows[:, None] * stride + columns[None, :], a * unit, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def step(
    table,
    bounds,
    norms,
    near,
    space,
    grams,
    arrivals,
    iterations,
    fresh,
    seed,
    members,
    begin,
    end,
    DTYPE: tl.constexpr,
    SCALE: tl.constexpr,
    ALONE: tl.constexpr,
    FIELDS: tl.constexpr,
    BAND: tl.constexpr,
    TILE: tl.constexpr,
):
    team, rank = tl.program_id(0) // members, tl.program_id(0) % members
    field = table + team * FIELDS
    number, m, n, stride, width = (
        tl.load(field),
        tl.load(field + 1),
        tl.load(field + 2),
        tl.load(field + 3),
        tl.load(field + 4),
    )
    w = tl.load(field + 5).to(tl.pointer_type(DTYPE))
    kept = tl.load(field + 6).to(tl.pointer_type(tl.float32))
    chunks, slices = tl.cdiv(m, BAND), tl.cdiv(n, BAND)
    largest = space + tl.load(field + 7)  # (chunks); then X (n, 16), Y (m, 16), W^T Y of each chunk (chunks, n, 16)
    x = largest + tl.cdiv(chunks, 16) * 16
    y, parts = x + n * 16, x + n * 16 + m * 16
    first = grams + tl.load(field + 8)  # two sets of (16, 16) for each chunk
    second = first + tl.maximum(chunks, slices) * 256
    k, small = tl.arange(0, 16)[None, :], tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    for phase in range(begin, end):
        if phase > begin:
            meet(arrivals + team, (phase - begin) * members, ALONE)
        if phase == 0:
            for c in range(rank, chunks, members):
                rows, most = c * BAND + tl.arange(0, BAND), tl.zeros((BAND, TILE), tl.float32)
                for j in range(0, n, TILE):
                    a = tl.abs(load_w(w, rows, j + tl.arange(0, TILE), m, n, stride, 1.0))
                    most = tl.maximum(most, tl.where(a == a, a, float("inf")))
                tl.store(largest + c, tl.max(most))
            for c in range(rank, slices, members):
                rows = c * BAND + tl.arange(0, BAND)[:, None]
                drawn = 2 * tl.rand(seed + number, (rows * 16 + k).to(tl.int32)) - 1
                old = (k < width - tl.minimum(fresh, width)) & (rows < n)
                block = tl.load(kept + rows * width + k, mask=old, other=0.0)
                tl.store(x + rows * 16 + k, tl.where(k >= width, 0.0, tl.where(old, block, drawn)), mask=rows < n)
        else:
            unit, inverse, finite = unit_of(largest, chunks)
            turn = tl.where(phase <= 4 * iterations, (phase - 1) % 4, 4)
            if (turn == 0) & finite:
                for c in range(rank, chunks, members):
                    rows = c * BAND + tl.arange(0, BAND)
                    lines = times_block(w, x, rows, m, n, stride, inverse, BAND, TILE)
                    for j in range(0, n, TILE):
                        columns = j + tl.arange(0, TILE)
                        a = load_w(w, rows, columns, m, n, stride, inverse)
                        z = product(tl.trans(a), lines)
                        tl.store(parts + (c * n + columns)[:, None] * 16 + k, z, mask=columns[:, None] < n)
            elif (turn < 4) & finite:
                T = tl.zeros((16, 16), tl.float32)
                if turn > 1:
                    T = orthogonalizer(total(first if turn == 2 else second, slices)).to(tl.float32)
                for c in range(rank, slices, members):
                    rows = c * BAND + tl.arange(0, BAND)[:, None]
                    z = tl.zeros((BAND, 16), tl.float32)
                    if turn == 1:
                        for part in range(0, chunks):
                            z += tl.load(parts + (part * n + rows) * 16 + k, mask=rows < n, other=0.0)
                    else:
                        z = product(tl.load(x + rows * 16 + k, mask=rows < n, other=0.0), T)
                        tl.debug_barrier()  # all have read before one writes
                    tl.store(x + rows * 16 + k, z, mask=rows < n)
                    if turn < 3:
                        tl.debug_barrier()
                        tl.store(
                            (first if turn == 1 else second) + c * 256 + small,
                            squares(x, c * BAND, tl.minimum((c + 1) * BAND, n)),
                        )
            elif (phase == 4 * iterations + 1) & finite:
                for c in range(rank, chunks, members):
                    rows = c * BAND + tl.arange(0, BAND)
                    tl.store(
                        y + rows[:, None] * 16 + k,
                        times_block(w, x, rows, m, n, stride, inverse, BAND, TILE),
                        mask=rows[:, None] < m,
                    )
                    tl.debug_barrier()
                    tl.store(first + c * 256 + small, squares(y, c * BAND, tl.minimum((c + 1) * BAND, m)))
            elif finite:
                finish(
                    w,
                    kept,
                    x,
                    y,
                    total(first, chunks),
                    tl.load(bounds + number),
                    norms + number,
                    near + number,
                    rank,
                    members,
                    m,
                    n,
                    stride,
                    width,
                    unit,
                    inverse,
                    SCALE,
                    BAND,
                    TILE,
                )
            elif (phase > 4 * iterations + 1) & (rank == 0):
                tl.store(norms + number, float("nan"))
                tl.store(near + number, 0)
