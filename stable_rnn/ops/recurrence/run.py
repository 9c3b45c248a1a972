"""Runs a recurrence: numbers for the schedule, a backend, checked lanes where asked. What the ops of `stable_rnn/_ops.py` do."""
from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import choose
from ..outputs import fresh
from . import verified
from .checks import check
from .problem import Output, Problem


def forward(*arguments) -> tuple[Tensor, ...]:
    """y, h_n, c_n, saved, cells, report."""
    out, found = outputs(*arguments)
    return fresh(arguments[:7], out.y, out.h_n, out.c_n, out.saved, out.cells, found)


def outputs(xp, w_hh, w_hr, h0, c0, base, lengths, *numbers) -> tuple[Output, Tensor]:
    """What a backend gives, and the report; `numbers` are a `Problem` and whether to save what the backward pass needs."""
    *numbers, save = numbers
    p = Problem(*numbers).resolved(h0.shape[0], xp.device)
    tensors = (xp, w_hh, w_hr, h0, c0, base, lengths)
    check(p, xp, h0, base, lengths, xp=xp, w_hh=w_hh, w_hr=w_hr, h0=h0, c0=c0)
    backend = choose(p, xp, w_hh, w_hr)
    if p.checked:
        out, found = verified.run(backend, tensors, p, save)
    else:
        out, found = backend.forward(*tensors, p, save=save), []
    return out, report(found)


def backward(dy, dh_n, dc_n, y, saved, cells, w_hh, w_hr, c0, base, lengths, *numbers) -> tuple[Tensor, ...]:
    """dz, dh, dh0, dc0, report."""
    p = Problem(*numbers).resolved(dh_n.shape[0], dy.device)
    tensors = (dy, dh_n, None if c0 is None else dc_n, y, saved, cells, w_hh, w_hr, c0, base, lengths)
    kept = {} if c0 is None else dict(saved=saved, cells=cells)
    check(p, dy, dh_n, base, lengths, w_hh=w_hh, w_hr=w_hr, dy=dy, y=y, dh_n=dh_n, c0=c0, dc_n=tensors[2], **kept)
    backend = choose(p, dy, w_hh, w_hr)
    if p.checked:
        out, found = verified.run_back(backend, tensors, p)
    else:
        out, found = backend.backward(*tensors, p), []
    return fresh(tensors, out.dz, out.dh, out.dh0, out.dc0, report(found))


def windowed_backward(dy, dh_n, dc_n, xp, w_hh, w_hr, h0, c0, base, lengths, *numbers) -> tuple[Tensor, ...]:
    """dxp, dw_hh, dw_hr, dh0, dc0."""
    p = Problem(*numbers).resolved(h0.shape[0], xp.device)
    tensors = (dy, dh_n, None if c0 is None else dc_n, xp, w_hh, w_hr, h0, c0, base, lengths)
    check(p, xp, h0, base, lengths, xp=xp, w_hh=w_hh, w_hr=w_hr, h0=h0, c0=c0, dy=dy, dh_n=dh_n, dc_n=tensors[2])
    found = choose(p, xp, w_hh, w_hr).windowed_backward(*tensors, p)
    return fresh(tensors, *(xp.new_empty(0) if t is None else t for t in found))


def report(numbers: list[float]) -> Tensor:
    """(4,) float64 on the CPU for checked plans: passes, lanes run again, largest jump, fell back. Else (0,)."""
    return torch.tensor(numbers, dtype=torch.float64) if numbers else torch.empty(0, dtype=torch.float64)
