"""A cascade over all ranks: group after group (`ops/recurrence/scanned.py`), each of whose scans is one over the ranks too.

A scan is affine in its start: over a rank's times it ends at E + P d where it started at d instead of 0, P the product of the gates that
forget. Each rank scans from 0, tells the others P and E, adds up where it really starts, and scans from there. The products over earlier
groups' h read the state one step earlier, whose first is the last of the rank before; backward, what they hand one step back comes from
the first step of the rank behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..cells import of_code
from ..ops.recurrence import cascade, native, run
from ..ops.recurrence.backends import choose
from ..ops.recurrence.checks import check
from ..ops.recurrence.fields import Fields
from ..ops.recurrence.function import Note
from ..ops.recurrence.problem import Adjoint, BackwardInputs, Inputs, Problem
from ..ops.recurrence.scanned import Scanned
from . import cpu_scans
from .way import Order, State, Way, chosen


def forward(inputs: Inputs, p: Problem, way: Way, save: bool, note: Note | None) -> tuple[State, tuple[Tensor, ...]]:
    """Where this rank starts, and y, h_n, c_n, saved, cells, report."""
    check(p, inputs)
    h, c = chosen(~way.states.here, (inputs.h0, inputs.c0))  # the scans write the rest
    scans, groups = _scans(inputs.xp, p, inputs.w_hh, inputs.w_hr, way)
    out = scans.forward(inputs._replace(h0=h, c0=c), p, groups)
    return (h, c), (out.y, out.h_n, out.c_n, out.saved, out.cells, run.report(None))


def backward(inputs: BackwardInputs, p: Problem, way: Way, note: Note | None) -> Adjoint:
    check(p, inputs)
    scans, groups = _scans(inputs.dy, p, inputs.w_hh, inputs.w_hr, way)
    dc_n = None if inputs.dc_n is None else inputs.dc_n.clone()  # the scans add to them
    return scans.backward(inputs._replace(dh_n=inputs.dh_n.clone(), dc_n=dc_n), p, groups)


def _scans(x: Tensor, p: Problem, w_hh: Tensor, w_hr: Tensor | None, way: Way) -> tuple[Scanned, tuple[int, ...]]:
    backend = choose(p, x, w_hh, w_hr)
    own: Scanned = cpu_scans.scans if backend is native else backend.scans
    made = Scanned(partial(_scan, own.scan, way), partial(_scan_backward, own.scan_backward, way), own.kind, own.kept)
    return made, cascade.groups(w_hh, p.spec.gates)


def _scan(scan: Callable, way: Way, f: Fields) -> None:
    """Forward, of one group."""
    cell, order, units = of_code(f["cell"]), way.states, slice(f["unit"], f["unit"] + f["units"])
    scan(f)
    if cell.forgets is not None:
        start, end = ("c0", "c_n") if cell.has_cell else ("h0", "h_n")
        arriving = _arriving(order, _kept(f, units, way), f[end][:, units])
        if order.place:
            f[start][:, units] = torch.where(order.here, arriving.to(f[start].dtype), f[start][:, units])
            scan(f)
    if not cell.carries:  # whose start is the last h
        last = order.handed_on(f["h_n"][:, units])
        f["h0"][:, units] = torch.where(order.here, last, f["h0"][:, units])
        first, used = way.own  # rows of no other sequence, whether used or not
        before = f["before"][first, units]
        f["before"][first, units] = torch.where((used > 0)[:, None], f["h0"][:, units], before)


def _scan_backward(scan: Callable, way: Way, f: Fields) -> None:
    """Backward, of one group."""
    cell, order, units = of_code(f["cell"]), way.adjoints, slice(f["unit"], f["unit"] + f["units"])
    scan(f)
    if cell.forgets is not None:
        start, end = ("dc_n", "dc0") if cell.has_cell else ("dh_n", "dh0")
        arriving = _arriving(order, _kept(f, units, way), f[end][:, units])
        if order.place:
            f[start][:, units] += torch.where(order.here, arriving, 0).to(f[start].dtype)
            scan(f)
    first, used = way.own
    of_group = lambda x, parts: x.view(len(x), parts, f["hidden"])[first][:, :, units].flatten(1)  # noqa: E731
    dz = of_group(f["dz"], cell.gates)
    d_hidden = order.handed_on(cell.hidden(dz, of_group(f["saved"], cell.saved) if cell.saved else dz))
    last = torch.where(order.here[:, 0], first + (used - 1) * way.step, first)
    after = f["after"].view(len(f["after"]), f["hidden"], cell.gates)
    by_unit = d_hidden.unflatten(1, (cell.gates, -1)).transpose(1, 2).to(after.dtype)
    after[last, units] = torch.where(order.here[:, :, None], by_unit, after[last, units])


def _kept(f: Fields, units: slice, way: Way) -> Tensor:
    """The product of the group's gates that forget over this rank's times: (B, units)."""
    cell = of_code(f["cell"])
    gates = f["saved"].view(way.steps, way.batch, cell.saved, f["hidden"])[:, :, cell.forgets, units]
    kind = torch.float64 if gates.dtype == torch.float64 else torch.float32
    return torch.where(way.there, gates, 1).prod(0, dtype=kind)


def _arriving(order: Order, kept: Tensor, end: Tensor) -> Tensor:
    """What this rank's start is to be moved by, (B, units), from every rank's `kept` and `end` of a scan before that."""
    kept_of, end_of = order.gather(torch.cat([kept, end.to(kept.dtype)], 1)).chunk(2, 2)
    move = torch.zeros_like(kept)
    for place in range(order.place):
        move = torch.where(order.arrives[place + 1][:, None], end_of[place] + kept_of[place] * move, 0)
    return move
