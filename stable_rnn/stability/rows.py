"""Rows of weights brought within limits: the bound of a forget gate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.spectral.later import on_gpu
from .bounds import up
from .weights import Names, once


def lower_forget(
    weights: dict[str, Tensor], names: Names, part: Callable[[Tensor], Tensor], forget: float, margin: float, x: Tensor
) -> None:
    """sigmoid(|W_ih| x + |W_hh| h + b) <= forget for each unit of the forget gate, whose rows of a weight or bias are `part` of it.
    A negative bias is kept and counts.

    What is stored is rounded towards zero (weights) and down (biases), since next to a large bias any other rounding is no small part of
    the limit; `spare` is for that of the sums in float64, here and in the certificate."""
    matrices = [weights[names[kind]] for kind in ("weight_ih", "weight_hh")]
    biases = [weights[names[kind]] for kind in ("bias_ih", "bias_hh") if names[kind] in weights]
    w_ih, w_hh = map(part, matrices)
    rows = _sums(w_ih, x.to(wide(w_ih))) + _sums(w_hh, state_bound(weights, names))
    bias = sum((wide(part(b)) for b in biases), torch.zeros_like(rows))
    limit = math.log(forget / (1 - forget)) * (1 - margin)
    spare = (w_ih.shape[1] + w_hh.shape[1] + 32) * torch.finfo(rows.dtype).eps * 4
    scale = torch.where(bias > 0, limit / (rows + bias), (limit - bias * (1 - spare)) / rows)
    over = scale < 1
    if on_gpu(matrices):  # nobody has waited to see whether they are finite
        over &= (rows + bias).isfinite()
    elif not over.any():
        return
    for w in map(part, once(matrices)):
        w.copy_(torch.where(over.unsqueeze(1), _least(wide(w) * scale.unsqueeze(1), w.dtype, 0.0), w))
    over &= bias > 0
    for b in map(part, once(biases)):
        b.copy_(torch.where(over, _least(wide(b) * scale, b.dtype, -math.inf), b))


def _sums(w: Tensor, vector: Tensor) -> Tensor:
    """|w| @ vector, for a finite vector >= 0, as `times` but without a look at its values; in float64 an upper bound."""
    return up(wide(w).abs() @ vector, w.shape[1])


def _least(value: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    """The value in another dtype, rounded towards 0 or -inf; one more place than needed where it is exact."""
    stored = value.to(dtype)
    return torch.nextafter(stored, torch.full_like(stored, towards))


def state_bound(weights: dict[str, Tensor], names: Names) -> Tensor:
    """|h| (P,) of a layer whose cell gives out at most 1, whatever its weights but W_hr."""
    w_hh, w_hr = weights[names["weight_hh"]], weights.get(names["weight_hr"])
    if w_hr is None:
        return torch.ones_like(wide(w_hh.select(0, 0)))
    return _sums(w_hr, torch.ones_like(wide(w_hr.select(0, 0))))


def wide(w: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return w.detach().to(torch.float32 if w.device.type == "mps" else torch.float64)
