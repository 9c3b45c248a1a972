"""What the ops are given, checked before an address of it reaches a kernel: dtypes, devices, shapes, and on the CPU the rows too."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cells import CELLS
from .problem import BackwardInputs, Inputs, Problem, WindowedInputs, row_base


def check(p: Problem, inputs: Inputs | BackwardInputs | WindowedInputs, values: bool = True) -> None:
    """`ValueError` that names the tensor, unless all fit the problem: `inputs.rows` sets dtype and device, `inputs.state` the batch.

    What the backward pass is given of a cell that has no c does not count. `values`: base and lengths hold some."""
    if p.cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}; got {p.cell!r}")
    cell, rows, h, w_hh, base, lengths = p.spec, inputs.rows, inputs.state, inputs.w_hh, inputs.base, inputs.lengths
    n, dtype, device = rows.shape[0], rows.dtype, rows.device
    if w_hh.dim() != 2 or h.dim() != 2 or rows.dim() != 2:
        raise ValueError(
            f"xp, w_hh and h0 must have two dimensions; w_hh is {tuple(w_hh.shape)}, the state {tuple(h.shape)}"
        )
    (columns, out), batch = w_hh.shape, h.shape[0]
    hidden = columns // cell.gates
    projected = inputs.w_hr is not None
    if columns % cell.gates or out != hidden and not projected:
        rows_of = "H" if cell.gates == 1 else f"{cell.gates}H"
        raise ValueError(f"w_hh is {tuple(w_hh.shape)}; expected ({rows_of}, {'P' if projected else 'H'})")
    if p.scanned and projected:
        raise ValueError(
            "Scanned() has no projected states (proj_size, w_hr): a projection mixes all units of a cascade at every step"
        )
    h_shape, c_shape = (batch, out), (batch, hidden)
    shapes = {
        "xp": (n, columns),
        "w_hh": (columns, out),
        "w_hr": (out, hidden),
        "hidden_bias": (hidden,),
        "dy": (n, out),
        "y": (n, out),
        "saved": (n, cell.saved * hidden),
        "cells": (n, hidden),
        "h0": h_shape,
        "dh_n": h_shape,
        "c0": c_shape,
        "dc_n": c_shape,
    }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if cell.has_cell and inputs.c0 is None:
        raise ValueError(f"c0 is missing; a cell {cell.name!r} needs it, of shape {c_shape}")
    if cell.carries and inputs.h0 is None:
        raise ValueError(f"h0 is missing; a cell {cell.name!r} needs it, of shape {h_shape}")
    if cell.hidden_bias is None and getattr(inputs, "hidden_bias", None) is not None:
        raise ValueError(f"hidden_bias is given; a cell {cell.name!r} has none")
    absent = ("dc_n", "cells") * (not cell.has_cell) + ("saved",) * (not cell.saved)
    for name, t in zip(inputs._fields, inputs):
        shape = shapes.get(name)
        if t is None or shape is None or name in absent:
            continue
        kind = wide if name == "cells" else dtype
        if t.shape != shape or t.dtype != kind or t.device != device:
            raise ValueError(
                f"{name} is {tuple(t.shape)}, {t.dtype} on {t.device}; expected {shape}, {kind} on {device} "
                f"(w_hh is {tuple(w_hh.shape)})"
            )
    for name, t in (("base", base), ("lengths", lengths)):
        if t is not None and (t.shape != (batch,) or t.dtype != torch.int64 or t.device != device):
            raise ValueError(
                f"{name} is {tuple(t.shape)}, {t.dtype} on {t.device}; expected ({batch},), torch.int64 on {device}"
            )
    resets = inputs.resets
    if resets is not None and (resets.shape != (n,) or resets.dtype != torch.bool or resets.device != device):
        raise ValueError(
            f"resets is {tuple(resets.shape)}, {resets.dtype} on {resets.device}; expected ({n},), torch.bool on {device}"
        )
    if base is None and (n != p.steps * batch or abs(p.step) != batch):
        raise ValueError(
            f"{n} buffer rows, step {p.step}; without base, expected T * B = {p.steps * batch} rows and a step of B = {batch}"
        )
    if (base is not None or lengths is not None) and values and device.type == "cpu" and batch:
        _check_rows(p, n, batch, base, lengths, device)


def _check_rows(
    p: Problem, n: int, batch: int, base: Tensor | None, lengths: Tensor | None, device: torch.device
) -> None:
    first = row_base(p, batch, base, device)
    used = torch.full_like(first, p.steps) if lengths is None else lengths
    ends = torch.stack([first, first + (used - 1) * p.step])[:, used > 0]
    if (
        int(used.min()) < 0
        or int(used.max()) > p.steps
        or ends.numel()
        and not 0 <= int(ends.min()) <= int(ends.max()) < n
    ):
        raise ValueError(f"base and lengths reach outside of the {n} buffer rows, or lengths outside of 0..{p.steps}")
