"""What a recurrence kernel is asked to do: the cell, the rows, the lanes. Every backend takes the same description.

The words are those of `csrc/include/stable_rnn/params.h`: a *row* is one sequence, whose time t lies at buffer row
`base[b] + t * step`; a *lane* is one independent run, with id `j * B + b`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...cells import CELLS, Cell

CPU = torch.device("cpu")
LANES = {"cpu": 64, "cuda": 4096}  # that keep a device busy: tiles for its threads, or its multiprocessors
# Strides that stand for T, and for "choose when T is known": they keep T symbolic under torch.compile
WHOLE, AUTO = 0, -1


class Problem(NamedTuple):
    """Sizes and rules of one layer and direction; the tensors travel beside it."""

    cell: str
    steps: int  # T, the largest length
    step: int  # buffer rows between consecutive times
    stride: int = WHOLE
    warmup: int = 0
    tol: float = -1.0  # < 0: lanes are not checked
    max_passes: int = 1
    cap: float = 1.0  # upper bound of the forget gate; 1: none
    backend: str = "auto"

    @property
    def spec(self) -> Cell:
        return CELLS[self.cell]

    @property
    def checked(self) -> bool:
        return self.tol >= 0

    @property
    def windowed(self) -> bool:
        """Every lane writes one time: its backward pass is the true gradient of the windowed function."""
        return self.stride == 1 and not self.checked

    def whole(self) -> Problem:
        """The plain recurrence: one lane a row."""
        return self._replace(stride=max(self.steps, 1), warmup=0, tol=-1.0)

    def resolved(self, batch: int, device: torch.device = CPU) -> Problem:
        """The same problem with numbers for `WHOLE` and `AUTO`."""
        stride, warmup = self.stride, self.warmup
        if stride == WHOLE:
            return self._replace(stride=max(self.steps, 1), warmup=0)
        if warmup == AUTO:
            warmup = 32 if self.cap >= 1 or self.tol <= 0 else min(256, max(32, ceil(log(self.tol) / log(self.cap))))
        if stride == AUTO:  # enough lanes, few enough for the warm-up to stay cheap
            stride = max(4 * warmup, -(-self.steps * batch // LANES.get(device.type, 64)), 1)
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
    h0: Tensor  # (B, P)
    c0: Tensor | None  # (B, H), cells that have c
    base: Tensor | None  # (B,) int64
    lengths: Tensor | None  # (B,) int64

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

    dy: Tensor  # (N, P)
    dh_n: Tensor  # (B, P)
    dc_n: Tensor | None  # (B, H), cells that have c
    y: Tensor
    saved: Tensor
    cells: Tensor
    w_hh: Tensor
    w_hr: Tensor | None
    c0: Tensor | None
    base: Tensor | None
    lengths: Tensor | None

    @property
    def rows(self) -> Tensor:
        return self.dy

    @property
    def state(self) -> Tensor:
        return self.dh_n


class WindowedInputs(NamedTuple):
    """The tensors of the op `windowed_backward`."""

    dy: Tensor
    dh_n: Tensor
    dc_n: Tensor | None
    xp: Tensor
    w_hh: Tensor
    w_hr: Tensor | None
    h0: Tensor
    c0: Tensor | None
    base: Tensor | None
    lengths: Tensor | None

    @property
    def rows(self) -> Tensor:
        return self.xp

    @property
    def state(self) -> Tensor:
        return self.h0


T = TypeVar("T", bound=Inputs | BackwardInputs | WindowedInputs)


def unpack(kind: type[T], arguments: Sequence) -> tuple[T, Problem, *tuple[Any, ...]]:
    """An op's arguments by their names: its tensors, its problem, and what the schema has behind them."""
    tensors = len(kind._fields)
    given = tensors + len(Problem._fields)
    return kind(*arguments[:tensors]), Problem(*arguments[tensors:given]), *arguments[given:]


class Output(NamedTuple):
    """What a forward run writes. `*_start`, `*_end` are each lane's state as it begins and ends to write, by lane id."""

    y: Tensor  # (N, P)
    saved: Tensor  # (N, S*H), what the cell saves of its steps; empty without, or not saving
    cells: Tensor  # (N, H) in the arithmetic's dtype, cells that have c, and saving; else empty
    h_n: Tensor  # (B, P)
    c_n: Tensor  # (B, H), LSTM; else empty
    h_start: Tensor  # (L*B, P) when borders are asked for; else empty
    c_start: Tensor
    h_end: Tensor
    c_end: Tensor


class Adjoint(NamedTuple):
    """What a backward run writes; starts and ends as in `Output`, in reverse time."""

    dz: Tensor  # (N, G*H): the gradient of xp
    dh: Tensor  # (N, P): the whole adjoint of h, with w_hr; else empty
    dh0: Tensor  # (B, P)
    dc0: Tensor  # (B, H), LSTM; else empty
    dh_start: Tensor
    dc_start: Tensor
    dh_end: Tensor
    dc_end: Tensor


def row_base(p: Problem, batch: int, base: Tensor | None, device: torch.device) -> Tensor:
    """Buffer row of each row's time 0: (B,) int64."""
    if base is not None:
        return base
    rows = torch.arange(batch, device=device)
    return rows if p.step > 0 else rows + (p.steps - 1) * batch


def row_length(p: Problem, batch: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Number of times of each row: (B,) int64."""
    return torch.full((batch,), p.steps, device=device) if lengths is None else lengths


def previous_states(y: Tensor, h0: Tensor, base: Tensor | None, lengths: Tensor | None, p: Problem) -> Tensor:
    """The state that each step read: y one step earlier, h0 at time 0. (N, P) -> (N, P); rows of no sequence hold anything finite."""
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


def weight_gradients(
    need_hh: bool,
    need_hr: bool,
    dz: Tensor,
    dh: Tensor,
    y: Tensor,
    saved: Tensor,
    cells: Tensor,
    h0: Tensor,
    base: Tensor | None,
    lengths: Tensor | None,
    p: Problem,
) -> tuple[Tensor | None, Tensor | None]:
    """dW_hh and dW_hr as products over all times at once, those that are needed."""
    dw_hh = p.spec.hidden(dz, saved).T @ previous_states(y, h0, base, lengths, p) if need_hh else None
    if not need_hr:
        return dw_hh, None
    return dw_hh, dh.T @ p.spec.output(saved, cells).to(dh.dtype)
