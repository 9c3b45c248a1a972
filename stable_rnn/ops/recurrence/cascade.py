"""The groups of a cascade: units in their order, no unit of a group reading a unit of its own or a later group (see `scanned.py`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ... import _native
from ..kernel_args import CPU_DTYPES, DTYPES, at, dense

_found: dict[tuple, tuple[StorageWeakRef, tuple[int, ...]]] = {}
_MOST = 256  # weights that are remembered


def groups(w_hh: Tensor, gates: int) -> tuple[int, ...]:
    """The first unit of each group, and H behind them: as few groups as the zeros of w_hh (G*H, H) allow.

    `ValueError` where a unit reads itself or a later unit. On a GPU the answer is kept as long as torch counts no change of the weight:
    to look means to wait for the device."""
    if w_hh.device.type == "cpu" or w_hh.is_inference():  # whose changes nobody counts
        return find(w_hh, gates)
    return remembered(w_hh, gates)


def remembered(w_hh: Tensor, gates: int) -> tuple[int, ...]:
    """As `find`, which is asked only once for each version of a weight."""
    storage = w_hh.untyped_storage()
    place = storage._cdata, w_hh.storage_offset(), w_hh.shape, w_hh.stride(), w_hh.dtype, w_hh.is_neg()
    key = (*place, w_hh._version)
    if key not in _found:
        full = len(_found) >= _MOST
        for old in [k for k, (alive, _) in _found.items() if full or k[:-1] == place or alive.expired()]:
            del _found[old]
        # while a storage is referred to, no other has its address
        _found[key] = StorageWeakRef(storage), find(w_hh, gates)
    return _found[key][1]


def find(w_hh: Tensor, gates: int) -> tuple[int, ...]:
    """`groups`, by a look at every entry."""
    hidden, starts = w_hh.shape[1], [0]
    for unit, read in enumerate(_reads(w_hh, gates)):
        if read > unit:
            raise ValueError(_offence(w_hh, hidden))
        if read > starts[-1]:
            starts.append(unit)
    return *starts, hidden


def _reads(w_hh: Tensor, gates: int) -> list[int]:
    """1 + the last unit that each unit reads by any gate, 0 for none."""
    hidden = w_hh.shape[1]
    if _native.lib is not None and w_hh.device.type == "cpu" and w_hh.dtype in CPU_DTYPES:
        (weight,) = dense(w_hh)
        reads = torch.empty(hidden, dtype=torch.int64, device="cpu")
        _native.lib.cascade_reads(DTYPES[w_hh.dtype], gates, hidden, at(weight), at(reads))
        return reads.tolist()
    used = (w_hh.detach().reshape(gates, hidden, hidden) != 0).any(0)
    return (used * torch.arange(1, hidden + 1, device=w_hh.device)).amax(1).tolist() if hidden else []


def _offence(w_hh: Tensor, hidden: int) -> str:
    """The first entry, row by row, by which a unit reads itself or a later one."""
    rows = torch.arange(len(w_hh), device=w_hh.device)[:, None] % hidden
    row, column = ((w_hh != 0) & (torch.arange(hidden, device=w_hh.device) >= rows)).nonzero()[0].tolist()
    unit, value = row % hidden, float(w_hh[row, column])
    whom = "itself" if unit == column else f"unit {column}"
    return (
        f"Scanned() needs a cascade, in which a unit reads earlier units only; weight_hh[{row}, {column}] = {value:.6g}: "
        f"unit {unit} reads {whom}"
    )
