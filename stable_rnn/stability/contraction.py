"""Contractions: a weighted norm V of state differences, and by which factor a step shrinks it. The derivations are in README.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.spectral import spectral_norm_bound
from .bounds import LstmBounds, RnnBounds, length, times, up
from .radius import SHORT, proven, radius, weighing
from .weights import LayerWeights

SHARE = 0.3  # of the room for the gates f, i, g that falls to f, unless a stable set says otherwise
STEPS = 60  # of power iterations; they only propose weights of a norm, which is then proven
LARGEST = 512  # units for which a numerical radius is looked for: it takes seconds there; a given rate is tried for any number
FLOOR = 0.05  # of the largest weight, the least that a unit's weight may be


@dataclass(frozen=True)
class Contraction:
    """For two states of one layer under the same inputs V(after) <= rate * V(before), rigorously.

    norm    "2" or "inf": the kind of V, and in which norm input differences are measured
    gain    a difference eps of the inputs adds at most gain * eps to V
    start   V of the difference between a zero state and any state that the layer can reach
    out     a state difference has |dh|_inf <= out[0] * V and ||dh||_2 <= out[1] * V
    units   V of a difference is at most hypot(units[0] * |dc|_inf, units[1] * |dh|_inf)
    spread  the same for differences as rounding makes them, spread over the units (README.md)
    """

    norm: str
    rate: float
    gain: float
    start: float
    out: tuple[float, float]
    units: tuple[float, float]
    spread: tuple[float, float]

    def after(self, k: int, eps: float) -> float:
        """Bound of V after k steps from `start` with inputs that differ by at most eps. It falls as k grows."""
        left = power(self.rate, k) * self.start if self.start else 0.0
        return _upwards(left + self.carried(eps))

    def carried(self, eps: float) -> float:
        """Bound of V that input differences of at most eps build up from no difference, in any number of steps."""
        return _piled_up(self.gain * eps, self.rate) if self.gain and eps else 0.0


def series(rate: float) -> float:
    """Upper bound of 1 + rate + rate^2 + ..."""
    return (1 + 2.0**-45) / (1 - rate) if rate < 1 else math.inf


def _piled_up(push: float, rate: float) -> float:
    """Upper bound of what a push at every step builds up from zero."""
    return push * series(rate) if push else 0.0


def power(rate: float, k: int) -> float:
    try:
        return rate**k * (1 + 2.0**-45) + 1e-300
    except OverflowError:
        return math.inf


def _upwards(x: float) -> float:
    return x * (1 + 2.0**-45)


def norm2(matrix: Tensor) -> float:
    if not torch.isfinite(matrix).all():
        return math.inf
    return float(spectral_norm_bound(matrix))


# ---- the tanh and relu RNN


def rnn_contractions(w: LayerWeights, b: RnnBounds, norms: tuple[str, ...], gain: float,
                     target: tuple[float, float] | None) -> list[Contraction]:
    """In the 2-norm ||W_hh||_2, and for "radius" near its numerical radius; in the max-norm absolute row sums, plain and with weights v
    near the Perron vector of |W_hh|.

    gain >= ||W_ih||_2. `target`: a rate (and a share) worth trying."""
    found = []
    if "2" in norms:
        rate = norm2(w.w_hh)
        start = min(length(b.h), _upwards(_piled_up(b.norm, rate)))
        found.append(Contraction("2", rate, gain, start, (1.0, 1.0), (0.0, math.sqrt(w.hidden)), (0.0, 1.0)))
    if "radius" in norms:
        found += _rnn_radius(w, b, gain, norm2(w.w_hh), target)
    if "inf" in norms:
        ones, drive = torch.ones_like(b.drive), times(w.abs_ih, torch.ones_like(w.w_ih[0]))
        for v in (ones, _perron(lambda v: times(w.abs_hh, v), ones)):
            rate = _upwards(float((times(w.abs_hh, v) / v).max()))
            start = _upwards(min(float((b.h / v).max()), _piled_up(float((b.drive / v).max()), rate)))
            per_unit = 0.0, _upwards(float((1 / v).max()))
            gain_inf, out = _upwards(float((drive / v).max())), (float(v.max()), length(v))
            found.append(Contraction("inf", rate, gain_inf, start, out, per_unit, per_unit))
    return found


def _rnn_radius(w: LayerWeights, b: RnnBounds, gain: float, most: float, target: tuple[float, float] | None) -> Iterator[Contraction]:
    """V^2 = dh^T P dh, at a rate just above the numerical radius of W_hh and at the target, where these are below `most` >= ||W_hh||_2."""
    if not 0 < most < 2:  # the radius is at least half of the norm
        return
    rates = [] if w.hidden > LARGEST else [SHORT * radius(w.w_hh)]
    for rate in rates if target is None else [*rates, target[0]]:
        P = weighing(w.w_hh, rate) if rate < most else None
        if P is None:
            continue
        P = (P + P.mT) / 2
        off = norm2(P - torch.eye(w.hidden, dtype=P.dtype))  # P lies between 1 - off and 1 + off
        if off < 1 and proven(w.w_hh, P, rate):
            small, large = (1 - off) ** -0.5 * (1 + 2.0**-45), _upwards((1 + off) ** 0.5)
            start = _upwards(min(large * length(b.h), _piled_up(small * b.norm, rate)))
            yield Contraction("2", rate, _upwards(small * gain), start, (small, small), (0.0, large * math.sqrt(w.hidden)), (0.0, large))


def relu_bound(found: list[Contraction], hidden: int) -> Tensor:
    """|h| (H,) of a relu layer: `start` of each contraction is what its inputs can build up from zero."""
    return torch.full((hidden,), min(c.start * c.out[0] for c in found), dtype=torch.float64)


def _perron(step: Callable[[Tensor], Tensor], start: Tensor, floor: float = FLOOR) -> Tensor:
    """Positive weights v that nearly minimize max_j step(v)_j / v_j; `floor` of `start` in it keeps every weight away from 0."""
    v = start / start.max()
    last = math.inf
    for number in range(STEPS):
        after = step(v)
        rate = float((after / v).max())  # it never rises, but may stand still for a while
        if not rate > 0 or number % 8 == 7 and rate > (1 - 1e-3) * last:
            break
        last = rate if number % 8 == 7 else last
        v = after / rate + v  # with v itself, so that a cycle converges too
        v = v / v.max()
    return v + floor * start / start.max()


# ---- the LSTM


def lstm_contractions(w: LayerWeights, b: LstmBounds, norms: tuple[str, ...], upper: bool,
                      target: tuple[float, float] | None) -> list[Contraction]:
    """In the 2-norm one, in the max-norm two. `upper`: inputs may differ, so gains matter. `target`: a rate and a share worth trying."""
    if not (b.f < 1).all():  # the sigmoid rounds to 1: nothing can be said
        nothing = (math.inf, math.inf)
        return [Contraction("2", math.inf, math.inf, math.inf, nothing, nothing, nothing)]
    found = [_lstm_two(w, b, upper, target)] if "2" in norms else []
    return [*found, *_lstm_inf(w, b)] if "inf" in norms else found


def gate_scales(b: LstmBounds, rate: float, share: Tensor | float, kappa: float = 1.0) -> Tensor:
    """The row scales D (4H,) for which ||D W_hh||_2 <= rate makes the layer contract at `rate`; kappa >= ||W_hr||_2. README.md."""
    share = torch.as_tensor(share, dtype=torch.float64)
    room = kappa * b.o * (rate / (rate - b.f))
    rest = (1 - share).rsqrt()
    own = b.c * torch.minimum(b.sf * share.rsqrt(), forget_slope(b.f, rate, share))
    scales = [room * b.si * joint(b.z) * rest, room * own, room * b.i * rest, kappa * b.so * joint(b.t)]
    return torch.cat([s.expand_as(b.o) for s in scales]) * (1 + 2.0**-45)


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
    rows = [torch.linalg.vector_norm(part, dim=1) for part in w.w_hh.chunk(4)]
    forget, others = torch.minimum(b.sf, b.f * (1 - b.f)) * b.c * rows[1], torch.hypot(b.si * rows[0], b.i * rows[2])
    own = (forget / (forget + others)).nan_to_num(SHARE).clamp(0.02, 0.98)
    even = torch.full_like(own, SHARE if target is None else target[1])
    rate, share = min(((_crossing(w.w_hh, b, share, kappa), share) for share in (own, even)), key=lambda trial: trial[0])
    found = [lstm_two_at(w, b, rate, share, kappa, upper)]
    if found[0].rate > rate:  # the estimate was short
        found.append(lstm_two_at(w, b, (rate + found[0].rate) / 2, share, kappa, upper))
    if target is not None and min(c.rate for c in found) > target[0] > float(b.f.max()):
        found.append(lstm_two_at(w, b, target[0], even, kappa, upper))
    return min(found, key=lambda c: c.rate)


def lstm_two_at(w: LayerWeights, b: LstmBounds, rate: float, share: Tensor, kappa: float, upper: bool) -> Contraction:
    """With the weights V^2 = sum_j weight_j dc_j^2 + ||dh||^2 that belong to `rate`; what is proven for them may be a little more."""
    scales = gate_scales(b, rate, share, kappa)
    weight = (kappa * b.o) ** 2 * (b.f / (rate - b.f)) * (1 + 2.0**-45)
    fresh = torch.sqrt((rate - b.f) / rate).repeat(3)  # a difference of the inputs meets no difference of the cell
    scales_in = torch.cat([scales[: 3 * w.hidden] * fresh, scales[3 * w.hidden :]]) * (1 + 2.0**-45)
    proven = _upwards(norm2(scales[:, None] * w.w_hh))
    gain = _upwards(norm2(scales_in[:, None] * w.w_ih)) if upper else 0.0
    h2 = min(length(b.h), _upwards(kappa * length(b.m)))
    start = _upwards(math.hypot(length(weight.sqrt() * b.c), h2))
    units = _upwards(float(weight.sum().sqrt())), math.sqrt(len(b.h))
    return Contraction("2", max(rate, proven), gain, start, (1.0, 1.0), units, (float(weight.max().sqrt()), 1.0))


def _crossing(w_hh: Tensor, b: LstmBounds, share: Tensor, kappa: float) -> float:
    """About the rate where ||D(rate) W_hh||_2 = rate, by power iteration and bisection in float32. Proves nothing."""
    w32 = w_hh.float()
    x = 1 + (torch.arange(w_hh.shape[1]) % 7).float() / 10

    def norm(rate: float) -> float:
        nonlocal x
        a = gate_scales(b, rate, share, kappa).float()[:, None] * w32
        for _ in range(8):
            y = a.mT @ (a @ x)
            size = float(torch.linalg.vector_norm(y))
            if not 0 < size < math.inf:
                return size
            x = y / size
        return math.sqrt(size)

    low = float(b.f.max()) * (1 + 1e-4)
    high = 1.0 if low < 1 and norm(1.0) < 1 else max(2.0, norm(2.0))
    for _ in range(14):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if norm(middle) <= middle else (middle, high)
    return high * (1 + 1e-4)


def _lstm_inf(w: LayerWeights, b: LstmBounds) -> Iterator[Contraction]:
    """V = max over units of |dc_j| / v_j and |dh_j| / v_j: with one weight for all cells, then near the best weights of all."""
    after = lstm_step(w, b)

    def step(v: Tensor) -> Tensor:
        return torch.cat(after(v[: w.hidden], times(w.abs_hh, v[w.hidden :])))

    def even(v: Tensor) -> Tensor:  # v (2,): the weight of all cells, and of all outputs
        return torch.stack([part.max() for part in after(v[0].expand_as(b.o), rows * v[1])])

    rows, rows_in = (times(m, torch.ones_like(m[0])) for m in (w.abs_hh, w.abs_ih))
    two = _perron(even, torch.ones(2, dtype=torch.float64), floor=0.0).clamp(min=1e-9)
    plain = torch.cat([two[0].expand_as(b.o), two[1].expand_as(b.h)])
    for v in (plain, _perron(step, plain)):
        vc, vh = v[: w.hidden], v[w.hidden :]
        rate = _upwards(float((step(v) / v).max()))
        gain = _upwards(float((torch.cat(after(torch.zeros_like(vc), rows_in)) / v).max()))
        start = _upwards(float((torch.cat([b.c, b.h]) / v).max()))
        per_unit = _upwards(float((1 / vc).max())), _upwards(float((1 / vh).max()))
        yield Contraction("inf", rate, gain, start, (float(vh.max()), length(vh)), per_unit, per_unit)


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
