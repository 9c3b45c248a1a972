"""What the ops of the recurrence do: numbers for the schedule, checks, a backend, checked lanes or scans where asked.

Outputs may be inputs, or one tensor twice; who has to give fresh ones calls `fresh`.

`passing`: of xp, or of what the forward pass saved, nobody reads the values again. Then what is saved may lie over xp, and dz over what
was saved: the largest tensors of a training step, each of which would be fresh memory, with a page fault every few KB."""

from __future__ import annotations

from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from . import cascade, pieces, verified
from .backends import choose
from .checks import check
from .policy import Case, Memory
from .problem import BackwardInputs, Inputs, Problem, WindowedInputs
from .report import Run
from .sweeps import Backward, Forward

T = TypeVar("T", Inputs, BackwardInputs, WindowedInputs)


def forward(
    inputs: Inputs, asked: Problem, save: bool, memory: Memory | None = None, passing: bool = False
) -> tuple[Tensor, ...]:
    """y, h_n, c_n, saved, cells, report; `save` asks for what the backward pass needs. `memory`: of checked plans."""
    backend, given, p, rows = _prepared(inputs, asked)
    if p.checked:
        out, found = verified.run(Forward(backend, given, p, save), memory, Case.of(inputs, asked))
    elif p.scanned:
        out, found = backend.scanned_forward(given, p, cascade.groups(given.w_hh, p.spec.gates), save), None
    else:
        place = {"saved": given.xp} if passing and save and _in_place(backend, given, p, given.xp) else {}
        out, found = backend.forward(given, p, save=save, **place), None
    h_n, c_n = rows.states(out.h_n, out.c_n)
    return out.y, h_n, c_n, out.saved, out.cells, report(found)


def backward(
    inputs: BackwardInputs, asked: Problem, memory: Memory | None = None, passing: bool = False
) -> tuple[Tensor, ...]:
    """dz, dh, dh0, dc0, report."""
    backend, given, p, rows = _prepared(inputs, asked)
    given = given if given.c0 is not None else given._replace(dc_n=None)
    if p.checked:
        out, found = verified.run(Backward(backend, given, p), memory, Case.of(inputs, asked))
    elif p.scanned:
        out, found = backend.scanned_backward(given, p, cascade.groups(given.w_hh, p.spec.gates)), None
    else:
        place = {"dz": given.saved} if passing and _in_place(backend, given, p, given.saved) else {}
        out, found = backend.backward(given, p, **place), None
    dh0, dc0 = rows.origins(out.dh0, out.dc0)
    return out.dz, out.dh, dh0, dc0, report(found)


def windowed_backward(inputs: WindowedInputs, p: Problem) -> tuple[Tensor, ...]:
    """Gradients of xp, w_hh, w_hr, hidden_bias, h0, c0."""
    backend, given, p, rows = _prepared(inputs, p)
    given = given if given.c0 is not None else given._replace(dc_n=None)
    found = backend.windowed_backward(given, p)
    *weights, dh0, dc0 = (inputs.xp.new_empty(0) if t is None else t for t in found)
    return *weights, *rows.origins(dh0, dc0)


def _prepared(inputs: T, p: Problem) -> tuple[ModuleType, T, Problem, pieces.Rows]:
    """The backend, its inputs and numbers, and the rows that it runs: pieces of them where it takes no resets."""
    check(p.resolved(), inputs)
    backend, rows = choose(p.resolved(), inputs.rows, inputs.w_hh, inputs.w_hr), pieces.Rows()
    if inputs.resets is not None and not backend.takes_resets:
        inputs, p, rows = pieces.cut(inputs, p)
    return backend, inputs, p.resolved(), rows


def _in_place(backend: ModuleType, given: Inputs | BackwardInputs, p: Problem, over: Tensor) -> bool:
    """Whether what is saved may lie over xp, or dz over what is saved: they have one shape, every row is read at one step and no other,
    and none is padding, which stays zero. With a projection what is saved is read once more, for its gradient."""
    return (
        backend.in_place
        and p.spec.saved == p.spec.gates
        and p.stride >= p.steps
        and given.w_hr is None
        and over.is_contiguous()
        and (given.lengths is None or int(given.lengths.sum()) == len(given.rows))
    )


def report(found: Run | None) -> Tensor:
    """(SIZE,) float64 on the CPU for checked plans, else (0,)."""
    return torch.empty(0, dtype=torch.float64) if found is None else found.tensor()
