"""How a module's input lies in memory: buffer rows, and where each sequence's times are among them (see `ops/recurrence/problem.py`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .ops.recurrence.problem import Problem, row_base, row_length


class Layout(NamedTuple):
    """Row b's time t lies at buffer row base[b] + t * step; `None` stands for time-major rows, and for T times each."""

    batch: int
    steps: int
    step: int
    base: Tensor | None = None
    lengths: Tensor | None = None
    take: Tensor | None = None  # the packed row of each buffer row, for packed input
    resets: Tensor | None = None  # (N,) bool: the state is zero before this row's step

    def reversed(self, device: torch.device) -> Layout:
        """Each sequence from its own end."""
        p, resets = Problem("", self.steps, self.step), self.resets
        base = row_base(p, self.batch, self.base, device)
        if resets is not None:  # before time t: now before time t - 1; before time 0: nowhere
            resets = resets.index_fill(0, base, False).roll(-self.step)
        if self.base is None and self.lengths is None:
            return self._replace(step=-self.step, resets=resets)
        used = row_length(p, self.batch, self.lengths, device)
        return self._replace(step=-self.step, base=base + (used - 1) * self.step, resets=resets)

    def unpacked(self, x: Tensor) -> Tensor:
        """Buffer rows of packed rows (N, F)."""
        return x if self.take is None else x.index_select(0, self.take)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """Dropout of buffer rows (N, F), by the masks that torch's own modules draw: time-major for padded input, else over packed rows."""
        if self.base is None:
            return F.dropout(x, p)
        noise = F.dropout(x.new_ones(x.shape), p)
        if self.take is not None:
            return x * noise.index_select(0, self.take)
        return x * noise.view(self.steps, self.batch, -1).transpose(0, 1).reshape(x.shape)


def padded(
    shape: torch.Size, batch_first: bool, lengths: Tensor | None, resets: Tensor | None, device: torch.device
) -> Layout:
    """(T, B, I), or (B, T, I) with batch_first, read in place; resets (T, B), or (B, T)."""
    resets = None if resets is None else resets.flatten()
    if not batch_first:
        return Layout(shape[1], shape[0], shape[1], None, lengths, None, resets)
    return Layout(shape[0], shape[1], 1, torch.arange(shape[0], device=device) * shape[1], lengths, None, resets)


def packed(sequence: PackedSequence) -> tuple[Layout, Tensor]:
    """Sequences end to end. Returns the layout, and the buffer row of each packed row."""
    sizes = sequence.batch_sizes  # (T,) on the CPU, descending
    batch, steps, rows = int(sizes[0]), len(sizes), int(sizes.sum())
    lengths = torch.searchsorted(-sizes, -torch.arange(batch))  # how many times have more than b rows
    base = lengths.cumsum(0) - lengths
    first = sizes.cumsum(0) - sizes
    t = torch.repeat_interleave(torch.arange(steps), sizes)
    to_buffer = base[torch.arange(rows) - first[t]] + t
    from_packed = torch.empty_like(to_buffer).index_copy_(0, to_buffer, torch.arange(rows))
    device = sequence.data.device
    lengths, base, from_packed, to_buffer = (
        x.to(device, non_blocking=True) for x in (lengths, base, from_packed, to_buffer)
    )
    return Layout(batch, steps, 1, base, lengths, from_packed), to_buffer


def checked(
    x: Tensor, batch_first: bool, lengths: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Padded input, its lengths and its resets, as kernels take them: checked, int64, and without anything past a length."""
    resets = None if resets is None else check_resets(resets, x)
    if lengths is not None:
        batch, steps = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        lengths = check_lengths(lengths, batch, steps, x.device)
        x = without_padding(x, lengths, batch_first)
        resets = None if resets is None else without_padding(resets, lengths, batch_first)
    return x, lengths, resets


def without_padding(x: Tensor, lengths: Tensor, batch_first: bool) -> Tensor:
    """x (T, B, ...), or (B, T, ...), with zeros past each length: whatever lies there, a NaN too, must not reach the products over all
    times."""
    steps = torch.arange(x.shape[1 if batch_first else 0], device=x.device)
    live = steps < lengths[:, None] if batch_first else steps[:, None] < lengths
    return torch.where(live.view(live.shape + (1,) * (x.dim() - 2)), x, x.new_zeros(()))


def check_lengths(lengths: Tensor, batch: int, steps: int, device: torch.device) -> Tensor:
    """`lengths` as (B,) int64; values are checked on the CPU only, where that does not synchronize."""
    lengths = as_lengths(lengths, batch, device)
    visible = (
        device.type == "cpu" and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    )
    if visible and batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
        raise ValueError(f"lengths must lie in 0..{steps}, got {lengths.tolist()}")
    return lengths


def as_lengths(lengths: Tensor, batch: int, device: torch.device) -> Tensor:
    """`check_lengths` without a look at the values."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a Tensor of shape ({batch},), got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must hold integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), one per sequence; got {tuple(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"lengths must be on the input's device {device}, got {lengths.device}")
    return lengths.long()


def check_resets(resets: Tensor, input: Tensor) -> Tensor:
    """`resets` themselves, booleans for each time of an input (..., I)."""
    shape = tuple(input.shape[:-1])
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets must be a Tensor of shape {shape}, got {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise TypeError(f"resets must hold booleans (torch.bool), got {resets.dtype}")
    if resets.shape != shape:
        raise ValueError(
            f"resets must have shape {shape}, one for each time of each sequence; got {tuple(resets.shape)}"
        )
    if resets.device != input.device:
        raise ValueError(f"resets must be on the input's device {input.device}, got {resets.device}")
    return resets
