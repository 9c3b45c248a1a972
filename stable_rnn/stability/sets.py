"""Stable sets of weights: what a `stability=` argument may be.

A set knows what the cell clamps (`cap`), how to move weights into it (`project_`), and what it certifies (`rate`). To try another set,
subclass `Stability`; modules ask for nothing else.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch import Tensor, nn

from .._numbers import to_float, to_int
from ..cells import CELLS
from .cascade import borders, cascade_names, default_forget, into_cascade_, readable_trains
from .cells import STABILITY
from .limits import Limits
from .projection import check_clamp, project_, projected_names
from .weights import recurrent

NORMS = ("2", "inf", "auto", "radius")


class Stability:
    """Base of the stable sets.

    rate    what a module in the set is certified for, or None if the set promises nothing
    target  a rate and a share of the forget gate (`gate_scales`) that a certificate should try, or None
    """

    rate: float | None = None
    target: tuple[float, float] | None = None
    projects: bool = True  # it has a form for layers with W_hr, torch's proj_size
    lasts: bool = False  # training by gradients does not lead out

    @property
    def cap(self) -> float:
        """The cell's forget gate is min(sigmoid(.), cap); 1.0 means no clamp."""
        return 1.0

    def cap_of(self, cell: str) -> float:
        """The same for one cell, a name in `stable_rnn.cells` that has a forget gate."""
        return self.cap

    def input_limit(self, cell: str) -> float:
        """The bound of |x_t| that a certificate of such a module assumes when it is told nothing."""
        return 1.0

    def check(self, cell: str) -> None:
        """ValueError if the set makes no sense for the cell, a name in `stable_rnn.cells`."""

    def project_(self, module: nn.Module, certify: bool = True) -> None:
        """Move the module's weights into the set, in place. certify=False: a cheap step for training loops, which may stop short."""

    def trained(self, w_hh: Tensor, hidden: int) -> Tensor:
        """W_hh (G*H, P), H = hidden, as the module's forward pass takes it: the same values, with gradients for what may move."""
        return w_hh

    def projected_names(self, module: nn.Module) -> list[str]:
        """The names of the module's tensors that `project_` may write: by default any of its own parameters."""
        return [name for name, _ in module.named_parameters(recurse=False)]


def check_stability(stability: Stability | None, mode: str, proj_size: int = 0) -> Stability | None:
    """Returns a `stability=` argument that fits torch's `mode` ("LSTM", "GRU", "RNN_TANH", "RNN_RELU") and `proj_size`; TypeError or
    ValueError otherwise."""
    if stability is None:
        return None
    if not isinstance(stability, Stability):
        raise TypeError(f"stability must be None, ForgetCap(f), Cascade(...) or Certified(...), got {stability!r}")
    stability.check(mode.lower())
    if proj_size and not stability.projects:
        raise ValueError(
            f"{stability} has no form for proj_size={proj_size}, whose W_hr mixes the units; use Certified(...)"
        )
    return stability


@dataclass(frozen=True)
class ForgetCap(Stability):
    """Only the clamp of the cell's forget gate, min(sigmoid(.), forget), 0 < forget < 1: an LSTM's f, a GRU's z. No weight is moved and no
    rate is promised; in practice such a cell forgets, and the plan `Verified` checks every run."""

    forget: float

    def __post_init__(self) -> None:
        forget = to_float("ForgetCap: forget", self.forget)
        if not 0 < forget < 1:
            raise ValueError(f"ForgetCap: forget must lie between 0 and 1, got {forget}")
        object.__setattr__(self, "forget", forget)

    @property
    def cap(self) -> float:
        return self.forget

    def check(self, cell: str) -> None:
        if CELLS[cell].forgets is None:
            raise ValueError(
                f"ForgetCap is for the LSTM and the GRU; {cell} has no forget gate to clamp (stability={self})"
            )


