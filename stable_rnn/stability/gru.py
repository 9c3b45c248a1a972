"""torch's GRU: how large its gates and state get, its contractions, and its weights' way into a stable set. See README.md.

Rows r, z, n, and m = W_hn h + b_hn:   n = tanh(W_in x + b_in + r m),   h' = (1 - z) n + z h,   z clamped."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from .rows import lower_forget, wide
from .weights import KINDS, LayerWeights, Names

RESET = ((math.sqrt(5) - 1) / 2) ** 5 * (1 + 2.0**-45)  # b, of the reset gate's lemma
ZETA = 2.0  # the weight of W_hz in the set; the certificate tries ZETAS too, and 2 z^2
ZETAS = (0.5, 1.0, 3.0)
LEAST_ZETA = 27 / 64
NO_UPDATE = 1e12  # for layers whose z reads no h
LEAST_REACH = 0.01  # of |m| in the set: so that a unit without W_hn and b_hn has scales that can be divided by


class Gru(CellStability):
    cascade_forget = 0.7

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
        b = gru_bounds(w, drive, cap)
        forget, groups = float(b.z.max()), depth(w)
        found: list[Contraction | Comparison] = [*gru_contractions(w, b, norms, upper, target, groups)]
        if groups is not None and forget < 1 and "inf" in norms:
            found.append(Comparison(partial(_gru_units, w, b), 2 * b.h, w.hidden, min(rates(forget))))
        return Reach(found, b.h, length(b.h), 0.0, forget, groups)

    def verdict(self, w: LayerWeights, x: Tensor, limits: Limits) -> Verdict | None:
        """The contractions of a certificate want ||D W_hh||_2 <= rate for one of a few D, which fall as the rate grows."""
        if limits.norm not in ("2", "radius"):
            return None
        b = gru_bounds(w, drive_of_bound(w, x, math.inf, math.inf), limits.cap)
        outside = Verdict(False, b.h, length(b.h))
        if not (b.z < 1).all():
            return outside

        def scaled(zeta: Tensor) -> Tensor | None:  # None: no such rate with this zeta
            scales, _ = gru_scales(b.m, b.z, limits.rate, zeta)
            return scales[:, None] * w.w_hh if torch.isfinite(scales).all() else None

        of_set, *others = _zetas(w, b)
        found = scaled(of_set)
        inside = False if found is None else within(found, limits.rate)
        if inside is not False:
            return None if inside is None else outside._replace(inside=True)
        tried = (scaled(zeta) for zeta in others)
        return outside if all(each is None or exceeds(each, limits.rate) for each in tried) else None

    def step_error(self, drive: float, unit: float, h: float, cell: float) -> tuple[float, float]:
        return 0.0, drive * 2 + unit * (
            2 + h
        )  # z moves h - n <= 2 by a quarter of its error, r and m each n by no more than theirs

    def check(self, limits: Limits) -> None:
        alpha = _set_alpha(limits.forget)
        if limits.norm == "inf" and not limits.forget < limits.rate:
            raise ValueError(f"Certified: forget must be below the rate {limits.rate}, got {limits.forget}")
        if limits.norm != "inf" and not alpha < limits.rate**2:
            raise ValueError(
                f"Certified: at the rate {limits.rate} a GRU's update gate needs a lower bound than forget={limits.forget}"
                f"{'' if limits.clamp else ', with clamp=True'}"
            )

    def written(self, limits: Limits) -> tuple[str, ...]:
        return KINDS if limits.cap == 1 else super().written(limits)

    def balls(self, weights: dict[str, Tensor], names: Names, limits: Limits, margin: float) -> list[Ball]:
        """By rows, since r's scales depend on the weights of n."""
        if limits.norm == "inf":
            return []
        m = _any_reach(weights, names)
        scales, _ = gru_scales(m, torch.full_like(m, limits.forget), limits.rate, ZETA)
        return [(weights[names["weight_hh"]], scales.unflatten(0, (3, -1)), limits.rate * (1 - margin))]

    def bring_in(
        self, weights: dict[str, Tensor], names: Names, limits: Limits, margin: float, x: Tensor, least: torch.dtype
    ) -> None:
        w_hh = weights[names["weight_hh"]]
        if limits.norm == "inf":
            # u + s + s^2/(4 u) < room, with u = 0.7 room for W_hn and a quarter of m W_hr, and s = 0.25 room for W_hz
            room = (limits.rate * (1 - margin) - limits.forget) / (1 - limits.forget)
            reset, update, new = w_hh.chunk(3)
            row_project_(new, 0.6 * room)
            row_project_(update, 0.25 * room)
            row_project_(reset, 0.4 * room / _any_reach(weights, names))
        elif margin > 1e-5:  # not within a few attempts: a smaller W_hh has smaller scales, too
            w_hh.mul_(1 - margin)
        if limits.cap == 1:
            lower_forget(weights, names, lambda w: w.chunk(3)[1], limits.forget, margin, x)


