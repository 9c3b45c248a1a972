"""What a checked run says of itself: numbers of fixed size, so that ops, compiled graphs and exports hand them on as a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

PASSES = 24  # whose jumps are kept
NONE = -1.0  # no jump
CORRECTIONS = ("none", "decay", "probes")
DONE, CHEAPER, MEMORY, REMEMBERED, ALL_PASSES, DEPTH, STALLED, BUDGET, FORWARD_MODE = range(9)
WHY = {
    DONE: "",
    CHEAPER: "the plain recurrence is predicted to be the cheaper one",
    MEMORY: "the state remembers for longer than a warm-up pays for",
    REMEMBERED: "it fell back in a call before this one",
    ALL_PASSES: "max_passes were not enough",
    DEPTH: "the passes would be as deep as the plain recurrence",
    STALLED: "the jumps stopped shrinking",
    BUDGET: "the next pass might make the call cost more than the plain recurrence does",
    FORWARD_MODE: "forward mode runs the plain recurrence",
}


@dataclass
class Run:
    """Of one layer and direction, forward or backward."""

    chunk: int = 0  # 0: no lanes
    warmup: int = 0
    correct: str = "none"
    predicted: float = 0.0  # cost of the first pass over that of the plain recurrence
    passes: int = 0  # most of any stretch of lanes; 0: no lanes
    lanes: int = 0
    rerun: int = 0  # lanes, each as often as it ran again
    plain_from: int = (
        -1
    )  # visited time from which the plain recurrence went on; 0: all of it is bitwise that; -1: nowhere
    rounds: int = 1  # of the ranks that time is sharded over
    why: int = DONE
    jumps: list[float] = field(default_factory=list)  # the largest of every pass, before its correction
    left: float = 0.0  # the largest that stays
    ran: int = 0  # lanes of each row that have been run so far; not reported

    def saw(self, index: int, jump: float) -> None:
        """The largest jump after pass `index` of a stretch."""
        if index < len(self.jumps):
            self.jumps[index] = max(self.jumps[index], jump)
        elif index < PASSES:
            self.jumps.append(jump)

    def tensor(self) -> Tensor:
        """(SIZE,) float64 on the CPU."""
        numbers = [getattr(self, name) for name in _NUMBERS]
        numbers += [CORRECTIONS.index(self.correct), *self.jumps, *[NONE] * (PASSES - len(self.jumps))]
        return torch.tensor(numbers, dtype=torch.float64)

    @classmethod
    def of(cls, numbers: Tensor) -> Run:
        values = numbers.tolist()
        found = cls()
        for name, value in zip(_NUMBERS, values):
            setattr(found, name, type(getattr(found, name))(value))
        correct, *jumps = values[len(_NUMBERS) :]
        found.correct, found.jumps = CORRECTIONS[int(correct)], [jump for jump in jumps if jump != NONE]
        return found


_NUMBERS = ("chunk", "warmup", "predicted", "passes", "lanes", "rerun", "plain_from", "why", "left", "rounds")
SIZE = len(Run().tensor())
