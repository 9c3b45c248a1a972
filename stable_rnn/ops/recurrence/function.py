"""The recurrence as `torch.autograd.Function`s over the registered ops.

One layer and direction: input projection `xp = x W_ih^T + bias` as one GEMM over all times, then the recurrence on lanes. `xp` itself
is not kept for the backward pass; the gradients of all weights are GEMMs over all times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..outputs import fresh
from . import native, reference, run
from .policy import Memory
from .problem import Adjoint, Inputs, Needs, Problem, WindowedInputs, backward_inputs, unpack, weight_gradients
from .report import FORWARD_MODE, Run

ops = torch.ops.stable_rnn
_PLAIN = frozenset((*native.PLAIN, type(None)))
# Whether a backward pass may write over what was saved: not where hooks get the tensors that are saved now, nor where the running pass
# keeps its graph for another. Where torch does not tell (2.5: of hooks), it may not.
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: ())
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_is_mapped = torch._C._functorch.is_legacy_batchedtensor


class Note:
    """An argument of checked plans that is no tensor: what earlier calls found out, and where the backward pass leaves its report."""

    memory: Memory | None = None
    report: Tensor | None = None

    def __init__(self, memory: Memory | None = None) -> None:
        self.memory = memory

    def __getstate__(self) -> dict[str, Any]:  # copies remember nothing
        return {"report": self.report}


class Layer(NamedTuple):
    """The arguments of the Functions below, and their gradients: autograd finds tensors in a flat list only."""

    x: Tensor  # (N, I), or without w_ih xp
    w_ih: Tensor | None
    bias: Tensor | None
    w_hh: Tensor
    w_hr: Tensor | None
    hidden_bias: Tensor | None
    h0: Tensor
    c0: Tensor | None
    base: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None
    note: Note | None
    p: Problem

    def inputs(self, xp: Tensor | None = None) -> Inputs:
        """The op's; xp is not kept for every backward pass."""
        return Inputs(xp, *self[3:-2])

    def gradients(self, found: Inputs, needs: Layer) -> Layer:
        """Those in all arguments, from those in the op's."""
        dz, x, w_ih = found.xp, self.x, self.w_ih
        dx, dw_ih, dbias = dz, None, None
        if w_ih is not None:
            product = _product(self.p.backend, dz, x, w_ih)
            dx, dw_ih = product(dz, w_ih) if needs.x else None, product(dz.T, x) if needs.w_ih else None
            dbias = dz.sum(0) if needs.bias else None
        return Layer(dx, dw_ih, dbias, *found[1:], note=None, p=None)


class FusedRecurrence(torch.autograd.Function):
    """Recurrent, chunked, verified and scanned runs: saves the states, goes back by the adjoint recursion on the same lanes or scans."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        given = Layer(*arguments)
        inputs = given.inputs(project_now(given.x, given.w_ih, given.bias, given.p.backend))
        if not _plain(*inputs):
            return fresh(inputs, *_op(inputs, given.p, True))
        passing = given.w_ih is not None  # else xp is the caller's
        found = run.forward(inputs, given.p, True, given.note and given.note.memory, passing)
        return fresh(inputs[passing:], *found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.note, ctx.problem = inputs
        y, _, _, saved, cells, report = output
        ctx.mark_non_differentiable(saved, cells, report)
        ctx.save_for_backward(*tensors, y, saved, cells)
        ctx.set_materialize_grads(False)  # zeros for `saved` and `cells`, too, as large as these
        ctx.hooked = _hooks(True) is not None  # they may hand out what others hold
        ctx.spent = False

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: Any) -> Layer:
        *tensors, y, saved, cells = ctx.saved_tensors  # once: hooks may unpack a tensor only once
        if ctx.spent:  # torch keeps what was saved where a pass did not come to its end
            raise RuntimeError(
                "Trying to backward through the graph a second time: the first pass, which an error or an interrupt ended, has overwritten "
                "what the forward pass saved. Run the forward pass again, or specify retain_graph=True for the first pass."
            )
        given, needs = Layer(*tensors, ctx.note, ctx.problem), Layer(*ctx.needs_input_grad)
        dy = torch.zeros_like(y) if dy is None else dy
        dh_n = torch.zeros_like(given.h0) if dh_n is None else dh_n
        dc_n = torch.zeros_like(cells[:0] if given.c0 is None else given.c0) if dc_n is None else dc_n
        if torch.is_grad_enabled():  # create_graph: the gradient has to be differentiable in its turn
            return _reference_backward(given, dy, dh_n, dc_n)
        ctx.spent = passing = not (ctx.hooked or _keeps_graph())
        found = _adjoint(given.inputs(), given.p, dy, dh_n, dc_n, y, saved, cells, needs, given.note, passing)
        found = given.gradients(found, needs)
        if passing and given.w_ih is not None and _plain(saved):  # else dz, which may lie there, is a gradient
            native.leave(saved)
        return found


class WindowedRecurrence(torch.autograd.Function):
    """Windows: every output is a function of its last k inputs alone. Saves nothing but the inputs; the backward pass is the true
    gradient of that function (each window runs again and goes back k steps, the overlaps add up)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        given = Layer(*arguments)
        inputs = given.inputs(project_now(given.x, given.w_ih, given.bias, given.p.backend))
        run_forward = run.forward if _plain(*inputs) else _op
        return fresh(inputs, *run_forward(inputs, given.p, False))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, _, ctx.problem = inputs
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh_n: Tensor, dc_n: Tensor, *_: Any) -> Layer:
        given, needs = Layer(*ctx.saved_tensors, None, ctx.problem), Layer(*ctx.needs_input_grad)
        if torch.is_grad_enabled():
            return _reference_backward(given, dy, dh_n, dc_n)
        xp = project_now(given.x, given.w_ih, given.bias, given.p.backend)
        inputs = given.inputs(xp.to(given.w_hh.dtype))  # autocast may be on here, which was off in the forward pass
        return given.gradients(_window_adjoint(inputs, given.p, dy, dh_n, dc_n), needs)


