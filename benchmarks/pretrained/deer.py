"""A baseline: every single step is an unknown (quasi-DEER: Lim et al., arXiv 2309.12252; Gonzalez et al., arXiv 2407.19115).

Newton's iteration on s_t = f(s_{t-1}, x_t), all t at once, with the part of the Jacobian that stays within a unit: a block of its h and c
(2 x 2), or of h alone. A pass is f at all steps, side by side, and a linear scan. On a GPU it is T lanes of one step each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stable_rnn.cells import MODES


def passes(module: nn.RNNBase, x: Tensor, tol: float, most: int) -> int | None:
    """Passes over x (T, 1, I) until no state moves by more than `tol`, relative to max(1, |state|); None: not within `most`, or NaN."""
    cell = MODES[module.mode]
    bias, own = cell.biases(*((module.bias_ih_l0, module.bias_hh_l0) if module.bias else (None, None)))
    w, hidden, steps = module.weight_hh_l0.detach(), module.hidden_size, len(x)
    xp = nn.functional.linear(x[:, 0], module.weight_ih_l0, bias).detach()
    loops = torch.cat([gate.diagonal() for gate in w.split(hidden)])  # of each unit, through W_hh
    shift = torch.zeros_like(xp[0])
    if own is not None and cell.hidden_bias is not None:
        shift.view(cell.gates, hidden)[cell.hidden_bias] = own.detach()
    parts = 1 + cell.has_cell
    states = xp.new_zeros(steps, parts, hidden)
    for count in range(1, most + 1):
        before = torch.cat([states[:1] * 0, states[:-1]])
        q = before[:, 0] @ w.mT + shift
        moving = before.clone().requires_grad_()
        within = q + loops * (moving[:, 0] - before[:, 0]).repeat(1, cell.gates)
        after = torch.stack(cell.step(xp, within, moving[:, 0], moving[:, -1], 1.0)[:parts], 1)
        blocks = torch.stack(
            [torch.autograd.grad(after[:, i].sum(), moving, retain_graph=True)[0] for i in range(parts)], 1
        )
        after = after.detach()
        new = scan(blocks, after - apply(blocks, before))
        moved = ((new - states).abs() / new.abs().clamp_min(1)).amax()
        states = new
        if not moved.isfinite():
            return None
        if moved <= tol:
            return count
    return None


def apply(blocks: Tensor, s: Tensor) -> Tensor:
    """(T, n, n, H), (T, n, H) -> (T, n, H)."""
    return (blocks * s[:, None]).sum(2)


def scan(blocks: Tensor, b: Tensor) -> Tensor:
    """s_t = blocks_t s_{t-1} + b_t from s_{-1} = 0, in log2 T doublings."""
    reach = 1
    while reach < len(b):
        b = torch.cat([b[:reach], b[reach:] + apply(blocks[reach:], b[:-reach])])
        product = (blocks[reach:, :, :, None] * blocks[:-reach, None]).sum(2)
        blocks = torch.cat([blocks[:reach], product])
        reach *= 2
    return b
