"""The cells in Triton: all that the kernels of `triton_small.py` and `triton_large.py` know of one. The formulas are those of
`csrc/include/stable_rnn/cells/`.

Each of the five functions below is one list of the cells. z, x and dz are tuples of one tile a gate, in float32; h and dh are those of
the same units; c and dc are only looked at where the cell has a c. What backward needs is stored and loaded here, tile by tile, from
`saved` (SAVED * H columns a row, from `at` on) and `cells` (H a row, from `at_cell` on): all of it at once would not fit in registers.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from ...cells import CELLS
from .triton_parts import cast, keep, load, sigmoid, tanh


@dataclass(frozen=True)
class OfCell:
    """A constant of each cell, `GATES(CELL)` in a kernel. Triton hashes it, and puts its text into the names of compiled kernels."""

    values: tuple[tuple[str, int], ...]

    def __call__(self, cell):
        return dict(self.values)[getattr(cell, "value", cell)]


GATES = tl.constexpr(OfCell(tuple((cell.name, cell.gates) for cell in CELLS.values())))
SAVED = tl.constexpr(OfCell(tuple((cell.name, cell.saved) for cell in CELLS.values())))
HAS_CELL = tl.constexpr(OfCell(tuple((cell.name, cell.has_cell) for cell in CELLS.values())))
FORGETS = tl.constexpr(
    OfCell(tuple((cell.name, -1 if cell.forgets is None else cell.forgets) for cell in CELLS.values()))
)
CARRIES = tl.constexpr(OfCell(tuple((cell.name, cell.carries) for cell in CELLS.values())))


@triton.jit
def sums(x, hidden_bias, unit, mask, CELL: tl.constexpr):
    """What the sums of the hidden product q start from, gate by gate: x, where a cell needs no more than x + q. hidden_bias (H,) is None
    but for cells with one."""
    gates: tl.constexpr = GATES(CELL)
    if CELL == "gru":
        z = gru_sums(x, hidden_bias, unit, mask)
    else:
        z = cast(x, tl.float32, gates)
    return z


@triton.jit
def step(z, x, h, c, cap, saved, cells, at, at_cell, mask, H: tl.constexpr, CELL: tl.constexpr):
    """The new h and c, from the sums z that started as `sums` says, x in the storage type, and h and c before. What is saved is stored on
    the way, where `mask` says."""
    if CELL == "lstm":
        h, c = lstm_step(z, c, cap, saved, cells, at, at_cell, mask, H)
    elif CELL == "gru":
        h = gru_step(z, x, h, cap, saved, at, mask, H)
    else:
        h = rnn_step(z, CELL)
    return h, c


@triton.jit
def forget(z, cap, CELL: tl.constexpr):
    """The gate that forgets, of cells that have one: the one that `step` computes, and the compiler that once."""
    return forget_gate(z, cap)


@triton.jit
def vjp(
    dh,
    dc,
    cap,
    y,
    saved,
    cells,
    h0,
    c0,
    at,
    at_cell,
    at_prev,
    at_start,
    live,
    goes_on,
    opens,
    H: tl.constexpr,
    CELL: tl.constexpr,
):
    """From the adjoints of h and c to dz, the gradient of x; to what the h before the step gets of dh beside the product with W_hh; and to
    the adjoint of the c before. h and c before the step lie at `at_prev` in y and cells where the step `goes_on` from them, or at
    `at_start` in h0 and c0 where it `opens` a row; else they are zero. h0 is None but for cells that read it."""
    carried = tl.zeros_like(dh)
    if CELL == "lstm":
        dz, dc = lstm_vjp(dh, dc, cap, saved, cells, c0, at, at_cell, at_prev, at_start, live, goes_on, opens, H)
    elif CELL == "gru":
        dz, carried = gru_vjp(dh, cap, y, saved, h0, at, at_prev, at_start, live, goes_on, opens, H)
    else:
        dz = rnn_vjp(dh, y, at_cell, live, CELL)
    return dz, carried, dc


@triton.jit
def hidden(dz, saved, at, live, H: tl.constexpr, CELL: tl.constexpr):
    """The gradient of the hidden product q: dz, where x and q only meet in a sum."""
    if CELL == "gru":
        dq = dz[0], dz[1], dz[2] * load(saved + at, live)
    else:
        dq = dz
    return dq


@triton.jit
def forget_gate(z, cap):
    """Of the LSTM and the GRU: their second, clamped."""
    f = sigmoid(z[1])
    return tl.where(f > cap, cap, f)


@triton.jit
def rnn_step(z, CELL: tl.constexpr):
    if CELL == "rnn_relu":
        h = tl.where(z[0] < 0, 0.0, z[0])
    else:
        h = tanh(z[0])
    return h


@triton.jit
def rnn_vjp(dh, y, at, live, CELL: tl.constexpr):
    h = load(y + at, live)
    if CELL == "rnn_relu":
        dz = tl.where(h <= 0, 0.0, dh)
    else:
        dz = dh * tl.fma(-h, h, 1.0)
    return (dz,)


@triton.jit
def lstm_step(z, c, cap, saved, cells, at, at_cell, mask, H: tl.constexpr):
    i = sigmoid(z[0])
    keep(saved, at, i, mask)
    g = tanh(z[2])
    keep(saved, at + 2 * H, g, mask)
    f = forget_gate(z, cap)
    keep(saved, at + H, f, mask)
    c = tl.fma(f, c, i * g)
    keep(cells, at_cell, c, mask)
    o = sigmoid(z[3])
    keep(saved, at + 3 * H, o, mask)
    return o * tanh(c), c


@triton.jit
def lstm_vjp(dh, dc, cap, saved, cells, c0, at, at_cell, at_prev, at_start, live, goes_on, opens, H: tl.constexpr):
    """From `cap` on f is constant."""
    t = tanh(load(cells + at_cell, live))
    o = load(saved + at + 3 * H, live)
    dc = tl.fma(dh * o, tl.fma(-t, t, 1.0), dc)
    zo = dh * t * (o * (1.0 - o))
    i, g = load(saved + at, live), load(saved + at + 2 * H, live)
    zi, zg = dc * g * (i * (1.0 - i)), dc * i * tl.fma(-g, g, 1.0)
    f = load(saved + at + H, live)
    c_prev = load(cells + at_prev, goes_on) + load(c0 + at_start, opens)
    zf = tl.where(f >= cap, 0.0, dc * c_prev * (f * (1.0 - f)))
    return (zi, zf, zg, zo), dc * f


@triton.jit
def gru_sums(x, hidden_bias, unit, mask):
    """n's hidden sum stays apart from x, with its own bias."""
    q = tl.zeros_like(x[2]).to(tl.float32)
    if hidden_bias is not None:
        q += load(hidden_bias + unit, mask)
    return x[0].to(tl.float32), x[1].to(tl.float32), q


@triton.jit
def gru_step(z, x, h, cap, saved, at, mask, H: tl.constexpr):
    r = sigmoid(z[0])
    keep(saved, at, r, mask)
    keep(saved, at + 3 * H, z[2], mask)
    n = tanh(tl.fma(r, z[2], x[2].to(tl.float32)))
    keep(saved, at + 2 * H, n, mask)
    f = forget_gate(z, cap)
    keep(saved, at + H, f, mask)
    return tl.fma(f, h - n, n)


@triton.jit
def gru_vjp(dh, cap, y, saved, h0, at, at_prev, at_start, live, goes_on, opens, H: tl.constexpr):
    """From `cap` on z is constant."""
    r, f, n = load(saved + at, live), load(saved + at + H, live), load(saved + at + 2 * H, live)
    h_prev = load(y + at_prev, goes_on) + load(h0 + at_start, opens)
    zn = dh * (1.0 - f) * tl.fma(-n, n, 1.0)
    zr = zn * load(saved + at + 3 * H, live) * (r * (1.0 - r))
    zz = tl.where(f >= cap, 0.0, dh * (h_prev - n) * (f * (1.0 - f)))
    return (zr, zz, zn), dh * f
