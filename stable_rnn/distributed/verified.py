"""Checked runs over all ranks: the ranks are lanes of a checked run themselves (`ops/recurrence/verified.py`), each with chunks inside.

Each rank guesses where the rank before ends: that one runs its last steps alone, from zero. All run their times from there, compare where
they started with where the rank before did end, correct all starts at once (`corrections.py`), and those run again whose start moves. The
first start that is wrong is corrected to that very end, so that it is right from then on: no more rounds than ranks. The backward pass
is the same with adjoints, from the first steps of the rank behind."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from ..ops.recurrence import policy, report, run
from ..ops.recurrence.corrections import Borders, corrected
from ..ops.recurrence.function import Note
from ..ops.recurrence.problem import Adjoint, BackwardInputs, Inputs, Problem
from ..ops.recurrence.reference import arithmetic
from ..ops.recurrence.verified import IGNORED, jumps
from .way import Order, Way

State = tuple[Tensor, Tensor | None]


def forward(inputs: Inputs, p: Problem, way: Way, save: bool, note: Note | None) -> tuple[State, tuple[Tensor, ...]]:
    """Where this rank starts, and y, h_n, c_n, saved, cells, report."""
    memory, order, corrects = note and note.memory, way.states, _corrects(p, way)

    def ends(start: State) -> tuple[State, tuple[Tensor, ...]]:
        out = run.forward(inputs._replace(h0=start[0], c0=start[1]), p, save or corrects, memory)
        return _state(p, *out[1:3]), out

    given = inputs.h0, inputs.c0
    kept = lambda out: _kept(out[3], p, way)  # noqa: E731
    first = _arrived(order, _tails(inputs, p, way), given)
    start, out, *rounds = _settled(ends, kept if corrects else None, first, p, order, inputs.w_hr)
    return start, (*out[:5], _reported(out[5], *rounds))


def backward(inputs: BackwardInputs, p: Problem, way: Way, note: Note | None) -> Adjoint:
    memory, order = note and note.memory, way.adjoints

    def ends(start: State) -> tuple[State, tuple[Tensor, ...]]:
        out = run.backward(inputs._replace(dh_n=start[0], dc_n=start[1]), p, memory)
        return _state(p, *out[2:4]), out

    given = inputs.dh_n, inputs.dc_n
    kept = (lambda out: _kept(inputs.saved, p, way)) if _corrects(p, way) else None
    first = _arrived(order, _heads(inputs, p, way), given)
    _, out, *rounds = _settled(ends, kept, first, p, order, inputs.w_hr, adjoint=True)
    if note is not None:
        note.report = _reported(out[4], *rounds)
    return Adjoint(*out[:4], *(None,) * 5)  # type: ignore[arg-type]  # of no lanes


def _settled(
    ends: Callable,
    kept: Callable | None,
    start: State,
    p: Problem,
    order: Order,
    w_hr: Tensor | None,
    adjoint: bool = False,
) -> tuple[State, tuple[Tensor, ...], int, float]:
    """The start from which all ranks agree, what `ends` gives for it, the rounds it took, the largest jump that stays."""
    end, out = ends(start)
    for rounds in count(1):
        h, c, h_end, c_end = _told(order, start, end)
        scale = _largest(h_end, c_end) if adjoint else None
        borders = Borders(h[1:], c[1:], h_end[:-1], c_end[:-1], c[1:, :, :0], order.arrives[1:])
        jump, _ = jumps(borders, scale)
        bad = ~(jump <= p.tol)
        if not bad.any():
            return start, out, rounds, float(jump.max()) if jump.numel() else 0.0
        # a start that is good enough counts as right
        wrong = bad[..., None]
        borders = borders._replace(h=torch.where(wrong, h[1:], h_end[:-1]), c=torch.where(wrong, c[1:], c_end[:-1]))
        new_h, new_c = borders.h_end, borders.c_end
        if kept is not None:
            decay = order.gather(kept(out))[:-1]
            new_h, new_c = corrected(borders._replace(decay=decay), not adjoint, w_hr, None)
        moved, _ = jumps(borders._replace(h_end=new_h, c_end=new_c), scale)
        again = (bad | (moved > IGNORED * p.tol))[order.place - 1][:, None] if order.place else bad[:1] & False
        if again.any():
            h0, c0 = start
            start = (
                torch.where(again, new_h[order.place - 1].to(h0.dtype), h0),
                None if c0 is None else torch.where(again, new_c[order.place - 1].to(c0.dtype), c0),
            )
            end, out = ends(start)
    raise AssertionError


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
    h, c = (None if s is None else torch.where(order.here, order.handed_on(end), s) for end, s in zip(ends, given))
    assert h is not None
    return h, c


def _tails(inputs: Inputs, p: Problem, way: Way) -> State:
    """Where this rank ends, by its last steps alone."""
    (first, used), steps = way.own, _warmup(p, way, inputs.w_hh)
    some = used.clamp_max(steps)
    exact = ~way.states.here & (used <= steps)[:, None]
    h0, c0 = (None if s is None else torch.where(exact, s, 0) for s in (inputs.h0, inputs.c0))
    given = inputs._replace(h0=h0, c0=c0, base=first + (used - some) * way.step, lengths=some)
    return _state(p, *run.forward(given, p._replace(steps=steps).whole(), False)[1:3])


def _heads(inputs: BackwardInputs, p: Problem, way: Way) -> State:
    """The adjoint before this rank's times, by its first steps alone."""
    used, steps = way.own[1], _warmup(p, way, inputs.w_hh)
    exact = ~way.adjoints.here & (used <= steps)[:, None]
    dh_n, dc_n = (None if s is None else torch.where(exact, s, 0) for s in (inputs.dh_n, inputs.dc_n))
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


def _reported(numbers: Tensor, rounds: int, jump: float) -> Tensor:
    found = report.Run.of(numbers)
    found.rounds, found.left = rounds, max(found.left, jump)
    return found.tensor()
