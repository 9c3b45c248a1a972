"""Contractions: a weighted norm V of state differences, and by which factor a step shrinks it. The derivations are in README.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.spectral import spectral_norm_bound
from ..ops.spectral.certified import proven_within
from ..ops.spectral.norm import width

STEPS = 60  # of power iterations; they only propose weights of a norm, which is then proven
POWERS = 8  # of those for a norm from below
FLOOR = 0.05  # of the largest weight, the least that a unit's weight may be


Errors = tuple[float, float]  # bounds of a difference of h: of its largest entry, and of its 2-norm


@dataclass(frozen=True)
class Contraction:
    """For two states of one layer under the same inputs V(after) <= rate * V(before), rigorously.

    norm    "2" or "inf": the kind of V, and in which norm input differences are measured
    gain    a difference eps of the inputs adds at most gain * eps to V
    start   V of the difference between a zero state and any state that the layer can reach
    out     a state difference has |dh|_inf <= out[0] * V and ||dh||_2 <= out[1] * V
    units   V of a difference is at most hypot(units[0] * |dc|_inf, units[1] * |dh|_inf)
    spread  the same for differences as rounding makes them, spread over the units (README.md)
    """

    norm: str
    rate: float
    gain: float
    start: float
    out: tuple[float, float]
    units: tuple[float, float]
    spread: tuple[float, float]

    def after(self, k: int, eps: float) -> float:
        """Bound of V after k steps from `start` with inputs that differ by at most eps. It falls as k grows."""
        left = power(self.rate, k) * self.start if self.start else 0.0
        return upwards(left + self.carried(eps))

    def carried(self, eps: float) -> float:
        """Bound of V that input differences of at most eps build up from no difference, in any number of steps."""
        return piled_up(self.gain * eps, self.rate) if self.gain and eps else 0.0

    def truncated(self, k: int, eps: float) -> Errors:
        """After k steps, or more, from `start`."""
        return self._errors(self.after(k, eps))

    def rounded(self, dc: float, dh: float, eps: float) -> Errors:
        """At any time, from no difference, where rounding adds up to dc to a difference of c and dh to one of h at each step."""
        v = self.carried(eps) + math.hypot(self.spread[0] * dc, self.spread[1] * dh) * series(self.rate)
        return v * self.out[0], v * self.out[1]

    def jumped(self, dc: float, dh: float, chunk: int, eps: float) -> Errors:
        """At any time, from no difference, where a step in `chunk` adds as much to every unit."""
        v = math.hypot(self.units[0] * dc, self.units[1] * dh)
        return self._errors(v * series(power(self.rate, chunk)) + self.carried(eps))

    def amplified(self) -> float:
        """Bound of what a push of 1 in every number of the state, at every step, builds up in h."""
        return math.hypot(*self.units) * series(self.rate) * self.out[0]

    def _errors(self, v: float) -> Errors:
        return _times(v, self.out[0]), _times(v, self.out[1])


def _times(v: float, factor: float) -> float:
    return v * factor * (1 + 2.0**-45) if v else 0.0


def series(rate: float) -> float:
    """Upper bound of 1 + rate + rate^2 + ..."""
    return (1 + 2.0**-45) / (1 - rate) if rate < 1 else math.inf


def piled_up(push: float, rate: float) -> float:
    """Upper bound of what a push at every step builds up from zero."""
    return push * series(rate) if push else 0.0


def power(rate: float, k: int) -> float:
    try:
        return rate**k * (1 + 2.0**-45) + 1e-300
    except OverflowError:
        return math.inf


def upwards(x: float) -> float:
    return x * (1 + 2.0**-45)


def norm2(matrix: Tensor) -> float:
    if not torch.isfinite(matrix).all():
        return math.inf
    return float(spectral_norm_bound(matrix))


def perron(step: Callable[[Tensor], Tensor], start: Tensor, floor: float = FLOOR) -> Tensor:
    """Positive weights v that nearly minimize max_j step(v)_j / v_j; `floor` of `start` in it keeps every weight away from 0."""
    v = start / start.max()
    last = math.inf
    for number in range(STEPS):
        after = step(v)
        rate = float((after / v).max())  # it never rises, but may stand still for a while
        if not rate > 0 or number % 8 == 7 and rate > (1 - 1e-3) * last:
            break
        last = rate if number % 8 == 7 else last
        v = after / rate + v  # with v itself, so that a cycle converges too
        v = v / v.max()
    return v + floor * start / start.max()


def crossing(w_hh: Tensor, scales: Callable[[float], Tensor], low: float) -> float:
    """About the rate > low where ||D(rate) W_hh||_2 = rate for row scales D that fall, by power iteration and bisection in float32. Proves
    nothing."""
    w32, x = w_hh.float(), _start(w_hh)

    def norm(rate: float) -> float:
        nonlocal x
        size, x = _power(scales(rate).float()[:, None] * w32, x)
        return size

    high = 1.0 if low < 1 and norm(1.0) < 1 else max(2.0, norm(2.0))
    for _ in range(14):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if norm(middle) <= middle else (middle, high)
    return high * (1 + 1e-4)


def exceeds(matrix: Tensor, bound: float) -> bool:
    """Whether a few power iterations show that ||matrix||_2 > bound; by less than float32 may be off, they don't."""
    return _power(matrix.float(), _start(matrix))[0] > bound * (1 + 1e-4)


def within(matrix: Tensor, bound: float) -> bool | None:
    """Whether ||matrix||_2 <= bound, where a few power iterations or a Cholesky factor tell: by so much that `norm2` says the same."""
    if exceeds(matrix, bound):
        return False
    spare = width(max(matrix.shape), min(matrix.shape))  # `norm2` is no sharper
    return True if proven_within(matrix, bound * (1 - spare)) < bound else None


def _start(matrix: Tensor) -> Tensor:
    return 1 + (torch.arange(matrix.shape[1], device=matrix.device) % 7).float() / 10


def _power(a: Tensor, x: Tensor) -> tuple[float, Tensor]:
    """||a||_2 from below, and the vector to go on from."""
    for _ in range(POWERS):
        y = a.mT @ (a @ x)
        size = float(torch.linalg.vector_norm(y))
        if not 0 < size < math.inf:
            return size, x
        x = y / size
    return math.sqrt(size), x
