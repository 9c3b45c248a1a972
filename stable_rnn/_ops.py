"""Every registered op: schema, implementation and fake side by side (`torch.ops.stable_rnn.*`).

The numbers of a `Problem` are spread over the schema in its order. Strides `WHOLE` and `AUTO` become numbers inside the op, so that a
compiled graph never depends on T. Outputs are fresh and row-major, whatever the inputs' strides; what a cell does not have comes back
empty, of shape (0,).

A fake checks its arguments as the op does, but for the values: the dispatcher sends a call with any tensor on the meta device to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops.outputs import fresh
from .ops.recurrence import run
from .ops.recurrence.batching import fold_rule, loop_rule
from .ops.recurrence.checks import check
from .ops.recurrence.function import backward_op, setup_op
from .ops.recurrence.problem import BackwardInputs, Inputs, Problem, WindowedInputs, unpack
from .ops.recurrence.reference import arithmetic
from .ops.recurrence.report import Run
from .ops.spectral import registration as _spectral  # noqa: F401  registers the spectral ops

_library = torch.library.Library("stable_rnn", "FRAGMENT")
_PROBLEM = (
    "str cell, SymInt steps, SymInt step, SymInt stride, SymInt warmup, float tol, int max_passes, str correct, bool on_output, "
    "float cap, str backend"
)
_ROWS = "Tensor? base, Tensor? lengths, Tensor? resets"
_INPUTS = f"Tensor xp, Tensor w_hh, Tensor? w_hr, Tensor? hidden_bias, Tensor h0, Tensor? c0, {_ROWS}"


def _register(
    schema: str,
    kind: type[Inputs] | type[BackwardInputs] | type[WindowedInputs],
    implementation: Callable,
    fake: Callable,
) -> None:
    name = schema.split("(")[0]
    _library.define(schema)

    def run_fresh(*arguments: Any) -> tuple[Tensor, ...]:
        inputs, *rest = unpack(kind, arguments)
        return fresh(inputs, *implementation(inputs, *rest))

    _library.impl(name, run_fresh, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stable_rnn::{name}", lambda *arguments: fake(*unpack(kind, arguments)), lib=_library)


def _forward_fake(inputs: Inputs, p: Problem, save: bool) -> tuple[Tensor, ...]:
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "torch.onnx has no form of this recurrence; give it the program in torch's own operations, "
            "torch.export.export(model, ...).run_decompositions(stable_rnn.decompositions()), or export unstabilize(model)"
        )
    check(p, inputs, values=False)
    xp, w_hh, c0, cell, empty = inputs.xp, inputs.w_hh, inputs.c0, p.spec, inputs.xp.new_empty
    n, hidden = xp.shape[0], w_hh.shape[0] // cell.gates
    return (
        empty(n, w_hh.shape[1]),
        empty(inputs.h0.shape),
        empty(0 if c0 is None else c0.shape),
        empty(n, cell.saved * hidden) if save and cell.saved else empty(0),
        empty(n, hidden, dtype=arithmetic(xp.dtype)) if save and cell.has_cell else empty(0),
        run.report(Run() if p.checked else None),
    )


_register(
    f"recurrence({_INPUTS}, {_PROBLEM}, bool save)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor cells, Tensor report)",
    Inputs,
    run.forward,
    _forward_fake,
)


def _backward_fake(inputs: BackwardInputs, p: Problem) -> tuple[Tensor, ...]:
    check(p, inputs, values=False)
    dy, c0, empty = inputs.dy, inputs.c0, inputs.dy.new_empty
    return (
        empty(dy.shape[0], inputs.w_hh.shape[0]),
        empty(0 if inputs.w_hr is None else dy.shape),
        empty(inputs.dh_n.shape),
        empty(0 if c0 is None else c0.shape),
        run.report(Run() if p.checked else None),
    )


_register(
    f"recurrence_backward(Tensor dy, Tensor dh_n, Tensor dc_n, Tensor y, Tensor saved, Tensor cells, Tensor w_hh, Tensor? w_hr,"
    f" Tensor? h0, Tensor? c0, {_ROWS}, {_PROBLEM}) -> (Tensor dz, Tensor dh, Tensor dh0, Tensor dc0, Tensor report)",
    BackwardInputs,
    run.backward,
    _backward_fake,
)


def _windowed_backward_fake(inputs: WindowedInputs, p: Problem) -> tuple[Tensor, ...]:
    check(p, inputs, values=False)
    return tuple(inputs.xp.new_empty(0 if t is None else t.shape) for t in inputs.inputs[:-3])


_register(
    f"windowed_backward(Tensor dy, Tensor dh_n, Tensor dc_n, {_INPUTS}, {_PROBLEM})"
    " -> (Tensor dxp, Tensor dw_hh, Tensor dw_hr, Tensor dhidden_bias, Tensor dh0, Tensor dc0)",
    WindowedInputs,
    run.windowed_backward,
    _windowed_backward_fake,
)

_OPS = torch.ops.stable_rnn
torch.library.register_autograd("stable_rnn::recurrence", backward_op, setup_context=setup_op, lib=_library)
torch.library.register_vmap("stable_rnn::recurrence", fold_rule(_OPS.recurrence, Inputs), lib=_library)
torch.library.register_vmap(
    "stable_rnn::recurrence_backward", fold_rule(_OPS.recurrence_backward, BackwardInputs), lib=_library
)
torch.library.register_vmap("stable_rnn::windowed_backward", loop_rule(_OPS.windowed_backward), lib=_library)


def decompositions() -> dict[Callable, Callable]:
    """The recurrence in torch's own operations, for programs that leave: they run without this package, with T and B free.

        program = torch.export.export(model.eval(), (x,), dynamic_shapes=...).run_decompositions(stable_rnn.decompositions())
        torch.onnx.export(program, dynamo=True)  or  torch._inductor.aoti_compile_and_package(program)

    `Windowed(k)` becomes feed-forward, k steps of all windows at once; other plans are one scan: `Chunked` over the steps of all chunks at
    once, the others over T, for `Verified` and `Scanned` equal `Recurrent`. The program has no gradient. Tested with torch 2.13; older
    releases may lack parts of the scan."""
    from .ops.recurrence import graph  # older torch has no such scan

    return {_OPS.recurrence.default: graph.recurrence}
