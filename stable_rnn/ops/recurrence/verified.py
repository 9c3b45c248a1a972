"""Checked lanes: run chunks side by side, compare each lane's start with the state its predecessor reached, correct all starts, run again.

The result is a trajectory whose only defects are jumps of at most `tol` (relative to max(1, |state|)) at chunk borders. The backward
pass is the same in reverse time, with `tol` relative to the largest adjoint. Lanes are run in stretches, in visiting order: the first is so
short that a layer which does not forget costs little more than its plain run, and each that agrees pays for a longer one. Where lanes
do not pay, the plain recurrence goes on from the last state that is certain.
"""

from __future__ import annotations

from math import inf, log
from typing import Any

import torch
from torch import Tensor

from . import corrections, policy, reference, report
from .corrections import Borders, corrected
from .policy import Case, Choice, Ledger, Memory
from .report import Run
from .sweeps import Sweep

IGNORED = 0.1  # of tol: what a correction may want to move a start by that then stays
NEAR = 16  # times tol: what may be rounding
PAYS = 0.75  # a pass pays if it leaves at most this part
TINY, HUGE = 1e-30, 1e30  # jumps beyond count as these


def run(sweep: Sweep, memory: Memory | None = None, case: Case | None = None) -> tuple[Any, Run]:
    """A sweep's output (`Output`, `Adjoint`), and what was done. `memory` of earlier calls of this layer and direction; `case`: what the
    caller asked for, if that is not the sweep's own rows."""
    device = "reference" if sweep.backend is reference else sweep.device.type
    choice = policy.choose(sweep.p, sweep.batch, sweep.inputs.w_hh.numel(), device)
    case = Case.of(sweep.inputs, sweep.p) if case is None else case
    if not choice.why and memory is not None and memory.fell_back(case):
        choice.why = report.REMEMBERED
    if choice.why:
        sweep.whole()
        return sweep.out, Run(predicted=choice.predicted, passes=1, plain_from=0, why=choice.why)
    ledger, found = Ledger(choice), Run()
    ledger.credit = memory.credit(case) if memory is not None else 0.0
    if choice.measure:
        choice = _measured(sweep, choice, ledger)
    while not choice.why:
        lanes = _Lanes(sweep, choice, ledger, found)
        choice.why = lanes.run()
        longer = policy.longer(choice, ledger) if choice.why else None
        if longer is None:
            break
        choice = longer
    if choice.why:
        _go_on_plainly(sweep, ledger, found)
    dear = not ledger.free and ledger.spent > ledger.costs.plain
    if (choice.why or dear) and memory is not None:
        memory.falls_back(case)
    found.predicted, found.why = choice.predicted, choice.why
    return sweep.out, found


def _measured(sweep: Sweep, choice: Choice, ledger: Ledger) -> Choice:
    """The choice with the warm-up that a trial finds: at a few places of each row, how far is a state after a warm-up from that after a
    longer one?"""
    batch, device, lengths = sweep.batch, sweep.device, policy.TRIAL
    places = policy.trial_places(choice, ledger)
    if not places:
        return choice
    row = torch.arange(batch, device=device).repeat(places)
    part = torch.arange(1, places + 1, device=device).repeat_interleave(batch)
    time = sweep.length[row] * part // (places + 1)
    most = sweep.length[row] - time if sweep.backward else time
    steps = torch.stack([most.clamp(max=length) for length in lengths])  # (3, places * B)
    begin = time if sweep.backward else time - steps
    h, c = sweep.zeros(steps.numel())
    ends = sweep.ends(row.repeat(len(lengths)), begin.expand_as(steps).flatten(), steps.flatten(), h, c)
    differences = []
    for end in ends:
        if end.numel():
            end = end.view(len(lengths), len(row), -1)
            size = end.abs().nan_to_num(0.0, 0.0).max() if sweep.backward else end[-1].abs().clamp_min(1)
            differences.append(
                ((end[:-1] - end[-1]).abs() / size).nan_to_num(0.0 if sweep.backward else inf).amax((1, 2))
            )
    jumps = torch.stack(differences).amax(0).tolist() if differences else [0.0, 0.0]
    return policy.with_memory(choice, policy.needed_warmup(jumps, lengths[:-1], choice.p.tol), ledger)


def _go_on_plainly(sweep: Sweep, ledger: Ledger, found: Run) -> None:
    """The plain recurrence: all of it, from the first border on that is not exactly where it would be; or, where a stretch of lanes has
    agreed, the rest, from the first border that does not."""
    if sweep.out is None:
        found.chunk, found.plain_from, found.passes = 0, 0, 1
        return sweep.whole()
    p, ran = sweep.p, found.ran
    jump, _ = jumps(sweep.borders(1, ran), None if not sweep.backward else sweep.largest())
    first = lambda differs: min([ran, *(1 + differs.any(1).nonzero()[:1, 0]).tolist()])  # noqa: E731
    exact, good = first(~(jump == 0)), first(~(jump <= p.tol))
    found.plain_from, start = (good * p.stride, good) if ledger.agreed else (0, exact)
    found.left = float(jump[: start - 1].max()) if start > 1 else 0.0
    if start < sweep.lanes:
        sweep.rest(start)


