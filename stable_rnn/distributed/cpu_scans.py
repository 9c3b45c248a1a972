"""The scans of one group on the CPU: its kernel goes once through time with all groups (`csrc/cpu/scanned.h`); here it is given the cascade
that one group is, which reads nothing but its sums. The buffers are time-major."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import of_code
from ..ops.recurrence import native
from ..ops.recurrence.fields import Fields
from ..ops.recurrence.problem import BackwardInputs, Inputs, Problem, previous_states
from ..ops.recurrence.reference import arithmetic
from ..ops.recurrence.scanned import Scanned


class _Group:
    """Columns of a group, in the arithmetic's dtype."""

    def __init__(self, f: Fields, like: Tensor) -> None:
        self.f, self.kind, self.cell = f, arithmetic(like.dtype), of_code(f["cell"])
        self.units = slice(f["unit"], f["unit"] + f["units"])
        self.whole = 0, f["units"]
        self.no_weight = torch.zeros(self.cell.gates * f["units"], f["units"], dtype=self.kind, device="cpu")
        self.p = Problem(self.cell.name, f["steps"], f["step"], cap=f["cap"])

    def part(self, name: str, parts: int = 1) -> Tensor:
        """A view of x (N, parts*H): (N, parts, units)."""
        x = self.f[name]
        return x.view(len(x), parts, self.f["hidden"])[:, :, self.units]

    def take(self, name: str, parts: int = 1) -> Tensor:
        """(N, parts*units), or x itself where a cell has none."""
        x = self.f[name]
        return x if x is None or x.dim() < 2 else self.part(name, parts).flatten(1).to(self.kind)

    def put(self, name: str, x: Tensor, parts: int = 1) -> None:
        if self.f[name] is not None and self.f[name].dim() == 2:
            self.part(name, parts).copy_(x.view(len(x), parts, self.f["units"]))


def _scan(f: Fields) -> None:
    """As `reference_scan.scan`."""
    g = _Group(f, f["xp"])
    x, cell = g.take("xp", g.cell.gates), g.cell
    q = torch.zeros_like(x).view(len(x), cell.gates, f["units"])
    if f["sums"] is not None:
        q += f["sums"].unflatten(1, (-1, cell.gates)).transpose(1, 2)
    if f["hidden_bias"] is not None and cell.hidden_bias is not None:
        q[:, cell.hidden_bias] += f["hidden_bias"][g.units]
    q, h0, c0 = q.flatten(1), g.take("h0"), g.take("c0")
    given = Inputs(cell.joined(x, q), g.no_weight, None, None, h0, c0, f["base"], f["length"])
    out = native.scanned_forward(given, g.p, g.whole)
    g.put("saved", cell.parted(out.saved, q), cell.saved)
    before = previous_states(out.y, given, g.p)
    for name, x in dict(y=out.y, cells=out.cells, before=before, h_n=out.h_n, c_n=out.c_n).items():
        g.put(name, x)


def _scan_backward(f: Fields) -> None:
    """As `reference_scan.scan_backward`."""
    g = _Group(f, f["y"])
    cell, saved = g.cell, g.take("saved", g.cell.saved)
    dy = g.take("dy") if f["sums"] is None else g.take("dy") + f["sums"]
    ends, kept = (g.take("dh_n"), g.take("dc_n")), (g.take("y"), saved, g.take("cells"))
    h0 = g.take("h0") if cell.carries else None
    given = BackwardInputs(dy, *ends, *kept, g.no_weight, None, h0, g.take("c0"), f["base"], f["length"])
    back = native.scanned_backward(given, g.p, g.whole)
    g.put("dz", back.dz, cell.gates)
    g.put("dc0", back.dc0)
    if cell.carries:
        g.put("dh0", back.dh0)
    d_hidden = cell.hidden(back.dz, saved).unflatten(1, (cell.gates, -1)).transpose(1, 2)
    after, step = f["after"].view(len(dy), f["hidden"], cell.gates)[:, g.units], f["step"]
    earlier, later = (slice(0, len(dy) - abs(step)), slice(abs(step), len(dy)))[:: 1 if step > 0 else -1]
    after[earlier] = d_hidden[later]  # 0 past a sequence's end, as dz is


scans = Scanned(_scan, _scan_backward, arithmetic, arithmetic)
