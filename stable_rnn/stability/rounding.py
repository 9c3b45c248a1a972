"""What rounding does to one step: a model of rounding errors, not a proof. See README.md."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .certificate import LayerCertificate


def local_error(layer: LayerCertificate, dtype: torch.dtype) -> tuple[float, float]:
    """About the largest rounding error that a step in `dtype` makes in an entry of c and of h.

    A pre-activation is a sum of I + P products, accumulated in float32 (float64 for float64): its error grows like the square root of
    the length, relative to the result or to 1. What is stored (pre-activations, gates, c, h) is rounded to `dtype`; a relative error
    of a pre-activation x moves tanh(x) by at most half of it, since |x| (1 - tanh(x)^2) < 1/2."""
    unit = torch.finfo(dtype).eps / 2
    accumulate = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    inputs, outputs = layer.sizes
    drive = unit + math.sqrt(inputs + outputs) / 2 * accumulate
    if layer.cell != "lstm":
        return 0.0, (drive + unit) * max(1.0, layer.bound)
    dc = drive * (layer.cell_bound / 4 + 1.25) + unit * (2 * layer.cell_bound + 1)
    return dc, dc + drive / 4 + unit
