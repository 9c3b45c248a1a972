"""`project_`: weights into the stable set of a `Certified`, in place. The sets and why they suffice are in README.md."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..cells import CELLS
from ..ops.spectral import SpectralState, spectral_project_
from ..ops.spectral.later import on_gpu
from ..ops.spectral.memory import first_overlap
from ..ops.spectral.norm import check_writable
from .bounds import length
from .cell import Ball, Verdict
from .cells import STABILITY
from .late import LateLook
from .layer import LayerCertificate, layer_certificate
from .limits import Limits
from .nearest import Directions, computable, into_ball, step_into_ball
from .products import step_of_products
from .rows import state_bound, wide
from .sharded import GATHER, check_kept, is_sharded, store, whole
from .weights import (
    LayerWeights,
    Names,
    check_finite,
    check_values,
    layer_names,
    named_weights,
    on_cpu,
    once,
    read,
    recurrent,
)

FIRST_MARGIN, ATTEMPTS = (
    1e-6,
    7,
)  # how far inside to aim; eight times further where rounding to the weights' dtype led out again
ROUNDS = 50  # through layers or modules that share weights; two or three are what it takes


class _Warm:
    """What training steps carry on: the subspaces of the spectral projection and of each LSTM matrix, and whether a GPU's weights are
    finite. No part of a module, so that state dicts, copies and pickles don't hold it."""

    def __init__(self) -> None:
        self.spectral = SpectralState()
        self.directions: defaultdict[int, Directions] = defaultdict(Directions)
        self.look = LateLook()


_warm: WeakKeyDictionary[nn.Module, _Warm] = WeakKeyDictionary()


@torch.no_grad()
def project_(module: nn.Module, stability: Limits, certify: bool = True) -> None:
    """Move the weights of an RNN, GRU or LSTM (module or cell) into the set, all layers and directions, in place.

    certify=True: afterwards every layer is certified at `stability.rate`; layers that were so before are left bitwise untouched.
    certify=False: one warm step of the spectral projection and the cheap rules, for training loops; it may stop a little short.
    On a GPU such a step in the 2-norm waits for nothing, but for the first: whether all weights are finite is asked in every 16th call and
    answered 4 calls later; until then those that are not are left alone.

    In the 2-norm: RNN ||W_hh||_2 <= rate ("radius": its numerical radius); LSTM ||D W_hh||_2 <= rate with D of `gate_scales`,
    ||W_hr||_2 <= 1. In the max-norm: the same of row sums. LSTM without a clamp: for each unit of the forget gate the rows of W_ih and
    W_hh and a positive bias are scaled together until sigmoid(row sums + bias) <= forget. Weights outside of a 2-norm set go (nearly) to
    the nearest ones inside.

    Layers may share weights (tied parameters, or one memory): they are projected in turn until all of them are certified. Modules that
    share weights with this one are not looked at. DTensors (FSDP2's `fully_shard`, tensor parallelism) are gathered, and each rank writes
    its part of the first rank's result: call it on every rank.

    Raises ValueError, before anything is written: for weights or biases with NaN or infinite values, on the meta device, on several
    devices or of another shape than the module's sizes say (parts of FSDP1 and ZeRO-3); weights that other parameters compute (a
    parametrization, weight norm), that overlap themselves (expanded) or in part each other, of which a sum of parts is placed, or that
    `fully_shard` lends for a pass; a set that doesn't fit the module. TypeError for weights that are not real floating point.
    """
    module, cell = recurrent(module)
    STABILITY[cell].check(stability)
    check_clamp(module, cell, stability.cap, stability)
    names = projected_names(module, stability)
    if not module.hidden_size:  # torch has cells without units
        return
    levels, held, warm = layer_names(module), named_weights(module), warm_of(module)
    weights = checked_weights(held, None if certify else warm.look)
    if certify:
        copies = {id(w): w.clone() for w in weights.values()}
        _certified({name: copies[id(w)] for name, w in weights.items()}, levels, stability, cell)
        for w in once(weights.values()):
            if not torch.equal(w, copies[id(w)]):
                w.copy_(copies[id(w)])
    else:
        _step(weights, levels, stability, cell, warm)
    store_sharded(held, names, weights)


def warm_of(module: nn.Module) -> _Warm:
    return _warm.setdefault(module, _Warm())


def check_clamp(module: nn.Module, cell: str, cap: float, stability: object) -> None:
    """ValueError if the module doesn't clamp its forget gate at `cap`, which `stability` needs, or below."""
    own = getattr(module, "stability", None)
    if CELLS[cell].forgets is not None and cap < (1.0 if own is None else own.cap_of(cell)):
        raise ValueError(
            f"project_: {stability} needs a cell that clamps its forget gate at {cap}; {type(module).__name__} here doesn't"
        )


