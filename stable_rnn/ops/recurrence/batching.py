"""torch.func.vmap over the recurrence ops: samples become more rows of one call, for rows may lie anywhere.

With mapped weights, and for the backward pass of windows (whose weight gradients are per sample), it is a loop over the samples.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .problem import Problem, row_base


def fold_rule(op: Callable, weights: tuple[int, ...], rows: int, state: int, base: int) -> Callable:
    """The vmap rule of an op; positions of its weights, of a tensor of buffer rows, of one of states, and of base."""

    def rule(info, in_dims, *args):
        if any(in_dims[i] is not None for i in weights):
            return loop_rule(op)(info, in_dims, *args)
        count, samples = base + 2, info.batch_size
        numbers = args[count:]
        p = Problem(*numbers[: len(Problem._fields)])
        full = [_spread(x, d, samples) for x, d in zip(args[:count], in_dims, strict=False)]
        n, batch = full[rows].shape[1], full[state].shape[1]
        first = row_base(p, batch, args[base], full[rows].device) if in_dims[base] is None else full[base]
        full[base] = first + n * torch.arange(samples, device=first.device)[:, None]
        for i in weights:
            full[i] = args[i]
        outputs = op(*(x if x is None or i in weights or _void(x) else x.flatten(0, 1) for i, x in enumerate(full)), *numbers)
        dims = tuple(None if x.dim() < 2 else 0 for x in outputs)
        return tuple(x if d is None else x.unflatten(0, (samples, -1)) for x, d in zip(outputs, dims, strict=True)), dims

    return rule


def loop_rule(op: Callable) -> Callable:
    """The vmap rule that runs one sample after the other."""

    def rule(info, in_dims, *args):
        results = [op(*(a if d is None else a.select(d, v) for a, d in zip(args, in_dims, strict=True))) for v in range(info.batch_size)]
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
