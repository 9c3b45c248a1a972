"""Layers whose W_hh has no cycle of units: how far apart two runs are after k steps, unit by unit. README.md, Cascades, has the
derivation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bounds import length
from .contraction import Errors
from .weights import LayerWeights

SHARES = (0.05, 0.1, 0.2)  # of the way from the largest forget gate to 1: the rates at which a norm is looked for
LONGEST = 2**14  # steps; no bound rises with time, so that the last one found holds for ever
STILL, LEAST = 1e-9, 1e-30  # where to stop: no unit falls by more than this share, all are below this
SOME = 256  # steps between jumps; what jumps more rarely jumps at most once in these
SMALL = 1e-15
TINY = 1e-280  # the least that is taken for a difference: far above what float64 rounds to 0


def depth(w: LayerWeights) -> int | None:
    """The units on the longest path of W_hh, where a unit follows those that it reads by any gate: in a cascade, its groups. None where
    some path is a circle, and for layers with W_hr."""
    if w.w_hr is not None:
        return None
    reads = (w.w_hh.unflatten(0, (-1, w.hidden)) != 0).any(0).double()  # (H, H)
    rest, rounds = torch.ones(w.hidden, dtype=torch.float64, device="cpu"), 0
    while rest.any():
        after = rest * (reads @ rest > 0)  # those that read one of the rest
        if torch.equal(after, rest):
            return None
        rest, rounds = after, rounds + 1
    return rounds


def settled(needed: Callable[[Tensor], Tensor], units: int, rounds: int) -> Tensor | None:
    """v (units,) = max(1, needed(v)), which is found within so many rounds where no unit needs itself; None if it is too large a number."""
    v = torch.ones(units, dtype=torch.float64, device="cpu")
    for _ in range(rounds):
        v = needed(v).clamp(min=1.0)
    return v if torch.isfinite(v).all() else None


def rates(forget: float) -> list[float]:
    return [forget + share * (1 - forget) for share in SHARES]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two runs from states within a box are `a` apart, unit by unit: a = box at first, and step(a, eps) after a step in which a is, with
    inputs that differ by at most eps in each entry; step is monotone. As `Contraction` has it, but without a norm.

    box     (N,) the largest difference of each number of a state, those of h last
    hidden  how many are of h
    rate    at which the layer forgets in the end: in some norm it contracts by it at every step
    """

    step: Callable[[Tensor, float], Tensor] = field(repr=False)
    box: Tensor = field(repr=False)
    hidden: int
    rate: float
    norm: str = field(default="inf", init=False)
    _runs: dict[float, _Run] = field(default_factory=dict, init=False, repr=False)

    def truncated(self, k: int, eps: float) -> Errors:
        """After k steps, or more. eps is rounded up to a power of the root of 2: a search for a window asks for many."""
        eps = 2.0 ** (math.ceil(2 * math.log2(eps)) / 2) * (1 + 2.0**-50) if 0 < eps < math.inf else eps
        if eps not in self._runs:
            self._runs[eps] = _Run(self, eps)
        return self._runs[eps].at(k)

    def rounded(self, dc: float, dh: float, eps: float) -> Errors:
        """At any time, where each step adds up to dc to a difference of c and dh to one of h."""
        push, a = self._push(dc, dh), self.box
        for _ in range(LONGEST):
            before, a = a, self._next(a, eps, push)
            if _still(before, a):
                break
        return self._errors(a)

    def amplified(self) -> float:
        """As of `Contraction`. The step of a small difference is that of 1, made smaller; larger ones would meet the box."""
        return self.rounded(SMALL, SMALL, 0.0)[0] / SMALL

    def jumped(self, dc: float, dh: float, chunk: int, eps: float) -> Errors:
        """At any time, from no difference, where a step in `chunk` adds as much."""
        chunk, push = min(chunk, SOME), self._push(dc, dh)
        border = worst = self.box  # before a jump, and ever
        for _ in range(LONGEST // (2 * chunk) + 1):
            a = worst = torch.minimum(border + push, self.box)
            after = torch.zeros_like(a)
            for number in range(1, 2 * chunk):  # the next jump comes after chunk steps, or more
                a = torch.minimum(self.step(a, eps), self.box)
                worst, after = torch.maximum(worst, a), torch.maximum(after, a) if number >= chunk else after
            before, border = border, torch.minimum(border, after)
            if _still(before, border):
                break
        return self._errors(worst)

    def _next(self, a: Tensor, eps: float, push: Tensor | None = None) -> Tensor:
        """A bound after t steps is one after t + 1 too, since a run may begin one step later."""
        after = self.step(a, eps) if push is None else self.step(a, eps) + push
        return torch.minimum(a, torch.where(after > 0, after.clamp(min=TINY), after))

    def _push(self, dc: float, dh: float) -> Tensor:
        others = len(self.box) - self.hidden
        return torch.tensor([dc] * others + [dh] * self.hidden, dtype=torch.float64, device="cpu")

    def _errors(self, a: Tensor) -> Errors:
        h = a[-self.hidden :]
        return float(h.max()) * (1 + 2.0**-45), length(h)


class _Run:
    """The errors after 1, 2, ... steps, as far as they were asked for."""

    def __init__(self, system: Comparison, eps: float) -> None:
        self.system, self.eps, self.a = system, eps, system.box
        self.found: list[Errors] = []
        self.over = False

    def at(self, k: int) -> Errors:
        while len(self.found) < k and not self.over:
            before, self.a = self.a, self.system._next(self.a, self.eps)
            self.found.append(self.system._errors(self.a))
            still = _still(before, self.a)
            self.over = still or float(self.a.max()) <= LEAST or len(self.found) >= LONGEST
        return self.found[min(k, len(self.found)) - 1]


def _still(before: Tensor, after: Tensor) -> bool:
    return bool((after >= before * (1 - STILL)).all())
