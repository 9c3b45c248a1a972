"""torch.func.vmap over the recurrence ops: samples become more rows of one call, for rows may lie anywhere.

With mapped weights, and for the backward pass of windows (whose weight gradients are per sample), it is a loop over the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .problem import row_base, unpack


def fold_rule(op: Callable, kind: Any) -> Callable:
    """The vmap rule of an op over tensors of this kind, `Inputs` or `BackwardInputs`."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        unpacked: Any = unpack(kind, args)  # tensors of any of the two kinds, or None
        tensors, p, *rest = unpacked
        dims, samples = kind(*in_dims[: len(tensors)]), info.batch_size
        shared = [name for name in ("w_hh", "w_hr", "hidden_bias") if name in kind._fields]  # by all samples
        if any(getattr(dims, name) is not None for name in shared):
            return loop_rule(op)(info, in_dims, *args)
        full = kind(*map(partial(_spread, samples=samples), tensors, dims))._replace(**dict.fromkeys(shared))
        n, batch, device = full.rows.shape[1], full.state.shape[1], full.rows.device
        first = row_base(p, batch, tensors.base, device) if dims.base is None else full.base
        flat = kind(*(x if x is None or _void(x) else x.flatten(0, 1) for x in full))._replace(
            **{name: getattr(tensors, name) for name in shared},
            base=(first + n * torch.arange(samples, device=device)[:, None]).flatten(),
        )
        outputs = op(*flat, *p, *rest)
        out_dims = tuple(None if x.dim() < 2 else 0 for x in outputs)
        return tuple(
            x if d is None else x.unflatten(0, (samples, -1)) for x, d in zip(outputs, out_dims, strict=True)
        ), out_dims

    return rule


def loop_rule(op: Callable) -> Callable:
    """The vmap rule that runs one sample after the other."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        results = [
            op(*(a if d is None else a.select(d, v) for a, d in zip(args, in_dims, strict=True)))
            for v in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def _void(x: Tensor) -> bool:
    """A (0,) tensor stands for what a cell does not have."""
    return x.dim() == 1 and not x.numel()


def _spread(x: Tensor | None, dim: int | None, samples: int) -> Tensor | None:
    if x is None or dim is None and _void(x):
        return x
    if dim is None:
        return x.expand(samples, *x.shape)
    x = x.movedim(dim, 0)
    return x[0] if _void(x[0]) else x
