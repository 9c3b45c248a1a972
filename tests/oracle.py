"""What the recurrence on lanes means, one row, one lane and one step at a time, in float64: slow, and too plain to be wrong."""

import torch


def cell(name, xp, h, c, w_hh, w_hr, cap, dz=0, dc=0):
    """One step. `dz`, `dc` shift the pre-activation and the new cell without a gradient."""
    z = xp + w_hh @ h + dz
    if name == "rnn_tanh":
        return torch.tanh(z), c
    if name == "rnn_relu":
        return torch.relu(z), c
    i, f, g, o = z.chunk(4)
    c = torch.sigmoid(f).clamp(max=cap) * c + torch.sigmoid(i) * torch.tanh(g) + dc
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else w_hr @ h), c


def forward(name, xp, w_hh, w_hr, h0, c0, rows, stride, warmup, cap=1.0):
    """`rows[b]`: the buffer row of each time of sequence b. Returns y, the cells along it, h_n, c_n, and
    for `backward` the state that each step really started from."""
    hidden = w_hh.shape[0] // (4 if name == "lstm" else 1)
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
                h, c = cell(name, xp[times[t]], h, c, w_hh, w_hr, cap)
                if t >= first:
                    y[times[t]], cells[times[t]] = h, c
            h_n[b], c_n[b] = h, c
    stack = lambda xs, like: torch.stack(list(xs)) if len(xs) else like  # noqa: E731
    return stack(y, h0[:0]), stack(cells, c0[:0]), stack(h_n, h0), stack(c_n, c0), before


def backward(name, dy, dh_n, dc_n, xp, y, cells, before, w_hh, w_hr, h0, c0, rows, stride, warmup, cap=1.0):
    """The adjoint rule on lanes over the saved trajectory (y, cells), each step's own derivative by autograd.

    A step is differentiated where it was really taken (`before`), as a function of the saved state one time earlier; at chunk
    borders these two differ by the jump.
    Returns gradients of xp, w_hh, w_hr (or None), h0, c0."""
    xp, w_hh, w_hr = (None if x is None else x.detach() for x in (xp, w_hh, w_hr))
    dxp, dw_hh, dw_hr = torch.zeros_like(xp), torch.zeros_like(w_hh), None if w_hr is None else torch.zeros_like(w_hr)
    dh0, dc0 = dh_n.clone(), dc_n.clone()
    for b, times in enumerate(rows):
        for first in range(0, len(times), stride):
            end = min(first + stride + warmup, len(times))
            dh, dc = (dh_n[b], dc_n[b]) if end == len(times) else (torch.zeros_like(dh_n[b]), torch.zeros_like(dc_n[b]))
            for t in reversed(range(first, end)):
                h_prev, c_prev = (y[times[t - 1]], cells[times[t - 1]]) if t else (h0[b], c0[b])
                leaves = [x.detach().clone().requires_grad_() for x in (xp[times[t]], h_prev, c_prev, w_hh)]
                leaves += [] if w_hr is None else [w_hr.clone().requires_grad_()]
                h_real, c_real = before[times[t]]
                dz = w_hh @ (h_real - h_prev)
                forget = (
                    torch.sigmoid((xp[times[t]] + w_hh @ h_real).chunk(4)[1]).clamp(max=cap) if name == "lstm" else 0
                )
                project = None if w_hr is None else leaves[4]
                h, c = cell(name, *leaves[:4], project, cap, dz, forget * (c_real - c_prev))
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
            if first == 0:
                dh0[b], dc0[b] = dh, dc
    return dxp, dw_hh, dw_hr, dh0, dc0
