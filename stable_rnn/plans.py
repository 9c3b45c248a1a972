"""Plans: how a module runs its recurrence over time. A plan acts on each layer and direction by itself.

| plan                   | sequential steps   | each output of a layer has seen         |
|------------------------|--------------------|-----------------------------------------|
| `Recurrent()`          | T                  | everything                              |
| `Windowed(k)`          | k                  | exactly its last k inputs               |
| `Chunked(chunk, w)`    | chunk + w          | its last w + 1 .. w + chunk inputs      |
| `Verified(...)`        | chunk + w + reruns | everything, to `tol`, checked each time |
| `Scanned()`            | k scans            | everything; weights that are a cascade  |

A module takes one of them, a list of one per layer, or a dict by layer or (layer, direction).

Runs that reach back to the start of a sequence begin there from the caller's `h0` (`c0`), exactly. Source: Miller & Hardt, "Stable
Recurrent Models", ICLR 2019, arXiv 1805.10369 (truncated models are `Windowed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Protocol, TypedDict, TypeGuard, TypeVar

import torch
from torch import nn

from ._numbers import to_float, to_int
from .ops.recurrence.problem import AUTO, SCANNED, WHOLE
from .ops.recurrence.reference import arithmetic
from .ops.recurrence.report import CORRECTIONS
from .precision import products_eps

_M = TypeVar("_M", bound=nn.Module)
_LONGEST = 2**62  # sequences are shorter, and the ops take 64-bit integers


class Numbers(TypedDict, total=False):
    """The fields of a `Problem` that a plan may set."""

    stride: int
    warmup: int
    tol: float
    max_passes: int
    correct: str
    on_output: bool


class Plan:
    """Base of the plans."""

    def numbers(self, x: torch.Tensor) -> Numbers:
        """The fields of a `Problem` that the plan sets for tensors like x."""
        raise NotImplementedError

    def at(self, layer: int, direction: int) -> Plan:
        """The plan of one layer and direction."""
        return self


@dataclass(frozen=True)
class Recurrent(Plan):
    """The plain recurrence over all T steps, with exact back-propagation through time."""

    def numbers(self, x: torch.Tensor) -> Numbers:
        return {"stride": WHOLE}


@dataclass(frozen=True)
class Windowed(Plan):
    """Every output is computed from its last `k` inputs alone, all windows at once: k dependent steps and k times the arithmetic.

    The gradient is the true gradient of the windowed function. `stable_rnn.memory(module, input)` measures the k that an input needs.
    Raises `ValueError` unless k >= 1, `TypeError` unless it is an int."""

    k: int

    def __post_init__(self) -> None:
        _take_int(self, "k", 1)

    def numbers(self, x: torch.Tensor) -> Numbers:
        return {"stride": 1, "warmup": min(self.k - 1, _LONGEST)}


@dataclass(frozen=True)
class Chunked(Plan):
    """Chunks of time run side by side, each after `warmup` steps from a zero state: chunk + warmup dependent steps,
    1 + warmup/chunk times the arithmetic.

    The backward pass is the adjoint recursion cut the same way in reverse time; it approximates the full gradient, with an error that
    shrinks like w λ^w (Lemma 2 of the paper), instead of stopping gradients at chunk borders. `stable_rnn.memory(module, input)` measures
    the warm-up that an input needs. chunk >= 1, warmup >= 0; `Chunked(1, w)` is `Windowed(w + 1)`."""

    chunk: int
    warmup: int

    def __post_init__(self) -> None:
        _take_int(self, "chunk", 1)
        _take_int(self, "warmup", 0)

    def numbers(self, x: torch.Tensor) -> Numbers:
        return {"stride": min(self.chunk, _LONGEST), "warmup": min(self.warmup, _LONGEST)}


@dataclass(frozen=True, repr=False)
class Verified(Plan):
    """Chunks of time run side by side, and every border between two of them is checked. Starts that differ by more than `tol` from the end
    of the chunk before are corrected, all at once, and their chunks run again, until all agree.

    The result is a trajectory of the recurrence whose only defects are jumps of at most `tol` (relative to max(1, |state|)) at chunk
    borders, for any weights. Where that does not pay, the plain recurrence runs, and `module.last_report` says why; on a device whose costs
    are known a call that finds this out costs at most about a tenth more than `Recurrent()`, and later calls with the same weights know.
    The backward pass checks the adjoint likewise, relative to its largest value.

    tol         None: about the rounding error of one step, 4 eps of the dtype for what is stored and 12 eps of the arithmetic (float32, or
                float64) for the sums; in float32 1.9e-6, or 1.2e-2 where torch's switch lets GPU products be TF32. 0: borders agree
                bitwise, and the result is that of the plain recurrence on the same backend
    chunk       steps; None: chosen by what a pass costs on the device, and the plain recurrence where no choice is worth it. A given chunk
                is run as told, up to `max_passes` or until the passes are as deep as the plain recurrence
    warmup      steps that a chunk runs before its first, from a zero state; None: found by a trial, or 32, or what a clamped forget gate
                needs to forget down to a tenth of `tol`
    max_passes  of each chunk
    correct     what a change of a chunk's start is taken to do to its end: "none" nothing; "decay" the product of the forget gates on
                each unit; "probes" what moving each slow unit by itself was seen to do (more chunks, worth it on GPUs only); "auto" decay,
                then probes where decay stalls and they may pay. It decides on the number of passes, not on what is accepted. RNNs have no
                forget gate: there it is "none"
    tol_on      "state"; or "output", a weaker promise: h jumps by at most `tol` at each border, c may jump by more where the chunk behind
                the border ran again from a corrected start and none of its outputs moved by more than `tol` (relative to max(1, |h|)).
                What the jump does in later chunks than the next is not seen. The backward pass is held to the state always"""

    tol: float | None = None
    chunk: int | None = None
    warmup: int | None = None
    max_passes: int = 16
    correct: str = "auto"
    tol_on: str = "state"

    def __post_init__(self) -> None:
        if self.tol is not None:
            tol = to_float("Verified: tol", self.tol, "a number or None")
            if not 0 <= tol < float("inf"):
                raise ValueError(f"Verified: tol must be finite and at least 0, got {self.tol!r}")
            object.__setattr__(self, "tol", tol)
        if self.chunk is not None:
            _take_int(self, "chunk", 1)
        if self.warmup is not None:
            _take_int(self, "warmup", 0)
        _take_int(self, "max_passes", 1)
        for name, allowed in (("correct", ("auto", *CORRECTIONS)), ("tol_on", ("state", "output"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Verified: {name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")

    def __repr__(self) -> str:
        """What differs from `Verified()`."""
        given = (f"{f.name}={value!r}" for f in fields(self) if (value := getattr(self, f.name)) != f.default)
        return f"Verified({', '.join(given)})"

    def numbers(self, x: torch.Tensor) -> Numbers:
        return {
            "stride": AUTO if self.chunk is None else min(self.chunk, _LONGEST),
            "warmup": AUTO if self.warmup is None else min(self.warmup, _LONGEST),
            "tol": step_rounding(x) if self.tol is None else self.tol,
            "max_passes": min(self.max_passes, _LONGEST),
            "correct": self.correct,
            "on_output": self.tol_on == "output",
        }


@dataclass(frozen=True)
class Scanned(Plan):
    """A cascade run over all times at once: k products and k linear scans, equal to `Recurrent()` to rounding, forward and backward.

    The units of a cascade stand in k groups, and W_hh of every gate is strictly block lower triangular: a unit reads inputs, units of
    earlier groups, and itself only through the gate that forgets. Group after group, all earlier groups' h are known for all times, so

        z[t] = x_t W_ih^T + h[t-1] W_hh^T  for all t, one product;      c[t] = f[t] c[t-1] + i[t] g[t]  for all t, a linear scan

    (LSTM; an RNN has no scan, its memory is k steps long). The groups are found in W_hh: as few as its zeros allow. Backward is the
    transposed cascade, groups in reverse. Cost: the arithmetic of `Recurrent()` without the zeros of W_hh, k dependent products instead
    of T steps. A NaN or an infinity reaches what depends on it, where the plain recurrence also multiplies it by zeros.

    Running it raises `ValueError` for weights that are no cascade, naming an entry by which a unit reads itself or a later unit, and for
    `proj_size`. On GPUs the groups of a weight are looked up once and again after each change that torch counts (not one through
    `.data`). Source: Martin & Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", ICLR 2018, arXiv 1709.04057."""

    def numbers(self, x: torch.Tensor) -> Numbers:
        return {"stride": SCANNED}


