"""What the ops of the recurrence do: numbers for the schedule, checks, a backend, checked lanes or scans where asked.

Outputs may be inputs, or one tensor twice; who has to give fresh ones calls `fresh`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cascade, pieces, verified
from .backends import choose
from .checks import check
from .policy import Memory
from .problem import BackwardInputs, Inputs, Problem, WindowedInputs
from .report import Run
from .sweeps import Backward, Forward


def forward(inputs: Inputs, p: Problem, save: bool, memory: Memory | None = None) -> tuple[Tensor, ...]:
    """y, h_n, c_n, saved, cells, report; `save` asks for what the backward pass needs. `memory`: of checked plans."""
    check(p.resolved(), inputs)
    backend, of = choose(p.resolved(), inputs.xp, inputs.w_hh, inputs.w_hr), None
    if inputs.resets is not None and not backend.takes_resets:
        inputs, p, of = pieces.cut(inputs, p)
    p = p.resolved()
    if p.checked:
        out, found = verified.run(Forward(backend, inputs, p, save), memory)
    elif p.scanned:
        out, found = backend.scanned_forward(inputs, p, cascade.groups(inputs.w_hh, p.spec.gates), save), None
    else:
        out, found = backend.forward(inputs, p, save=save), None
    h_n, c_n = (out.h_n, out.c_n) if of is None else (of.states(out.h_n), of.states(out.c_n))
    return out.y, h_n, c_n, out.saved, out.cells, report(found)


def backward(inputs: BackwardInputs, p: Problem, memory: Memory | None = None) -> tuple[Tensor, ...]:
    """dz, dh, dh0, dc0, report."""
    check(p.resolved(), inputs)
    inputs = inputs if inputs.c0 is not None else inputs._replace(dc_n=None)
    backend, of = choose(p.resolved(), inputs.dy, inputs.w_hh, inputs.w_hr), None
    if inputs.resets is not None and not backend.takes_resets:
        inputs, p, of = pieces.cut(inputs, p)
    p = p.resolved()
    if p.checked:
        out, found = verified.run(Backward(backend, inputs, p), memory)
    elif p.scanned:
        out, found = backend.scanned_backward(inputs, p, cascade.groups(inputs.w_hh, p.spec.gates)), None
    else:
        out, found = backend.backward(inputs, p), None
    dh0, dc0 = (out.dh0, out.dc0) if of is None else (of.origins(out.dh0), of.origins(out.dc0))
    return out.dz, out.dh, dh0, dc0, report(found)


def windowed_backward(inputs: WindowedInputs, p: Problem) -> tuple[Tensor, ...]:
    """Gradients of xp, w_hh, w_hr, hidden_bias, h0, c0."""
    check(p.resolved(), inputs)
    inputs = inputs if inputs.c0 is not None else inputs._replace(dc_n=None)
    backend, of = choose(p.resolved(), inputs.xp, inputs.w_hh, inputs.w_hr), None
    if inputs.resets is not None and not backend.takes_resets:
        inputs, p, of = pieces.cut(inputs, p)
    found = backend.windowed_backward(inputs, p.resolved())
    *weights, dh0, dc0 = (inputs.xp.new_empty(0) if t is None else t for t in found)
    return *weights, *((dh0, dc0) if of is None else (of.origins(dh0), of.origins(dc0)))


def report(found: Run | None) -> Tensor:
    """(SIZE,) float64 on the CPU for checked plans, else (0,)."""
    return torch.empty(0, dtype=torch.float64) if found is None else found.tensor()
