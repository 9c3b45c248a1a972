"""Checked runs over all ranks: the ranks are lanes of a checked run themselves (`ops/recurrence/verified.py`), each with chunks inside.

Each rank guesses where the rank before ends: that one runs its last steps alone, from zero. All run their times from there, compare where
they started with where the rank before did end, correct all starts at once (`corrections.py`), and those run again whose start moves. The
first start that is wrong is corrected to that very end, so that it is right from then on: no more rounds than ranks. The backward pass
is the same with adjoints, from the first steps of the rank behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.recurrence import policy, report, run
from ..ops.recurrence.corrections import Borders, corrected
from ..ops.recurrence.function import Note
from ..ops.recurrence.problem import Adjoint, BackwardInputs, Inputs, Problem
from ..ops.recurrence.reference import arithmetic
from ..ops.recurrence.verified import IGNORED, jumps
from .way import Order, State, Way, chosen


def forward(inputs: Inputs, p: Problem, way: Way, save: bool, note: Note | None) -> tuple[State, tuple[Tensor, ...]]:
    """Where this rank starts, and y, h_n, c_n, saved, cells, report."""
    memory, order, corrects = note.memory if note else None, way.states, _corrects(p, way)

    def run_from(start: State) -> tuple[State, tuple[Tensor, ...]]:
        out = run.forward(inputs._replace(h0=start[0], c0=start[1]), p, save or corrects, memory)
        return _state(p, *out[1:3]), out

    kept = (lambda out: _kept(out[3], p, way)) if corrects else None
    first = _arrived(order, _tails(inputs, p, way), (inputs.h0, inputs.c0))
    found = _settled(run_from, kept, first, p, order, inputs.w_hr)
    return found.start, (*found.out[:5], found.report(found.out[5]))


def backward(inputs: BackwardInputs, p: Problem, way: Way, note: Note | None) -> Adjoint:
    memory, order = note.memory if note else None, way.adjoints

    def run_from(start: State) -> tuple[State, tuple[Tensor, ...]]:
        out = run.backward(inputs._replace(dh_n=start[0], dc_n=start[1]), p, memory)
        return _state(p, *out[2:4]), out

    kept = (lambda _: _kept(inputs.saved, p, way)) if _corrects(p, way) else None
    first = _arrived(order, _heads(inputs, p, way), (inputs.dh_n, inputs.dc_n))
    found = _settled(run_from, kept, first, p, order, inputs.w_hr, adjoint=True)
    dz, dh, dh0, dc0, numbers = found.out
    if note is not None:
        note.report = found.report(numbers)
    none = dz.new_empty(0)
    return Adjoint(dz, dh, dh0, dc0, none, none, none, none, none)


class _Settled(NamedTuple):
    start: State  # from which all ranks agree
    out: tuple[Tensor, ...]
    rounds: int
    jump: float  # the largest that stays

    def report(self, numbers: Tensor) -> Tensor:
        """That of the last run, with what is of all ranks."""
        found = report.Run.of(numbers)
        found.rounds, found.left = self.rounds, max(found.left, self.jump)
        return found.tensor()


def _settled(
    run_from: Callable[[State], tuple[State, tuple[Tensor, ...]]],
    kept: Callable[[tuple[Tensor, ...]], Tensor] | None,
    start: State,
    p: Problem,
    order: Order,
    w_hr: Tensor | None,
    adjoint: bool = False,
) -> _Settled:
    """Runs from the start, which `run_from` gives the end of and its outputs, until all ranks agree. `kept`: how much of a change of
    its start each unit keeps in such a run, (B, H)."""
    (end, out), rounds = run_from(start), 1
    while True:
        h, c, h_end, c_end = _told(order, start, end)
        scale = _largest(h_end, c_end) if adjoint else None
        borders = Borders(h[1:], c[1:], h_end[:-1], c_end[:-1], c[1:, :, :0], order.arrives[1:])
        jump, _ = jumps(borders, scale)
        bad = ~(jump <= p.tol)
        if not bad.any():
            return _Settled(start, out, rounds, float(jump.max()) if jump.numel() else 0.0)
        # a start that is good enough counts as right
        wrong = bad[..., None]
        borders = borders._replace(h=torch.where(wrong, h[1:], h_end[:-1]), c=torch.where(wrong, c[1:], c_end[:-1]))
        new_h, new_c = borders.h_end, borders.c_end
        if kept is not None:
            decay = order.gather(kept(out))[:-1]
            new_h, new_c = corrected(borders._replace(decay=decay), not adjoint, w_hr, None)
        moved, _ = jumps(borders._replace(h_end=new_h, c_end=new_c), scale)
        again = bad | (moved > IGNORED * p.tol)
        before = order.place - 1
        if before >= 0 and again[before].any():
            new = new_h[before].to(start[0].dtype), None if start[1] is None else new_c[before].to(start[1].dtype)
            start = chosen(again[before][:, None], new, start)
            end, out = run_from(start)
        rounds += 1


def _told(order: Order, *states: State) -> tuple[Tensor, ...]:
    """Every rank's h and c of each of the states: (R, B, P) and (R, B, H), H = 0 without c."""
    parts = [t for h, c in states for t in (h, h[:, :0] if c is None else c)]
    return order.gather(torch.cat(parts, 1).to(arithmetic(parts[0].dtype))).split([t.shape[1] for t in parts], 2)


