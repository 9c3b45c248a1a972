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
from typing import Any

import torch
from torch import Tensor

from ...cells import NOTHING
from ..kernel_args import DTYPES, dense, rows_like
from .fields import SCAN, SCAN_BACKWARD, Fields
from .problem import Adjoint, BackwardInputs, Inputs, Output, Problem, row_base, row_length


class Scanned:
    """The scanned runs of a backend that has `scan(fields)` and `scan_backward(fields)`, over the fields of one group.

    `kind`: of sums and products, for a storage dtype; `kept`: of the adjoints that later products read."""

    def __init__(self, scan: Callable, scan_backward: Callable, kind: Callable, kept: Callable) -> None:
        self.scan, self.scan_backward, self.kind, self.kept = scan, scan_backward, kind, kept

    def forward(self, inputs: Inputs, p: Problem, groups: tuple[int, ...], save: bool = True) -> Output:
        """As a backend's `forward`, of all lanes. `groups`: first units, and H."""
        tensors: Any = dense(*inputs)
        xp, w_hh, _, hidden_bias, h0, c0, base, lengths = tensors
        n, hidden, cell, empty = xp.shape[0], w_hh.shape[1], p.spec, xp.new_empty(0)
        make = xp.new_empty if lengths is None else xp.new_zeros  # rows past a length are zero
        out = Output(
            make(n, hidden),
            make(n, cell.saved * hidden) if save and cell.saved else empty,
            make(n, hidden, dtype=self.kind(xp.dtype)) if save and cell.has_cell else empty,
            rows_like(h0),
            rows_like(c0) if cell.has_cell else empty,
            *[empty] * 5,
        )
        if not p.steps or not hidden:
            return out._replace(h_n=h0.clone(), c_n=c0.clone() if cell.has_cell else empty)
        before = torch.zeros_like(out.y)  # h one step earlier
        weight = by_unit(w_hh, cell.gates)
        fields = common(SCAN, p, w_hh, h0.shape[0], base, lengths, xp.dtype)
        fields.update(zip(out._fields[:5], out), xp=xp, hidden_bias=hidden_bias, h0=h0, c0=c0, before=before)
        for first, end in pairwise(groups):
            rows = weight[first * cell.gates : end * cell.gates, :first]
            sums = product(before[:, :first], rows.T, self.kind(xp.dtype)) if first else None
            self.scan(fields | {"unit": first, "units": end - first, "sums": sums})
        return out

    def backward(self, inputs: BackwardInputs, p: Problem, groups: tuple[int, ...]) -> Adjoint:
        """As a backend's `backward`, of all lanes."""
        tensors: Any = dense(*inputs)
        dy, dh_n, dc_n, y, saved, cells, w_hh, _, h0, c0, base, lengths = tensors
        n, (columns, hidden), cell, empty = y.shape[0], w_hh.shape, p.spec, y.new_empty(0)
        make, batch, kind = y.new_empty if lengths is None else y.new_zeros, dh_n.shape[0], self.kind(y.dtype)
        dh0 = torch.zeros_like(dh_n, dtype=kind)  # the part that a cell carries
        out = Adjoint(make(n, columns), empty, dh0, rows_like(c0) if cell.has_cell else empty, *[empty] * 5)
        if not p.steps or not hidden:
            return out._replace(dh0=dh_n.clone(), dc0=dc_n.clone() if cell.has_cell else empty)
        after = y.new_zeros(n, columns, dtype=self.kept(y.dtype))  # d_hidden one step later
        weight = by_unit(w_hh, cell.gates)
        fields = common(SCAN_BACKWARD, p, w_hh, batch, base, lengths, y.dtype)
        fields.update(dz=out.dz, dh0=dh0, dc0=out.dc0, dy=dy, y=y, saved=saved, cells=cells, h0=h0, c0=c0)
        fields.update(dh_n=dh_n, dc_n=dc_n, after=after)
        for first, end in reversed(list(pairwise(groups))):
            later = end * cell.gates
            sums = product(after[:, later:], weight[later:, first:end], kind) if later < columns else None
            self.scan_backward(fields | {"unit": first, "units": end - first, "sums": sums})
        opening = row_base(p, batch, base, y.device)
        used = row_length(p, batch, lengths, y.device)[:, None] > 0
        first_rows = torch.where(used[:, 0], opening, 0)
        kept = saved[first_rows].to(kind) if cell.saved else NOTHING.h
        through = cell.hidden(out.dz[first_rows].to(kind), kept) @ w_hh.to(kind) if n else dh0
        return out._replace(dh0=torch.where(used, dh0 + through, dh_n.to(kind)).to(dh_n.dtype))


def by_unit(w_hh: Tensor, gates: int) -> Tensor:
    """W_hh with the rows of each unit side by side: (G*H, H) -> (H*G, H)."""
    hidden = w_hh.shape[1]
    return w_hh.view(gates, hidden, hidden).transpose(0, 1).reshape(gates * hidden, hidden)


def product(a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
    """a b in the dtype of sums."""
    return a.to(kind) @ b.to(kind)


def common(
    struct: Fields,
    p: Problem,
    w_hh: Tensor,
    batch: int,
    base: Tensor | None,
    lengths: Tensor | None,
    dtype: torch.dtype,
) -> Fields:
    """A struct's fields, of which those that both scans begin with have values, but for the group's."""
    return {
        **struct,
        "cell": p.spec.code,
        "dtype": DTYPES.get(dtype, -1),
        "hidden": w_hh.shape[1],
        "cap": p.cap,
        "steps": p.steps,
        "batch": batch,
        "step": p.step,
        "base": base,
        "length": lengths,
    }
