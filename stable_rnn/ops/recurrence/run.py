"""What the ops of the recurrence do: numbers for the schedule, checks, a backend, checked lanes or scans where asked.

Outputs may be inputs, or one tensor twice; who has to give fresh ones calls `fresh`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cascade, verified
from .backends import choose
from .checks import check
from .problem import BackwardInputs, Inputs, Problem, WindowedInputs


def forward(inputs: Inputs, p: Problem, save: bool) -> tuple[Tensor, ...]:
    """y, h_n, c_n, saved, cells, report; `save` asks for what the backward pass needs."""
    p = p.resolved(inputs.h0.shape[0], inputs.xp.device)
    check(p, inputs)
    backend = choose(p, inputs.xp, inputs.w_hh, inputs.w_hr)
    if p.checked:
        out, found = verified.run(backend, inputs, p, save)
    elif p.scanned:
        out, found = backend.scanned_forward(inputs, p, cascade.groups(inputs.w_hh, p.spec.gates), save), []
    else:
        out, found = backend.forward(inputs, p, save=save), []
    return out.y, out.h_n, out.c_n, out.saved, out.cells, report(found)


def backward(inputs: BackwardInputs, p: Problem) -> tuple[Tensor, ...]:
    """dz, dh, dh0, dc0, report."""
    p = p.resolved(inputs.dh_n.shape[0], inputs.dy.device)
    check(p, inputs)
    inputs = inputs if inputs.c0 is not None else inputs._replace(dc_n=None)
    backend = choose(p, inputs.dy, inputs.w_hh, inputs.w_hr)
    if p.checked:
        out, found = verified.run_back(backend, inputs, p)
    elif p.scanned:
        out, found = backend.scanned_backward(inputs, p, cascade.groups(inputs.w_hh, p.spec.gates)), []
    else:
        out, found = backend.backward(inputs, p), []
    return out.dz, out.dh, out.dh0, out.dc0, report(found)


def windowed_backward(inputs: WindowedInputs, p: Problem) -> tuple[Tensor, ...]:
    """Gradients of xp, w_hh, w_hr, hidden_bias, h0, c0."""
    p = p.resolved(inputs.h0.shape[0], inputs.xp.device)
    check(p, inputs)
    inputs = inputs if inputs.c0 is not None else inputs._replace(dc_n=None)
    found = choose(p, inputs.xp, inputs.w_hh, inputs.w_hr).windowed_backward(inputs, p)
    return tuple(inputs.xp.new_empty(0) if t is None else t for t in found)


def report(numbers: list[float]) -> Tensor:
    """(4,) float64 on the CPU for checked plans: passes, lanes run again, largest jump, fell back. Else (0,)."""
    return torch.tensor(numbers, dtype=torch.float64) if numbers else torch.empty(0, dtype=torch.float64)
