"""The same values in other places of memory: what tests try every tensor argument in."""

import torch


def _strided(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], 1).flatten(0, 1)[::2]


def _columns(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2]


def _permuted(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def _odd_ones(t):
    """Contiguous for torch, with strides of their own for the dimensions of size 1."""
    return torch.as_strided(
        t.contiguous(), t.shape, [7 if size == 1 else stride for size, stride in zip(t.shape, t.contiguous().stride())]
    )


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "permuted": _permuted,
    "strided": _strided,
    "columns": _columns,
    "offset": lambda t: torch.cat([torch.full_like(t[:1], torch.nan), t])[1:],
    "expanded": lambda t: t[:1].expand_as(t),
    "odd_ones": _odd_ones,
    "negative": lambda t: torch._neg_view(-t),
}


def place(t, layout):
    """`t` in a layout; None, integers and what is too small to be laid out stay."""
    if t is None or not t.is_floating_point() or not t.dim() or not t.numel():
        return t
    return LAYOUTS[layout](t)


def plain(t):
    """A row-major copy."""
    return t if t is None else t.resolve_neg().clone(memory_format=torch.contiguous_format)


def row_major(t):
    return t.stride() == torch.empty(t.shape).stride()
