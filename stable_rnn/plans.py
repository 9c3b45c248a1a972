"""Plans: how a module runs its recurrence over time. A plan acts on each layer and direction by itself.

| plan                   | sequential steps   | each output of a layer has seen         |
|------------------------|--------------------|-----------------------------------------|
| `Recurrent()`          | T                  | everything                              |
| `Windowed(k)`          | k                  | exactly its last k inputs               |
| `Chunked(chunk, w)`    | chunk + w          | its last w + 1 .. w + chunk inputs      |
| `Verified(...)`        | chunk + w + reruns | everything, to `tol`, checked each time |
| `Scanned()`            | k scans            | everything; weights that are a cascade  |

Runs that reach back to the start of a sequence begin there from the caller's `h0` (`c0`), exactly. Source: Miller & Hardt, "Stable
Recurrent Models", ICLR 2019, arXiv 1805.10369 (truncated models are `Windowed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypedDict, TypeGuard, TypeVar

import torch
from torch import nn

from ._numbers import to_float, to_int
from .ops.recurrence.problem import AUTO, SCANNED, WHOLE
from .ops.recurrence.reference import arithmetic
from .precision import products_eps

_M = TypeVar("_M", bound=nn.Module)
_LONGEST = 2**62  # sequences are shorter, and the ops take 64-bit integers


class Numbers(TypedDict, total=False):
    """The fields of a `Problem` that a plan may set."""

    stride: int
    warmup: int
    tol: float
    max_passes: int


class Plan:
    """Base of the plans."""

    def numbers(self, x: torch.Tensor) -> Numbers:
        """The fields of a `Problem` that the plan sets for tensors like x."""
        raise NotImplementedError


@dataclass(frozen=True)
class Recurrent(Plan):
    """The plain recurrence over all T steps, with exact back-propagation through time."""

    def numbers(self, x: torch.Tensor) -> Numbers:
        return {"stride": WHOLE}


@dataclass(frozen=True)
class Windowed(Plan):
    """Every output is computed from its last `k` inputs alone, all windows at once: k dependent steps and k times the arithmetic.

    The gradient is the true gradient of the windowed function. Raises `ValueError` unless k >= 1, `TypeError` unless it is an int."""

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
    shrinks like w λ^w (Lemma 2 of the paper), instead of stopping gradients at chunk borders. chunk >= 1, warmup >= 0;
    `Chunked(1, w)` is `Windowed(w + 1)`."""

    chunk: int
    warmup: int

    def __post_init__(self) -> None:
        _take_int(self, "chunk", 1)
        _take_int(self, "warmup", 0)

    def numbers(self, x: torch.Tensor) -> Numbers:
        return {"stride": min(self.chunk, _LONGEST), "warmup": min(self.warmup, _LONGEST)}


@dataclass(frozen=True)
class Verified(Plan):
    """Chunks whose borders are checked, and run again from their predecessor's state where they differ by more than `tol`.

    The result is a trajectory of the recurrence whose only defects are jumps of at most `tol` (relative to max(1, |state|)) at chunk
    borders, for any weights. `tol=None`: about the rounding error of one step, 4 eps of the dtype for what is stored and 12 eps of the
    arithmetic (float32, or float64) for the sums; in float32 1.9e-6, or 1.2e-2 where torch's switch lets GPU products be TF32.
    `tol=0`: borders agree bitwise, and the result is that of the plain recurrence on the same backend. Where checking does not pay
    (after `max_passes`, or when reruns stop shrinking) it runs `Recurrent` and says so in `module.last_report`. The backward pass
    checks the adjoint likewise, relative to its largest value.
    `chunk` and `warmup` are chosen when not given: 32 steps, or what a clamped forget gate needs to forget down to `tol`."""

    tol: float | None = None
    chunk: int | None = None
    warmup: int | None = None
    max_passes: int = 8

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

    def numbers(self, x: torch.Tensor) -> Numbers:
        return {
            "stride": AUTO if self.chunk is None else min(self.chunk, _LONGEST),
            "warmup": AUTO if self.warmup is None else min(self.warmup, _LONGEST),
            "tol": step_rounding(x) if self.tol is None else self.tol,
            "max_passes": min(self.max_passes, _LONGEST),
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


def step_rounding(x: torch.Tensor) -> float:
    """About what rounding does to one step on tensors like x, relative to max(1, |state|): 4 eps of what is stored, 12 eps of what is
    multiplied. Less, and two sound runs of a slowly forgetting model, whose rounding errors live on for a while, would not agree."""
    products = products_eps() if x.is_cuda and x.dtype == torch.float32 else torch.finfo(arithmetic(x.dtype)).eps
    return 4 * torch.finfo(x.dtype).eps + 12 * products


def _no_bound(jump: float) -> None:
    return None


@dataclass(frozen=True)
class Report:
    """What a `Verified` run did, over all layers and directions of a module."""

    passes: int  # most passes of any layer; 1: the first run was good
    lanes_rerun: int
    largest_jump: float  # relative to max(1, |state|), in the backward pass to the largest adjoint; 0 after a fallback
    fallback: bool  # some layer ran the plain recurrence
    backward: Report | None = None  # of the backward pass, once it ran
    bound: Callable[[float], float | None] = field(default=_no_bound, repr=False, compare=False)

    @property
    def forward_bound(self) -> float | None:
        """Bound on the largest output error in exact arithmetic, for inputs within the certificate's bound; None without a certificate.

        Computed when asked for, from the module's weights as they are then."""
        return self.bound(self.largest_jump)

    @classmethod
    def of(
        cls,
        layers: list[torch.Tensor],
        backward: Report | None = None,
        bound: Callable[[float], float | None] = _no_bound,
    ) -> Report:
        """From the (4,) reports of the layers' runs."""
        passes, rerun, jump, fallback = torch.stack(layers).unbind(1)
        return cls(int(passes.max()), int(rerun.sum()), float(jump.max()), bool(fallback.any()), backward, bound)


def check_plan(plan: object) -> Plan:
    """The plan itself; `TypeError` for anything else."""
    if not isinstance(plan, Plan):
        hint = " (an instance is needed: Recurrent())" if isinstance(plan, type) and issubclass(plan, Plan) else ""
        raise TypeError(
            f"plan must be Recurrent(), Windowed(k), Chunked(chunk, warmup), Verified(...) or Scanned(); got {plan!r}{hint}"
        )
    return plan


@contextmanager
def use_plan(model: _M, plan: Plan) -> Iterator[_M]:
    """Run every stable recurrent module in `model` under `plan` inside the `with` block; their own plans come back after it.

    The plan is the module's, for all threads. Raises `TypeError` for something that is no plan or model, `ValueError` for a model without
    any such module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"use_plan: model must be an nn.Module, got {type(model).__name__}")
    check_plan(plan)
    found = [m for m in model.modules() if _has_plan(m)]
    if not found:
        raise ValueError(f"use_plan: {type(model).__name__} holds no StableRNN, StableGRU or StableLSTM")
    before = [m.plan for m in found]
    try:
        for m in found:
            m.plan = plan
        yield model
    finally:
        for m, old in zip(found, before, strict=True):
            if _has_plan(m):  # still: `unstabilize` may have been called inside
                m.plan = old


class _Planned(Protocol):
    plan: Plan


def _has_plan(m: object) -> TypeGuard[_Planned]:
    return isinstance(getattr(m, "plan", None), Plan)


def _take_int(plan: Plan, name: str, least: int) -> None:
    object.__setattr__(plan, name, to_int(f"{type(plan).__name__}: {name}", getattr(plan, name), least))
