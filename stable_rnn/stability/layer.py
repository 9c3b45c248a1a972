"""The certificate of one layer and direction."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .bounds import drive_of_bound, drive_of_data
from .cells import STABILITY
from .comparison import Comparison
from .contraction import Contraction, norm2
from .weights import LayerWeights


@dataclass(frozen=True)
class LayerCertificate:
    """One layer and direction.

    name     "l0", "l0_reverse", ... as in the weights' names ("" for a cell)
    rate     V(after) <= rate * V(before) for two states under the same inputs, in a norm V of the kind `norm`, "2" or "inf"
    forget   largest forget gate there can be (LSTM), else None
    depth    the groups of a cascade, as the weights have them; None for other layers
    bound    largest |h| there can be;  bound2 the largest ||h||_2
    """

    name: str
    cell: str
    rate: float
    norm: str
    forget: float | None
    bound: float
    bound2: float
    contractions: tuple[Contraction | Comparison, ...] = field(repr=False)
    sizes: tuple[int, int] = field(repr=False)  # of the input and of h
    cell_bound: float = field(repr=False)  # largest |c|
    depth: int | None = None

    @property
    def apart(self) -> float:
        """Two reachable states differ by at most this times their bound."""
        return STABILITY[self.cell].apart

    @property
    def amplified(self) -> float:
        """Bound of what a push of 1 in every number of the state, at every step, builds up in h."""
        return min(c.amplified() for c in self.contractions)


def layer_certificate(
    w: LayerWeights,
    x: Tensor,
    x2: float,
    data: Tensor | None,
    cap: float,
    target: tuple[float, float] | None,
    norms: tuple[str, ...] = ("2", "radius", "inf"),
    upper: bool = False,
) -> tuple[LayerCertificate, Tensor]:
    """One layer and direction, and the bound of |h| per unit (P,)."""
    gain = norm2(w.w_ih) if data is None or upper else 0.0
    drive = drive_of_bound(w, x, x2, gain) if data is None else drive_of_data(w, data)
    reach = STABILITY[w.cell].reach(w, drive, gain, cap, norms, upper, target)
    best = min(reach.contractions, key=lambda c: c.rate)
    sizes = w.w_ih.shape[1], w.w_hh.shape[1]
    layer = LayerCertificate(
        w.tag,
        w.cell,
        best.rate,
        best.norm,
        reach.forget,
        float(reach.h.abs().max()),
        reach.h2,
        tuple(reach.contractions),
        sizes,
        reach.cell,
        reach.depth,
    )
    return layer, reach.h
