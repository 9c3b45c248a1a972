"""How far the demo is, as bars on a terminal and as lines elsewhere, and how long each part of it may take."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EVERY = 10.0  # seconds between two lines of one part
SHARES = {
    "train": 8,
    "run": 2,
    "windows of": 1,
    "speed of": 3,
}  # of the time; the last one comes once, the others for each model


class Part:
    """One part of the demo's work: `total` turns, of which those that begin after `end` are left out."""

    def __init__(self, schedule: Schedule, what: str, total: int, unit: str, seconds: float) -> None:
        self.schedule, self.what, self.total, self.unit, self.done = schedule, what, total, unit, 0
        self.begin = self.said = time.monotonic()
        self.end = self.begin + seconds
        self.bar = schedule.bars.add_task(what, total=total, note="")
        if not schedule.terminal:
            schedule.say(f"{what}: {total} {unit}")

    def advance(self, note: str = "") -> None:
        self.done += 1
        self.schedule.bars.update(self.bar, advance=1, note=note)
        now = time.monotonic()
        if not self.schedule.terminal and now - self.said >= EVERY:
            self.said = now
            self.schedule.say(
                f"  {self.done} of {self.total} {self.unit}, {now - self.begin:.0f} s{', ' * bool(note)}{note}"
            )

    def room(self, seconds: float = 0.0) -> bool:
        """Whether there is time for something that takes so long."""
        return time.monotonic() + seconds < self.end


class Schedule:
    """Shares `seconds` out among the parts: one takes its share of what is left, and leaves what it did not need to those after it."""

    def __init__(self, console: Console, seconds: float, models: int) -> None:
        names, notes = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        self.console, self.terminal = console, console.is_terminal
        columns = (names, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), notes)
        self.bars = Progress(*columns, console=console, disable=not self.terminal)
        *each, last = SHARES.values()
        self.end, self.shares = time.monotonic() + seconds, models * sum(each) + last
        self.parts: list[Part] = []

    def __enter__(self) -> Schedule:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def part(self, kind: str, model: str, total: int, unit: str) -> Part:
        seconds = max(self.end - time.monotonic(), 0.0) * SHARES[kind] / self.shares
        self.shares -= SHARES[kind]
        self.parts.append(Part(self, f"{kind} {model}", total, unit, seconds))
        return self.parts[-1]

    @property
    def cut(self) -> list[str]:
        """The parts that there was no time for, or not for all of them."""
        return [
            f"{part.what}: {part.done} of {part.total} {part.unit}" for part in self.parts if part.done < part.total
        ]

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)
