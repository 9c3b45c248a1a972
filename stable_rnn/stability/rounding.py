"""What rounding does to one step: a model of rounding errors, not a proof. See README.md."""

from __future__ import annotations

import math

import torch

from .cells import STABILITY
from .layer import LayerCertificate


def local_error(layer: LayerCertificate, dtype: torch.dtype) -> tuple[float, float]:
    """About the largest rounding error that a step in `dtype` makes in an entry of c and of h.

    A pre-activation is a sum of I + P products, accumulated in float32 (float64 for float64): its error grows like the square root of
    the length, relative to the result or to 1. What is stored (pre-activations, gates, c, h) is rounded to `dtype`; a relative error
    of a pre-activation x moves tanh(x) by at most half of it, since |x| (1 - tanh(x)^2) < 1/2."""
    unit = torch.finfo(dtype).eps / 2
    accumulate = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    inputs, outputs = layer.sizes
    drive = unit + math.sqrt(inputs + outputs) / 2 * accumulate
    return STABILITY[layer.cell].step_error(drive, unit, layer.bound, layer.cell_bound)
