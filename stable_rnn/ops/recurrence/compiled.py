"""What the kernels share: the fields of `params.h`, taken from tensors, and fresh outputs."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .problem import Adjoint, Output, Problem

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `enum DType`; TF32 is asked for by number
TF32 = 3


def at(t: Tensor | None) -> int:
    """The address of a tensor's values; 0, which kernels take for an absent tensor, for None alone and for tensors without elements."""
    address = 0 if t is None else t.data_ptr()
    if not address and t is not None and t.numel():
        raise RuntimeError(f"a tensor of shape {tuple(t.shape)} has no memory: its storage was freed, as FSDP does between uses")
    return address


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Row by row in memory, with the values that are read there (a negative view of torch's holds the others)."""
    return [None if t is None else t.resolve_neg().contiguous() for t in tensors]


def rows_like(t: Tensor) -> Tensor:
    """Memory for what a kernel writes row by row. (`empty_like` alone keeps the strides of a transposed tensor.)"""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def sizes(p: Problem, dtype: int, w_hh: Tensor, batch: int) -> tuple:
    """The numbers that every kernel begins with, up to the schedule."""
    return (p.spec.code, dtype, torch.get_num_threads(), w_hh.shape[0] // p.spec.gates, w_hh.shape[1], p.cap, p.steps, batch, p.step,
            p.stride, p.warmup)


def _borders(p: Problem, batch: int, out: int, hidden: int, like: Tensor) -> list[Tensor]:
    """Start and end states of all lanes, zero where no lane runs."""
    count, c_width = p.lanes() * batch, hidden if p.spec.has_cell else 0
    return [like.new_zeros(count, width, dtype=torch.float32) for width in (out, c_width, out, c_width)]


class Kernels:
    """A backend's `forward` and `backward` over two entry points that take the fields of `ForwardParams` and `BackwardParams`.

    `dtype` gives the `DType` of a tensor, `make(like, zero, *shape, dtype=)` a fresh output, `at` what stands for a tensor in a field."""

    def __init__(self, forward: Callable, backward: Callable, dtype: Callable[[Tensor], int], make: Callable[..., Tensor],
                 at: Callable = at):
        self._forward, self._backward, self._dtype, self._make, self._at = forward, backward, dtype, make, at

    def forward(self, xp: Tensor, w_hh: Tensor, w_hr: Tensor | None, h0: Tensor, c0: Tensor | None, base: Tensor | None,
                lengths: Tensor | None, p: Problem, save: bool = True, borders: bool = False, ids: Tensor | None = None,
                h_init: Tensor | None = None, c_init: Tensor | None = None, out: Output | None = None) -> Output:
        """As `reference.forward`; `out` is written in place."""
        xp, w_hh, w_hr, h0, c0, base, lengths, h_init, c_init = dense(xp, w_hh, w_hr, h0, c0, base, lengths, h_init, c_init)
        n, batch, width = xp.shape[0], h0.shape[0], w_hh.shape[1]
        cell, hidden = p.spec, w_hh.shape[0] // p.spec.gates
        if out is None:
            empty = xp.new_empty(0)
            make = partial(self._make, xp, lengths is not None)  # rows past a length are zero
            saved = make(n, cell.saved * hidden) if save and cell.saved else empty
            cells = make(n, hidden, dtype=torch.float32) if save and cell.has_cell else empty
            ends = _borders(p, batch, width, hidden, xp) if borders else [empty] * 4
            out = Output(make(n, width), saved, cells, rows_like(h0), rows_like(c0) if cell.has_cell else empty, *ends)
        at = self._at
        self._forward(
            *sizes(p, self._dtype(xp), w_hh, batch), at(base), at(lengths), at(ids), 0 if ids is None else len(ids),
            at(xp), at(w_hh), at(w_hr), at(h0), at(c0), at(h_init), at(c_init), at(None),
            at(out.y), at(out.h_n), at(out.c_n), at(out.saved), at(out.cells), *map(at, out[5:]))
        return out

    def backward(self, dy: Tensor, dh_n: Tensor, dc_n: Tensor | None, y: Tensor, saved: Tensor, cells: Tensor, w_hh: Tensor,
                 w_hr: Tensor | None, c0: Tensor | None, base: Tensor | None, lengths: Tensor | None, p: Problem, borders: bool = False,
                 ids: Tensor | None = None, dh_init: Tensor | None = None, dc_init: Tensor | None = None,
                 out: Adjoint | None = None) -> Adjoint:
        """As `reference.backward`; `out` is written in place."""
        dy, dh_n, dc_n, y, saved, cells, w_hh, w_hr, c0, base, lengths, dh_init, dc_init = dense(
            dy, dh_n, dc_n, y, saved, cells, w_hh, w_hr, c0, base, lengths, dh_init, dc_init)
        n, batch, width = y.shape[0], dh_n.shape[0], w_hh.shape[1]
        cell, hidden = p.spec, w_hh.shape[0] // p.spec.gates
        if out is None:
            empty = y.new_empty(0)
            make = partial(self._make, y, lengths is not None)
            ends = _borders(p, batch, width, hidden, y) if borders else [empty] * 4
            out = Adjoint(make(n, w_hh.shape[0]), empty if w_hr is None else make(n, width), rows_like(dh_n),
                          rows_like(c0) if cell.has_cell else empty, *ends)
        at = self._at
        self._backward(
            *sizes(p, self._dtype(dy), w_hh, batch), at(base), at(lengths), at(ids), 0 if ids is None else len(ids),
            at(dy), at(y), at(saved), at(cells), at(w_hh), at(w_hr), at(c0), at(dh_n), at(dc_n), at(dh_init), at(dc_init), at(None),
            *map(at, out))
        return out
