"""Weights near the closest ones whose gates, each with its own scale, have a joint spectral norm within a bound.

Everywhere W is (G*H, P), its gates stacked; scales (G,) > 0, d is scales[g] in all rows of gate g, and inside means
||diag(d) W||_2 <= bound. The derivation is in README.md. Nothing here proves anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.spectral.norm import gram

FAR = 64.0  # times the bound: weights that reach further are scaled down to it first, so that no square overflows
LITTLE, SOME, MUCH = 0.01, 0.03, 0.125  # of `into_ball`
ROUNDS, STEP_ROUNDS = 8, 2
TURNS = 2
NEWTON = 12
SPARE, MULTIPLE, PERIOD = 8, 8, 16  # of `Directions`


def into_ball(W: Tensor, scales: Tensor, bound: float) -> Tensor:
    """Weights near the closest ones (Frobenius norm) inside, up to the rounding of their dtype; W itself if it is inside.

    One round as a rule, or more until the norm is beyond the bound by SOME of what it was and by MUCH at most. Then singular values are
    clipped; but weights from far outside, where LITTLE is left of the bound, are all shorter by that. A round takes P^3 * 10 operations,
    for the eigenvectors, beside some 30 G H P^2 for its products."""
    W, rounding = _near(W, scales, bound), 8 * torch.finfo(W.dtype).eps
    aim = bound * (1 - 32 * rounding)  # eigenvalues are off by rounding
    squares, V = _all_directions(W, scales)
    first = _excess(squares, bound)
    if not first > rounding:
        return W
    far, little = first > 1, LITTLE * min(first, 1.0)
    for _ in range(ROUNDS):
        Y = W @ V
        onto, excess = _onto(Y, squares, scales, bound, little)
        W = onto @ V.mT if far else W + onto.sub_(Y) @ V.mT  # a difference of large weights would cancel
        if excess <= little and far:
            return W * (aim / bound / (1 + max(excess, 0.0)))
        squares, V = _all_directions(W, scales)
        if excess <= min(SOME * first, MUCH):
            break
    over = squares > aim * aim
    V = V[:, over]
    return W + (W @ V * (aim * squares[over].rsqrt() - 1)) @ V.mT


@dataclass
class Directions:
    """What the training steps of one matrix hand on: the right singular vectors (P, k) of diag(d) W outside and just inside the bound.

    Every PERIOD-th step, and where too few are left to spare, the next looks at all P; so it does where a block would save nothing."""

    block: Tensor | None = None
    steps: int = 0


def step_into_ball(W: Tensor, scales: Tensor, bound: float, kept: Directions) -> Tensor:
    """As `into_ball`, for the weights after an optimizer's step: two rounds in the directions that are kept, each after one block power
    iteration. That leaves W outside by 5 % where the optimizer's step alone is as large as W, by less where it is smaller.

    A round takes 8 G H P k operations or so, for products with W, and k^3 * 10."""
    near = _near(W, scales, bound)
    block, P = kept.block, W.shape[1]
    if block is not None and (block.shape[0] != P or block.dtype != W.dtype or block.device != W.device):
        block = None  # of another matrix
    kept.steps += 1
    if block is None or kept.steps % PERIOD == 0:
        squares, V = _all_directions(near, scales)
        outside = int((squares > bound * bound).sum())
        k = min(P, -(-(outside + SPARE) // MULTIPLE) * MULTIPLE)
        squares, V = squares[P - k :], V[:, P - k :]
        Y = near @ V
    else:
        squares, V, Y = _power_step(near, near @ block, scales)
        outside, k = int((squares > bound * bound).sum()), block.shape[1]
    kept.block = V if outside + SPARE // 2 <= k <= P // 2 else None
    if not outside:
        return near
    for number in range(STEP_ROUNDS):
        if number:
            squares, V, Y = _power_step(near, Y, scales)
        less = _less(Y, squares, scales, bound)
        near, Y = near + less @ V.mT, Y + less
    kept.block = kept.block if kept.block is None else V
    return near


def _near(W: Tensor, scales: Tensor, bound: float) -> Tensor:
    reach = float((W.reshape(len(scales), -1).abs().amax(1) * scales).max())
    return W * (FAR * bound / reach) if reach > FAR * bound else W


def _all_directions(W: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The squares (P,) of the singular values of diag(d) W, ascending, and its right singular vectors (P, P)."""
    return torch.linalg.eigh(gram(_rows(scales, W) * W))


