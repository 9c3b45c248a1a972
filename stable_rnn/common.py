"""What the modules and the cells share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def _autocast_available(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


_autocast_available.__dict__["_dynamo_marked_constant"] = True  # older torch cannot trace it; as in precision.py


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of x, or None where it is off or leaves x alone."""
    if x.is_cpu and not torch._C._is_any_autocast_enabled():  # the fastest question, of which mps is not a part
        return None
    kind = x.device.type
    if not _autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind) if x.is_floating_point() and x.dtype != torch.float64 else None


def has_values(weight: Tensor) -> bool:
    """Not on the meta device, and not fake."""
    return not weight.is_meta and not isinstance(weight, FakeTensor)
