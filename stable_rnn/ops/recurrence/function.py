"""The recurrence as `torch.autograd.Function`s over the registered ops.

One layer and direction: input projection `xp = x W_ih^T + bias` as one GEMM over all times, then the recurrence on lanes. `xp` itself
is not kept for the backward pass; the gradients of all weights are GEMMs over all times.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import native, reference, run
from .problem import Problem, weight_gradients

ops = torch.ops.stable_rnn
_PLAIN = frozenset((*native.PLAIN, type(None)))
_NOTHING = (None,) * (2 + len(Problem._fields))  # base, lengths and the numbers have no gradient


class Note:
    """Where the backward pass of a checked plan leaves its report (4,): an argument that is no tensor."""

    report: Tensor | None = None


class FusedRecurrence(torch.autograd.Function):
    """Recurrent, chunked and verified runs: saves the states, goes back by the adjoint recursion on the same lanes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w_ih, bias, w_hh, w_hr, h0, c0, base, lengths, note, *numbers):
        return ops.recurrence(_project_now(x, w_ih, bias, numbers[-1]), w_hh, w_hr, h0, c0, base, lengths, *numbers, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.note, ctx.problem = inputs[9], Problem(*inputs[10:])
        y, _, _, saved, cells, report = output
        ctx.mark_non_differentiable(saved, cells, report)
        ctx.save_for_backward(*inputs[:9], y, saved, cells)

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, *_):
        x, w_ih, bias, *state, y, saved, cells = ctx.saved_tensors  # once: hooks may unpack a tensor only once
        if torch.is_grad_enabled():  # create_graph: the gradient has to be differentiable in its turn
            return _reference_backward(x, w_ih, bias, state, (dy, dh_n, dc_n), ctx.problem)
        needs = ctx.needs_input_grad
        dz, *rest = _adjoint((dy, dh_n, dc_n), state, (y, saved, cells), ctx.problem, needs[3:5], ctx.note)
        return *_input_gradients(dz, x, w_ih, needs), *rest, None, *_NOTHING


