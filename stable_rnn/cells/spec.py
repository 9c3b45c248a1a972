"""What a cell is: all that the reference, the plans and the callers of the kernels know of it. `csrc/include/stable_rnn/cells/` says the
same to the compiled kernels.

A step reads the input projection x (n, G*H), with its biases, the hidden product q = h W_hh^T (n, G*H), with the bias that is
its own, and the state, h (n, P) and,
where the cell has one, c (n, H); arithmetic is float32 or float64.

To add a cell: one file here and its place in `__init__.py`, one header there and its place in `cells.h`, its functions in
`ops/recurrence/triton_cells.py`, one file in `stability/`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """h (n, H) and c (n, H) of one time; what a cell does not read, or has not, is empty, of shape (0,)."""

    h: Tensor
    c: Tensor


NOTHING = State(torch.empty(0), torch.empty(0))
Step = tuple[Tensor, Tensor, tuple[Tensor, ...]]


class Cell:
    """One cell. `name` is the one of the ops' schemas, `mode` torch's (`nn.RNNBase.mode`), `code` that of `enum Cell` in `params.h`."""

    name: str
    mode: str
    code: int
    family: str  # of cells that share their files, of the name: here, in csrc's cells/ and in stability/
    gates: int  # G: columns of x, q and dz, in units of H
    saved: int  # columns that the backward pass needs beside y and c, in units of H; 0: y is enough
    has_cell: bool  # a second state c
    hidden_bias: int | None = (
        None  # the gate whose hidden product has a bias of its own; those of all others are part of x
    )
    h_after: bool  # vjp() reads h
    carries: bool = False  # step() reads the unit's own h, and vjp() hands a part of dh on to it; no cell with a c does
    projects: bool  # may have W_hr
    # The gate by which the state (c, else h) keeps a part of its own, and which a clamp bounds; its clamped value is saved at this place.
    forgets: int | None  # None: no gate forgets

    def step(self, x: Tensor, q: Tensor, h: Tensor, c: Tensor, clamp: float) -> Step:
        """The new h (n, H) before a projection, the new c (as it was, for a cell without), and what to save, `saved` times (n, H)."""
        raise NotImplementedError

    def vjp(
        self, dh: Tensor, dc: Tensor, saved: Tensor, after: State, before: State, clamp: float
    ) -> tuple[Tensor, State]:
        """From the adjoints of a step's h (before a projection) and c to dz (n, G*H), the gradient of x, and to the adjoints of the states
        before the step, that of h without the product with W_hh. `saved` and `clamp` as the storage dtype rounded them."""
        raise NotImplementedError

    def biases(self, b_ih: Tensor | None, b_hh: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """torch's two biases (G*H,) as that of x (G*H,) and that of the hidden product alone (H,)."""
        own = None
        if self.hidden_bias is not None and b_hh is not None:
            parts = list(b_hh.chunk(self.gates))
            own, parts[self.hidden_bias] = parts[self.hidden_bias], torch.zeros_like(parts[self.hidden_bias])
            b_hh = torch.cat(parts)
        return (b_hh if b_ih is None else b_ih if b_hh is None else b_ih + b_hh), own

    def joined(self, x: Tensor, q: Tensor) -> Tensor:
        """x with which a step that has no hidden product does the same; what it saves goes through `parted`."""
        return x + q

    def parted(self, saved: Tensor, q: Tensor) -> Tensor:
        """What a step with q saves, from what the one with `joined` saved."""
        return saved

    def output(self, saved: Tensor, c: Tensor) -> Tensor:
        """h before its projection, of cells that have one, from what is saved."""
        raise NotImplementedError

    def forget_gate(self, saved: Tensor) -> Tensor:
        """The gate that forgets (n, H), of cells that have one, from what is saved."""
        assert self.forgets is not None
        return saved.chunk(self.saved, 1)[self.forgets]

    def hidden(self, dz: Tensor, saved: Tensor) -> Tensor:
        """The gradient of q: dz, for cells in which x and q only meet in a sum."""
        return dz
