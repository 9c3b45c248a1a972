"""What the recurrence on lanes means, one row, one lane and one step at a time, in float64: slow, and too plain to be wrong."""

import torch

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}


def cell(name, xp, h, c, w_hh, w_hr, bias, cap, dz=0, dh=0, dc=0):
    """One step. `dz`, `dh`, `dc` shift the hidden product, the new h and the new cell without a gradient."""
    q = w_hh @ h + dz
    if name == "gru":
        (x_r, x_z, x_n), (q_r, q_z, q_n) = xp.chunk(3), q.chunk(3)
        r, keep = torch.sigmoid(x_r + q_r), torch.sigmoid(x_z + q_z).clamp(max=cap)
        n = torch.tanh(x_n + r * (q_n + bias))
        return (1 - keep) * n + keep * h + dh, c
    z = xp + q
    if name == "rnn_tanh":
        return torch.tanh(z), c
    if name == "rnn_relu":
        return torch.relu(z), c
    i, f, g, o = z.chunk(4)
    c = torch.sigmoid(f).clamp(max=cap) * c + torch.sigmoid(i) * torch.tanh(g) + dc
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else w_hr @ h), c


def forward(name, xp, w_hh, w_hr, bias, h0, c0, rows, stride, warmup, cap=1.0):
    """`rows[b]`: the buffer row of each time of sequence b. Returns y, the cells along it, h_n, c_n, and
    for `backward` the state that each step really started from."""
    hidden = w_hh.shape[0] // GATES[name]
    y = [h0.new_zeros(h0.shape[1])] * xp.shape[0]
    cells = [h0.new_zeros(hidden)] * xp.shape[0]
    h_n, c_n, before = list(h0), list(c0), {}
    for b, times in enumerate(rows):
        for first in range(0, len(times), stride):
            begin = first - warmup
            h, c = (h0[b], c0[b]) if begin <= 0 else (torch.zeros_like(h0[b]), torch.zeros_like(c0[b]))
            for t in range(max(begin, 0), min(first + stride, len(times))):
                if t >= first:
                    before[times[t]] = h.detach(), c.detach()
                h, c = cell(name, xp[times[t]], h, c, w_hh, w_hr, bias, cap)
                if t >= first:
                    y[times[t]], cells[times[t]] = h, c
            h_n[b], c_n[b] = h, c
    stack = lambda xs, like: torch.stack(list(xs)) if len(xs) else like  # noqa: E731
    return stack(y, h0[:0]), stack(cells, c0[:0]), stack(h_n, h0), stack(c_n, c0), before


def backward(name, dy, dh_n, dc_n, xp, y, cells, before, w_hh, w_hr, bias, h0, c0, rows, stride, warmup, cap=1.0):
    """The adjoint rule on lanes over the saved trajectory (y, cells), each step's own derivative by autograd.

    A step is differentiated where it was really taken (`before`), as a function of the saved state one time earlier; at chunk
    borders these two differ by the jump.
    Returns gradients of xp, w_hh, w_hr (or None), bias (or None), h0, c0."""
    xp, w_hh, w_hr, bias = (None if x is None else x.detach() for x in (xp, w_hh, w_hr, bias))
    dxp, dw_hh, dw_hr, d_bias = (None if x is None else torch.zeros_like(x) for x in (xp, w_hh, w_hr, bias))
    dh0, dc0 = dh_n.clone(), dc_n.clone()
    for b, times in enumerate(rows):
        for first in range(0, len(times), stride):
            end = min(first + stride + warmup, len(times))
            dh, dc = (dh_n[b], dc_n[b]) if end == len(times) else (torch.zeros_like(dh_n[b]), torch.zeros_like(dc_n[b]))
            for t in reversed(range(first, end)):
                h_prev, c_prev = (y[times[t - 1]], cells[times[t - 1]]) if t else (h0[b], c0[b])
                leaves = [x.detach().clone().requires_grad_() for x in (xp[times[t]], h_prev, c_prev, w_hh)]
                leaves += [w.clone().requires_grad_() for w in (w_hr, bias) if w is not None]
                h_real, c_real = before[times[t]]
                dz, dh_new, dc_new = w_hh @ (h_real - h_prev), 0, 0
                if name in ("lstm", "gru"):
                    forget = torch.sigmoid((xp[times[t]] + w_hh @ h_real).chunk(GATES[name])[1]).clamp(max=cap)
                    dh_new, dc_new = (
                        (0, forget * (c_real - c_prev)) if name == "lstm" else (forget * (h_real - h_prev), 0)
                    )
                others = [None if w is None else leaves[-1] for w in (w_hr, bias)]  # no cell has both
                h, c = cell(name, *leaves[:4], *others, cap, dz, dh_new, dc_new)
                outputs = [(h, dh + dy[times[t]])] + ([(c, dc)] if name == "lstm" else [])
                grads = torch.autograd.grad(
                    [o for o, _ in outputs], leaves, [g for _, g in outputs], materialize_grads=True
                )
                dh, dc = grads[1], grads[2] if name == "lstm" else dc
                if t < first + stride:
                    dxp[times[t]] += grads[0]
                    dw_hh += grads[3]
                    if w_hr is not None:
                        dw_hr += grads[4]
                    if bias is not None:
                        d_bias += grads[4]
            if first == 0:
                dh0[b], dc0[b] = dh, dc
    return dxp, dw_hh, dw_hr, d_bias, dh0, dc0
