"""What a cell is: all that the reference, the plans and the callers of the kernels know of it. `csrc/include/stable_rnn/cells/` says the
same to the compiled kernels.

A step reads the input projection x (n, G*H), with its biases, the hidden product q = h W_hh^T (n, G*H), and the state, h (n, P) and,
where the cell has one, c (n, H); arithmetic is float32 or float64.

To add a cell: one file here and its place in `__init__.py`, one header there and its place in `cells.h`, its functions in
`ops/recurrence/triton_cells.py`, one file in `stability/`."""

from __future__ import annotations

from torch import Tensor


class Cell:
    """One cell. `name` is the one of the ops' schemas, `mode` torch's (`nn.RNNBase.mode`), `code` that of `enum Cell` in `params.h`."""

    name: str
    mode: str
    code: int
    family: str  # of cells that share their files, of the name: here, in csrc's cells/ and in stability/
    gates: int  # G: columns of x, q and dz, in units of H
    saved: int  # columns that the backward pass needs beside y and c, in units of H; 0: y is enough
    has_cell: bool  # a second state c
    h_after: bool  # vjp() reads h
    carries: bool = False  # the h before a step gets a part of dh beside the product with W_hh; no cell with a c does
    projects: bool  # may have W_hr
    forgets: int | None  # the gate that a clamp bounds; None: no gate forgets

    def step(self, x: Tensor, q: Tensor, h: Tensor, c: Tensor, clamp: float) -> tuple[Tensor, Tensor, Tensor]:
        """The new h (n, H) before a projection, the new c (as it was, for a cell without), and the columns to save (n, saved*H)."""
        raise NotImplementedError

    def vjp(
        self, dh: Tensor, dc: Tensor, saved: Tensor, h: Tensor, c: Tensor, c_prev: Tensor, clamp: float
    ) -> tuple[Tensor, Tensor]:
        """From the adjoints of a step's h (before a projection) and c to dz (n, G*H), the gradient of x, and to the adjoint of the c
        before the step. `saved` and `clamp` as the storage dtype rounded them."""
        raise NotImplementedError

    def output(self, saved: Tensor, c: Tensor) -> Tensor:
        """h before its projection, of cells that have one, from what is saved."""
        raise NotImplementedError

    def hidden(self, dz: Tensor, saved: Tensor) -> Tensor:
        """The gradient of q: dz, for cells in which x and q only meet in a sum."""
        return dz
