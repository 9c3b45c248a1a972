"""Plain loops in float64 and a search for inputs that come close to a certificate's bound."""

from dataclasses import replace

import torch
from torch import nn

# ---- the oracle: plain loops in float64


def step(w, xp, h, c, cap):
    """One step of a batch: xp (N, G*H), h (N, P), c (N, H)."""
    if w.cell == "gru":
        b = torch.zeros_like(w.bias) if w.bias_hh is None else w.bias_hh
        (xr, xz, xn), (qr, qz, m) = (xp - b).chunk(3, -1), (h @ w.w_hh.mT + b).chunk(3, -1)
        z = (xz + qz).sigmoid().clamp(max=cap)
        return (1 - z) * (xn + (xr + qr).sigmoid() * m).tanh() + z * h, c
    u = xp + h @ w.w_hh.mT
    if w.cell != "lstm":
        return u.tanh() if w.cell == "rnn_tanh" else u.relu(), c
    i, f, g, o = u.chunk(4, 1)
    c = f.sigmoid().clamp(max=cap) * c + i.sigmoid() * g.tanh()
    m = o.sigmoid() * c.tanh()
    return (m if w.w_hr is None else m @ w.w_hr.mT), c


def outputs(levels, x, k, cap=1.0):
    """x (T, I) -> (T, D*P). Each output of a layer from its last k inputs and a zero state: T runs side by side."""
    times = torch.arange(len(x))
    for level in levels:
        found = []
        for w in level:
            xp = (x.flip(0) if w.tag.endswith("reverse") else x) @ w.w_ih.mT + w.bias
            h, c = x.new_zeros(len(x), w.w_hh.shape[1]), x.new_zeros(len(x), w.hidden)
            for back in range(min(k, len(x)) - 1, -1, -1):
                at = times - back
                h1, c1 = step(w, xp[at.clamp(min=0)], h, c, cap)
                h, c = torch.where(at[:, None] >= 0, h1, h), torch.where(at[:, None] >= 0, c1, c)
            found.append(h.flip(0) if w.tag.endswith("reverse") else h)
        x = torch.cat(found, 1)
    return x


def worst(levels, k, bound=1.0, cap=1.0, steps=10, rounds=10):
    """The largest |windowed - recurrent| that gradient ascent over inputs within the bound finds."""
    best = 0.0
    for sign in (1.0, -1.0):
        p = (torch.randn(steps, levels[0][0].w_ih.shape[1], dtype=torch.float64) + sign).requires_grad_()
        optimizer = torch.optim.Adam([p], lr=0.3)
        for _ in range(rounds):
            x = bound * p.tanh()
            error = (outputs(levels, x, k, cap) - outputs(levels, x, steps, cap)).abs().max()
            best = max(best, error.item())
            optimizer.zero_grad()
            (-error).backward()
            optimizer.step()
    return best


def kept_apart(levels, steps, warm=30, rounds=60, bound=1.0, cap=1.0):
    """For t = 1..steps, how far a run with a past of `warm` steps and one from zero are still apart after t steps, under inputs that
    gradient ascent finds for that t: (steps,)."""
    w, best = levels[0][0], torch.zeros(steps, dtype=torch.float64)
    p = (torch.randn(warm + steps, steps, w.w_ih.shape[1], dtype=torch.float64) * 1.5).requires_grad_()
    optimizer = torch.optim.Adam([p], lr=0.2)
    at = torch.arange(steps)
    for _ in range(rounds):
        x = bound * p.tanh()
        runs = []
        for first in (0, warm):
            h, c, hs = x.new_zeros(steps, w.w_hh.shape[1]), x.new_zeros(steps, w.hidden), []
            for t in range(first, warm + steps):
                h, c = step(w, x[t] @ w.w_ih.mT + w.bias, h, c, cap)
                hs.append(h)
            runs.append(torch.stack(hs[-steps:])[at, at])
        apart = (runs[0] - runs[1]).abs().amax(1)
        best = torch.maximum(best, apart.detach())
        optimizer.zero_grad()
        (-apart.clamp(min=1e-300).log().sum()).backward()
        optimizer.step()
    return best


def growth(advance, v, box, inputs, rounds=100, starts=32):
    """The largest V(after)/V(before), V = max |difference| / v (N,), that gradient ascent over pairs of states in a box (N,), close to one
    another, and their common inputs finds. advance(states (n, N), u (n, inputs)) is one step."""
    f64 = dict(dtype=torch.float64)
    params = [torch.randn(starts, size, **f64).requires_grad_() for size in (inputs, len(v), len(v))]
    optimizer, best = torch.optim.Adam(params, lr=0.1), 0.0
    u, s, d = params
    for _ in range(rounds):
        state, change = box * s.tanh() * 0.999, d.tanh() * v / v.max() * 1e-3 * box.min()
        ratio = ((advance(state + change, u) - advance(state, u)).abs() / v).amax(1) / (change.abs() / v).amax(1)
        best = max(best, float(ratio.detach().max()))
        optimizer.zero_grad()
        (-ratio.sum()).backward()
        optimizer.step()
    return best


def weights(module, kind, scale):
    """Random, of one sign, or orthogonal recurrent blocks, times a scale."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if kind == "positive":
                p.abs_()
            if kind == "orthogonal" and "weight_hh" in name:
                for block in p.split(module.hidden_size):
                    nn.init.orthogonal_(block)
            p.mul_(scale if "weight_h" in name else 1.0)
    return module.double()


def in_norm(found, norm):
    """The certificate as it would be with the contractions of one norm alone."""
    levels = tuple(
        tuple(replace(layer, contractions=tuple(c for c in layer.contractions if c.norm == norm)) for layer in level)
        for level in found.levels
    )
    return replace(found, levels=levels)


RNN = [
    dict(hidden_size=3),
    dict(hidden_size=3, nonlinearity="relu"),
    dict(hidden_size=2, num_layers=2, bidirectional=True),
    dict(hidden_size=2, num_layers=3, nonlinearity="relu", bias=False),
]
LSTM = [
    dict(hidden_size=3),
    dict(hidden_size=1),
    dict(hidden_size=3, proj_size=2),
    dict(hidden_size=2, num_layers=2, bidirectional=True),
    dict(hidden_size=3, num_layers=2, proj_size=1, bias=False),
]


def modules(kind):
    for options in RNN:
        yield weights(nn.RNN(2, **options), kind, 0.7)
    for options in LSTM:
        yield weights(nn.LSTM(2, **options), kind, 0.5)
