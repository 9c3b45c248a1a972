"""What rounding does to one step: a model of rounding errors, not a proof. See README.md."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .certificate import LayerCertificate


def local_error(layer: LayerCertificate, dtype: torch.dtype) -> tuple[float, float]:
    """About the largest rounding error that a step in `dtype` makes in an entry of c and of h.

    Products accumulate in float32 (float64 for float64), of length I + P; their error grows like the square root of the length, for
    partial sums of about the size of the result or of 1. Stored values are rounded to `dtype`."""
    unit = torch.finfo(dtype).eps / 2
    accumulate = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    inputs, hidden = layer.sizes
    drive = 3 * unit + math.sqrt(inputs + hidden) * accumulate
    if layer.cell != "lstm":
        return 0.0, drive + 2 * unit * max(1.0, layer.bound)
    dc = drive * (layer.cell_bound / 4 + 1.25) + 3 * unit * layer.cell_bound
    return dc, dc + drive / 4 + 2 * unit