def store_sharded(held: dict[str, Tensor], names: list[str], weights: dict[str, Tensor]) -> None:
    """What was written to the whole of a sharded weight, into its parts; plain weights were written themselves."""
    for w, name in {held[name]: name for name in names}.items():
        if is_sharded(w):
            store(w, weights[name])


def projected_names(module: nn.Module, stability: Limits) -> list[str]:
    """The names of the weights that `project_` may write. ValueError if one of them cannot be written, as `project_` says."""
    return writable_names(module, STABILITY[recurrent(module)[1]].written(stability))


def writable_names(module: nn.Module, kinds: tuple[str, ...]) -> list[str]:
    """The names of a module's weights of these kinds. ValueError if one of them cannot be written."""
    module, _ = recurrent(module)
    wanted = [names[kind] for level in layer_names(module) for names in level for kind in kinds]
    found = {name: w for name in wanted if (w := getattr(module, name, None)) is not None}
    for name in found:
        if name not in module._parameters and name not in module._buffers:
            flat = f" {GATHER}" if hasattr(module, "_is_fsdp_managed_module") else ""
            raise ValueError(
                f"project_: {name} of {type(module).__name__} is computed from other parameters (by a parametrization or "
                f"weight norm), so that writing to it has no effect; remove that, or set stability=None{flat}"
            )
    named_weights(module)
    for name, w in found.items():
        check_kept(module, name, w)
        if not is_sharded(w) and module.hidden_size:
            check_writable(w, f"project_: {name}")
    return list(found)


def identity(w: Tensor) -> Hashable:
    """Equal for weights that are one: the same object, or the same entries in the same memory."""
    if is_sharded(w) or w.is_meta or not w.numel():
        return id(w)
    return w.device, w.data_ptr(), w.dtype, w.shape, w.stride()


def checked_weights(held: dict[str, Tensor], look: LateLook | None) -> dict[str, Tensor]:
    """All weights and biases by name, whole and detached; names of one weight have one tensor. One look at their sums tells whether all
    values are finite, or may not be; on a GPU a late one, if there is one."""
    for name, w in held.items():
        check_values(name, w)
    if len({w.device for w in held.values()}) > 1:
        places = ", ".join(f"{name} on {w.device}" for name, w in held.items())
        raise ValueError(f"project_: all weights must be on one device, got {places}")
    one: dict[Hashable, Tensor] = {}
    found = {}
    for name, w in held.items():
        key = identity(w)
        if key not in one:
            one[key] = whole(w.detach())
        found[name] = one[key]
    distinct = list(one.values())
    names = {id(w): name for name, w in reversed(found.items())}
    pair = first_overlap(distinct)
    if pair:
        first, second = (names[id(distinct[i])] for i in pair)
        raise ValueError(
            f"project_: {first} and {second} share a part of their memory, or all of it in another order; make them one "
            "parameter, or give one a memory of its own (.clone())"
        )
    sums = partial(_sums, distinct)
    suspect = look.suspect(sums, distinct) if look is not None and on_gpu(distinct) else not sums().isfinite().all()
    if suspect:
        for name, w in found.items():
            check_finite(name, w)
    return found