def _largest(*ends: Tensor) -> Tensor:
    sizes = torch.cat([t.flatten() for t in ends]).abs().nan_to_num(0.0, 0.0)
    return torch.cat([sizes, sizes.new_full((1,), torch.finfo(sizes.dtype).tiny)]).max()


def _state(p: Problem, h: Tensor, c: Tensor) -> State:
    return h, c if p.spec.has_cell else None


def _arrived(order: Order, ends: State, given: State) -> State:
    """This rank's start: the end of the rank before, or the state that is given where no sequence comes from there."""
    h, c = ends
    return chosen(order.here, (order.handed_on(h), None if c is None else order.handed_on(c)), given)


def _tails(inputs: Inputs, p: Problem, way: Way) -> State:
    """Where this rank ends, by its last steps alone."""
    (first, used), steps = way.own, _warmup(p, way, inputs.w_hh)
    some = used.clamp_max(steps)
    h0, c0 = chosen(~way.states.here & (used <= steps)[:, None], (inputs.h0, inputs.c0))
    given = inputs._replace(h0=h0, c0=c0, base=first + (used - some) * way.step, lengths=some)
    return _state(p, *run.forward(given, p._replace(steps=steps).whole(), False)[1:3])


def _heads(inputs: BackwardInputs, p: Problem, way: Way) -> State:
    """The adjoint before this rank's times, by its first steps alone."""
    used, steps = way.own[1], _warmup(p, way, inputs.w_hh)
    dh_n, dc_n = chosen(~way.adjoints.here & (used <= steps)[:, None], (inputs.dh_n, inputs.dc_n))
    given = inputs._replace(dh_n=dh_n, dc_n=dc_n, lengths=used.clamp_max(steps))
    return _state(p, *run.backward(given, p._replace(steps=steps).whole())[2:4])


def _warmup(p: Problem, way: Way, w_hh: Tensor) -> int:
    return max(1, policy.choose(p, way.batch, w_hh.numel(), way.device.type).p.warmup)


def _corrects(p: Problem, way: Way) -> bool:
    """Whether a change of a rank's start is taken to reach its end: between two ranks there is none to pass on."""
    return p.spec.forgets is not None and p.correct != "none" and len(way.sizes) > 2


def _kept(saved: Tensor, p: Problem, way: Way) -> Tensor:
    """The product of the gates that forget over this rank's times: (B, H)."""
    gates = p.spec.forget_gate(saved).view(way.steps, way.batch, -1)
    kind = torch.float64 if gates.dtype == torch.float64 else torch.float32
    return torch.where(way.there, gates, 1).prod(0, dtype=kind)
