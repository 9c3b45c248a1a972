"""What a recurrence kernel is asked to do: the cell, the rows, the lanes. Every backend takes the same description.

The words are those of `csrc/include/stable_rnn/params.h`: a *row* is one sequence, whose time t lies at buffer row
`base[b] + t * step`; a *lane* is one independent run, with id `j * B + b`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...cells import CELLS, Cell

# Strides that stand for T, and for "choose when T is known": they keep T symbolic under torch.compile; and for no lanes at all, a
# cascade's scans over time (`scanned.py`)
WHOLE, AUTO, SCANNED = 0, -1, -2


class Problem(NamedTuple):
    """Sizes and rules of one layer and direction; the tensors travel beside it."""

    cell: str
    steps: int  # T, the largest length
    step: int  # buffer rows between consecutive times
    stride: int = WHOLE
    warmup: int = 0
    tol: float = -1.0  # < 0: lanes are not checked
    max_passes: int = 1
    correct: str = "auto"  # how checked lanes' starts are corrected: none, decay, probes
    on_output: bool = False  # checked lanes: jumps count by what they do to outputs
    cap: float = 1.0  # upper bound of the forget gate; 1: none
    backend: str = "auto"

    @property
    def spec(self) -> Cell:
        return CELLS[self.cell]

    @property
    def checked(self) -> bool:
        return self.tol >= 0

    @property
    def scanned(self) -> bool:
        return self.stride == SCANNED

    @property
    def windowed(self) -> bool:
        """Every lane writes one time: its backward pass is the true gradient of the windowed function."""
        return self.stride == 1 and not self.checked

    def whole(self) -> Problem:
        """The plain recurrence: one lane a row."""
        return self._replace(stride=max(self.steps, 1), warmup=0, tol=-1.0)

    def differentiable(self) -> Problem:
        """The problem that plain torch differentiates in this one's place: checked and scanned runs equal the plain recurrence."""
        return self.whole() if self.checked or self.scanned else self

    def resolved(self) -> Problem:
        """The same problem with numbers for `WHOLE`. What a checked one leaves open, `policy.py` chooses."""
        stride, warmup = self.stride, self.warmup
        if self.scanned:
            return self
        if stride == WHOLE:
            return self._replace(stride=max(self.steps, 1), warmup=0)
        # no lane starts before time 0
        return self._replace(stride=min(stride, max(self.steps, 1)), warmup=min(warmup, self.steps))

    def lanes(self) -> int:
        """Lanes per row."""
        return -(-self.steps // self.stride)


class Inputs(NamedTuple):
    """The tensors of the op `recurrence`, in the order of its schema."""

    xp: Tensor  # (N, G*H)
    w_hh: Tensor  # (G*H, P)
    w_hr: Tensor | None  # (P, H)
    hidden_bias: Tensor | None  # (H,), cells whose hidden product has a bias of its own
    h0: Tensor  # (B, P)
    c0: Tensor | None  # (B, H), cells that have c
    base: Tensor | None  # (B,) int64
    lengths: Tensor | None  # (B,) int64
    resets: Tensor | None = None  # (N,) bool: the state is zero before this row's step

    @property
    def rows(self) -> Tensor:
        """A tensor of buffer rows; it sets dtype and device."""
        return self.xp

    @property
    def state(self) -> Tensor:
        """A tensor of h's shape (B, P)."""
        return self.h0


class BackwardInputs(NamedTuple):
    """The tensors of the op `recurrence_backward`; `y`, `saved`, `cells` as in `Output`."""

    dy: Tensor  # (N, P); `adjoint_ends` alone takes None
    dh_n: Tensor  # (B, P)
    dc_n: Tensor | None  # (B, H), cells that have c
    y: Tensor
    saved: Tensor
    cells: Tensor
    w_hh: Tensor
    w_hr: Tensor | None
    h0: Tensor | None  # (B, P), cells that carry
    c0: Tensor | None
    base: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        return self.dy

    @property
    def state(self) -> Tensor:
        return self.dh_n


class WindowedInputs(NamedTuple):
    """The tensors of the op `windowed_backward`: output gradients, and `Inputs`."""

    dy: Tensor
    dh_n: Tensor
    dc_n: Tensor | None
    xp: Tensor
    w_hh: Tensor
    w_hr: Tensor | None
    hidden_bias: Tensor | None
    h0: Tensor
    c0: Tensor | None
    base: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        return self.xp

    @property
    def state(self) -> Tensor:
        return self.h0

    @property
    def inputs(self) -> Inputs:
        return Inputs(*self[3:])


T = TypeVar("T", bound=Inputs | BackwardInputs | WindowedInputs)


def unpack(kind: type[T], arguments: Sequence) -> tuple[T, Problem, *tuple[Any, ...]]:
    """An op's arguments by their names: its tensors, its problem, and what the schema has behind them."""
    tensors = len(kind._fields)
    given = tensors + len(Problem._fields)
    return kind(*arguments[:tensors]), Problem(*arguments[tensors:given]), *arguments[given:]


class Output(NamedTuple):
    """What a forward run writes. `*_start`, `*_end` are each lane's state as it begins and ends to write, by lane id.

    `decay` is how much of a change of a lane's start reaches its end directly: the product of the clamped forget gates over the times that
    the lane writes, 1 where there are none. Long products underflow to 0, which does no harm: nothing of the start is left then."""

    y: Tensor  # (N, P)
    saved: Tensor  # (N, S*H), what the cell saves of its steps; empty without, or not saving
    cells: Tensor  # (N, H) in the arithmetic's dtype, cells that have c, and saving; else empty
    h_n: Tensor  # (B, P)
    c_n: Tensor  # (B, H), LSTM; else empty
    h_start: Tensor  # (L*B, P) when borders are asked for; else empty
    c_start: Tensor
    h_end: Tensor
    c_end: Tensor
    decay: Tensor  # (L*B, H) when borders are asked for, (L*B, 0) of cells that forget nothing; else empty


class Adjoint(NamedTuple):
    """What a backward run writes; starts, ends and decay as in `Output`, in reverse time, over the saved forget gates."""

    dz: Tensor  # (N, G*H): the gradient of xp
    dh: Tensor  # (N, P): the whole adjoint of h, with w_hr; else empty
    dh0: Tensor  # (B, P)
    dc0: Tensor  # (B, H), LSTM; else empty
    dh_start: Tensor
    dc_start: Tensor
    dh_end: Tensor
    dc_end: Tensor
    decay: Tensor


def row_base(p: Problem, batch: int, base: Tensor | None, device: torch.device) -> Tensor:
    """Buffer row of each row's time 0: (B,) int64."""
    if base is not None:
        return base
    rows = torch.arange(batch, device=device)
    return rows if p.step > 0 else rows + (p.steps - 1) * batch


def row_length(p: Problem, batch: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Number of times of each row: (B,) int64."""
    return torch.full((batch,), p.steps, device=device) if lengths is None else lengths


def previous_states(y: Tensor, given: Inputs, p: Problem) -> Tensor:
    """The state that each step read: y one step earlier, h0 at time 0. (N, P) -> (N, P); rows of no sequence hold anything finite,
    rows that a reset stands before zeros."""
    previous = _shifted(y, given.h0, given.base, given.lengths, p)
    return previous if given.resets is None else previous.masked_fill(given.resets[:, None], 0)


def _shifted(y: Tensor, h0: Tensor, base: Tensor | None, lengths: Tensor | None, p: Problem) -> Tensor:
    rows, batch = y.shape[0], h0.shape[0]
    shift = abs(p.step)
    if base is None and lengths is None and shift == batch:
        return torch.cat([h0, y[: rows - shift]]) if p.step > 0 else torch.cat([y[shift:], h0])
    previous = torch.cat(
        [y.new_zeros(shift, y.shape[1]), y[: rows - shift]]
        if p.step > 0
        else [y[shift:], y.new_zeros(shift, y.shape[1])]
    )
    first = row_base(p, batch, base, y.device)
    if lengths is not None:  # rows without any time go to a row that is dropped
        first = torch.where(lengths > 0, first, rows)
    return torch.cat([previous, previous[:1]]).index_copy(0, first, h0)[:rows]


def backward_inputs(
    dy: Tensor, dh_n: Tensor, dc_n: Tensor | None, y: Tensor, saved: Tensor, cells: Tensor, given: Inputs, p: Problem
) -> BackwardInputs:
    """What the backward pass reads of a forward pass over `given`."""
    h0 = given.h0 if p.spec.carries else None
    return BackwardInputs(
        dy, dh_n, dc_n, y, saved, cells, given.w_hh, given.w_hr, h0, given.c0, given.base, given.lengths, given.resets
    )


class Needs(NamedTuple):
    """Which weights' gradients are asked for."""

    w_hh: bool = True
    w_hr: bool = True
    hidden_bias: bool = True


def weight_gradients(
    needs: Needs,
    found: Adjoint,
    y: Tensor,
    saved: Tensor,
    cells: Tensor,
    given: Inputs,
    p: Problem,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of w_hh, w_hr and hidden_bias as products and sums over all times at once: those that are needed, of weights that are
    given."""
    cell, dw_hh, dw_hr, d_bias = p.spec, None, None, None
    own = cell.hidden_bias if given.hidden_bias is not None and needs.hidden_bias else None
    if needs.w_hh or own is not None:
        d_hidden = cell.hidden(found.dz, saved)
        if needs.w_hh:
            dw_hh = product(d_hidden.T, previous_states(y, given, p))
        if own is not None:
            d_bias = d_hidden.chunk(cell.gates, 1)[own].sum(0)
    if needs.w_hr and given.w_hr is not None:
        dw_hr = product(found.dh.T, cell.output(saved, cells).to(found.dh.dtype))
    return dw_hh, dw_hr, d_bias
