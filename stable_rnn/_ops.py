"""Every registered op: schema, implementation and fake side by side (`torch.ops.stable_rnn.*`).

The numbers of a `Problem` are spread over the schema in its order. Strides `WHOLE` and `AUTO` become numbers inside the op, so that a
compiled graph never depends on T. Outputs are fresh; what a cell does not have comes back empty, of shape (0,).
"""
from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import choose
from .ops.recurrence import verified
from .ops.recurrence.batching import fold_rule, loop_rule
from .ops.recurrence.function import backward_op, setup_op
from .ops.recurrence.problem import Problem
from .ops.recurrence.reference import arithmetic
from .ops.spectral import registration as _spectral  # noqa: F401  registers the spectral ops

_library = torch.library.Library("stable_rnn", "FRAGMENT")
_PROBLEM = ("str cell, SymInt steps, SymInt step, SymInt stride, SymInt warmup, float tol, int max_passes, float cap, str backend")
_ROWS = "Tensor? base, Tensor? lengths"


def _register(schema: str, implementation, fake) -> None:
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stable_rnn::{name}", fake, lib=_library)


def _recurrence(xp, w_hh, w_hr, h0, c0, base, lengths, *numbers):
    *numbers, save = numbers
    p = Problem(*numbers).resolved(h0.shape[0])
    backend = choose(p, xp)
    tensors = (xp, w_hh, w_hr, h0, c0, base, lengths)
    report = [1.0, 0.0, 0.0, 0.0]
    if p.checked and p.lanes() > 1:
        out, report = verified.run(backend, tensors, p, save)
    else:
        out = backend.forward(*tensors, p, save=save)
    return _fresh(tensors, out.y, out.h_n, out.c_n, out.gates, out.cells) + (torch.tensor(report, dtype=torch.float64),)


def _recurrence_fake(xp, w_hh, w_hr, h0, c0, base, lengths, cell, *numbers):
    save = numbers[-1] and cell == "lstm"
    hidden, empty = w_hh.shape[0] // 4, xp.new_empty
    return (empty(xp.shape[0], w_hh.shape[1]), torch.empty_like(h0), empty(0) if c0 is None else torch.empty_like(c0),
            empty(xp.shape[0], 4 * hidden) if save else empty(0),
            empty(xp.shape[0], hidden, dtype=arithmetic(xp.dtype)) if save else empty(0), _report())


_register(f"recurrence(Tensor xp, Tensor w_hh, Tensor? w_hr, Tensor h0, Tensor? c0, {_ROWS}, {_PROBLEM}, bool save)"
          " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells, Tensor report)", _recurrence, _recurrence_fake)


def _recurrence_backward(dy, dh_n, dc_n, y, gates, cells, w_hh, w_hr, c0, base, lengths, *numbers):
    p = Problem(*numbers).resolved(dh_n.shape[0])
    backend = choose(p, dy)
    dc_n = None if c0 is None else dc_n
    tensors = (dy, dh_n, dc_n, y, gates, cells, w_hh, w_hr, c0, base, lengths)
    report = [1.0, 0.0, 0.0, 0.0]
    if p.checked and p.lanes() > 1:
        out, report = verified.run_back(backend, tensors, p)
    else:
        out = backend.backward(*tensors, p)
    return _fresh(tensors, out.dz, out.dh, out.dh0, out.dc0) + (torch.tensor(report, dtype=torch.float64),)


def _recurrence_backward_fake(dy, dh_n, dc_n, y, gates, cells, w_hh, w_hr, c0, *rest):
    empty = dy.new_empty
    return (empty(dy.shape[0], w_hh.shape[0]), empty(0) if w_hr is None else torch.empty_like(dy), torch.empty_like(dh_n),
            empty(0) if c0 is None else torch.empty_like(c0), _report())


_register(f"recurrence_backward(Tensor dy, Tensor dh_n, Tensor dc_n, Tensor y, Tensor gates, Tensor cells, Tensor w_hh, Tensor? w_hr,"
          f" Tensor? c0, {_ROWS}, {_PROBLEM}) -> (Tensor dz, Tensor dh, Tensor dh0, Tensor dc0, Tensor report)",
          _recurrence_backward, _recurrence_backward_fake)


def _windowed_backward(dy, dh_n, dc_n, xp, w_hh, w_hr, h0, c0, base, lengths, *numbers):
    p = Problem(*numbers).resolved(h0.shape[0])
    tensors = (dy, dh_n, None if c0 is None else dc_n, xp, w_hh, w_hr, h0, c0, base, lengths)
    found = choose(p, xp).windowed_backward(*tensors, p)
    return _fresh(tensors, *(xp.new_empty(0) if t is None else t for t in found))


def _windowed_backward_fake(dy, dh_n, dc_n, xp, w_hh, w_hr, h0, c0, *rest):
    return tuple(xp.new_empty(0) if t is None else torch.empty_like(t) for t in (xp, w_hh, w_hr, h0, c0))


_register(f"windowed_backward(Tensor dy, Tensor dh_n, Tensor dc_n, Tensor xp, Tensor w_hh, Tensor? w_hr, Tensor h0, Tensor? c0, {_ROWS},"
          f" {_PROBLEM}) -> (Tensor dxp, Tensor dw_hh, Tensor dw_hr, Tensor dh0, Tensor dc0)", _windowed_backward, _windowed_backward_fake)


def _fresh(inputs: tuple, *outputs: Tensor) -> tuple[Tensor, ...]:
    """Contiguous outputs, none of them an input or another output, as ops have to give them."""
    seen, fresh = {id(t) for t in inputs}, []
    for t in outputs:
        fresh.append(t.clone() if id(t) in seen else t.contiguous())
        seen.add(id(t))
    return tuple(fresh)


torch.library.register_autograd("stable_rnn::recurrence", backward_op, setup_context=setup_op, lib=_library)
_OPS = torch.ops.stable_rnn
torch.library.register_vmap("stable_rnn::recurrence", fold_rule(_OPS.recurrence, (1, 2), rows=0, state=3, base=5), lib=_library)
torch.library.register_vmap(
    "stable_rnn::recurrence_backward", fold_rule(_OPS.recurrence_backward, (6, 7), rows=0, state=1, base=9), lib=_library)
torch.library.register_vmap("stable_rnn::windowed_backward", loop_rule(_OPS.windowed_backward), lib=_library)


def _report() -> Tensor:
    """(4,) float64 on the CPU: passes, lanes run again, largest jump, fell back."""
    return torch.empty(4, dtype=torch.float64)
