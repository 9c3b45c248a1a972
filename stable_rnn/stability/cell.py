"""What certificates and projections know of one cell. `rnn.py` and `lstm.py` say it for the cells that there are, `cells.py` finds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import Drive
from .comparison import Comparison
from .contraction import Contraction
from .limits import Limits
from .weights import LayerWeights, Names

Ball = tuple[
    Tensor, tuple[float, ...] | Tensor | None, float
]  # (W, d, bound): ||diag(d) W||_2 <= bound, d a number for each gate, or (G, H) by row, or None for 1


class Reach(NamedTuple):
    """How far the states of a layer get, and how it brings them closer.

    h       (P,) >= |h|, and h2 >= ||h||_2
    cell    largest |c|, 0 without one
    forget  largest forget gate there can be, None without one
    depth   the groups of a cascade, None for other layers
    """

    contractions: Sequence[Contraction | Comparison]
    h: Tensor
    h2: float
    cell: float
    forget: float | None
    depth: int | None = None


class Verdict(NamedTuple):
    """Whether a layer is certified within limits; its h and h2 as in `Reach`."""

    inside: bool
    h: Tensor
    h2: float


class CellStability:
    """One cell. To add one: a subclass in the file of its family (`Cell.family`), which lists it in `CELLS`."""

    apart = 2.0  # two reachable states differ by at most this times their bound
    cascade_forget = 1.0  # what `Cascade` clamps the forget gate at, unless it is told
    assumed = ""  # what the certificate of a state dict takes for granted, since names and shapes don't tell, beside the clamp

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
        """Of one layer and direction whose inputs do what `drive` says; gain >= ||W_ih||_2, or 0 where inputs don't differ.

        cap: the forget gate's clamp, 1 for none. norms: of "2", "radius", "inf", those to look for a contraction in. upper: inputs may
        differ, so gains matter. target: a rate and a share of the forget gate worth trying."""
        raise NotImplementedError

    def verdict(self, w: LayerWeights, x: Tensor, limits: Limits) -> Verdict | None:
        """What a certificate would say of the layer, for inputs |x_t| <= x (I,), where less than a certificate tells; else None."""
        return None

    def step_error(self, drive: float, unit: float, h: float, cell: float) -> tuple[float, float]:
        """About the largest rounding error of c and of h in one step, from that of a pre-activation, relative to the result or to 1, and
        that of storing a number; h >= |h|, cell >= |c|."""
        raise NotImplementedError

    def check(self, limits: Limits) -> None:
        """ValueError if no weights of the cell obey these limits."""

    def written(self, limits: Limits) -> tuple[str, ...]:
        """The kinds of weights that a projection may write."""
        return "weight_hh", "weight_hr"

    def balls(self, weights: dict[str, Tensor], names: Names, limits: Limits, margin: float) -> list[Ball]:
        """The spectral norms that one layer's weights have to obey, `margin` inside."""
        raise NotImplementedError

    def bring_in(
        self, weights: dict[str, Tensor], names: Names, limits: Limits, margin: float, x: Tensor, least: torch.dtype
    ) -> None:
        """All else that they have to obey, in place. x (I,) >= |inputs of the layer|; eigenvectors are computed in `least` or wider."""
        raise NotImplementedError
