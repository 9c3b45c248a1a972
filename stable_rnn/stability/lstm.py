"""The LSTM: how large its gates and states get, its contractions, and its weights' way into a stable set. See README.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..ops.spectral import row_project_
from .bounds import GATE, ROUNDS, Drive, drive_of_bound, length, times, up
from .cell import Ball, CellStability, Reach, Verdict
from .comparison import Comparison, depth, rates, settled
from .contraction import Contraction, crossing, exceeds, norm2, perron, upwards, within
from .limits import Limits
from .rows import lower_forget
from .weights import KINDS, LayerWeights, Names

SHARE = 0.3  # of the room for the gates f, i, g that falls to f, unless a stable set says otherwise
CELL_WEIGHT = 0.9  # max-norm set: V = max(|dc|/0.9, |dh|)
INPUT_ANGLE = math.pi / 6  # max-norm set: how the gates i and g share their room


class Lstm(CellStability):
    cascade_forget = 0.8

    def reach(
        self,
        w: LayerWeights,
        drive: Drive,
        gain: float,
        cap: float,
        norms: tuple[str, ...],
        upper: bool,
        target: tuple[float, float] | None,
    ) -> Reach:
        b = lstm_bounds(w, drive, cap)
        forget, groups = float(b.f.max()), depth(w)
        found: list[Contraction | Comparison] = [*lstm_contractions(w, b, norms, upper, target, groups)]
        if groups is not None and forget < 1 and "inf" in norms:
            box = 2 * torch.cat([b.c, b.h])
            found.append(Comparison(partial(_lstm_both, w, b), box, w.hidden, min(rates(forget))))
        return Reach(found, b.h, length(b.h), float(b.c.max()), forget, groups)

    def verdict(self, w: LayerWeights, x: Tensor, limits: Limits) -> Verdict | None:
        """The contractions of a certificate want ||D W_hh||_2 <= rate for one of two D, which fall as the rate grows. Most layers from
        outside exceed that in a few power iterations, and most of those brought in obey it for the D of the set."""
        if limits.norm not in ("2", "radius"):
            return None
        b = lstm_bounds(w, drive_of_bound(w, x, math.inf, math.inf), limits.cap)
        outside = Verdict(False, b.h, length(b.h))
        if not (b.f < limits.rate).all():
            return outside
        kappa = 1.0 if w.w_hr is None else norm2(w.w_hr)
        own, even = shares(w, b, limits.target[1])
        rate = limits.rate
        inside = within(gate_scales(b, rate, even, kappa)[:, None] * w.w_hh, rate)
        if inside is False and not exceeds(gate_scales(b, rate, own, kappa)[:, None] * w.w_hh, rate):
            return None
        return None if inside is None else outside._replace(inside=inside)

    def step_error(self, drive: float, unit: float, h: float, cell: float) -> tuple[float, float]:
        dc = drive * (cell / 4 + 1.25) + unit * (2 * cell + 1)
        return dc, dc + drive / 4 + unit

    def check(self, limits: Limits) -> None:
        if not limits.forget < limits.rate:
            raise ValueError(f"Certified: an LSTM's rate must be above 1/2, or pass clamp=True; got {limits.rate}")

    def written(self, limits: Limits) -> tuple[str, ...]:
        return KINDS if limits.cap == 1 else super().written(limits)

    def balls(self, weights: dict[str, Tensor], names: Names, limits: Limits, margin: float) -> list[Ball]:
        if limits.norm == "inf":
            return []
        w_hh, w_hr = weights[names["weight_hh"]], weights.get(names["weight_hr"])
        balls: list[Ball] = [(w_hh, set_scales(limits.forget, *limits.target), limits.rate * (1 - margin))]
        return balls if w_hr is None else [*balls, (w_hr, None, 1 - margin)]

    def bring_in(
        self, weights: dict[str, Tensor], names: Names, limits: Limits, margin: float, x: Tensor, least: torch.dtype
    ) -> None:
        if limits.norm == "inf":
            w_hh, w_hr = weights[names["weight_hh"]], weights.get(names["weight_hr"])
            rate, share = limits.rate * (1 - margin), limits.target[1]
            room = (rate - limits.forget) * CELL_WEIGHT
            rest = (1 - share) * room
            most = (
                4 * math.sin(INPUT_ANGLE) * rest,
                4 * (1 - limits.forget) * share * room,
                math.cos(INPUT_ANGLE) * rest,
                4 * rate * math.sqrt(1 - CELL_WEIGHT**2),
            )
            for gate, limit in zip(w_hh.chunk(4), most):
                row_project_(gate, limit)
            if w_hr is not None:
                row_project_(w_hr, 1 - margin)
        if limits.cap == 1:
            lower_forget(weights, names, lambda w: w.chunk(4)[1], limits.forget, margin, x)


CELLS = {"lstm": Lstm()}


@dataclass(frozen=True)
class LstmBounds:
    """Upper bounds per unit, all (H,) but `h` (P,).

    i, f, o, z: the gates and |tanh| of the candidate;  si, sf, so: the slopes of the gates' sigmoids;  c >= |c|, t >= |tanh c|,
    m >= |o tanh c|, h >= |h|.
    """

    i: Tensor
    f: Tensor
    o: Tensor
    z: Tensor
    si: Tensor
    sf: Tensor
    so: Tensor
    c: Tensor
    t: Tensor
    m: Tensor
    h: Tensor


def lstm_bounds(w: LayerWeights, drive: Drive, cap: float) -> LstmBounds:
    """Each round is valid for all times, since it starts from a bound of |h| that is (at first |o tanh c| <= 1), and sharpens it."""
    abs_hr = w.abs_hr
    project: Callable[[Tensor], Tensor] = (lambda m: m) if abs_hr is None else (lambda m: times(abs_hr, m))
    h = project(torch.ones(w.hidden, dtype=torch.float64))
    for _ in range(ROUNDS):
        reach = times(w.abs_hh, h)
        pad = (torch.maximum(-drive.low, drive.high) + reach) * 2.0**-50
        low, high = (drive.low - reach - pad).chunk(4), (drive.high + reach + pad).chunk(4)
        i, f, o = (torch.sigmoid(high[gate]) * GATE for gate in (0, 1, 3))
        i, f, o = i.clamp(max=1.0), f.clamp(max=cap), o.clamp(max=1.0)
        z = torch.tanh(torch.maximum(-low[2], high[2])).mul(GATE).clamp(max=1.0)
        c = i * z / (1 - f) * (1 + 2.0**-50)
        t = torch.tanh(c).mul(GATE).clamp(max=1.0)
        m = o * t * (1 + 2.0**-50)
        h = torch.minimum(h, project(m))
    si, sf, so = (_slope(low[gate], high[gate]) for gate in (0, 1, 3))
    return LstmBounds(i, f, o, z, si, sf, so, c, t, m, h)


def _slope(low: Tensor, high: Tensor) -> Tensor:
    """The largest slope of the sigmoid between low and high: 1/4 where 0 lies between, else that at the nearer end."""
    nearest = torch.maximum(low, -high).clamp(min=0)
    return torch.sigmoid(nearest) * torch.sigmoid(-nearest) * (1 + 2.0**-40)


def lstm_contractions(
    w: LayerWeights,
    b: LstmBounds,
    norms: tuple[str, ...],
    upper: bool,
    target: tuple[float, float] | None,
    groups: int | None = None,
) -> list[Contraction]:
    """In the 2-norm one, in the max-norm two, or more in a cascade of so many groups. `upper`: inputs may differ, so gains matter.
    `target`: a rate and a share worth trying."""
    if not (b.f < 1).all():  # the sigmoid rounds to 1: nothing can be said
        nothing = (math.inf, math.inf)
        return [Contraction("2", math.inf, math.inf, math.inf, nothing, nothing, nothing)]
    found = [_lstm_two(w, b, upper, target)] if "2" in norms else []
    return [*found, *_lstm_inf(w, b, groups)] if "inf" in norms else found


def gate_scales(b: LstmBounds, rate: float, share: Tensor | float, kappa: float = 1.0) -> Tensor:
    """The row scales D (4H,) for which ||D W_hh||_2 <= rate makes the layer contract at `rate`; kappa >= ||W_hr||_2. README.md."""
    share = torch.as_tensor(share, dtype=torch.float64)
    room = kappa * b.o * (rate / (rate - b.f))
    rest = (1 - share).rsqrt()
    own = b.c * torch.minimum(b.sf * share.rsqrt(), forget_slope(b.f, rate, share))
    scales = [room * b.si * joint(b.z) * rest, room * own, room * b.i * rest, kappa * b.so * joint(b.t)]
    return torch.cat([s.expand_as(b.o) for s in scales]) * (1 + 2.0**-45)


@lru_cache(maxsize=64)
def set_scales(forget: float, rate: float, share: float) -> tuple[float, ...]:
    """D of a set, whatever W_ih and the biases are: the number of each gate."""
    with torch.device("cpu"):
        return tuple(gate_scales(_any_gates(1, forget), rate, share).tolist())


def forget_slope(f: Tensor, rate: float, share: Tensor) -> Tensor:
    """What stands for slope / sqrt(share) of the forget gate, which is hardly steep where it is open: the supremum over g <= f of
    g (1 - g) sqrt(f (rate - f) / (K - g^2)), K = f (f + share (rate - f)), at f or at the middle root of g^3 - 2 K g + K. README.md."""
    f = f.clamp(min=1e-30)
    spare = share * f * (rate - f)  # K - f^2
    k = f * f + spare
    angle = (-0.75 * torch.sqrt(1.5 / k)).clamp(min=-1).arccos() / 3 - 2 * math.pi / 3
    g = torch.minimum(2 * torch.sqrt(k * (2 / 3)) * torch.cos(angle), f)
    turn = g * (1 - g) * torch.sqrt(f * (rate - f) / (spare + (f - g) * (f + g)))
    return torch.maximum(turn, f * (1 - f) * share.rsqrt()) * (1 + 2.0**-40)


def joint(t: Tensor) -> Tensor:
    """a(t) of |d(sigmoid(x) tanh(y))| <= hypot(a slope |dx|, s |dy|) where |tanh y| <= t, sigmoid(x) <= s."""
    return (2 - t * t).rsqrt()


def _lstm_two(w: LayerWeights, b: LstmBounds, upper: bool, target: tuple[float, float] | None) -> Contraction:
    """The least rate found with ||D(rate) W_hh||_2 <= rate, for two ways to share the room between f and the other gates."""
    kappa = 1.0 if w.w_hr is None else norm2(w.w_hr)
    own, even = shares(w, b, SHARE if target is None else target[1])
    rate, share = min(
        ((_crossing(w.w_hh, b, share, kappa), share) for share in (own, even)), key=lambda trial: trial[0]
    )
    found = [lstm_two_at(w, b, rate, share, kappa, upper)]
    if found[0].rate > rate:  # the estimate was short
        found.append(lstm_two_at(w, b, (rate + found[0].rate) / 2, share, kappa, upper))
    if target is not None and min(c.rate for c in found) > target[0] > float(b.f.max()):
        found.append(lstm_two_at(w, b, target[0], even, kappa, upper))
    return min(found, key=lambda c: c.rate)


def shares(w: LayerWeights, b: LstmBounds, even: float) -> tuple[Tensor, Tensor]:
    """The forget gate's share of the room, by unit (H,): as the rows of W_hh are long, and `even`."""
    rows = [torch.linalg.vector_norm(part, dim=1) for part in w.w_hh.chunk(4)]
    forget, others = torch.minimum(b.sf, b.f * (1 - b.f)) * b.c * rows[1], torch.hypot(b.si * rows[0], b.i * rows[2])
    own = (forget / (forget + others)).nan_to_num(SHARE).clamp(0.02, 0.98)
    return own, torch.full_like(own, even)


