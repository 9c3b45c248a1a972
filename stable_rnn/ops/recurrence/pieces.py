"""Rows that begin anew inside, cut where they do: each piece is a row of its own.

A row may lie anywhere in the buffers, so pieces copy nothing; and as rows they run side by side, which one row after its resets would
not. The number of pieces is a shape: on a GPU this waits for it, so backends whose kernels take `resets` are given them as they are.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .problem import BackwardInputs, Inputs, Problem, WindowedInputs, row_base, row_length

T = TypeVar("T", bound=Inputs | BackwardInputs | WindowedInputs)


class Pieces(NamedTuple):
    """The pieces of B rows, row by row in visiting order: n of them. A row without any time is a piece without any."""

    row: Tensor  # (n,) that each is of
    base: Tensor  # (n,)
    lengths: Tensor  # (n,)
    longest: int
    last: Tensor  # (B,) the last piece of each row
    first: Tensor  # (B,) the first piece of each row
    kept: Tensor  # (B,) bool: the first piece starts from the row's state: no reset stands before its first step

    @classmethod
    def of(cls, resets: Tensor, p: Problem, batch: int, base: Tensor | None, lengths: Tensor | None) -> Pieces:
        """Of rows with at most `p.steps` times; resets (N,) bool by buffer row."""
        device = resets.device
        origin, length = row_base(p, batch, base, device), row_length(p, batch, lengths, device)
        time = torch.arange(p.steps, device=device)
        there = time < length[:, None]  # (B, T)
        rows = torch.where(there, origin[:, None] + time * p.step, 0)
        marks = there & resets[rows] if len(resets) else there
        kept = ~marks[:, 0]
        begins = torch.cat([torch.ones_like(kept)[:, None], marks[:, 1:]], 1)
        row, start = begins.nonzero(as_tuple=True)  # the one shape that depends on values
        count = begins.sum(1)
        last = count.cumsum(0) - 1
        ends = torch.cat([start[1:], start.new_zeros(1)]).index_copy(0, last, length)
        lengths = ends - start
        longest = int(lengths.max()) if len(lengths) else 0
        return cls(row, origin[row] + start * p.step, lengths, longest, last, last - count + 1, kept)

    def starts(self, state: Tensor | None) -> Tensor | None:
        """What pieces start from: the rows' states (B, F) at their own starts, else zeros."""
        if state is None:
            return None
        own = torch.where(self.kept[:, None], state, torch.zeros_like(state))
        return state.new_zeros(len(self.row), state.shape[1]).index_copy(0, self.first, own)

    def ends(self, adjoint: Tensor | None) -> Tensor | None:
        """The adjoints (B, F) of the rows' last states as those of pieces."""
        if adjoint is None or not adjoint.numel():
            return adjoint
        return adjoint.new_zeros(len(self.row), adjoint.shape[1]).index_copy(0, self.last, adjoint)

    def states(self, found: Tensor) -> Tensor:
        """The rows' last states, of those of pieces."""
        return found.index_select(0, self.last) if found.dim() == 2 else found

    def origins(self, found: Tensor) -> Tensor:
        """The adjoints of the rows' starts, of those of pieces."""
        if found.dim() < 2:
            return found
        mine = found.index_select(0, self.first)
        return torch.where(self.kept[:, None], mine, torch.zeros_like(mine))


def cut(inputs: T, p: Problem) -> tuple[T, Problem, Pieces]:
    """The same inputs and problem, of pieces."""
    assert inputs.resets is not None
    pieces = Pieces.of(inputs.resets, p, inputs.state.shape[0], inputs.base, inputs.lengths)
    changed = {"base": pieces.base, "lengths": pieces.lengths, "resets": None, "c0": pieces.starts(inputs.c0)}
    changed["h0"] = pieces.starts(inputs.h0)
    if not isinstance(inputs, Inputs):
        changed |= {"dh_n": pieces.ends(inputs.dh_n), "dc_n": pieces.ends(inputs.dc_n)}
    return inputs._replace(**changed), p._replace(steps=pieces.longest), pieces
