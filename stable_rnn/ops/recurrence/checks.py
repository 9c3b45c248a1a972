"""What the ops are given, checked before an address of it reaches a kernel: dtypes, devices, shapes, and on the CPU the rows too."""
from __future__ import annotations

import torch
from torch import Tensor

from ...cells import CELLS
from .problem import Problem, row_base


def check(p: Problem, rows: Tensor, h: Tensor, base: Tensor | None, lengths: Tensor | None, values: bool = True,
          **tensors: Tensor | None) -> None:
    """`ValueError` that names the tensor, unless all fit the problem: `rows` (N, .) sets dtype and device, `h` (B, P) the batch.

    `tensors` by their names in the schema; those that may be absent are None. `values`: base and lengths hold some."""
    if p.cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}; got {p.cell!r}")
    cell, w_hh, n = p.spec, tensors["w_hh"], rows.shape[0]
    if w_hh.dim() != 2 or h.dim() != 2 or rows.dim() != 2:
        raise ValueError(f"xp, w_hh and h0 must have two dimensions; w_hh is {tuple(w_hh.shape)}, the state {tuple(h.shape)}")
    (columns, out), batch = w_hh.shape, h.shape[0]
    hidden = columns // cell.gates
    projected = tensors["w_hr"] is not None
    if columns % cell.gates or out != hidden and not projected:
        rows_of = "H" if cell.gates == 1 else f"{cell.gates}H"
        raise ValueError(f"w_hh is {tuple(w_hh.shape)}; expected ({rows_of}, {'P' if projected else 'H'})")
    shapes = {"xp": (n, columns), "w_hh": (columns, out), "w_hr": (out, hidden), "dy": (n, out), "y": (n, out),
              "saved": (n, cell.saved * hidden), "cells": (n, hidden)}
    shapes |= dict.fromkeys(("h0", "dh_n"), (batch, out)) | dict.fromkeys(("c0", "dc_n"), (batch, hidden))
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    for name, t in tensors.items():
        if t is None:
            if cell.has_cell and name in ("c0", "dc_n"):
                raise ValueError(f"{name} is missing; an LSTM needs it, of shape {shapes[name]}")
        elif t.shape != shapes[name] or t.dtype != (wide if name == "cells" else rows.dtype) or t.device != rows.device:
            raise ValueError(f"{name} is {tuple(t.shape)}, {t.dtype} on {t.device}; expected {shapes[name]}, "
                             f"{wide if name == 'cells' else rows.dtype} on {rows.device} (w_hh is {tuple(w_hh.shape)})")
    for name, t in (("base", base), ("lengths", lengths)):
        if t is not None and (t.shape != (batch,) or t.dtype != torch.int64 or t.device != rows.device):
            raise ValueError(f"{name} is {tuple(t.shape)}, {t.dtype} on {t.device}; expected ({batch},), torch.int64 on {rows.device}")
    if base is None and (n != p.steps * batch or abs(p.step) != batch):
        raise ValueError(f"{n} buffer rows, step {p.step}; without base, expected T * B = {p.steps * batch} rows and a step of B = {batch}")
    if values and rows.device.type == "cpu" and batch and (base is not None or lengths is not None):
        _check_rows(p, n, batch, base, lengths, rows.device)


def _check_rows(p: Problem, n: int, batch: int, base: Tensor | None, lengths: Tensor | None, device: torch.device) -> None:
    first = row_base(p, batch, base, device)
    used = torch.full_like(first, p.steps) if lengths is None else lengths
    ends = torch.stack([first, first + (used - 1) * p.step])[:, used > 0]
    if int(used.min()) < 0 or int(used.max()) > p.steps or ends.numel() and not 0 <= int(ends.min()) <= int(ends.max()) < n:
        raise ValueError(f"base and lengths reach outside of the {n} buffer rows, or lengths outside of 0..{p.steps}")
