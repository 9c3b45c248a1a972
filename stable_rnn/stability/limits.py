"""What the weights of a `Certified` module obey: all that certificates and projections know of a stable set."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..cells import CELLS


@dataclass(frozen=True)
class Limits:
    """The fields of `Certified`, which checks them."""

    rate: float
    norm: str
    forget: float
    input_bound: float
    clamp: bool

    @property
    def cap(self) -> float:
        return self.forget if self.clamp else 1.0

    @property
    def target(self) -> tuple[float, float]:
        # measured on one text (README.md); where the weights bound the forget gate, its recurrent part is small anyway
        return self.rate, 0.3 if self.clamp else 0.05

    def input_limit(self, cell: str) -> float:
        return math.inf if self.clamp and CELLS[cell].forgets is not None else self.input_bound