def _sums(weights: list[Tensor]) -> Tensor:
    return torch.stack([w.sum(dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights])


@on_cpu
def _certified(weights: dict[str, Tensor], levels: list[list[Names]], stability: Limits, cell: str) -> None:
    tied = len(once(weights.values())) < len(weights)
    for _ in range(ROUNDS):
        if not _project_layers(weights, levels, stability, cell) or not tied:
            return
    raise ValueError(
        f"project_: layers that share weights don't come to rest in the set {stability}; give them weights of their own"
    )


def _project_layers(weights: dict[str, Tensor], levels: list[list[Names]], stability: Limits, cell: str) -> bool:
    """Brings each layer that is not certified into the set; whether there was one."""
    moved = False
    x = torch.full(
        (weights[levels[0][0]["weight_ih"]].shape[1],), stability.input_limit(cell), dtype=torch.float64
    )  # |inputs| of the level
    x2 = length(x)
    for level in levels:
        made = []
        for names in level:
            for attempt in range(ATTEMPTS):
                found = _judged(read(weights.get, names, cell), x, x2, stability)
                if found.inside:
                    break
                margin, moved = FIRST_MARGIN * 8**attempt, True
                STABILITY[cell].bring_in(weights, names, stability, margin, x, torch.float64)
                balls = STABILITY[cell].balls(weights, names, stability, margin)
                if balls:  # after rows of forget gates, which take most room and often end small, for other reasons
                    _into_balls(balls, proven=attempt > 0)
                    STABILITY[cell].bring_in(weights, names, stability, margin, x, torch.float64)
            else:
                layer, _ = _certificate(read(weights.get, names, cell), x, x2, stability)
                forget = (
                    ""
                    if layer.forget is None
                    else f", its forget gate may reach {layer.forget:.6g} (allowed: {stability.forget:g})"
                )
                raise RuntimeError(
                    f"project_: {names['weight_hh']} does not reach the set: rate {layer.rate:.6g}{forget}"
                )
            made.append(found)
        x = torch.cat([found.h for found in made])
        x2 = math.hypot(*(found.h2 for found in made))
    return moved


def _judged(w: LayerWeights, x: Tensor, x2: float, stability: Limits) -> Verdict:
    """Whether the layer is certified at `stability.rate`."""
    found = STABILITY[w.cell].verdict(w, x, stability)
    if found is None:
        layer, h = _certificate(w, x, x2, stability)
        found = Verdict(layer.rate <= stability.rate, h, layer.bound2)
    return found


def _certificate(w: LayerWeights, x: Tensor, x2: float, stability: Limits) -> tuple[LayerCertificate, Tensor]:
    norms = {"auto": ("2", "inf"), "radius": ("2", "radius")}.get(stability.norm, (stability.norm,))
    return layer_certificate(w, x, x2, None, stability.cap, stability.target, norms)


@on_cpu
def _step(weights: dict[str, Tensor], levels: list[list[Names]], stability: Limits, cell: str, warm: _Warm) -> None:
    balls = [
        ball
        for level in levels
        for names in level
        for ball in STABILITY[cell].balls(weights, names, stability, FIRST_MARGIN)
    ]
    _step_into_balls(
        list({id(ball[0]): ball for ball in balls}.values()), warm
    )  # one weight has the same ball in every layer
    for number, level in enumerate(levels):
        for names in level:
            if number == 0:
                x = torch.full_like(wide(weights[names["weight_ih"]].select(0, 0)), stability.input_bound)
            STABILITY[cell].bring_in(weights, names, stability, FIRST_MARGIN, x, torch.float32)
        x = torch.cat([state_bound(weights, names) for names in level])


# ---- the 2-norm


def _into_balls(balls: list[Ball], proven: bool) -> None:
    """LSTM weights near to where they were, in the norm that optimizers move them in. `proven`: what then is left outside, by rounding
    for instance, is clipped."""
    matrices, bounds, changed = [], [], []
    for w, scales, bound in balls:
        if scales is None:
            matrices.append(w)
            bounds.append(bound)
            continue
        scales, bound = _by_largest(scales, bound)
        wide = computable(w, torch.float64 if proven else torch.float32)
        near = into_ball(wide, scales.to(wide), bound)
        if not proven:
            if near is not wide:
                w.copy_(near)
            continue
        rows = scales.to(wide).repeat_interleave(len(w) // len(scales))[:, None]
        matrices.append((rows * near).contiguous())
        bounds.append(bound)
        changed.append((w, wide, near, rows, matrices[-1], matrices[-1].clone()))
    if matrices:
        spectral_project_(matrices, bounds)
    for w, wide, near, rows, scaled, before in changed:
        clipped = torch.where(scaled == before, near, scaled / rows)
        w.copy_(torch.where(clipped == wide, w.to(wide), clipped))


def _step_into_balls(balls: list[Ball], warm: _Warm) -> None:
    others = [(w, bound) for w, scales, bound in balls if scales is None]
    if others:
        spectral_project_([w for w, _ in others], [bound for _, bound in others], certify=False, state=warm.spectral)
    alike = defaultdict(list)  # on a GPU one stack
    for number, (w, scales, bound) in enumerate(balls):
        if scales is not None and on_gpu([w]):
            alike[w.shape, w.dtype, w.device, bound].append((w, _beside(scales, w)))
        elif scales is not None:
            scales, bound = _by_largest(scales, bound)
            wide = computable(w, torch.float32)
            near = step_into_ball(wide, scales.to(wide), bound, warm.directions[number])
            if near is not wide:
                w.copy_(near)
    for (*_, bound), stack in alike.items():
        matrices, scales = map(torch.stack, zip(*stack))
        found = step_of_products(computable(matrices, torch.float32), scales, bound)
        for (w, _), near in zip(stack, found):
            w.copy_(near)


def _by_largest(scales: tuple[float, ...] | Tensor, bound: float) -> tuple[Tensor, float]:
    """Both by the largest scale, so that no product with a large weight overflows; scales (G,) or (G*H,)."""
    scales = scales.flatten() if isinstance(scales, Tensor) else torch.tensor(scales, dtype=torch.float64)
    most = float(scales.max())
    return scales / most, bound / most


def _beside(scales: tuple[float, ...] | Tensor, w: Tensor) -> Tensor:
    """(G, H) or (G, 1) on the device of w. Numbers go there as arguments of kernels: a copy would wait."""
    if isinstance(scales, Tensor):
        return scales
    return torch.stack([w.new_full((1,), scale, dtype=torch.float64) for scale in scales])
