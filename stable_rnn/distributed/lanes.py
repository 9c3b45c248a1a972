"""Windows and chunks: the lanes of this rank's times, after a halo of the times before them, from the ranks that hold these.

The halo reaches back to a border between chunks, so that its lanes are those of the whole; the first ones, whose warm-ups it cuts short,
write nothing that is kept. Backward, dy is 0 in the halo. The adjoint rule is linear in dy, so the ranks' gradients add up to the whole's
if each runs over the states that the whole has. The lanes that a rank's dy reaches lie up to `warmup` steps before its own; these, and
the state before them, need a halo of their own again. The true gradient of windows does not."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.recurrence.function import Layer, layer
from ..ops.recurrence.problem import Problem
from .exchange import Exchange
from .way import Way, chosen


def run(given: Layer, way: Way) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`function.layer` of this rank's rows."""
    p = given.p._replace(stride=min(given.p.stride, way.total), warmup=min(given.p.warmup, way.total))
    begin = opening(p, way.begin, torch.is_grad_enabled())
    halos = torch.where(way.live, way.begin - begin, 0).amax(1).tolist() if way.batch else [0] * len(way.sizes)
    halo = halos[way.place]
    x = _with_halo(given.x, halos[::-1] if way.backwards else halos, way)
    base, used = way.rows(begin[way.place], way.first if way.backwards else way.first - halo)
    from_start = (begin[way.place] == 0)[:, None].to(way.device)
    h0, c0 = chosen(from_start, (given.h0, given.c0))
    p = p._replace(steps=way.steps + halo)
    y, h_n, c_n, report = layer(x, *given[1:6], h0, c0, base, used, None, p)
    rows = way.steps * way.batch
    return y[:rows] if way.backwards else y[len(y) - rows :], h_n, c_n, report


def opening(p: Problem, begin: Tensor, gradients: bool) -> Tensor:
    """The own time at which the lanes begin whose outputs start at own time `begin`: a multiple of the chunk."""
    lead = -(-p.warmup // p.stride) * p.stride
    if gradients and not p.windowed:
        return ((begin - p.warmup) // p.stride * p.stride - p.stride - lead).clamp_min(0)
    return (begin // p.stride * p.stride - lead).clamp_min(0)


def _with_halo(x: Tensor, halos: list[int], way: Way) -> Tensor:
    """x with this rank's halo: so many times (`halos`, by rank) before its own, or after them where time runs backwards."""
    if not any(halos):
        return x
    wanted = [
        range(end, end + halo) if way.backwards else range(end - size - halo, end - size)
        for end, size, halo in zip(way.ends, way.sizes, halos)
    ]
    held = [range(end - size, end) for end, size in zip(way.ends, way.sizes)]
    steps = x.view(way.steps, way.batch * x.shape[1])
    parts = [_common(held[way.rank], times) for times in wanted]
    sends = torch.cat([steps[times.start - way.first : times.stop - way.first] for times in parts])
    receives = [len(_common(times, wanted[way.rank])) for times in held]
    halo = Exchange.apply(way.group, [len(times) for times in parts], receives, sends)
    return torch.cat([steps, halo] if way.backwards else [halo, steps]).view(-1, x.shape[1])


def _common(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))