CELLS = {"gru": Gru()}


@dataclass(frozen=True)
class GruBounds:
    """Upper bounds per unit, all (H,): of the gates r and z, and of |m|, |h|."""

    r: Tensor
    z: Tensor
    m: Tensor
    h: Tensor


def gru_bounds(w: LayerWeights, drive: Drive, cap: float) -> GruBounds:
    """h is a convex combination of 0 and of all n so far, so each bound of |n| is one of |h|; from |h| <= 1, each round is valid for all
    times."""
    b_hn = torch.zeros(w.hidden, dtype=torch.float64, device="cpu") if w.bias_hh is None else w.bias_hh.chunk(3)[2]
    low, high = drive.low.chunk(3)[2] - b_hn, drive.high.chunk(3)[2] - b_hn  # W_in x + b_in alone
    alone = torch.maximum(-low, high)
    alone = alone + (alone + 2 * b_hn.abs()) * 2.0**-50
    h = torch.ones(w.hidden, dtype=torch.float64, device="cpu")
    for _ in range(ROUNDS):
        of_r, of_z, of_n = times(w.abs_hh, h).chunk(3)
        m = up(of_n + b_hn.abs(), 2)
        reach = [d + q + (d.abs() + q) * 2.0**-50 for d, q in zip(drive.high.chunk(3), (of_r, of_z))]
        r = (torch.sigmoid(reach[0]) * GATE).clamp(max=1.0)
        z = (torch.sigmoid(reach[1]) * GATE).clamp(max=cap)
        h = torch.minimum(h, torch.tanh(up(alone + r * m, 2)) * GATE)
    return GruBounds(r, z, m, h)


def gru_contractions(
    w: LayerWeights,
    b: GruBounds,
    norms: tuple[str, ...],
    upper: bool,
    target: tuple[float, float] | None,
    groups: int | None = None,
) -> list[Contraction]:
    """In the 2-norm one, in the max-norm two, or more in a cascade of so many groups. `upper`: inputs may differ, so gains matter.
    `target`: a rate (and a share) worth trying."""
    if not (b.z < 1).all():  # the sigmoid rounds to 1: nothing can be said
        nothing = (math.inf, math.inf)
        return [Contraction("2", math.inf, math.inf, math.inf, nothing, nothing, nothing)]
    found = [_gru_two(w, b, upper, target)] if "2" in norms else []
    return [*found, *_gru_inf(w, b, groups)] if "inf" in norms else found


# ---- the 2-norm


