"""Rows that begin anew inside, cut where they do: each piece is a row of its own.

A row may lie anywhere in the buffers, so pieces copy nothing; and as rows they run side by side, which one row after its resets would
not. The number of pieces is a shape: on a GPU this waits for it, so backends whose kernels take `resets` are given them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .problem import BackwardInputs, Inputs, Problem, WindowedInputs, row_base, row_length

T = TypeVar("T", Inputs, BackwardInputs, WindowedInputs)


class Rows:
    """Rows as they are: a run's states are theirs."""

    def states(self, *found: Tensor) -> tuple[Tensor, ...]:
        """The rows' last states, (B, F) each, or (0,) of what a cell does not have."""
        return found

    def origins(self, *found: Tensor) -> tuple[Tensor, ...]:
        """The adjoints of the rows' first states, likewise."""
        return found


@dataclass(frozen=True)
class Pieces(Rows):
    """The n pieces of B rows, row by row in visiting order. A row without any time is a piece without any."""

    base: Tensor  # (n,) buffer rows of their first times
    lengths: Tensor  # (n,)
    longest: int
    first: Tensor  # (B,) the first piece of each row
    last: Tensor  # (B,) the last
    kept: Tensor  # (B, 1) whether a row's first piece starts from its state: no reset stands before its first step

    @classmethod
    def of(cls, resets: Tensor, p: Problem, batch: int, base: Tensor | None, lengths: Tensor | None) -> Pieces:
        """Of rows with at most `p.steps` times, at least one; resets (N,) bool by buffer row."""
        device = resets.device
        origin, length = row_base(p, batch, base, device), row_length(p, batch, lengths, device)
        time = torch.arange(p.steps, device=device)
        there = time < length[:, None]  # (B, T)
        begins = there & resets[torch.where(there, origin[:, None] + time * p.step, 0)] if len(resets) else there
        kept = ~begins[:, :1]
        begins = torch.cat([torch.ones_like(kept), begins[:, 1:]], 1)
        row, start = begins.nonzero(as_tuple=True)  # the one shape that depends on values
        last = begins.sum(1).cumsum(0) - 1
        first = torch.cat([last.new_zeros(1), last[:-1] + 1])[:batch]
        end = torch.cat([start[1:], start[:1]]).index_copy(0, last, length)  # where the next piece of the row begins
        lengths = end - start
        longest = int(lengths.max()) if batch else 0
        return cls(origin[row] + start * p.step, lengths, longest, first, last, kept)

    def states(self, *found: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.index_select(0, self.last) if x.dim() == 2 else x for x in found)

    def origins(self, *found: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.where(self.kept, x.index_select(0, self.first), 0) if x.dim() == 2 else x for x in found)

    def starts(self, state: Tensor | None) -> Tensor | None:
        """What pieces start from: the rows' states (B, F), zeros elsewhere."""
        return None if state is None else self._of(self.first, torch.where(self.kept, state, 0))

    def ends(self, adjoint: Tensor | None) -> Tensor | None:
        """The adjoints of what pieces end in: those of the rows' last states (B, F), zeros elsewhere."""
        return adjoint if adjoint is None or adjoint.dim() < 2 else self._of(self.last, adjoint)

    def _of(self, piece: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(len(self.base), values.shape[1]).index_copy(0, piece, values)


def cut(inputs: T, p: Problem) -> tuple[T, Problem, Rows]:
    """The inputs and problem of the pieces, and these."""
    if inputs.resets is None or not p.steps:
        return inputs._replace(resets=None), p, Rows()
    pieces = Pieces.of(inputs.resets, p, inputs.state.shape[0], inputs.base, inputs.lengths)
    moved = {"h0": pieces.starts, "c0": pieces.starts, "dh_n": pieces.ends, "dc_n": pieces.ends}
    changed: Any = {name: of(getattr(inputs, name)) for name, of in moved.items() if name in inputs._fields}
    changed |= {"base": pieces.base, "lengths": pieces.lengths, "resets": None}
    return inputs._replace(**changed), p._replace(steps=pieces.longest), pieces