class _Lanes:
    """A run in lanes, as far as it pays. Borders are numbered as the lanes behind them."""

    def __init__(self, sweep: Sweep, choice: Choice, ledger: Ledger, found: Run) -> None:
        self.sweep, self.choice, self.ledger, self.found = sweep, choice, ledger, found
        sweep.cut(choice.p)
        found.chunk, found.warmup, found.correct = choice.p.stride, choice.p.warmup, choice.correct
        found.passes, found.jumps, found.left, found.ran = 1, [], 0.0, 0

    def run(self) -> int:
        """All lanes, stretch by stretch: DONE, or why not."""
        sweep, p, first = self.sweep, self.choice.p, 0
        while first < sweep.lanes:
            last = self.ledger.stretch(p, first)
            if last == first:
                return report.BUDGET
            sweep.run(first, last)
            self.ledger.spend((last - first) * sweep.batch, p.stride + p.warmup)
            self.found.ran, self.found.lanes = last, last * sweep.batch
            why = self.settle(max(first, 1), last)
            if why:
                return why
            first, self.ledger.agreed = last, True
        return report.DONE

    def settle(self, first: int, last: int) -> int:
        """Correct and rerun the lanes [first, last) until their borders agree: DONE, or why not."""
        sweep, p, ledger, found = self.sweep, self.choice.p, self.ledger, self.found
        passes, progress = 1, _Progress()
        quiet = None  # lanes whose start may differ, for it moves no output
        while first < last:
            borders = sweep.borders(first, last)
            scale = sweep.largest() if sweep.backward else None
            jump, of_h = jumps(borders, scale)
            bad = ~(jump <= p.tol) if quiet is None else ~((jump <= p.tol) | quiet & (of_h <= p.tol))
            worst, typical, count, place = _numbers(jump, bad)
            found.passes = max(found.passes, passes)
            found.saw(passes - 1, worst)
            if not count:
                found.left = max(found.left, worst)
                break
            if why := self.stop(passes, progress, (worst, typical, count), borders):
                return why
            certain = (first + place) * p.stride
            probing = self.probing(borders) * p.stride
            if probing and not ledger.allows(probing, certain, inf):
                return report.BUDGET
            h, c = self.starts(borders, first, last, progress.rounding)
            moved, _ = jumps(borders._replace(h_end=h, c_end=c), scale)
            chosen = bad if progress.rounding else bad | (moved > IGNORED * p.tol)
            again = chosen.flatten().nonzero()[:, 0]
            price = ledger.costs.run(len(again), p.stride) + ledger.costs.host + ledger.costs.mend
            if not ledger.allows(price, certain, (price + probing) * progress.to_come(p.tol) - probing):
                return report.BUDGET
            places = first * sweep.batch + again
            rows = sweep.rows_of(places) if p.on_output and not sweep.backward else None
            outputs = None if rows is None else sweep.out.y[rows].float()
            sweep.rerun(places, h.flatten(0, 1)[again], c.flatten(0, 1)[again] if c.numel() else None)
            if outputs is not None:
                quiet = _quiet(quiet, chosen, again, _change(outputs, sweep.out.y[rows].float()) <= p.tol)
            ledger.spent += price
            found.rerun += len(again)
            passes += 1
        return report.DONE

    def stop(self, passes: int, progress: _Progress, numbers: tuple[float, float, int], borders: Borders) -> int:
        """Why no further pass is to be run, or DONE."""
        p, found = self.choice.p, self.found
        if passes >= p.max_passes:
            return report.ALL_PASSES
        if self.ledger.free and p.stride * (passes + 1) + p.warmup > p.steps:
            return report.DEPTH
        stalled = progress.stalled(*numbers, p.tol, found.correct)
        slow = passes > 1 and passes + progress.to_come(p.tol) > p.max_passes
        if (stalled or slow) and self.harder(borders):
            progress.__init__()  # type: ignore[misc]  # of another correction
            return report.DONE
        return report.STALLED if stalled else report.DONE

    def starts(self, borders: Borders, first: int, last: int, plain: bool) -> tuple[Tensor, Tensor]:
        """New starts of the lanes behind the borders. `plain`: where the lanes before them end."""
        sweep, correct = self.sweep, self.found.correct
        if plain or correct == "none":
            return borders.h_end, borders.c_end
        response = self.probes(borders, first, last) if correct == "probes" else None
        h, c = corrected(borders, not sweep.backward, sweep.inputs.w_hr, response)
        return h if sweep.backward else h.to(sweep.inputs.rows.dtype).to(h.dtype), c  # as steps store it

    def probes(self, borders: Borders, first: int, last: int) -> corrections.Response | None:
        """The responses of the lanes [first - 1, last - 1), or None where that is too much to keep."""
        sweep, slow = self.sweep, corrections.slow_units(borders.decay)
        lanes = borders.exists.numel() * len(slow)
        if not lanes or lanes * (borders.h.shape[-1] + borders.c.shape[-1]) > corrections.RESPONSES:
            return None
        h, c = (sweep.visited(t, first - 1, last - 1) for t in sweep.state[:2])
        self.ledger.spend(lanes, self.choice.p.stride)
        self.found.rerun += lanes
        ends = lambda lane, unit, h, c: sweep.probe((first - 1) * sweep.batch + lane, unit, h, c)  # noqa: E731
        w_hr = sweep.inputs.w_hr
        return corrections.probed(ends, h, c, borders.h_end, borders.c_end, slow, sweep.backward, w_hr)

    def probing(self, borders: Borders) -> float:
        """What probes cost, over one lane's run; 0 where there are none."""
        if self.found.correct != "probes":
            return 0.0
        lanes = borders.exists.numel() * len(corrections.slow_units(borders.decay))
        return self.ledger.costs.run(lanes, 1) if lanes else 0.0

    def harder(self, borders: Borders) -> bool:
        """Probes in place of decay, where the plan leaves that open, the device is one for them, and they may be paid."""
        ledger, found, stride = self.ledger, self.found, self.choice.p.stride
        if self.choice.p.correct != "auto" or found.correct != "decay" or not ledger.costs.device.probes:
            return False
        found.correct = "probes"
        if 0 < self.probing(borders) and ledger.allows(self.probing(borders) * stride, stride, inf):
            return True
        found.correct = "decay"
        return False


