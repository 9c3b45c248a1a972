"""Verified and scanned runs: each rank runs its own times from the state that the rank before ends with, and back from its adjoint.

How that state is found without waiting for that rank, `verified.py` and `scanned.py` say; here is what autograd sees of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.outputs import fresh
from ..ops.recurrence.function import Layer, from_adjoint, project_now
from ..ops.recurrence.problem import backward_inputs
from . import scanned, verified
from .way import Way


def run(given: Layer, way: Way) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`function.layer` of this rank's rows."""
    base, used = way.own
    given = given._replace(base=base, lengths=used)
    return States.apply(way, torch.is_grad_enabled(), *given)


class States(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: Way, save: bool, *arguments: Any) -> tuple[Tensor, ...]:
        given = Layer(*arguments)
        inputs = given.inputs(project_now(given.x, given.w_ih, given.bias, given.p.backend))
        p, of = given.p.resolved(), scanned if given.p.scanned else verified
        start, (y, h_n, c_n, saved, cells, report) = of.forward(inputs, p, way, save, given.note)
        if save:
            *tensors, ctx.note, ctx.problem = given
            ctx.way = way
            ctx.save_for_backward(*tensors, *start, y, saved, cells)
        ctx.mark_non_differentiable(report)
        return fresh(inputs, y, h_n, c_n, report)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dh_n: Tensor, dc_n: Tensor, _: Tensor) -> tuple:
        *tensors, h, c, y, saved, cells = ctx.saved_tensors
        given, way = Layer._make((*tensors, ctx.note, ctx.problem)), ctx.way
        p, of = given.p.resolved(), scanned if given.p.scanned else verified
        state = given.inputs()._replace(h0=h, c0=c)
        inputs = backward_inputs(dy, dh_n, dc_n if c is not None else None, y, saved, cells, state, p)
        back = of.backward(inputs, p, way, given.note)
        # the states before time 0 are those of the ranks where sequences begin
        dh0, dc0 = (torch.where(way.opens, t, 0) if t.numel() else t for t in (back.dh0, back.dc0))
        needs = Layer._make(ctx.needs_input_grad[2:])
        found = from_adjoint(back._replace(dh0=dh0, dc0=dc0), state, p, y, saved, cells, needs)
        return None, None, *given.gradients(found, needs)
