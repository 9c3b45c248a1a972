"""What modules and cells are given, checked before anything is computed: weights and states.

Wrong states raise the exceptions of torch's modules, which come from Python (`hx[1]`, `h.dim()`) or from the C++ that `hx` is handed to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def describe(value: Any) -> str:
    """A value in an error message."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f", {value.layout}"
        return f"{tuple(value.shape)}, {value.dtype} on {value.device}{layout}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)} ({'; '.join(map(describe, value))})"
    return type(value).__name__


def suits(t: Tensor, x: Tensor, cast: bool) -> bool:
    """Dense, on x's device, and of x's dtype or, with `cast`, of one that autocast converts."""
    return (
        t.device == x.device
        and t.layout is torch.strided
        and (t.dtype is x.dtype or cast and t.is_floating_point() and t.dtype is not torch.float64)
    )


def check_weight(name: str, w: Tensor, shape: tuple[int, ...], x: Tensor, cast: bool) -> None:
    """`RuntimeError` that names the weight, unless it has this shape and suits x. Nothing else would tell: sums and products broadcast,
    promote, and take memory that holds no values."""
    if getattr(w, "shape", None) == shape and suits(w, x, cast):
        return
    if not isinstance(w, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(w)}")
    raise RuntimeError(f"{name} is {describe(w)}; expected {shape}, {x.dtype} on {x.device}")


def check_state(name: str, h: Tensor, x: Tensor) -> None:
    """`RuntimeError` unless the state is a dense tensor of x's dtype on x's device."""
    if not suits(h, x, cast=False):
        raise RuntimeError(
            f"Input and hidden tensors are not the same dtype or not at the same device: input is {describe(x)}, "
            f"{name} is {describe(h)}"
        )


def pair(hx: Any, dims: int | None, handed_on: bool = False) -> tuple[Tensor, Tensor]:
    """h_0 and c_0, of so many dimensions; None: packed. `handed_on`: torch gives such a call's `hx` to C++ as it is."""
    if handed_on:
        _two("lstm", hx)
    try:
        found = hx[0].dim(), hx[1].dim()
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise type(error)(_no_pair(hx)) from None
    if dims is None and min(found) < 3:
        raise IndexError(f"For packed input, hx and cx should be 3-D: {_no_pair(hx)}")
    if dims is not None and found != (dims, dims):
        if isinstance(hx, Tensor):
            raise RuntimeError(_no_pair(hx))
        kind = "unbatched 2-D" if dims == 2 else "batched 3-D"
        raise RuntimeError(
            f"For {kind} input, hx and cx should also be {dims}-D but got ({found[0]}-D, {found[1]}-D) tensors"
        )
    return _two("lstm", hx)


def cell_pair(hx: Any, batched: bool) -> tuple[Tensor, Tensor]:
    """h and c of a cell's step, each of one dimension or two."""
    try:
        for which, h in enumerate(hx):
            if h.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{which}] to be 1D or 2D, got {h.dim()}D instead")
        if not batched:
            hx[0], hx[1]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise type(error)(_no_pair(hx)) from None
    return _two("lstm_cell", hx)


def _two(name: str, hx: Any) -> tuple[Tensor, Tensor]:
    """`hx` as C++ takes it."""
    if not isinstance(hx, (tuple, list)) or not all(isinstance(h, Tensor) for h in hx):
        raise TypeError(_no_pair(hx))
    if len(hx) != 2:
        raise RuntimeError(f"{name} expects two hidden states: {_no_pair(hx)}")
    return tuple(hx)


def _no_pair(hx: Any) -> str:
    return f"hx must be a pair of tensors (h, c), got {describe(hx)}"