def _crossing(w_hh: Tensor, b: LstmBounds, share: Tensor, kappa: float) -> float:
    return crossing(w_hh, lambda rate: gate_scales(b, rate, share, kappa), float(b.f.max()) * (1 + 1e-4))


def lstm_two_at(w: LayerWeights, b: LstmBounds, rate: float, share: Tensor, kappa: float, upper: bool) -> Contraction:
    """With the weights V^2 = sum_j weight_j dc_j^2 + ||dh||^2 that belong to `rate`; what is proven for them may be a little more."""
    scales = gate_scales(b, rate, share, kappa)
    weight = (kappa * b.o) ** 2 * (b.f / (rate - b.f)) * (1 + 2.0**-45)
    fresh = torch.sqrt((rate - b.f) / rate).repeat(3)  # a difference of the inputs meets no difference of the cell
    scales_in = torch.cat([scales[: 3 * w.hidden] * fresh, scales[3 * w.hidden :]]) * (1 + 2.0**-45)
    proven = upwards(norm2(scales[:, None] * w.w_hh))
    gain = upwards(norm2(scales_in[:, None] * w.w_ih)) if upper else 0.0
    h2 = min(length(b.h), upwards(kappa * length(b.m)))
    start = upwards(math.hypot(length(weight.sqrt() * b.c), h2))
    units = upwards(float(weight.sum().sqrt())), math.sqrt(len(b.h))
    return Contraction("2", max(rate, proven), gain, start, (1.0, 1.0), units, (float(weight.max().sqrt()), 1.0))