def _alpha(z: Tensor, zeta: Tensor | float) -> Tensor:
    """The least alpha with |h'|^2 <= alpha a^2 + u^2 + b m^2 v^2 + zeta s^2 for gates up to z (H,), rounded upwards; infinite where there
    is none. README.md."""
    zeta = torch.as_tensor(zeta, dtype=torch.float64)
    z = z.clamp(min=1e-30)
    near = zeta >= 2 * z * z
    above = torch.where(near, z * (zeta - z * z), z * z)
    below = torch.where(near, (2 - z) * zeta - z, 1 - 4 * (z * (1 - z)).square() / zeta) - 2.0**-48 * (zeta + 1)
    return torch.where((below > 0) & (zeta >= LEAST_ZETA), above * (1 + 2.0**-45) / below, math.inf)


@lru_cache(maxsize=64)
def _set_alpha(forget: float) -> float:
    with torch.device("cpu"):  # whatever device the module is made on
        return float(_alpha(torch.tensor([forget], dtype=torch.float64), ZETA))


def gru_scales(m: Tensor, z: Tensor, rate: float, zeta: Tensor | float) -> tuple[Tensor, Tensor]:
    """The row scales D (3H,) for which ||D W_hh||_2 <= rate makes the layer contract at `rate`, and the weights p (H,) of its norm,
    V^2 = sum_j p_j dh_j^2; infinite where the rate is too low. m (H,) >= |W_hn h + b_hn|, z (H,) >= the update gates."""
    square = rate * rate
    room = square * (1 - 2.0**-50) - _alpha(z, zeta)
    p = torch.where(room > 0, square * (1 + 2.0**-45) / room, math.inf)
    root = p.sqrt() * (1 + 2.0**-45)
    zeta = torch.as_tensor(zeta, dtype=torch.float64)
    return torch.cat([math.sqrt(RESET) * m * root, zeta.sqrt() * root, root]) * (1 + 2.0**-45), p


def _gru_two(w: LayerWeights, b: GruBounds, upper: bool, target: tuple[float, float] | None) -> Contraction:
    """The least rate found with ||D(rate) W_hh||_2 <= rate, for a few ways to weigh W_hz."""
    zetas = _zetas(w, b)
    rate, number = min((_crossing(w, b, zeta), number) for number, zeta in enumerate(zetas))
    found = [gru_two_at(w, b, rate, zetas[number], upper)]
    if found[0].rate > rate:  # the estimate was short
        found.append(gru_two_at(w, b, (rate + found[0].rate) / 2, zetas[number], upper))
    if target is not None and min(c.rate for c in found) > target[0]:
        found.append(gru_two_at(w, b, target[0], zetas[0], upper))
    return min(found, key=lambda c: c.rate)


def _zetas(w: LayerWeights, b: GruBounds) -> list[Tensor]:
    """Weights of W_hz to try, the set's first."""
    zetas = [torch.full_like(b.z, zeta) for zeta in (ZETA, *ZETAS)] + [(2 * b.z * b.z).clamp(min=LEAST_ZETA)]
    return zetas if w.w_hh.chunk(3)[1].any() else [*zetas, torch.full_like(b.z, NO_UPDATE)]


def _crossing(w: LayerWeights, b: GruBounds, zeta: Tensor) -> float:
    low = math.sqrt(float(_alpha(b.z, zeta).max())) * (1 + 1e-4)
    return math.inf if math.isinf(low) else crossing(w.w_hh, lambda rate: gru_scales(b.m, b.z, rate, zeta)[0], low)


def gru_two_at(w: LayerWeights, b: GruBounds, rate: float, zeta: Tensor, upper: bool) -> Contraction:
    """With the weights p that belong to `rate`; what is proven for them may be a little more."""
    scales, p = gru_scales(b.m, b.z, rate, zeta)
    root = p.sqrt() * (1 + 2.0**-45)
    proven = upwards(norm2(scales[:, None] * w.w_hh))
    reset, update, new = w.w_ih.chunk(3)
    parts = ((new, 1.0), (reset, b.m / 4), (update, 0.5))
    gain = upwards(sum(norm2((root * scale)[:, None] * part) for part, scale in parts)) if upper else 0.0
    most = upwards(float(p.rsqrt().max()))
    start, units = upwards(length(root * b.h)), (0.0, length(root))
    return Contraction("2", max(rate, proven), gain, start, (most, most), units, (0.0, float(root.max())))


