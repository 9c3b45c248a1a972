"""A cascade over all times at once: group after group one product, and then a linear scan over time.

Units of a group read earlier groups only, so with their h known for all times

    q[t] = h[t-1] W_hh^T (one product),   a, b = cell's step on xp[t], q[t] from a zero state,   s[t] = a[t] s[t-1] + b[t] (a scan)

s is the state that a unit keeps for itself: c, or h of a cell that carries; a is its gate that forgets. Backward, groups in reverse:
dh = dy + the later groups' d_hidden[t+1] W_hh, and u[t-1] = a[t] u[t] + b[t] is what a step hands on to s before it, b[t] what it would
hand on for u[t] = 0. A cell needs nothing for this beyond its step and its vector-Jacobian product.

Here are the products, by torch; a backend brings the two scans. (The `cpu` backend does both in one pass over time: `csrc/cpu/scanned.h`.)
Sums lie unit by unit, each with its gates, so that the units of any range of groups are columns side by side."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ...cells import NOTHING
from ..kernel_args import DTYPES, dense, rows_like
from .fields import SCAN, SCAN_BACKWARD, Fields
from .problem import Adjoint, BackwardInputs, Inputs, Output, Problem, row_base, row_length

WIDE_SUMS = "dtype" in torch.ops.aten.mm.overloads()  # products of 16 bits with float32 sums, on CUDA devices


class Scanned:
    """The scanned runs of a backend that has `scan(fields)` and `scan_backward(fields)`, over the fields of one group.

    `kind`: of sums and products, for a storage dtype; `kept`: of the adjoints that later products read."""

    def __init__(self, scan: Callable, scan_backward: Callable, kind: Callable, kept: Callable) -> None:
        self.scan, self.scan_backward, self.kind, self.kept = scan, scan_backward, kind, kept

    def forward(self, inputs: Inputs, p: Problem, groups: tuple[int, ...], save: bool = True) -> Output:
        """As a backend's `forward`, of all lanes. `groups`: first units, and H."""
        given, cell = Inputs._make(dense(*inputs)), p.spec
        xp, h0, c0 = given.xp, given.h0, given.c0 if cell.has_cell else None
        n, hidden, kind, empty = xp.shape[0], given.w_hh.shape[1], self.kind(xp.dtype), xp.new_empty(0)
        make = xp.new_empty if given.lengths is None else xp.new_zeros  # rows past a length are zero
        out = Output(
            make(n, hidden),
            make(n, cell.saved * hidden) if save and cell.saved else empty,
            make(n, hidden, dtype=kind) if save and cell.has_cell else empty,
            rows_like(h0),
            empty if c0 is None else rows_like(c0),
            *[empty] * 5,
        )
        if not p.steps or not hidden:
            return out._replace(h_n=h0.clone(), c_n=empty if c0 is None else c0.clone())
        before = torch.zeros_like(out.y)  # h one step earlier
        weight = by_unit(given.w_hh, cell.gates)
        fields = common(SCAN, p, hidden, h0.shape[0], given.base, given.lengths, given.resets, xp.dtype)
        fields.update(zip(out._fields[:5], out), xp=xp, hidden_bias=given.hidden_bias, h0=h0, c0=c0, before=before)
        for first, end in pairwise(groups):
            rows = weight[first * cell.gates : end * cell.gates, :first]
            sums = product(before[:, :first], rows.T, kind) if first else None
            self.scan(fields | {"unit": first, "units": end - first, "sums": sums})
        return out

    def backward(self, inputs: BackwardInputs, p: Problem, groups: tuple[int, ...]) -> Adjoint:
        """As a backend's `backward`, of all lanes."""
        given, cell = BackwardInputs._make(dense(*inputs)), p.spec
        y, saved, dh_n, c0 = given.y, given.saved, given.dh_n, given.c0 if cell.has_cell else None
        n, (columns, hidden), batch, kind = y.shape[0], given.w_hh.shape, dh_n.shape[0], self.kind(y.dtype)
        make, empty = y.new_empty if given.lengths is None else y.new_zeros, y.new_empty(0)
        dh0 = torch.zeros_like(dh_n, dtype=kind)  # the part that a cell carries
        out = Adjoint(make(n, columns), empty, dh0, empty if c0 is None else rows_like(c0), *[empty] * 5)
        if not p.steps or not hidden:
            return out._replace(dh0=dh_n.clone(), dc0=empty if given.dc_n is None or c0 is None else given.dc_n.clone())
        after = y.new_zeros(n, columns, dtype=self.kept(y.dtype))  # d_hidden one step later
        weight = by_unit(given.w_hh, cell.gates)
        fields = common(SCAN_BACKWARD, p, hidden, batch, given.base, given.lengths, given.resets, y.dtype)
        fields.update(dy=given.dy, y=y, saved=saved, cells=given.cells, h0=given.h0, c0=c0, dh_n=dh_n, dc_n=given.dc_n)
        fields.update(dz=out.dz, dh0=dh0, dc0=out.dc0, after=after)
        for first, end in reversed(list(pairwise(groups))):
            later = end * cell.gates
            sums = product(after[:, later:], weight[later:, first:end], kind) if later < columns else None
            self.scan_backward(fields | {"unit": first, "units": end - first, "sums": sums})
        if not n:
            return out._replace(dh0=dh_n.clone())
        used = row_length(p, batch, given.lengths, y.device) > 0
        opening = torch.where(used, row_base(p, batch, given.base, y.device), 0)
        kept = saved[opening].to(kind) if cell.saved else NOTHING.h
        read = cell.hidden(out.dz[opening].to(kind), kept) @ given.w_hh.to(kind)
        if given.resets is not None:
            read = read.masked_fill(given.resets[opening, None], 0)
        dh0 = dh0 + read
        return out._replace(dh0=torch.where(used[:, None], dh0, dh_n.to(kind)).to(dh_n.dtype))


def by_unit(w_hh: Tensor, gates: int) -> Tensor:
    """W_hh with the rows of each unit side by side: (G*H, H) -> (H*G, H)."""
    hidden = w_hh.shape[1]
    return w_hh.view(gates, hidden, hidden).transpose(0, 1).reshape(gates * hidden, hidden)


def product(a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
    """a b in the dtype of sums, on a GPU by its 16-bit products where torch can add them up in float32 (from 2.8 on)."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) and WIDE_SUMS:
        return torch.mm(a, b, out_dtype=kind)
    return a.to(kind) @ b.to(kind)


def common(
    struct: Fields,
    p: Problem,
    hidden: int,
    batch: int,
    base: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    dtype: torch.dtype,
) -> Fields:
    """A struct's fields, of which those that both scans begin with have values, but for the group's."""
    return {
        **struct,
        "cell": p.spec.code,
        "dtype": DTYPES.get(dtype, -1),
        "hidden": hidden,
        "cap": p.cap,
        "steps": p.steps,
        "batch": batch,
        "step": p.step,
        "base": base,
        "length": lengths,
        "resets": resets,
    }
