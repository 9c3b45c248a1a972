"""The recurrence as `torch.autograd.Function`s over the registered ops.

One layer and direction: input projection `xp = x W_ih^T + bias` as one GEMM over all times, then the recurrence on lanes. `xp` itself
is not kept for the backward pass; the gradients of all weights are GEMMs over all times.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .problem import Problem, weight_gradients

ops = torch.ops.stable_rnn
_NOTHING = (None,) * (2 + len(Problem._fields))  # base, lengths and the numbers have no gradient


class FusedRecurrence(torch.autograd.Function):
    """Recurrent, chunked and verified runs: saves the states, goes back by the adjoint recursion on the same lanes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w_ih, bias, w_hh, w_hr, h0, c0, base, lengths, *numbers):
        xp = project(x, w_ih, bias)
        return ops.recurrence(xp, w_hh, w_hr, h0, c0, base, lengths, *numbers, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.problem = inputs[:9], Problem(*inputs[9:])
        y, _, _, gates, cells, report = output
        ctx.mark_non_differentiable(gates, cells, report)
        ctx.save_for_backward(*tensors, y, gates, cells)

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, *_):
        x, w_ih, bias, w_hh, w_hr, h0, c0, base, lengths, y, gates, cells = ctx.saved_tensors
        p = ctx.problem
        if torch.is_grad_enabled():  # create_graph: the gradient has to be differentiable in its turn
            return _reference_backward(ctx.saved_tensors[:9], (dy, dh_n, dc_n), p)
        dz, dh, dh0, dc0, _ = ops.recurrence_backward(dy, dh_n, dc_n, y, gates, cells, w_hh, w_hr, c0, base, lengths, *p)
        needs = ctx.needs_input_grad
        dw_hh, dw_hr = weight_gradients(needs[3], needs[4], dz, dh, y, gates, cells, h0, base, lengths, p)
        return *_input_gradients(dz, x, w_ih, needs), dw_hh, dw_hr, dh0, dc0 if c0 is not None else None, *_NOTHING


class WindowedRecurrence(torch.autograd.Function):
    """Windows: every output is a function of its last k inputs alone. Saves nothing but the inputs; the backward pass is the true
    gradient of that function (each window runs again and goes back k steps, the overlaps add up)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w_ih, bias, w_hh, w_hr, h0, c0, base, lengths, *numbers):
        xp = project(x, w_ih, bias)
        return ops.recurrence(xp, w_hh, w_hr, h0, c0, base, lengths, *numbers, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.problem = inputs[:9], Problem(*inputs[9:])
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, *_):
        x, w_ih, bias, w_hh, w_hr, h0, c0, base, lengths = ctx.saved_tensors
        p = ctx.problem
        if torch.is_grad_enabled():
            return _reference_backward(ctx.saved_tensors, (dy, dh_n, dc_n), p)
        dz, dw_hh, dw_hr, dh0, dc0 = ops.windowed_backward(
            dy, dh_n, dc_n, project(x, w_ih, bias), w_hh, w_hr, h0, c0, base, lengths, *p)
        return (*_input_gradients(dz, x, w_ih, ctx.needs_input_grad), dw_hh, dw_hr if w_hr is not None else None, dh0,
                dc0 if c0 is not None else None, *_NOTHING)


def project(x: Tensor, w_ih: Tensor | None, bias: Tensor | None) -> Tensor:
    """xp for all times in one GEMM; without weights, x is xp."""
    return x if w_ih is None else F.linear(x, w_ih, bias)


def _input_gradients(dz: Tensor, x: Tensor, w_ih: Tensor | None, needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if w_ih is None:
        return dz, None, None
    return dz @ w_ih if needs[0] else None, dz.T @ x if needs[1] else None, dz.sum(0) if needs[2] else None


def _reference_backward(tensors, grads, p: Problem):
    x, w_ih, bias, w_hh, w_hr, h0, c0, base, lengths = tensors
    dy, dh_n, dc_n = grads
    batch = h0.shape[0]
    dz, dw_hh, dw_hr, dh0, dc0 = reference.gradients(
        dy, dh_n, dc_n if c0 is not None else None, project(x, w_ih, bias), w_hh, w_hr, h0, c0, base, lengths, p.resolved(batch))
    return *_input_gradients(dz, x, w_ih, [True] * 3), dw_hh, dw_hr, dh0, dc0, *_NOTHING


def layer(x: Tensor, w_ih: Tensor | None, bias: Tensor | None, w_hh: Tensor, w_hr: Tensor | None, h0: Tensor, c0: Tensor | None,
          base: Tensor | None, lengths: Tensor | None, p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer and direction over buffer rows: x (N, I) or, without w_ih, (N, G*H) -> y (N, P), h_n (B, P), c_n (B, H), report (4,).

    Rows of x that belong to no time of any sequence give zeros. `report`: passes, lanes run again, largest jump, fell back."""
    tensors = (x, w_ih, bias, w_hh, w_hr, h0, c0)
    if forward_ad._current_level >= 0:  # forward mode: plain torch carries the tangents
        p = p.resolved(h0.shape[0])
        out = reference.forward(project(x, w_ih, bias), w_hh, w_hr, h0, c0, base, lengths, p.whole() if p.checked else p)
        return out.y, out.h_n, out.c_n, torch.tensor([1.0, 0.0, 0.0, float(p.checked)], dtype=torch.float64)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors) or _transforming():
        function = WindowedRecurrence if p.windowed else FusedRecurrence
        y, h_n, c_n, _, _, report = function.apply(*tensors, base, lengths, *p)
    else:
        y, h_n, c_n, _, _, report = ops.recurrence(project(x, w_ih, bias), w_hh, w_hr, h0, c0, base, lengths, *p, False)
    return y, h_n, c_n, report


def _transforming() -> bool:
    """Inside torch.func: gradients are not visible in `requires_grad`."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
