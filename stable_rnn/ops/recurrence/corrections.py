"""How the starts of checked lanes are corrected, all at once, between two passes.

Lane j starts at S_j, and the lane before it ends at E_{j-1}. A change d_{j-1} of that lane's start moves its end by about
R_{j-1} d_{j-1}; so

    S_j <- E_{j-1} + R_{j-1} d_{j-1}        d_j = (E_{j-1} - S_j) + R_{j-1} d_{j-1},   d_0 = 0

an affine scan over the lanes. Its fixed points (S_j = E_{j-1}) are those of R = 0 whatever R is: R only decides how many passes it takes.
It is multiple shooting with a quasi-Newton matrix (DEER, arXiv 2309.12252, and ELK, arXiv 2407.19115, do so for every single step).

decay     R is diagonal: the product of the lane's forget gates
probes    for the slow units (those that some lane keeps), R is measured: lanes from the same start with one unit moved, of which only the
          end is kept; decay for all others. Adjoints are linear, so there the response of a lane without upstream gradients is exact

A cell without a forget gate has no decay, and no slow units that could be told: it gets no correction. What it holds for long is a
combination of units (an eigenvector), and probes of all H units would cost H times the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 1e-3  # a unit is slow if some lane keeps so much of it
MOVE = 1e-2  # what a probe moves its unit by, relative to max(1, |state|)
WORKSPACE = 1 << 24  # floats of one group of probes
RESPONSES = 1 << 26  # floats of all responses
FEW = 64  # lanes that are scanned one after the other
STEEP = 1e3  # a response beyond it says nothing
FAR = 1e30  # where adjoints have no limit


class Borders(NamedTuple):
    """The borders between neighbouring lanes: (n, B, P) and (n, B, H), in the order in which states pass them. h and c are adjoints in
    the backward pass; c and its likes are empty for cells that have none."""

    h: Tensor  # where the lane behind the border started
    c: Tensor
    h_end: Tensor  # where the lane before it ended
    c_end: Tensor
    decay: Tensor  # of the lane before it
    exists: Tensor  # (n, B): the row goes on behind the border, from the state before it


class Response(NamedTuple):
    """How the lane before each border answers to its slow units: (n, B, S, P) and (n, B, S, H)."""

    slow: Tensor  # (S,) their numbers
    h: Tensor
    c: Tensor


def corrected(borders: Borders, bounded: bool, w_hr: Tensor | None, response: Response | None) -> tuple[Tensor, Tensor]:
    """New starts of the lanes behind the borders: h, c. A lane gets exactly its predecessor's end where that lane's own start stays.

    `bounded`: states stay within 1.5 max(1, what ends have shown). Adjoints have no range that is known."""
    has_cell = bool(borders.c.numel())
    start, end = (borders.c, borders.c_end) if has_cell else (borders.h, borders.h_end)
    exists = borders.exists[..., None]
    jump = torch.where(exists, end - start, 0.0).nan_to_num(0.0, 0.0, 0.0)
    decay = torch.where(exists, borders.decay, 0.0).nan_to_num(0.0).clamp(0, 1)
    limit = 1.5 * end.nan_to_num(0.0, 0.0, 0.0).abs().amax((0, 1)).clamp_min(1)
    start = start.nan_to_num(0.0, 0.0, 0.0)
    low, high = (
        (-limit - start, limit - start) if bounded else (torch.full_like(jump, -FAR), torch.full_like(jump, FAR))
    )
    answer_h, answer_c = torch.zeros_like(borders.h), torch.zeros_like(borders.c)
    if response is not None:
        slow = response.slow
        decay = decay.index_fill(2, slow, 0.0)
        own = (response.c if has_cell else response.h)[..., slow]  # (n, B, S, S)
        moved = _before(_linear_scan(own, jump[..., slow], low[..., slow], high[..., slow]))[:, :, None]
        answer_h = (moved @ response.h)[:, :, 0]
        answer_c = (moved @ response.c)[:, :, 0] if has_cell else answer_c
    answer = answer_c if has_cell else answer_h
    slide = decay * _before(clipped_scan(decay, jump + answer, low, high)) + answer
    if not has_cell:
        return _within(end + slide, limit if bounded else None, end), borders.c
    c = _within(end + slide, limit if bounded else None, end)
    # adjoints: a pass turns the new dc into dh
    of_c = following(borders.h_end, borders.c_end, slide - answer, w_hr) if bounded else 0.0
    return _within(borders.h_end + of_c + answer_h, None, borders.h_end), c


def following(h: Tensor, c: Tensor, move: Tensor, w_hr: Tensor | None) -> Tensor:
    """How h follows a move of c at the same time: o (tanh(c + move) - tanh(c)). The output gate is h / tanh(c), or where a projection hides
    it, its middle."""
    before = c.tanh()
    change = (c + move).tanh() - before
    if w_hr is not None:
        return 0.5 * change @ w_hr.T.to(change.dtype)
    return (h / torch.where(before.abs() < 1e-6, torch.inf, before)).clamp(0, 1) * change


def _within(state: Tensor, limit: Tensor | None, end: Tensor) -> Tensor:
    """A start within its limits, or the predecessor's end where it is no number, or that end itself is beyond them."""
    if limit is not None:
        state = torch.where(end.abs() <= limit, state.clamp(-limit, limit), state)
    return torch.where(state.isfinite(), state, end)