# ---- the max-norm


def gru_step(b: GruBounds, a: Tensor, drive: Tensor, fresh: Tensor) -> Tensor:
    """Bound of |dh| (H,) after a step, from the bounds a (H,) of |dh|, `drive` (3H,) of the differences of W_hr h, W_hz h, W_hn h (for r
    and z with those of the inputs) and `fresh` (H,) of those of W_in x. The largest over all gates there can be, see README.md."""
    q, s = _new(b, drive, fresh)
    z = torch.minimum(((a - q + s) / (2 * s).clamp(min=1e-300)).clamp(min=0.0), b.z)
    return up(z * a + (1 - z) * (q + z * s), 16)


def _new(b: GruBounds, drive: Tensor, fresh: Tensor | float) -> tuple[Tensor, Tensor]:
    """q, s (H,) for which dn and the part that z moves are together at most q + z s, before the factor 1 - z."""
    v, s, u = drive.chunk(3)
    v = b.m * v
    r = torch.minimum((1 + u / v.clamp(min=1e-300)) / 2, b.r)
    q = r * u + r * (1 - r) * v + fresh
    t = (b.z * s / (2 * q).clamp(min=1e-300)).clamp(max=1.0)
    return q, ((1 + t) * s - t * t * q / b.z.clamp(min=1e-300)).clamp(min=0.0)


def _gru_units(w: LayerWeights, b: GruBounds, a: Tensor, eps: float = 0.0) -> Tensor:
    """`gru_step` of a (H,), with inputs that differ by at most eps in each entry."""
    inputs = times(w.abs_ih, torch.full_like(w.w_ih[0], eps))
    gates = torch.cat([inputs[: 2 * w.hidden], torch.zeros_like(a)])
    return gru_step(b, a, up(times(w.abs_hh, a) + gates, 2), inputs[2 * w.hidden :])


def _gru_inf(w: LayerWeights, b: GruBounds, groups: int | None) -> Iterator[Contraction]:
    """V = max over units of |dh_j| / v_j: with equal weights, then near the best weights of all; in a cascade also with weights that grow
    from group to group."""
    ones = torch.ones_like(b.h)
    growing = [] if groups is None else [_growing(w, b, rate, groups) for rate in rates(float(b.z.max()))]
    for v in (ones, perron(partial(_gru_units, w, b), ones), *growing):
        if v is None:
            continue
        rate = upwards(float((_gru_units(w, b, v) / v).max()))
        gain = upwards(float((_gru_units(w, b, torch.zeros_like(v), 1.0) / v).max()))
        start, per_unit = upwards(float((b.h / v).max())), upwards(float((1 / v).max()))
        yield Contraction("inf", rate, gain, start, (float(v.max()), length(v)), (0.0, per_unit), (0.0, per_unit))


def _growing(w: LayerWeights, b: GruBounds, rate: float, groups: int) -> Tensor | None:
    """v (H,) with gru_step(v) <= rate v, in a cascade of so many groups: each unit's weight from those that it reads."""

    def needed(v: Tensor) -> Tensor:
        q, s = _new(b, times(w.abs_hh, v), 0.0)
        return (q + s / 4) / (rate - b.z)

    return settled(needed, w.hidden, groups)


def _any_reach(weights: dict[str, Tensor], names: Names) -> Tensor:
    """m (H,) of weights in a set, whatever |h| <= 1 is."""
    m = wide(weights[names["weight_hh"]].chunk(3)[2]).abs().sum(1)
    if names["bias_hh"] in weights:
        m = m + wide(weights[names["bias_hh"]].chunk(3)[2]).abs()
    return m.clamp(min=LEAST_REACH)
