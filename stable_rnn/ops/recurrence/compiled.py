"""A backend's `forward` and `backward` over kernels that take the fields of `params.h`, and fresh outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernel_args import DTYPES, TF32, dense, rows_like
from .fields import BACKWARD, FORWARD, Fields
from .problem import Adjoint, BackwardInputs, Inputs, Output, Problem, WindowedInputs

__all__ = ["DTYPES", "TF32", "Kernels", "lanes", "shared"]


def shared(
    struct: Fields,
    p: Problem,
    dtype: int,
    tensors: Inputs | BackwardInputs | WindowedInputs,
    batch: int,
    ids: Tensor | None = None,
) -> Fields:
    """A struct's fields, with the values of those that every struct begins with, and of the op's tensors, which have the same names."""
    (columns, out), cell = tensors.w_hh.shape, p.spec
    return {
        **struct,
        **{name: t for name, t in tensors._asdict().items() if name in struct},
        "cell": cell.code,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "hidden": columns // cell.gates,
        "out": out,
        "cap": p.cap,
        "steps": p.steps,
        "batch": batch,
        "step": p.step,
        "stride": p.stride,
        "warmup": p.warmup,
        "length": tensors.lengths,
        "select": ids,
        "n_select": 0 if ids is None else len(ids),
    }


def lanes(fields: Fields) -> int:
    """How many lanes a call runs."""
    return -(-fields["steps"] // fields["stride"]) * fields["batch"] if fields["select"] is None else fields["n_select"]


def _borders(p: Problem, batch: int, out: int, hidden: int, like: Tensor) -> list[Tensor]:
    """Start and end states of all lanes, zero where no lane runs, and their decay, then 1."""
    count, c_width = p.lanes() * batch, hidden if p.spec.has_cell else 0
    states = [like.new_zeros(count, width, dtype=torch.float32) for width in (out, c_width, out, c_width)]
    return [*states, like.new_ones(count, 0 if p.spec.forgets is None else hidden, dtype=torch.float32)]


def _ends(h_init: Tensor, c_init: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where rows without any time end: where they start."""
    return h_init.clone(), h_init.new_empty(0) if c_init is None else c_init.clone()


class Kernels:
    """What the backends with kernels share; each says how it calls them."""

    def call(self, backward: bool, fields: Fields) -> tuple[Callable, Sequence, Any]:
        """The kernel, what it takes, and what has to live until it is launched."""
        raise NotImplementedError

    def dtype(self, x: Tensor) -> int:
        """The `DType` of a tensor."""
        return DTYPES[x.dtype]

    def padded(self, lengths: Tensor | None, rows: int) -> bool:
        """Whether some buffer rows may be no time of any sequence; these are zero."""
        return lengths is not None

    def make(self, like: Tensor, zero: bool, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A fresh output."""
        return like.new_zeros(shape, dtype=dtype) if zero else like.new_empty(shape, dtype=dtype)

    def forward(
        self,
        inputs: Inputs,
        p: Problem,
        save: bool = True,
        borders: bool = False,
        ids: Tensor | None = None,
        h_init: Tensor | None = None,
        c_init: Tensor | None = None,
        out: Output | None = None,
        saved: Tensor | None = None,
    ) -> Output:
        """As `reference.forward`; `out` is written in place. `saved`: the memory for what is saved, instead of a fresh one."""
        given = Inputs._make(dense(*inputs))
        xp, h0, c0, lengths = given.xp, given.h0, given.c0, given.lengths
        n, batch, (columns, width), cell = xp.shape[0], h0.shape[0], given.w_hh.shape, p.spec
        hidden = columns // cell.gates
        if out is None:
            empty = xp.new_empty(0)
            make, padded = self.make, self.padded(lengths, n)
            if saved is None:
                saved = make(xp, padded, n, cell.saved * hidden) if save and cell.saved else empty
            cells = make(xp, padded, n, hidden, dtype=torch.float32) if save and cell.has_cell else empty
            ends = _borders(p, batch, width, hidden, xp) if borders else [empty] * 5
            out = Output(
                make(xp, padded, n, width),
                saved,
                cells,
                rows_like(h0),
                rows_like(c0) if cell.has_cell and c0 is not None else empty,
                *ends,
            )
        h_init, c_init = dense(h_init, c_init)
        fields = shared(FORWARD, p, self.dtype(xp), given, batch, ids)
        fields.update(zip(out._fields, out), h_init=h_init, c_init=c_init)
        kernel, values, _held = self.call(False, fields)
        kernel(*values)
        return out

    def backward(
        self,
        inputs: BackwardInputs,
        p: Problem,
        borders: bool = False,
        ids: Tensor | None = None,
        dh_init: Tensor | None = None,
        dc_init: Tensor | None = None,
        out: Adjoint | None = None,
        dz: Tensor | None = None,
    ) -> Adjoint:
        """As `reference.backward`; `out` is written in place. `dz`: the memory for it, instead of a fresh one."""
        given = BackwardInputs._make(dense(*inputs))
        y, dh_n, c0, w_hr, lengths = given.y, given.dh_n, given.c0, given.w_hr, given.lengths
        n, batch, (columns, width), cell = y.shape[0], dh_n.shape[0], given.w_hh.shape, p.spec
        hidden = columns // cell.gates
        if out is None:
            empty = y.new_empty(0)
            make, padded = self.make, self.padded(lengths, n)
            ends = _borders(p, batch, width, hidden, y) if borders else [empty] * 5
            out = Adjoint(
                make(y, padded, n, columns) if dz is None else dz,
                empty if w_hr is None else make(y, padded, n, width),
                rows_like(dh_n),
                rows_like(c0) if cell.has_cell and c0 is not None else empty,
                *ends,
            )
        dh_init, dc_init = dense(dh_init, dc_init)
        fields = shared(BACKWARD, p, self.dtype(y), given, batch, ids)
        fields.update(zip(out._fields, out), dh_init=dh_init, dc_init=dc_init)
        kernel, values, _held = self.call(True, fields)
        kernel(*values)
        return out

    def ends(self, inputs: Inputs, p: Problem, h_init: Tensor, c_init: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `reference.ends`."""
        given = Inputs._make(dense(*inputs))
        h_init, c_init = dense(h_init, c_init)
        h_end, c_end = _ends(h_init, c_init)
        fields = shared(FORWARD, p.whole(), self.dtype(given.xp), given, len(h_init))
        fields.update(h0=None, c0=None, h_init=h_init, c_init=c_init, h_end=h_end, c_end=c_end)
        kernel, values, _held = self.call(False, fields)
        kernel(*values)
        return h_end, c_end

    def adjoint_ends(
        self, inputs: BackwardInputs, p: Problem, dh_init: Tensor, dc_init: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `reference.adjoint_ends`."""
        given = BackwardInputs._make(dense(*inputs))
        dh_init, dc_init = dense(dh_init, dc_init)
        dh_end, dc_end = _ends(dh_init, dc_init)
        fields = shared(BACKWARD, p.whole(), self.dtype(given.y), given, len(dh_init))
        fields.update(dh_n=None, dc_n=None, dh_init=dh_init, dc_init=dc_init, dh_end=dh_end, dc_end=dc_end)
        kernel, values, _held = self.call(True, fields)
        kernel(*values)
        return dh_end, dc_end