@dataclass(frozen=True, repr=False)
class PerLayer(Plan):
    """A plan for each layer and direction of a module; made of a list or dict by whatever takes a plan."""

    plans: tuple[Plan, ...]  # in torch's order of weights
    ways: int  # directions

    def at(self, layer: int, direction: int) -> Plan:
        return self.plans[layer * self.ways + direction]

    def __repr__(self) -> str:
        layers = [self.plans[i : i + self.ways] for i in range(0, len(self.plans), self.ways)]
        if all(len(set(layer)) == 1 for layer in layers):
            return f"[{', '.join(repr(layer[0]) for layer in layers)}]"
        places = ((layer, way) for layer in range(len(layers)) for way in range(self.ways))
        return f"{{{', '.join(f'{place}: {self.at(*place)!r}' for place in places)}}}"


def step_rounding(x: torch.Tensor) -> float:
    """About what rounding does to one step on tensors like x, relative to max(1, |state|): 4 eps of what is stored, 12 eps of what is
    multiplied. Less, and two sound runs of a slowly forgetting model, whose rounding errors live on for a while, would not agree."""
    single = x.dtype == torch.float32
    products = products_eps(x.is_cuda) if single else torch.finfo(arithmetic(x.dtype)).eps
    return 4 * torch.finfo(x.dtype).eps + 12 * products