@dataclass(frozen=True, repr=False)
class Cascade(Stability):
    """The units of each layer in groups: a unit reads the inputs, the units of groups before its own, and itself only through its forget
    gate, which is clamped. Such a layer forgets whatever the size of its weights is; an RNN's remembers `groups` steps and no more.

    groups  how many, of sizes as `torch.tensor_split` makes them; one unit each where a layer has fewer units
    forget  0 < forget < 1, what the forget gate is clamped at. Default 0.8; an RNN has none

    In training the entries of W_hh outside get no gradient, so that they stay 0 and count for no gradient norm; `project_` sets them to 0,
    exactly and in any dtype, and nothing else. No form for proj_size. What is certified of such a layer is how soon it forgets; how far it
    may amplify small errors before, rounding for instance, is bounded poorly. Formulas: stability/README.md."""

    groups: int = 8
    forget: float | None = None

    projects = False
    lasts = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", to_int("Cascade: groups", self.groups, 1))
        if self.forget is not None:
            forget = to_float("Cascade: forget", self.forget)
            if not 0 < forget < 1:
                raise ValueError(f"Cascade: forget must lie between 0 and 1, got {forget}")
            object.__setattr__(self, "forget", forget)

    @property
    def rate(self) -> float:  # type: ignore[override]
        """What is certified at least: a tenth of the way from the largest clamp to 1."""
        return self.cap + 0.1 * (1 - self.cap)

    @property
    def cap(self) -> float:
        return max(self.cap_of(name) for name, cell in CELLS.items() if cell.forgets is not None)

    def cap_of(self, cell: str) -> float:
        return default_forget(cell) if self.forget is None else self.forget

    def input_limit(self, cell: str) -> float:
        return 1.0 if CELLS[cell].forgets is None else math.inf

    def borders(self, hidden: int) -> list[int]:
        """Where the groups of a layer of `hidden` units begin, and `hidden`."""
        return borders(hidden, self.groups)

    def trained(self, w_hh: Tensor, hidden: int) -> Tensor:
        return readable_trains(w_hh, hidden, self.groups)

    def project_(self, module: nn.Module, certify: bool = True) -> None:
        """The set is reached in one step, whatever `certify` says; without, a GPU's weights are looked at late, as by `Certified`."""
        names, cell = cascade_names(module), recurrent(module)[1]
        check_clamp(module, cell, self.cap_of(cell), self)
        into_cascade_(module, names, self.groups, certify)

    def projected_names(self, module: nn.Module) -> list[str]:
        return cascade_names(module)

    def __repr__(self) -> str:
        return f"Cascade(groups={self.groups}{'' if self.forget is None else f', forget={self.forget}'})"


@dataclass(frozen=True, init=False, repr=False)
class Certified(Limits, Stability):  # type: ignore[misc]  # `target` is read-only, as all of a frozen set is
    """Weights for which `certificate(module).rate <= rate` is proven.

    rate         0 < rate < 1, of every layer and direction
    norm         the norm in which weights from outside are brought in: "2" (singular values), "inf" (absolute row sums), "auto" (layers
                 that are certified in either norm stay as they are, others as for "2"), or "radius" (an RNN's numerical radius: more
                 room than "2" at some ten products of H x H matrices a step; the LSTM as for "2")
    forget       LSTM: bound of the forget gate. Default 0.55, with clamp=True 0.6, or less where the rate is less
    input_bound  bound of |x_t| for which the LSTM's weights keep the forget gate below `forget`; then 1/2 < forget < rate
    clamp        True: the LSTM cell clamps its forget gate at `forget` instead, 0 < forget < rate; holds for inputs of any size

    The RNN's rate needs no bound of the inputs, and `forget` and `clamp` don't matter to it; its truncation error and window do assume
    input_bound, whatever `clamp` is. Only the LSTM's hold for inputs of any size with clamp=True. The old spelling `cap=` warns. Formulas:
    stability/README.md, after Miller & Hardt, "Stable Recurrent Models", ICLR 2019, arXiv 1805.10369.
    """

    def __init__(
        self,
        rate: float = 0.99,
        norm: str = "2",
        forget: float | None = None,
        input_bound: float = 1.0,
        clamp: bool = False,
        *,
        cap: bool | None = None,
    ) -> None:
        if cap is not None:
            warnings.warn("Certified: cap= is now called clamp=", DeprecationWarning, stacklevel=2)
            clamp = cap
        rate, input_bound = to_float("Certified: rate", rate), to_float("Certified: input_bound", input_bound)
        if not 0 < rate < 1:
            raise ValueError(f"Certified: rate must lie between 0 and 1, got {rate}")
        if norm not in NORMS:
            raise ValueError(f"Certified: norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if not 0 <= input_bound < math.inf:
            raise ValueError(f"Certified: input_bound must be finite and 0 or more, got {input_bound}")
        if not isinstance(clamp, bool):
            raise TypeError(f"Certified: clamp must be True or False, got {clamp!r}; the clamp's height is forget=")
        least = 0.0 if clamp else 0.5
        chosen = (
            min(0.6, 0.7 * rate) if clamp else min(0.55, (0.5 + rate) / 2)
        )  # where no forget gate fits, `check` tells an LSTM so
        forget = chosen if forget is None else to_float("Certified: forget", forget)
        if forget != chosen and not least < forget < rate:
            raise ValueError(
                f"Certified: forget must lie between {least:g} and the rate {rate}{'' if clamp else ' (or pass clamp=True)'}, "
                f"got {forget}"
            )
        for name, value in zip(
            ("rate", "norm", "forget", "input_bound", "clamp"), (rate, norm, forget, input_bound, clamp)
        ):
            object.__setattr__(self, name, value)

    def __setstate__(self, state: dict) -> None:
        """Pickles may be from when `clamp` was called `clamped`."""
        vars(self).update({"clamp" if name == "clamped" else name: value for name, value in state.items()})

    def check(self, cell: str) -> None:
        STABILITY[cell].check(self)

    def project_(self, module: nn.Module, certify: bool = True) -> None:
        project_(module, self, certify)

    def projected_names(self, module: nn.Module) -> list[str]:
        return projected_names(module, self)

    def __repr__(self) -> str:
        return (
            f"Certified(rate={self.rate}, norm={self.norm!r}, forget={self.forget}, input_bound={self.input_bound}, "
            f"clamp={self.clamp})"
        )