def _lstm_inf(w: LayerWeights, b: LstmBounds, groups: int | None) -> Iterator[Contraction]:
    """V = max over units of |dc_j| / v_j and |dh_j| / v_j: with one weight for all cells, then near the best weights of all; in a cascade
    also with weights that grow from group to group."""
    after = lstm_step(w, b)

    def step(v: Tensor) -> Tensor:
        return torch.cat(after(v[: w.hidden], times(w.abs_hh, v[w.hidden :])))

    def even(v: Tensor) -> Tensor:  # v (2,): the weight of all cells, and of all outputs
        return torch.stack([part.max() for part in after(v[0].expand_as(b.o), rows * v[1])])

    rows, rows_in = (times(m, torch.ones_like(m[0])) for m in (w.abs_hh, w.abs_ih))
    two = perron(even, torch.ones(2, dtype=torch.float64), floor=0.0).clamp(min=1e-9)
    plain = torch.cat([two[0].expand_as(b.o), two[1].expand_as(b.h)])
    growing = () if groups is None else (_growing(w, b, rate, groups) for rate in rates(float(b.f.max())))
    for v in (plain, perron(step, plain), *growing):
        if v is None:
            continue
        vc, vh = v[: w.hidden], v[w.hidden :]
        rate = upwards(float((step(v) / v).max()))
        gain = upwards(float((torch.cat(after(torch.zeros_like(vc), rows_in)) / v).max()))
        start = upwards(float((torch.cat([b.c, b.h]) / v).max()))
        per_unit = upwards(float((1 / vc).max())), upwards(float((1 / vh).max()))
        yield Contraction("inf", rate, gain, start, (float(vh.max()), length(vh)), per_unit, per_unit)