def jumps(borders: Borders, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest difference between the states before each border and behind it, of all and of h alone: (n, B). Relative to
    max(1, |state|), or to `scale`."""
    of = []
    for start, end in ((borders.h, borders.h_end), (borders.c, borders.c_end)):
        if start.shape[-1] and start.numel():
            same = (start == end) | (start.isnan() & end.isnan())
            size = end.abs().clamp_min(1) if scale is None else scale
            of.append(torch.where(same | ~borders.exists[..., None], 0.0, (start - end).abs() / size).amax(2))
    of = of or [borders.exists.float() * 0]
    return (of[0], of[0]) if len(of) == 1 else (torch.maximum(*of), of[0])


class _Progress:
    """What passes have brought: a pass pays if it brings down the jumps that are too large, in their geometric mean, or their number.
    The largest alone may grow for a pass or two while most fall."""

    def __init__(self) -> None:
        self.typical, self.count, self.rate, self.idle = inf, inf, 0.0, 0
        self.rounding = False  # what is left is rounding, to which corrections would add

    def stalled(self, worst: float, typical: float, count: int, tol: float, correct: str) -> bool:
        """Whether passes have stopped to pay; corrections may take two to begin. Rounding ends when it does."""
        pays = typical < PAYS * self.typical or count <= PAYS * self.count
        self.rate = typical / self.typical if typical < self.typical else 1.0
        self.idle = 0 if pays else self.idle + 1
        self.typical, self.count = typical, count
        self.rounding |= self.idle > 0 and worst <= NEAR * tol
        return self.idle > (correct != "none") and not self.rounding

    def to_come(self, tol: float) -> float:
        """How many more passes it takes if they go on to bring what the last one did."""
        if self.idle or not 0 < self.rate < 1 or not tol > 0:
            return inf
        return max(1.0, log(tol / self.typical) / log(self.rate))


def _numbers(jump: Tensor, bad: Tensor) -> tuple[float, float, int, int]:
    """The largest jump, the geometric mean of those that are bad, their number, the first border that has one: one transfer."""
    if not jump.numel():
        return 0.0, 0.0, 0, 0
    size = jump.double().nan_to_num(inf)
    typical = torch.where(bad, size.clamp(TINY, HUGE).log(), 0.0).sum() / bad.sum().clamp_min(1)
    found = torch.stack([size.max(), typical.exp(), bad.sum().double(), bad.any(1).double().argmax().double()])
    worst, mean, count, first = found.tolist()
    return worst, mean, int(count), int(first)


def _change(before: Tensor, after: Tensor) -> Tensor:
    """The largest difference between the outputs of lanes (n, C, P): (n,)."""
    return ((before - after).abs() / after.abs().clamp_min(1)).flatten(1).amax(1)


def _quiet(before: Tensor | None, chosen: Tensor, again: Tensor, still: Tensor) -> Tensor:
    """Lanes (n, B) that ran again from their predecessor's end without moving an output, if that end has not changed since."""
    ran = torch.zeros_like(chosen.flatten()).index_copy(0, again, still).view(chosen.shape)
    if before is None:
        return ran
    ahead = torch.cat([torch.zeros_like(chosen[:1]), chosen[:-1]])  # the lane before has run again
    return torch.where(chosen, ran, before & ~ahead)
