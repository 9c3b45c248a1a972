"""Checked lanes: run chunks with a warm-up, compare each lane's start with the state its predecessor reached, rerun what differs.

The result is a trajectory whose only defects are jumps of at most `tol` (relative to max(1, |state|)) at chunk borders. The backward
pass is the same in reverse time, with `tol` relative to the largest adjoint. Both are `_check` over a backend's lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .problem import Adjoint, BackwardInputs, Inputs, Output, Problem

PATIENCE = 0.5  # a pass pays if it leaves at most this part of the lanes that it reran
FEW = 8  # so few lanes are rerun whatever the part


def run(backend: ModuleType, inputs: Inputs, p: Problem, save: bool) -> tuple[Output, list[float]]:
    """Forward: the output, and the report [passes, lanes run again, largest jump, fell back]."""
    out = backend.forward(inputs, p, save=save, borders=True)
    again = lambda ids, h, c, out: backend.forward(  # noqa: E731
        inputs, p, save=save, borders=True, ids=ids, h_init=h, c_init=c, out=out
    )
    out, report = _check(
        out, out._fields.index("h_start"), again, p, inputs.state.shape[0], inputs.lengths, ahead=False
    )
    if report[3]:
        out = backend.forward(inputs, p.whole(), save=save)
    return out, report


def run_back(backend: ModuleType, inputs: BackwardInputs, p: Problem) -> tuple[Adjoint, list[float]]:
    """Backward, as `run`."""
    out = backend.backward(inputs, p, borders=True)
    again = lambda ids, h, c, out: backend.backward(inputs, p, borders=True, ids=ids, dh_init=h, dc_init=c, out=out)  # noqa: E731
    out, report = _check(
        out, out._fields.index("dh_start"), again, p, inputs.state.shape[0], inputs.lengths, ahead=True
    )
    if report[3]:
        out = backend.backward(inputs, p.whole())
    return out, report


def _check(
    out: Output | Adjoint, field: int, again: Callable, p: Problem, batch: int, lengths: Tensor | None, ahead: bool
):
    """Rerun until every border agrees. `ahead`: a lane's start is the end of the lane after it (reverse time), else before it.

    Returns the output and [passes, lanes run again, largest jump, fell back]; one device sync a pass."""
    lanes, passes, rerun, fallback = p.lanes(), 1, 0, False
    neighbor = batch if ahead else -batch
    previous = math.inf
    while True:
        jump = _jumps(*out[field : field + 4], p, lanes, batch, lengths, ahead)
        bad = (~(jump <= p.tol)).nonzero().squeeze(1)
        if not len(bad):
            break
        depth = p.stride * (passes + 1) + p.warmup
        slow = len(bad) > max(PATIENCE * previous, FEW) if passes > 1 else False
        if passes >= p.max_passes or depth > p.steps or slow:
            fallback = True
            break
        if not ahead:
            bad = bad + batch  # jump j is at the border between lanes j and j + 1
        h_end, c_end = out[field + 2], out[field + 3]
        out = again(bad, h_end[bad + neighbor], c_end[bad + neighbor] if c_end.numel() else None, out)
        previous, rerun, passes = len(bad), rerun + len(bad), passes + 1
    largest = 0.0 if fallback or not jump.numel() else float(jump.max())
    return out, [float(passes), float(rerun), largest, float(fallback)]


def _jumps(
    h_start: Tensor,
    c_start: Tensor,
    h_end: Tensor,
    c_end: Tensor,
    p: Problem,
    lanes: int,
    batch: int,
    lengths: Tensor | None,
    ahead: bool,
) -> Tensor:
    """Largest relative difference at each inner border: ((L-1)*B,), border j between lanes j and j+1."""
    inner = (lanes - 1) * batch
    total = h_start.new_zeros(inner)
    scale = None
    if ahead:  # adjoints: relative to the largest of them
        scale = torch.stack([t.abs().max() for t in (h_end, c_end) if t.numel()] or [h_end.new_ones(())]).max()
        scale = scale.clamp_min(torch.finfo(h_end.dtype).tiny)
    for start, end in ((h_start, h_end), (c_start, c_end)):
        if not start.numel() or not inner:
            continue
        start, end = (start[:inner], end[batch:]) if ahead else (start[batch:], end[:inner])
        same = (start == end) | (start.isnan() & end.isnan())
        size = end.abs().clamp_min(1) if scale is None else scale
        total = torch.maximum(total, torch.where(same, 0.0, (start - end).abs() / size).amax(1))
    if lengths is not None and inner:  # borders that a row does not reach
        border = torch.arange(1, lanes, device=total.device) * p.stride
        total = torch.where(border[:, None] < lengths, total.view(lanes - 1, batch), 0.0).flatten()
    return total