def _before(d: Tensor) -> Tensor:
    """The change of the start of the lane before each border; the lane before the first one keeps its own."""
    return torch.cat([torch.zeros_like(d[:1]), d[:-1]])


def clipped_scan(a: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """d_j = min(max(a_j d_{j-1} + b_j, low_j), high_j) from d_{-1} = 0, elementwise along dimension 0, 0 <= a <= 1, finite limits, in log
    depth: maps of this kind are closed under composition."""
    lines, step = torch.stack([b, low, high]), 1
    while step < len(a):
        later = lines[:, step:]
        joined = torch.addcmul(later[:1], a[None, step:], lines[:, :-step])
        joined[1:].clamp_(later[1], later[2])
        lines = torch.cat([lines[:, :step], joined], 1)
        a = torch.cat([a[:step], a[step:] * a[:-step]])
        step *= 2
    return lines[0].clamp(lines[1], lines[2])


def _linear_scan(r: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """d_j = d_{j-1} r_j + b_j within its limits: (n, B, S, S), (n, B, S). Over many lanes in log depth, with the limits at the end."""
    if len(r) <= FEW:
        d, found = torch.zeros_like(b[0]), []
        for step, jump, least, most in zip(r, b, low, high):
            d = ((d[:, None] @ step)[:, 0] + jump).clamp(least, most)
            found.append(d)
        return torch.stack(found)
    step = 1
    while step < len(r):
        r1, r2, b1, b2 = r[:-step], r[step:], b[:-step], b[step:]
        b = torch.cat([b[:step], (b1[:, :, None] @ r2)[:, :, 0] + b2])
        r = torch.cat([r[:step], r1 @ r2]).clamp(-STEEP, STEEP)
        step *= 2
    return b.nan_to_num(0.0).clamp(low, high)


def slow_units(decay: Tensor) -> Tensor:
    """The units that some lane keeps: (S,)."""
    return (decay > KEPT).flatten(0, -2).any(0).nonzero()[:, 0]


def probed(
    ends: Callable[..., tuple[Tensor, Tensor]],
    h: Tensor,
    c: Tensor,
    h_end: Tensor,
    c_end: Tensor,
    slow: Tensor,
    linear: bool,
    w_hr: Tensor | None,
) -> Response:
    """The responses of lanes (n, B) to their slow units, by `ends(lane, unit, h, c)`: where lanes (m,) end that start from h (m, P) and
    c (m, H), in which this unit was moved. `linear`: without their inputs, from one unit alone."""
    units, places = len(slow), torch.arange(h.shape[0] * h.shape[1] * len(slow), device=h.device)
    has_cell, h0, h1 = bool(c.numel()), h.flatten(0, 1), h_end.flatten(0, 1)
    c0, c1 = (c.flatten(0, 1), c_end.flatten(0, 1)) if has_cell else (c, c_end)
    own, columns = c0 if has_cell else h0, 2 * (h.shape[-1] + c.shape[-1])
    answers_h, answers_c = [], []
    for group in places.split(max(1, WORKSPACE // columns)):
        lane, unit = group // units, slow[group % units][:, None]
        step = torch.ones_like(unit, dtype=h.dtype)
        step = step if linear else MOVE * own[lane].gather(1, unit).abs().clamp_min(1)
        move = own.new_zeros(len(group), own.shape[1]).scatter(1, unit, step)
        if linear:
            from_h, from_c = (h.new_zeros(len(group), h.shape[-1]), move) if has_cell else (move, None)
        elif has_cell:  # the lane before this one would have moved h too
            from_h, from_c = h0[lane] + following(h0[lane], c0[lane], move, w_hr), c0[lane] + move
        else:
            from_h, from_c = h0[lane] + move, None
        to_h, to_c = ends(lane, unit[:, 0], from_h, from_c)
        answers_h.append(_finite((to_h if linear else to_h - h1[lane]) / step))
        if has_cell:
            answers_c.append(_finite((to_c if linear else to_c - c1[lane]) / step))
    of_h = torch.cat(answers_h).view(*h.shape[:2], units, h.shape[-1])
    return Response(slow, of_h, torch.cat(answers_c).view(*h.shape[:2], units, c.shape[-1]) if has_cell else c)


def _finite(response: Tensor) -> Tensor:
    """Nothing in place of what is no number."""
    return response.nan_to_num(0.0, 0.0, 0.0).clamp(-STEEP, STEEP)
