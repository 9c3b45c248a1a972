"""A cell that the package doesn't have, as a plug-in: the GRU (Cho et al. 2014), whose x and hidden product meet behind a gate, which saves
more than its gates, reads its own h, and carries a part of dh past the product."""

import pytest
import torch
import triton
import triton.language as tl
from lane_cases import DEVICE, WAYS, divide

from stable_rnn.cells import CELLS, Cell
from stable_rnn.ops.recurrence import triton as backend
from stable_rnn.ops.recurrence import triton_large, triton_small
from stable_rnn.ops.recurrence.problem import Inputs, Problem, backward_inputs
from stable_rnn.ops.recurrence.triton_cells import OfCell
from stable_rnn.ops.recurrence.triton_parts import keep, load, sigmoid, tanh

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter looks a kernel's functions up anew")


class Gru(Cell):
    name, mode, code = "gru", "GRU", 3
    family = "gru"
    gates, saved, has_cell, hidden_bias, h_after, carries, projects, forgets = 3, 4, False, 2, False, True, False, 1


@triton.jit
def sums(x, hidden_bias, unit, mask, CELL: tl.constexpr):
    return x[0].to(tl.float32), x[1].to(tl.float32), tl.zeros_like(x[2]).to(tl.float32) + load(hidden_bias + unit, mask)


@triton.jit
def step(z, x, h, c, cap, saved, cells, at, at_cell, mask, H: tl.constexpr, CELL: tl.constexpr):
    r, u = sigmoid(z[0]), sigmoid(z[1])
    n = tanh(x[2].to(tl.float32) + r * z[2])
    keep(saved, at, r, mask)
    keep(saved, at + H, u, mask)
    keep(saved, at + 2 * H, n, mask)
    keep(saved, at + 3 * H, z[2], mask)
    return n + u * (h - n), c


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
    opens,
    H: tl.constexpr,
    CELL: tl.constexpr,
):
    r, u, n, q = (
        load(saved + at, live),
        load(saved + at + H, live),
        load(saved + at + 2 * H, live),
        load(saved + at + 3 * H, live),
    )
    before = load(y + at_prev, live & ~opens) + load(h0 + at_start, live & opens)
    dn = dh * (1 - u) * (1 - n * n)
    return (dn * q * r * (1 - r), dh * (before - n) * u * (1 - u), dn), dh * u, dc


@triton.jit
def hidden(dz, saved, at, live, H: tl.constexpr, CELL: tl.constexpr):
    return dz[0], dz[1], dz[2] * load(saved + at, live)


@triton.jit
def forget(z, cap, CELL: tl.constexpr):
    return sigmoid(z[1])


@pytest.mark.parametrize("way", WAYS)
def test_a_gru_is_its_functions_alone(way, monkeypatch):
    """Against torch's, with gradients of the input, of the state and, through what is saved, of both weights; and its decay."""
    T, B, I, H = 5, 3, 4, 20
    divide(way, monkeypatch)
    monkeypatch.setitem(CELLS, "gru", Gru())
    monkeypatch.setattr(
        backend._Kernels, "make", lambda self, like, zero, *shape, dtype=None: torch.full(shape, torch.nan)
    )
    kernels = triton_small if way == "small" else triton_large
    for name, made in dict(sums=sums, cell_step=step, vjp=vjp, hidden=hidden, forget=forget).items():
        monkeypatch.setattr(kernels, name, made)
    constants = dict(GATES=Gru.gates, SAVED=Gru.saved, HAS_CELL=Gru.has_cell, CARRIES=True, FORGETS=Gru.forgets)
    for name in constants.keys() & vars(kernels).keys():
        monkeypatch.setattr(kernels, name, tl.constexpr(OfCell((("gru", constants[name]),))))
    torch.manual_seed(0)
    gru = torch.nn.GRU(I, H)
    x, h0, dy, dh_n = (
        torch.randn(T, B, I),
        torch.randn(B, H, requires_grad=True),
        torch.randn(T * B, H),
        torch.randn(B, H),
    )
    bias = gru.bias_ih_l0 + torch.cat([gru.bias_hh_l0[: 2 * H], torch.zeros(H)])
    want, want_n = gru(x, h0[None])
    d_weights = torch.autograd.grad(
        (want.reshape(T * B, H) * dy).sum() + (want_n[0] * dh_n).sum(), [h0, gru.weight_hh_l0, gru.bias_ih_l0]
    )

    with torch.no_grad():
        xp = x.reshape(T * B, I) @ gru.weight_ih_l0.mT + bias
        inputs = Inputs(xp, gru.weight_hh_l0, None, gru.bias_hh_l0[2 * H :], h0, None, None, None)
        p = Problem("gru", T, B, stride=T)
        out = backend.forward(inputs, p, borders=True)
        back = backend.backward(
            backward_inputs(dy, dh_n, None, out.y, out.saved, out.cells, inputs, p), p, borders=True
        )
    close = dict(rtol=1e-5, atol=1e-5)  # of sums of 20 products, over 5 steps, in float32
    torch.testing.assert_close(out.y, want.reshape(T * B, H), **close)
    torch.testing.assert_close(out.h_n, want_n[0], **close)
    torch.testing.assert_close(back.dh0, d_weights[0], **close)
    before = torch.cat([h0, out.y[:-B]]).detach()
    dq = torch.cat([back.dz[:, : 2 * H], back.dz[:, 2 * H :] * out.saved[:, :H]], 1)
    torch.testing.assert_close(dq.mT @ before, d_weights[1], **close)
    torch.testing.assert_close(back.dz.sum(0), d_weights[2], **close)
    for decay in (out.decay, back.decay):
        torch.testing.assert_close(decay, out.saved[:, H : 2 * H].view(T, B, H).prod(0), rtol=1e-6, atol=0)
