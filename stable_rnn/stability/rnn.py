"""The tanh and relu RNN: how large its state gets, its contractions, and its weights' way into a stable set. See README.md."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..ops.spectral import row_project_
from .bounds import GATE, ROUNDS, Drive, length, times, up
from .cell import Ball, CellStability, Reach, Verdict
from .comparison import Comparison, depth, rates, settled
from .contraction import Contraction, norm2, perron, piled_up, upwards, within
from .limits import Limits
from .nearest import computable
from .radius import SHORT, into_radius, proven, radius, weighing
from .weights import LayerWeights, Names

LARGEST = 512  # units for which a numerical radius is looked for: it takes seconds there; a given rate is tried for any number


class Tanh(CellStability):
    assumed = "tanh cells"
    most = 1.0  # |h|, whatever the weights are

    def reach(
        self,
        w: LayerWeights,
        drive: Drive,
        gain: float,
        cap: float,
        norms: tuple[str, ...],
        upper: bool,
        target: tuple[float, float] | None,
    ) -> Reach:
        groups = depth(w)
        b = rnn_bounds(w, drive, groups)
        found = rnn_contractions(w, b, norms, gain, target, groups)
        h = self.bound(b, found)
        h2 = min(length(h), *(c.start * c.out[1] for c in found))
        if groups is None or "inf" not in norms:
            return Reach(found, h, h2, 0.0, None, groups)
        return Reach([*found, self.compared(w, h, found)], h, h2, 0.0, None, groups)

    def verdict(self, w: LayerWeights, x: Tensor, limits: Limits) -> Verdict | None:
        """By ||W_hh||_2 alone: no inputs and no bound of the state matter."""
        inside = within(w.w_hh, limits.rate) if limits.norm == "2" else None
        if inside is None:
            return None
        h = torch.full((w.hidden,), self.most, dtype=torch.float64)
        return Verdict(inside, h, length(h))

    def compared(self, w: LayerWeights, h: Tensor, found: list[Contraction]) -> Comparison:
        box = self.apart * h
        return Comparison(partial(_rnn_step, w), box, w.hidden, min([*rates(0.0), *(c.rate for c in found)]))

    def bound(self, b: RnnBounds, found: list[Contraction]) -> Tensor:
        return b.h

    def step_error(self, drive: float, unit: float, h: float, cell: float) -> tuple[float, float]:
        return 0.0, (drive + unit) * max(1.0, h)

    def balls(self, weights: dict[str, Tensor], names: Names, limits: Limits, margin: float) -> list[Ball]:
        """Without a margin: the spectral projection proves its bound."""
        return [] if limits.norm in ("inf", "radius") else [(weights[names["weight_hh"]], None, limits.rate)]

    def bring_in(
        self, weights: dict[str, Tensor], names: Names, limits: Limits, margin: float, x: Tensor, least: torch.dtype
    ) -> None:
        w, rate = weights[names["weight_hh"]], limits.rate * (1 - margin)
        if limits.norm == "inf":
            row_project_(w, rate)
        if limits.norm == "radius":
            before = computable(w, least)
            near = into_radius(before, rate)
            if near is not before:
                w.copy_(near)


class Relu(Tanh):
    apart = 1.0  # outputs have one sign
    most = math.inf

    def bound(self, b: RnnBounds, found: list[Contraction]) -> Tensor:
        """`start` of each contraction is what its inputs can build up from zero."""
        return torch.minimum(b.h, torch.full_like(b.h, min(c.start * c.out[0] for c in found)))


CELLS = {"rnn_tanh": Tanh(), "rnn_relu": Relu()}


@dataclass(frozen=True)
class RnnBounds:
    """`drive` (H,) >= |W_ih x + b|; `norm` the same in the 2-norm; `h` (H,) >= |h| or infinite where nothing is known."""

    drive: Tensor
    norm: float
    h: Tensor


def rnn_bounds(w: LayerWeights, drive: Drive, groups: int | None = None) -> RnnBounds:
    """Of a tanh layer from |h| <= tanh(drive + |W_hh| |h|), started at 1; of a relu layer the state's bound needs its rate, or the groups
    of its cascade."""
    largest = torch.maximum(-drive.low, drive.high)
    h = torch.full_like(largest, 1.0 if w.cell == "rnn_tanh" else math.inf)
    if w.cell == "rnn_tanh":
        for _ in range(ROUNDS):
            h = torch.minimum(h, torch.tanh(largest + times(w.abs_hh, h)) * GATE)
    elif groups is not None:
        for _ in range(groups):
            h = up(largest + times(w.abs_hh, h), 2)
    return RnnBounds(largest, drive.norm, h)


def rnn_contractions(
    w: LayerWeights,
    b: RnnBounds,
    norms: tuple[str, ...],
    gain: float,
    target: tuple[float, float] | None,
    groups: int | None = None,
) -> list[Contraction]:
    """In the 2-norm ||W_hh||_2, and for "radius" near its numerical radius; in the max-norm absolute row sums, plain and with weights v
    near the Perron vector of |W_hh|, or, in a cascade of so many groups, that grow from one to the next.

    gain >= ||W_ih||_2. `target`: a rate (and a share) worth trying."""
    found = []
    if "2" in norms:
        rate = norm2(w.w_hh)
        start = min(length(b.h), upwards(piled_up(b.norm, rate)))
        found.append(Contraction("2", rate, gain, start, (1.0, 1.0), (0.0, math.sqrt(w.hidden)), (0.0, 1.0)))
    if "radius" in norms:
        found += _rnn_radius(w, b, gain, norm2(w.w_hh), target)
    if "inf" in norms:
        ones, drive = torch.ones_like(b.drive), times(w.abs_ih, torch.ones_like(w.w_ih[0]))
        growing = [] if groups is None else [_growing(w, rate, groups) for rate in rates(0.0)]
        for v in (ones, perron(lambda v: times(w.abs_hh, v), ones), *growing):
            if v is None:
                continue
            rate = upwards(float((times(w.abs_hh, v) / v).max()))
            start = upwards(min(float((b.h / v).max()), piled_up(float((b.drive / v).max()), rate)))
            per_unit = 0.0, upwards(float((1 / v).max()))
            gain_inf, out = upwards(float((drive / v).max())), (float(v.max()), length(v))
            found.append(Contraction("inf", rate, gain_inf, start, out, per_unit, per_unit))
    return found


def _growing(w: LayerWeights, rate: float, groups: int) -> Tensor | None:
    """v (H,) with |W_hh| v <= rate v, in a cascade of so many groups."""
    return settled(lambda v: times(w.abs_hh, v) / rate, w.hidden, groups)


def _rnn_step(w: LayerWeights, a: Tensor, eps: float) -> Tensor:
    """Both functions are 1-Lipschitz."""
    return up(times(w.abs_hh, a) + times(w.abs_ih, torch.full_like(w.w_ih[0], eps)), 2)


def _rnn_radius(
    w: LayerWeights, b: RnnBounds, gain: float, most: float, target: tuple[float, float] | None
) -> Iterator[Contraction]:
    """V^2 = dh^T P dh, at a rate just above the numerical radius of W_hh and at the target, where these are below `most` >= ||W_hh||_2."""
    if not 0 < most < 2:  # the radius is at least half of the norm
        return
    rates = [] if w.hidden > LARGEST else [SHORT * radius(w.w_hh)]
    for rate in rates if target is None else [*rates, target[0]]:
        P = weighing(w.w_hh, rate) if rate < most else None
        if P is None:
            continue
        P = (P + P.mT) / 2
        off = norm2(P - torch.eye(w.hidden, dtype=P.dtype))  # P lies between 1 - off and 1 + off
        if off < 1 and proven(w.w_hh, P, rate):
            small, large = (1 - off) ** -0.5 * (1 + 2.0**-45), upwards((1 + off) ** 0.5)
            start = upwards(min(large * length(b.h), piled_up(small * b.norm, rate)))
            yield Contraction(
                "2",
                rate,
                upwards(small * gain),
                start,
                (small, small),
                (0.0, large * math.sqrt(w.hidden)),
                (0.0, large),
            )