PlanLike = Plan | Sequence[Plan] | Mapping[int | tuple[int, int], Plan]


def check_plan(plan: object) -> Plan:
    """The plan itself; `TypeError` for anything else."""
    if not isinstance(plan, Plan):
        hint = " (an instance is needed: Recurrent())" if isinstance(plan, type) and issubclass(plan, Plan) else ""
        hint = " (only modules take one plan per layer)" if isinstance(plan, (list, tuple, Mapping)) else hint
        raise TypeError(
            f"plan must be Recurrent(), Windowed(k), Chunked(chunk, warmup), Verified(...) or Scanned(); got {plan!r}{hint}"
        )
    if isinstance(plan, PerLayer):
        raise TypeError(f"plan must be one plan, not one per layer; got {plan!r}")
    return plan


def written(plan: Plan) -> str:
    """`Chunked(256, 32)`, `Verified()`: what a user would write."""
    assert is_dataclass(plan)
    given = [(f, getattr(plan, f.name)) for f in fields(plan)]
    changed = [n for n, (f, value) in enumerate(given) if value != f.default]
    text = [f"{value}" if n == at else f"{f.name}={value}" for at, n in enumerate(changed) for f, value in [given[n]]]
    return f"{type(plan).__name__}({', '.join(text)})"


def plan_of(plan: object, layers: int, ways: int) -> Plan:
    """The plan of a module with so many layers and directions: one for all, a list with one per layer, or a dict by layer, or (layer,
    direction), which leaves all others to `Recurrent()`. Raises `TypeError` or `ValueError` for what is none, or does not fit."""
    if isinstance(plan, PerLayer):
        if (len(plan.plans), plan.ways) != (layers * ways, ways):
            raise ValueError(f"plan {plan!r} is one of another module; this one has {_size(layers, ways)}")
        return plan
    if isinstance(plan, Mapping):
        found: list[Plan] = [Recurrent()] * (layers * ways)
        keys = [(key if isinstance(key, tuple) else (key,), key) for key in plan]
        for place, key in sorted(keys, key=lambda pair: len(pair[0])):  # a direction's own plan comes after its layer's
            fits = len(place) in (1, 2) and all(
                isinstance(n, int) and not isinstance(n, bool) and 0 <= n < most
                for n, most in zip(place, (layers, ways))
            )
            if not fits:
                raise ValueError(
                    f"plan: the keys of a dict are layers, 0 to {layers - 1}, or (layer, direction), directions 0 to {ways - 1}; "
                    f"got {key!r}"
                )
            ids = range(place[0] * ways, (place[0] + 1) * ways) if len(place) == 1 else [place[0] * ways + place[1]]
            for index in ids:
                found[index] = check_plan(plan[key])
    elif isinstance(plan, (list, tuple)):
        if len(plan) != layers:
            raise ValueError(
                f"plan: a list holds one plan per layer; got {len(plan)}, and the module has {_size(layers, ways)}"
            )
        found = [check_plan(one) for one in plan for _ in range(ways)]
    else:
        return check_plan(plan)
    return found[0] if len(set(found)) == 1 else PerLayer(tuple(found), ways)


def _size(layers: int, ways: int) -> str:
    return f"{layers} layer{'s' * (layers > 1)}{' of two directions' * (ways > 1)}"


@contextmanager
def use_plan(model: _M, plan: PlanLike) -> Iterator[_M]:
    """Run every stable recurrent module in `model` under `plan` inside the `with` block; their own plans come back after it.

    A list holds one plan per layer, a dict plans by layer or (layer, direction); they have to fit every module found. The plan is the
    module's, for all threads. Raises `TypeError` for something that is no plan or model, `ValueError` for a model without any such module,
    or plans that do not fit."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"use_plan: model must be an nn.Module, got {type(model).__name__}")
    found = [m for m in model.modules() if _has_plan(m)]
    plans = [plan_of(plan, m.num_layers, 1 + m.bidirectional) for m in found]
    if not found:
        raise ValueError(f"use_plan: {type(model).__name__} holds no StableRNN, StableGRU or StableLSTM")
    before = [m.plan for m in found]
    try:
        for m, one in zip(found, plans):
            m.plan = one
        yield model
    finally:
        for m, old in zip(found, before, strict=True):
            if _has_plan(m):  # still: `unstabilize` may have been called inside
                m.plan = old


class _Planned(Protocol):
    plan: Plan
    num_layers: int
    bidirectional: bool


def _has_plan(m: object) -> TypeGuard[_Planned]:
    return isinstance(getattr(m, "plan", None), Plan)


def _take_int(plan: Plan, name: str, least: int) -> None:
    object.__setattr__(plan, name, to_int(f"{type(plan).__name__}: {name}", getattr(plan, name), least))
