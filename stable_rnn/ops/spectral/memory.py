"""Which tensors share memory: what is written to one of them would change the other, or another entry of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def overlaps_itself(w: Tensor) -> bool:
    """Whether several entries have one place in memory, as in an expanded tensor."""
    if w.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(w.shape, w.stride()) if size > 1):
        if stride == 0 or stride <= reach:  # between the entries of the smaller dimensions, or on them
            return stride == 0 or len(_places(w, w.data_ptr()).unique()) < w.numel()
        reach += stride * (size - 1)
    return False


def first_overlap(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The numbers of two tensors that share an entry's memory, or None."""
    spans = sorted(
        (str(w.device), w.data_ptr(), w.data_ptr() + _reach(w) * w.element_size(), i)
        for i, w in enumerate(tensors)
        if w.numel()
    )
    for number, (device, _, end, i) in enumerate(spans):
        for other, start, _, j in spans[number + 1 :]:
            if other != device or start >= end:
                break
            if _meet(tensors[i], tensors[j]):
                return min(i, j), max(i, j)
    return None


def _meet(a: Tensor, b: Tensor) -> bool:
    """Exactly, for tensors whose stretches of memory overlap: their entries may still alternate, as the columns of one matrix do."""
    first = min(a.data_ptr(), b.data_ptr())
    size = a.element_size()
    if b.element_size() != size or (a.data_ptr() - b.data_ptr()) % size:
        return True
    return bool(torch.isin(_places(a, first), _places(b, first)).any())


def _places(w: Tensor, first: int) -> Tensor:
    """Where each entry (numel,) lies, in entries from the address `first`."""
    offset = (w.data_ptr() - first) // w.element_size()
    return torch.arange(offset + _reach(w), device="cpu").as_strided(w.shape, w.stride(), offset).flatten()


def _reach(w: Tensor) -> int:
    """From the first entry to behind the last, in entries."""
    return 1 + sum(stride * (size - 1) for size, stride in zip(w.shape, w.stride()))