def _growing(w: LayerWeights, b: LstmBounds, rate: float, groups: int) -> Tensor | None:
    """v (2H,) with lstm_step(v) <= rate v, in a cascade of so many groups: each unit's weight from those that it reads."""
    xi, xo = b.si * b.z, b.so * b.t

    def needed(v: Tensor) -> Tensor:
        di, df, dz, do = times(w.abs_hh, v[w.hidden :]).chunk(4)
        vc = ((b.c * b.sf * df + xi * di + b.i * dz) / (rate - b.f)).clamp(min=1.0)
        return torch.cat([vc, b.o * vc + xo * do / rate])

    return settled(needed, 2 * w.hidden, groups)


def _lstm_both(w: LayerWeights, b: LstmBounds, a: Tensor, eps: float) -> Tensor:
    """`lstm_step` of both, a (2H,), with inputs that differ by at most eps in each entry."""
    drive = up(times(w.abs_hh, a[w.hidden :]) + times(w.abs_ih, torch.full_like(w.w_ih[0], eps)), 2)
    return torch.cat(lstm_step(w, b)(a[: w.hidden], drive))


def lstm_step(w: LayerWeights, b: LstmBounds) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Bounds of |dc| (H,), |dh| (P,) after a step, from |dc| and the bound `drive` (4H,) of the pre-activations' differences.

    A product gate * tanh changes by at most hypot(x, y) and at most x' + y, see README.md."""
    xi, xi_sum, xo, xo_sum = b.si * joint(b.z), b.si * b.z, b.so * joint(b.t), b.so * b.t

    def after(dc: Tensor, drive: Tensor) -> tuple[Tensor, Tensor]:
        di, df, dz, do = drive.chunk(4)
        y, df = b.i * dz, b.c * df
        f = torch.minimum(b.f, (1 + dc / df.clamp(min=1e-300)) / 2)  # the gate for which f dc + f (1 - f) df is largest
        kept = torch.minimum(f * dc + f * (1 - f) * df, b.f * dc + b.sf * df)
        dc = up(kept + torch.minimum(torch.hypot(xi * di, y), xi_sum * di + y), 16)
        y = b.o * dc
        dm = up(torch.minimum(torch.hypot(xo * do, y), xo_sum * do + y), 16)
        return dc, dm if w.abs_hr is None else times(w.abs_hr, dm)

    return after


def _any_gates(hidden: int, forget: float) -> LstmBounds:
    """Bounds whatever W_ih and the biases are, but that forget gates are <= forget."""
    one = torch.ones(hidden, dtype=torch.float64)
    return LstmBounds(
        i=one,
        f=forget * one,
        o=one,
        z=one,
        si=one / 4,
        sf=one / 4,
        so=one / 4,
        c=one / (1 - forget),
        t=one,
        m=one,
        h=one,
    )