def project(x: Tensor, w_ih: Tensor | None, bias: Tensor | None) -> Tensor:
    """xp for all times in one GEMM; without weights, x is xp."""
    return x if w_ih is None else F.linear(x, w_ih, bias)


def project_now(x: Tensor, w_ih: Tensor | None, bias: Tensor | None, backend: str, passing: bool = False) -> Tensor:
    """`project` where no gradient goes through it: by the kernel if it can."""
    if w_ih is not None and _plain(x) and native.can_project(x, w_ih, bias, backend):
        return native.project(x, w_ih, bias, passing)
    return project(x, w_ih, bias)


def _plain(*tensors: Tensor | None) -> bool:
    """Nothing watches: no subclass, no dispatch mode, no functional transform."""
    return (
        not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and _PLAIN.issuperset(map(type, tensors))
    )


def _mapped(*tensors: Tensor | None) -> bool:
    """Whether one of these stands for many, in a backward pass with `is_grads_batched`, which is no functional transform."""
    return any(t is not None and _is_mapped(t) for t in tensors)


def _product(backend: str, *tensors: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """a @ b for products of these: by the kernel if it may, where no gradient goes through it."""
    own = backend in ("auto", "cpu") and not torch.is_grad_enabled() and _plain(*tensors) and not _mapped(*tensors)
    return native.product if own else torch.matmul


def _op(inputs: Inputs, p: Problem, save: bool) -> tuple[Tensor, ...]:
    """As `run.forward`, by way of torch's dispatcher; where nothing watches, that would be the price of an op at every step of a stream."""
    return ops.recurrence(*inputs, *p, save)


def _adjoint(
    state: Inputs,
    p: Problem,
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    y: Tensor,
    saved: Tensor,
    cells: Tensor,
    needs: Inputs | Layer,
    note: Note | None = None,
    passing: bool = False,
) -> Inputs:
    """The gradients by the adjoint recursion. `passing`: nobody else reads what was saved."""
    inputs = backward_inputs(dy, dh_n, dc_n, y, saved, cells, state, p)
    mapped = _mapped(dy, dh_n, dc_n)
    if _plain(*inputs) and not mapped:
        *adjoint, report = run.backward(inputs, p, note and note.memory, passing)
    else:
        *adjoint, report = ops.recurrence_backward(*inputs, *p)
    if note is not None and not mapped:
        note.report = report
    return from_adjoint(Adjoint(*adjoint, *(None,) * 5), state, p, y, saved, cells, needs)


def from_adjoint(
    back: Adjoint, state: Inputs, p: Problem, y: Tensor, saved: Tensor, cells: Tensor, needs: Inputs | Layer
) -> Inputs:
    """The gradients, once the adjoint recursion has run."""
    wanted = Needs(needs.w_hh, needs.w_hr, needs.hidden_bias)
    product = _product(p.backend, back.dz, y, saved, cells)
    weights = weight_gradients(wanted, back, y, saved, cells, state, p, product)
    return Inputs(back.dz, *weights, back.dh0, back.dc0 if state.c0 is not None else None, None, None)


def _window_adjoint(state: Inputs, p: Problem, dy: Tensor, dh_n: Tensor, dc_n: Tensor) -> Inputs:
    """The gradients of the windowed function."""
    inputs = WindowedInputs(dy, dh_n, dc_n, *state)
    plain = _plain(*inputs) and not _mapped(dy, dh_n, dc_n)
    found = run.windowed_backward(inputs, p) if plain else ops.windowed_backward(*inputs, *p)
    return Inputs(*(None if t is None else d for t, d in zip(state, found)), None, None)


def _reference_backward(given: Layer, dy: Tensor, dh_n: Tensor, dc_n: Tensor) -> Layer:
    state, p = given.inputs(project(given.x, given.w_ih, given.bias)), given.p.resolved()
    found = reference.gradients(WindowedInputs(dy, dh_n, dc_n if given.c0 is not None else None, *state), p)
    return given.gradients(Inputs(*found, None, None), Layer(*(t is not None for t in given)))


# The same gradients on the bare op, for graphs: torch.compile sees one op with a derivative, and keeps T symbolic in it.


def setup_op(ctx: Any, inputs: tuple, output: tuple) -> None:
    given, ctx.problem, _ = unpack(Inputs, inputs)
    y, _, _, saved, cells, report = output
    ctx.mark_non_differentiable(saved, cells, report)
    if ctx.problem.windowed:
        ctx.save_for_backward(*given)
    else:
        ctx.save_for_backward(*given._replace(xp=None), y, saved, cells)


def backward_op(ctx: Any, dy: Tensor, dh_n: Tensor, dc_n: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    count = len(Inputs._fields)
    kept, p, needs = ctx.saved_tensors, ctx.problem, Inputs(*ctx.needs_input_grad[:count])
    state, outputs = Inputs(*kept[:count]), kept[count:]
    found = (
        _window_adjoint(state, p, dy, dh_n, dc_n) if p.windowed else _adjoint(state, p, dy, dh_n, dc_n, *outputs, needs)
    )
    return *found, *(None,) * (len(Problem._fields) + 1)


def layer(
    x: Tensor,
    w_ih: Tensor | None,
    bias: Tensor | None,
    w_hh: Tensor,
    w_hr: Tensor | None,
    hidden_bias: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    base: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    p: Problem,
    note: Note | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer and direction over buffer rows: x (N, I) or, without w_ih, (N, G*H) -> y (N, P), h_n (B, P), c_n (B, H), report.

    Rows of x that belong to no time of any sequence give zeros. `report` of checked plans: a `Run` as numbers; else (0,). The
    backward pass leaves its own in `note`."""
    tensors = (x, w_ih, bias, w_hh, w_hr, hidden_bias, h0, c0)
    graph = torch.compiler.is_compiling()
    if not graph and torch.jit.is_tracing():  # a trace has fixed T and B, and does not see what the kernels write
        raise RuntimeError(
            "torch.jit.trace cannot record this recurrence; trace the plain module instead, module.to_torch(), or the whole "
            "model, unstabilize(model), or use torch.export or torch.compile"
        )
    if not graph and forward_ad._current_level >= 0:  # forward mode: plain torch carries the tangents
        p = p.resolved()
        given = Inputs(project(x, w_ih, bias), w_hh, w_hr, hidden_bias, h0, c0, base, lengths, resets)
        out = reference.forward(given, p.differentiable())
        return out.y, out.h_n, out.c_n, run.report(Run(plain_from=0, why=FORWARD_MODE) if p.checked else None)
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not graph and (gradient or torch._C._are_functorch_transforms_active()):  # torch.func hides requires_grad
        function = WindowedRecurrence if p.windowed else FusedRecurrence
        y, h_n, c_n, _, _, report = function.apply(*tensors, base, lengths, resets, note, p)
        return y, h_n, c_n, report
    if not graph and _plain(*tensors):
        xp = project_now(x, w_ih, bias, p.backend, passing=True)
        inputs = Inputs(xp, w_hh, w_hr, hidden_bias, h0, c0, base, lengths, resets)
        y, h_n, c_n, _, _, report = run.forward(inputs, p, False, note and note.memory)
    else:
        save = gradient and not p.windowed
        inputs = Inputs(project(x, w_ih, bias), w_hh, w_hr, hidden_bias, h0, c0, base, lengths, resets)
        y, h_n, c_n, _, _, report = _op(inputs, p, save)
    return y, h_n, c_n, report
