"""A cell that the package doesn't have, as a plug-in: the GRU (Cho et al. 2014), whose x and hidden product meet behind a gate, which saves
more than its gates, reads its own h, and carries a part of dh past the product."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from lane_cases import DEVICE

from stable_rnn.ops.recurrence import triton_large, triton_small
from stable_rnn.ops.recurrence.triton_cells import OfCell
from stable_rnn.ops.recurrence.triton_parts import keep, load, sigmoid, tanh

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter looks a kernel's functions up anew")
GRU = SimpleNamespace(GATES=3, SAVED=4, HAS_CELL=False, CARRIES=True)


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


@pytest.mark.parametrize("members", [0, 1, 2], ids=["small", "alone", "team"])
def test_a_gru_is_its_functions_alone(members, monkeypatch):
    """Against torch's, with gradients of the input, of the state and, through what is saved, of both weights."""
    T, B, I, H = 5, 3, 4, 20
    kernels = triton_large if members else triton_small
    for name, made in dict(sums=sums, cell_step=step, vjp=vjp, hidden=hidden).items():
        monkeypatch.setattr(kernels, name, made)
    for name, value in vars(GRU).items():
        if hasattr(kernels, name):
            monkeypatch.setattr(kernels, name, tl.constexpr(OfCell((("gru", value),))))
    torch.manual_seed(0)
    gru = torch.nn.GRU(I, H)
    x, h0, dy, dh_n = (
        torch.randn(T, B, I),
        torch.randn(B, H, requires_grad=True),
        torch.randn(T * B, H),
        torch.randn(B, H),
    )
    bias = gru.bias_ih_l0 + torch.cat([gru.bias_hh_l0[: 2 * H], torch.zeros(H)])
    xp = (x.reshape(T * B, I) @ gru.weight_ih_l0.mT + bias).detach().requires_grad_()
    with torch.no_grad():
        w, hidden_bias = gru.weight_hh_l0.clone(), gru.bias_hh_l0[2 * H :].clone()
    want, want_n = gru(x, h0[None])
    gru.zero_grad()
    d_weights = torch.autograd.grad(
        (want.reshape(T * B, H) * dy).sum() + (want_n[0] * dh_n).sum(), [h0, gru.weight_hh_l0, gru.bias_ih_l0]
    )

    y, h_n, saved = (
        torch.full((T * B, H), torch.nan),
        torch.full((B, H), torch.nan),
        torch.full((T * B, 4 * H), torch.nan),
    )
    dz, dh0 = torch.full((T * B, 3 * H), torch.nan), torch.full((B, H), torch.nan)
    none, shape = (None,) * 4, dict(H=H, UNITS=32, LANES=16, CELL="gru", PRECISION="ieee")
    numbers = (1.0, B, T, B, B, T, 0)

    def run(kernel, tensors, columns, stages, **options):
        if not members:
            kernel[(1,)](*tensors, *numbers, **shape, **options)
            return
        planes, floats, arrivals = (
            torch.zeros(2, 16, columns * 32),
            torch.full((2, 16, 32), torch.nan),
            torch.zeros(1, dtype=torch.int32),
        )
        blocks = shape | dict(UNITS=16, INNER=16, WIDTH=32, ALONE=members == 1)
        for begin, end in [(-1, 2**31 - 1)] if members == 1 else [(s, s + 1) for s in range(-1, stages)]:
            kernel[(members,)](*tensors, planes, floats, arrivals, *numbers, members, begin, end, **blocks, **options)

    with torch.no_grad():
        run(
            kernels.forward,
            (xp, w, h0, None, None, None, None, None, None, y, h_n, None, saved, None, *none),
            1,
            T,
            hidden_bias=hidden_bias,
        )
        run(
            kernels.backward,
            (dy, y, saved, None, w, None, dh_n, None, None, None, None, None, None, dz, dh0, None, *none),
            3,
            T + 1,
            h0=h0,
        )
    close = dict(rtol=1e-5, atol=1e-5)  # of sums of 20 products, over 5 steps, in float32
    torch.testing.assert_close(y, want.reshape(T * B, H), **close)
    torch.testing.assert_close(h_n, want_n[0], **close)
    torch.testing.assert_close(dh0, d_weights[0], **close)
    before = torch.cat([h0, y[:-B]]).detach()
    dq = torch.cat([dz[:, : 2 * H], dz[:, 2 * H :] * saved[:, :H]], 1)
    torch.testing.assert_close(dq.mT @ before, d_weights[1], **close)
    torch.testing.assert_close(dz.sum(0), d_weights[2], **close)
