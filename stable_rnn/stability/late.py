"""Whether the weights on a GPU are finite, which training steps ask without waiting for the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..ops.spectral.later import LAG, Sent, capturing, send

PERIOD = 16  # calls between two questions


class LateLook:
    """The first call waits. Then every PERIOD-th one asks, and the answer is read LAG calls later: a fixed number, so that results repeat.
    While a CUDA graph is captured nothing is asked or read."""

    def __init__(self) -> None:
        self.calls = 0
        self.sent: Sent | None = None

    def suspect(self, sums: Callable[[], Tensor], weights: Sequence[Tensor]) -> bool:
        """Whether the sums of the weights were not finite when last asked."""
        if capturing(weights):
            return False
        self.calls += 1
        if self.calls == 1:
            return not sums().isfinite().all()
        if self.sent is not None and self.calls >= self.sent.call + LAG:
            (found,), self.sent = self.sent.read(), None
            return not found.isfinite().all()
        if self.calls % PERIOD == 0:
            self.sent = send(self.calls, sums())
        return False