def _excess(squares: Tensor, bound: float) -> float:
    """How far the largest singular value is beyond the bound, relative to it."""
    return float(squares[-1].clamp(min=0).sqrt()) / bound - 1


def _power_step(W: Tensor, Y: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W, Y = W V for some V (P, k)  ->  squares (k,) ascending, V, Y: after V <- orth(W^T diag(d)^2 Y), Ritz pairs of that space."""
    squared = _rows(scales, W).square()
    V = torch.linalg.qr(W.mT @ (squared * Y))[0]
    Y = W @ V
    squares, turn = torch.linalg.eigh(Y.mT @ (squared * Y))
    return squares, V @ turn, Y @ turn


def _onto(Y: Tensor, squares: Tensor, scales: Tensor, bound: float, left: float) -> tuple[Tensor, float]:
    """Y = W V (G*H, P) in all directions, with those outside on the bound, and how far the norm still is beyond it: by `left` at most,
    if a few corrections do.

    Gates that shrink differently turn directions towards each other: K = Y^T diag(d)^2 Y is diagonal no longer, where Lambda is. Entries
    L_ij more of it move K_ij by -L_ij sum_g d_g^4 (k_gi |Y_gj|^2 + k_gj |Y_gi|^2), k_gi = 1 / (1 + mu_i d_g^2), to first order."""
    gates, speed = Y.reshape(len(scales), -1, Y.shape[1]), scales.square()[:, None]
    kept, rows = _kept(gates, squares, speed, bound), _rows(scales, Y)
    floor = torch.zeros_like(squares).masked_fill_(squares > bound * bound, -torch.inf)  # what is inside may stay there
    gates = gates * kept[:, None]
    for number in range(TURNS + 1):
        K = gram(rows * gates.reshape(Y.shape))
        if number:
            excess = _excess(torch.linalg.eigvalsh(K), bound)
            if excess <= left or number == TURNS:
                break
        pace = (speed.square() * kept).mT @ gates.square().sum(1)
        pace = pace + pace.mT
        K.diagonal().sub_(bound * bound).clamp_(min=floor)
        L = K.div_(pace.clamp_(min=1e-4 * float(pace.max())))  # short directions are orthogonal up to rounding only
        turned = (gates.reshape(Y.shape) @ L).reshape(gates.shape)
        gates.sub_(turned.mul_((speed * kept)[:, None]))
    return gates.reshape(Y.shape), excess


def _less(Y: Tensor, squares: Tensor, scales: Tensor, bound: float) -> Tensor:
    """What Y = W V (G*H, k) loses where each direction outside comes to lie on the bound alone."""
    gates, speed = Y.reshape(len(scales), -1, Y.shape[1]), scales.square()[:, None]
    return ((_kept(gates, squares, speed, bound) - 1)[:, None] * gates).reshape(Y.shape)


def _kept(gates: Tensor, squares: Tensor, speed: Tensor, bound: float) -> Tensor:
    """1 / (1 + mu d_g^2) (G, k), by which direction v, with W_g v a column of `gates` (G, H, k), comes to lie on the bound, from outside by
    its own square: mu >= 0 of sum_g d_g^2 |W_g v|^2 / (1 + mu d_g^2)^2 = bound^2, by Newton's method for 1/bound, from mu = 0."""
    parts = speed * gates.square().sum(1)  # (G, k)
    mu = torch.zeros_like(squares)
    for _ in range(NEWTON):
        shrunk = 1 + mu * speed
        now = parts / shrunk.square()
        size = now.sum(0).sqrt()
        mu = mu + (1 / bound - 1 / size).clamp(min=0) * size**3 / (now * speed / shrunk).sum(0)
    mu = torch.where(squares > bound * bound, mu, 0.0)  # also of directions with no length, where mu is NaN
    return 1 / (1 + mu * speed)


def _rows(scales: Tensor, W: Tensor) -> Tensor:
    return scales.repeat_interleave(len(W) // len(scales))[:, None]


def computable(w: Tensor, least: torch.dtype) -> Tensor:
    """In `least` or a wider dtype, and on the CPU if w is on a device without eigenvectors."""
    return w.to("cpu" if w.device.type == "mps" else w.device).to(torch.promote_types(w.dtype, least))
