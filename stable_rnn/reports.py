"""What `Verified` runs say: `module.last_report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .ops.recurrence.report import WHY, Run


@dataclass(frozen=True)
class LayerReport:
    """What a `Verified` run did in one layer and direction."""

    layer: int
    direction: int  # 1: reverse
    passes: int  # 1: the first run was good, or the only one
    chunk: int  # 0: there were no lanes
    warmup: int
    correct: str  # how starts were corrected, where they were: "none", "decay", "probes"
    lanes: int  # over all rows of the batch
    lanes_rerun: int  # each as often as it ran again, probes included
    jumps: tuple[float, ...]  # the largest of each pass (of the first 24), before the next one mended it
    largest_jump: float  # that stays
    predicted: float  # cost of the first pass over that of the plain recurrence
    fallback: bool  # the result is that of the plain recurrence, bitwise
    plain_from: (
        int | None
    )  # steps after which the plain recurrence went on, if it did; in the backward pass counted from the end
    why: str  # the plain recurrence ran; else empty
    rounds: int = (
        1  # runs of this rank's stretch of time, in `stable_rnn.distributed`; the other numbers are of the last
    )

    @classmethod
    def of(cls, place: tuple[int, int], numbers: torch.Tensor) -> LayerReport:
        run = Run.of(numbers)
        plain = None if run.plain_from < 0 else run.plain_from
        return cls(
            *place,
            run.passes,
            run.chunk,
            run.warmup,
            run.correct,
            run.lanes,
            run.rerun,
            tuple(run.jumps),
            run.left,
            run.predicted,
            run.plain_from == 0,
            plain,
            WHY[run.why],
            run.rounds,
        )

    def __str__(self) -> str:
        name = f"layer {self.layer}{', reverse' if self.direction else ''}: "
        name += f"{self.rounds} rounds over the ranks, " * (self.rounds > 1)
        lanes = f"{self.lanes} lanes of {self.chunk} steps, warm-up {self.warmup}, {self.passes} pass"
        lanes += "es" * (self.passes > 1) + f", {self.lanes_rerun} rerun ({self.correct})" * (self.lanes_rerun > 0)
        lanes += f", jumps {' '.join(f'{jump:.1g}' for jump in self.jumps)}" * bool(self.jumps)
        if self.plain_from is None:
            return name + lanes
        since = "" if self.fallback else f" after {self.plain_from} steps"
        return f"{name}plain recurrence{since}, because {self.why}" + f" ({lanes})" * (self.chunk > 0)


def _no_bound(jump: float, chunk: int) -> None:
    return None


@dataclass(frozen=True)
class Report:
    """What a `Verified` run did, over all layers and directions of a module that have that plan; `str()` says it in words."""

    passes: int  # most passes of any layer; 1: the first run was good
    lanes_rerun: int
    largest_jump: float  # that stays, relative to max(1, |state|), in the backward pass to the largest adjoint; 0 after a fallback
    fallback: bool  # some layer ran the plain recurrence
    layers: tuple[LayerReport, ...] = ()
    backward: Report | None = None  # of the backward pass, once it ran
    bound: Callable[[float, int], float | None] = field(default=_no_bound, repr=False, compare=False)

    @property
    def forward_bound(self) -> float | None:
        """Bound on the largest output error in exact arithmetic, for inputs within the certificate's bound; None without a certificate.

        Computed when asked for, from the module's weights as they are then."""
        return self.bound(self.largest_jump, min((layer.chunk for layer in self.layers if layer.chunk), default=1))

    @classmethod
    def of(
        cls,
        places: Sequence[tuple[int, int]],
        numbers: Sequence[torch.Tensor],
        backward: Report | None = None,
        bound: Callable[[float, int], float | None] = _no_bound,
    ) -> Report:
        """From what the runs of these layers and directions gave."""
        layers = tuple(LayerReport.of(place, run) for place, run in zip(places, numbers))
        most, rerun = max(x.passes for x in layers), sum(x.lanes_rerun for x in layers)
        left, fallback = max(x.largest_jump for x in layers), any(x.plain_from is not None for x in layers)
        return cls(most, rerun, left, fallback, layers, backward, bound)

    def __str__(self) -> str:
        lines = [str(layer) for layer in self.layers]
        lines += [f"backward, {layer}" for layer in self.backward.layers] if self.backward else []
        return "\n".join(lines)