class WindowedRecurrence(torch.autograd.Function):
    """Windows: every output is a function of its last k inputs alone. Saves nothing but the inputs; the backward pass is the true
    gradient of that function (each window runs again and goes back k steps, the overlaps add up)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w_ih, bias, w_hh, w_hr, h0, c0, base, lengths, note, *numbers):
        return ops.recurrence(_project_now(x, w_ih, bias, numbers[-1]), w_hh, w_hr, h0, c0, base, lengths, *numbers, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.problem = Problem(*inputs[10:])
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(*inputs[:9])

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, *_):
        x, w_ih, bias, *state = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _reference_backward(x, w_ih, bias, state, (dy, dh_n, dc_n), ctx.problem)
        dz, *rest = _window_adjoint((dy, dh_n, dc_n), state, _project_now(x, w_ih, bias, ctx.problem.backend), ctx.problem)
        return *_input_gradients(dz, x, w_ih, ctx.needs_input_grad), *rest, None, *_NOTHING


def project(x: Tensor, w_ih: Tensor | None, bias: Tensor | None) -> Tensor:
    """xp for all times in one GEMM; without weights, x is xp."""
    return x if w_ih is None else F.linear(x, w_ih, bias)


def _project_now(x: Tensor, w_ih: Tensor | None, bias: Tensor | None, backend: str, passing: bool = False) -> Tensor:
    """`project` where no gradient goes through it: by the kernel if it can."""
    if w_ih is not None and _plain(x) and native.can_project(x, w_ih, bias, backend):
        return native.project(x, w_ih, bias, passing)
    return project(x, w_ih, bias)


def _plain(*tensors: Tensor | None) -> bool:
    """Nothing watches: no subclass, no dispatch mode, no functional transform."""
    return (not torch._C._len_torch_dispatch_stack() and not torch._C._are_functorch_transforms_active()
            and _PLAIN.issuperset(map(type, tensors)))


def _adjoint(grads, state, saved, p: Problem, needs, note: Note | None = None) -> tuple[Tensor | None, ...]:
    """Gradients of (xp, w_hh, w_hr, h0, c0) by the adjoint recursion; `saved`: y, saved, cells."""
    w_hh, w_hr, h0, c0, base, lengths = state
    dz, dh, dh0, dc0, report = ops.recurrence_backward(*grads, *saved, w_hh, w_hr, c0, base, lengths, *p)
    if note is not None:
        note.report = report
    dw_hh, dw_hr = weight_gradients(needs[0], needs[1], dz, dh, *saved, h0, base, lengths, p)
    return dz, dw_hh, dw_hr, dh0, dc0 if c0 is not None else None


def _window_adjoint(grads, state, xp: Tensor, p: Problem) -> tuple[Tensor | None, ...]:
    """Gradients of (xp, w_hh, w_hr, h0, c0) of the windowed function."""
    dz, dw_hh, dw_hr, dh0, dc0 = ops.windowed_backward(*grads, xp, *state, *p)
    return dz, dw_hh, dw_hr if state[1] is not None else None, dh0, dc0 if state[3] is not None else None


def _reference_backward(x, w_ih, bias, state, grads, p: Problem) -> tuple[Tensor | None, ...]:
    dy, dh_n, dc_n = grads
    h0, c0 = state[2:4]
    p = p.resolved(h0.shape[0], h0.device)
    dz, *rest = reference.gradients(dy, dh_n, dc_n if c0 is not None else None, project(x, w_ih, bias), *state, p)
    return *_input_gradients(dz, x, w_ih, (True, w_ih is not None, bias is not None)), *rest, None, *_NOTHING


def _input_gradients(dz: Tensor, x: Tensor, w_ih: Tensor | None, needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if w_ih is None:
        return dz, None, None
    return dz @ w_ih if needs[0] else None, dz.T @ x if needs[1] else None, dz.sum(0) if needs[2] else None


# The same gradients on the bare op, for graphs: torch.compile sees one op with a derivative, and keeps T symbolic in it.


def setup_op(ctx, inputs, output) -> None:
    xp, *state = inputs[:7]
    ctx.problem = Problem(*inputs[7:-1])
    y, _, _, saved, cells, report = output
    ctx.mark_non_differentiable(saved, cells, report)
    ctx.save_for_backward(*state, *((xp,) if ctx.problem.windowed else (y, saved, cells)))


def backward_op(ctx, dy, dh_n, dc_n, *_):
    kept, p, grads = ctx.saved_tensors, ctx.problem, (dy, dh_n, dc_n)
    state, saved = kept[:6], kept[6:]
    found = _window_adjoint(grads, state, saved[0], p) if p.windowed else _adjoint(grads, state, saved, p, ctx.needs_input_grad[1:3])
    return *found, *_NOTHING, None


def layer(x: Tensor, w_ih: Tensor | None, bias: Tensor | None, w_hh: Tensor, w_hr: Tensor | None, h0: Tensor, c0: Tensor | None,
          base: Tensor | None, lengths: Tensor | None, p: Problem, note: Note | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer and direction over buffer rows: x (N, I) or, without w_ih, (N, G*H) -> y (N, P), h_n (B, P), c_n (B, H), report.

    Rows of x that belong to no time of any sequence give zeros. `report` (4,) of checked plans: passes, lanes run again, largest jump,
    fell back; else (0,). The backward pass leaves its own in `note`."""
    tensors = (x, w_ih, bias, w_hh, w_hr, h0, c0)
    graph = torch.compiler.is_compiling()
    if not graph and torch.jit.is_tracing():  # a trace has fixed T and B, and does not see what the kernels write
        raise RuntimeError("torch.jit.trace cannot record this recurrence; trace the plain module instead, module.to_torch(), or the whole "
                           "model, unstabilize(model), or use torch.export or torch.compile")
    if not graph and forward_ad._current_level >= 0:  # forward mode: plain torch carries the tangents
        p = p.resolved(h0.shape[0], h0.device)
        out = reference.forward(project(x, w_ih, bias), w_hh, w_hr, h0, c0, base, lengths, p.whole() if p.checked else p)
        return out.y, out.h_n, out.c_n, torch.tensor([1.0, 0.0, 0.0, 1.0][: 4 * p.checked], dtype=torch.float64)
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not graph and (gradient or torch._C._are_functorch_transforms_active()):  # torch.func hides requires_grad
        function = WindowedRecurrence if p.windowed else FusedRecurrence
        y, h_n, c_n, _, _, report = function.apply(*tensors, base, lengths, note, *p)
    else:
        save = gradient and not p.windowed
        if not graph and _plain(*tensors):  # the op's own code, without the price of an op at every step of a stream
            xp = _project_now(x, w_ih, bias, p.backend, passing=True)
            (y, _, _, h_n, c_n, *_), report = run.outputs(xp, w_hh, w_hr, h0, c0, base, lengths, *p, save)
        else:
            y, h_n, c_n, _, _, report = ops.recurrence(project(x, w_ih, bias), w_hh, w_hr, h0, c0, base, lengths, *p, save)
    return y, h_n, c_n, report
