"""The weights of a recurrent module, cell or state dict, as float64 matrices on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .._errors import printable
from ..cells import CELLS, MODES
from .sharded import GATHER, whole

# prefix, layer and direction; what follows (_g, .original0, ...) belongs to weights that are computed
HIDDEN_WEIGHT = re.compile(
    r"(?:(.*?)\.)?(?:parametrizations\.)?weight_hh(?:_(l\d+(?:_reverse)?))?(?:[._].*)?", re.DOTALL
)
KINDS = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")
LARGE = 2**24  # values; an expanded tensor may look larger than any memory

CLAMP = (
    "forget_clamp"  # in the metadata of a state dict: weights trained under a clamp mean another function without it
)

P = ParamSpec("P")
R = TypeVar("R")


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """New tensors of the function are made on the CPU, whatever torch's default device is, and autocast is off."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


@dataclass(frozen=True)
class Names:
    """What one layer and direction calls its tensors. `tag` is "l0", "l0_reverse", ..., or "" in a cell."""

    tag: str

    def __getitem__(self, kind: str) -> str:
        return f"{kind}_{self.tag}" if self.tag else kind


@dataclass(frozen=True)
class LayerWeights:
    """One layer and direction in float64: what `W_ih x + W_hh h + b` and W_hr are in exact arithmetic, but for the one rounding of b.

    cell is a name in `stable_rnn.cells`, with G gates. w_ih (G*H, I), w_hh (G*H, P), bias_ih and bias_hh (G*H,), w_hr (P, H) or None.
    """

    cell: str
    tag: str
    w_ih: Tensor
    w_hh: Tensor
    bias_ih: Tensor
    w_hr: Tensor | None
    bias_hh: Tensor | None = None  # None: 0

    @cached_property
    def bias(self) -> Tensor:
        return self.bias_ih if self.bias_hh is None else self.bias_ih + self.bias_hh

    @cached_property
    def abs_ih(self) -> Tensor:
        return self.w_ih.abs()

    @cached_property
    def abs_hh(self) -> Tensor:
        return self.w_hh.abs()

    @cached_property
    def abs_hr(self) -> Tensor | None:
        return None if self.w_hr is None else self.w_hr.abs()

    @property
    def hidden(self) -> int:
        return self.w_hh.shape[0] // CELLS[self.cell].gates


def recurrent(module: nn.Module) -> tuple[nn.RNNBase | nn.RNNCellBase, str]:
    """The module, and its cell's name in `stable_rnn.cells`. TypeError for what has no certificate."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        cell = MODES.get(mode_of(module))
        if cell is not None:
            return module, cell.name
    raise TypeError(f"a certificate needs an RNN, LSTM or GRU (module or cell), got {type(module).__name__}")


def mode_of(module: nn.Module) -> str:
    """As `nn.RNNBase.mode`, which torch's cells don't have."""
    if isinstance(module, nn.RNNCell):
        return f"RNN_{module.nonlinearity}".upper()
    for kind, mode in ((nn.LSTMCell, "LSTM"), (nn.GRUCell, "GRU")):
        if isinstance(module, kind):
            return mode
    return getattr(module, "mode", "")


def layer_names(module: nn.RNNBase | nn.RNNCellBase) -> list[list[Names]]:
    """For each layer, its one or two directions."""
    if isinstance(module, nn.RNNCellBase):
        return [[Names("")]]
    ways = ("", "_reverse") if module.bidirectional else ("",)
    return [[Names(f"l{level}{way}") for way in ways] for level in range(module.num_layers)]


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """All weights and biases of a module as it holds them. ValueError for one of another shape than the module's sizes ask for."""
    module, cell = recurrent(module)
    hidden, inputs = module.hidden_size, module.input_size
    rows, out, found = CELLS[cell].gates * hidden, getattr(module, "proj_size", 0) or hidden, {}
    for level in layer_names(module):
        shapes = dict(zip(KINDS, ((rows, inputs), (rows, out), (out, hidden), (rows,), (rows,))))
        for names in level:
            for kind, shape in shapes.items():
                w = getattr(module, names[kind], None)
                if w is None:
                    continue
                if w.shape != shape:
                    text = f"{names[kind]} of {type(module).__name__} has the shape {tuple(w.shape)}, where {shape} is needed"
                    raise ValueError(f"{text}. {GATHER}" if w.dim() == 1 and len(shape) == 2 or not w.numel() else text)
                found[names[kind]] = w
        inputs = len(level) * out
    return found


def read_module(module: nn.Module) -> list[list[LayerWeights]]:
    """All layers and directions of a module. ValueError names a weight with NaN or infinite entries or on the meta device."""
    module, cell = recurrent(module)
    weights = named_weights(module)
    return [[read(weights.get, names, cell) for names in level] for level in layer_names(module)]


def once(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(w): w for w in tensors}.values())


def check_values(name: str, w: Tensor) -> None:
    """Not their being finite; see `check_finite`."""
    if not w.is_floating_point():  # the proofs are about real numbers
        raise TypeError(f"{name} must have a real floating dtype, got {w.dtype}")
    if w.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got the layout {w.layout}; pass {name}.to_dense()")
    if w.is_meta:
        raise ValueError(
            f"{name} is on the meta device and holds no values; give it some first, module.to_empty(device=...) and weights"
        )


def check_finite(name: str, w: Tensor) -> None:
    if not torch.isfinite(w.sum()) and not torch.isfinite(w).all():  # a sum may overflow
        raise ValueError(f"{name} holds NaN or infinite values")


def read(get: Callable[[str], Tensor | None], names: Names, cell: str) -> LayerWeights:
    """One layer and direction, from `get(name)`, which answers None for a tensor that there isn't."""

    def matrix(kind: str) -> Tensor | None:
        found = get(names[kind])
        if found is None:
            return None
        check_values(names[kind], found)
        found = whole(found.detach()).to("cpu", torch.float64)
        check_finite(names[kind], found)
        return found

    w_ih, w_hh = matrix("weight_ih"), matrix("weight_hh")
    assert w_ih is not None and w_hh is not None
    bias_ih, bias_hh = matrix("bias_ih"), matrix("bias_hh")
    if bias_ih is None:
        bias_ih = torch.zeros(w_hh.shape[0], dtype=torch.float64)
    return LayerWeights(cell, names.tag, w_ih, w_hh, bias_ih, matrix("weight_hr"), bias_hh)


def saved_clamp(metadata: object, default: float) -> float:
    """What a module's metadata in a state dict says of its clamp, 1.0 for none; `default` where it says nothing. Files may hold anything
    there."""
    cap = metadata.get(CLAMP) if isinstance(metadata, Mapping) else None
    return cap if isinstance(cap, float) and 0 < cap <= 1 else default


def clamp_text(cap: float) -> str:
    return f"a forget gate clamped at {cap}" if cap < 1 else "no clamp of the forget gate"


def read_state_dict(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, list[list[LayerWeights]]], dict[str, Exception]]:
    """Every stack of recurrent layers by its prefix, and why others cannot be read, by theirs: LookupError for what has no certificate,
    ValueError or TypeError for weights that are no real numbers or don't fit each other, RuntimeError for what torch cannot convert.

    The cell is told by the number of gates; a single gate is taken for tanh."""
    tags: dict[str, set[str]] = {}
    for key in state_dict:
        named = HIDDEN_WEIGHT.fullmatch(key) if isinstance(key, str) else None
        if named:
            tags.setdefault(named[1] or "", set()).add(named[2] or "")
    stacks: dict[str, list[list[LayerWeights]]] = {}
    faults: dict[str, Exception] = {}
    for prefix, found in tags.items():
        start = prefix + "." if prefix else ""
        try:
            stacks[prefix] = _read_stack(state_dict, start, sorted(found, key=lambda t: (_level(t), t)))
        except LookupError as error:
            faults[prefix] = LookupError(f"{printable(prefix) or 'the model'} {error.args[0]}")
        except (TypeError, ValueError) as error:  # the message starts with the weight's name
            faults[prefix] = type(error)(f"{printable(start)}{error}")
        except RuntimeError as error:
            faults[prefix] = RuntimeError(
                f"{printable(prefix) or 'the model'} cannot be read: {str(error).partition(chr(10))[0]}"
            )
    return stacks, faults


def _read_stack(state_dict: Mapping[str, Tensor], start: str, tags: list[str]) -> list[list[LayerWeights]]:
    """LookupError with the reason if this is no stack that has a certificate."""
    cells = {_cell_of_shapes(state_dict, start, Names(tag)) for tag in tags}
    if len(cells) > 1:
        raise LookupError(f"has layers of several kinds ({', '.join(sorted(cells))})")
    levels: dict[int, list[LayerWeights]] = {}
    for tag in tags:
        levels.setdefault(_level(tag), []).append(
            read(lambda name: state_dict.get(start + name), Names(tag), min(cells))
        )
    if sorted(levels) != list(range(len(levels))):
        raise LookupError(f"has the layers {_listed(sorted(levels))} only")
    for level in range(1, len(levels)):
        width = sum(w.w_hh.shape[1] for w in levels[level - 1])
        for w in levels[level]:
            if w.w_ih.shape[1] != width:
                raise LookupError(
                    f"has a {Names(w.tag)['weight_ih']} for inputs of size {w.w_ih.shape[1]}, the layer below gives {width}"
                )
    return [levels[level] for level in range(len(levels))]


def _level(tag: str) -> int:
    digits = tag.removeprefix("l").removesuffix("_reverse")
    return int(digits[:9]) if digits else 0  # 10 digits are no layer that could follow others


def _listed(names: Sequence[object], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(map(printable, names[:most])) + (f" and {more} more" if more > 0 else "")


def _cell_of_shapes(state_dict: Mapping[str, Tensor], start: str, names: Names) -> str:
    """The cell whose shapes these are. LookupError with the reason for what has no certificate, ValueError for shapes that don't fit."""
    for kind in ("weight_ih", "weight_hh"):
        name = names[kind]
        if not isinstance(state_dict.get(start + name), Tensor):
            parts = re.compile(rf"{re.escape(start)}(parametrizations\.)?{name}(?!_reverse|_l\d)[._].*", re.DOTALL)
            akin = _listed([key for key in state_dict if isinstance(key, str) and parts.fullmatch(key)])
            raise LookupError(
                f"has no {name}" + (f", only {akin} (a computed weight, by weight norm for instance)" if akin else "")
            )
    found = {kind: state_dict[start + names[kind]] for kind in KINDS if state_dict.get(start + names[kind]) is not None}
    shapes = {kind: tuple(getattr(w, "shape", ())) for kind, w in found.items()}

    def check(kind: str, fits: bool, wanted: str) -> None:
        if not fits:
            hidden = f"{names['weight_hh']} {shapes['weight_hh']}"
            raise ValueError(f"{names[kind]} has the shape {shapes[kind]}, which doesn't fit {hidden}: {wanted}")

    for kind, w in found.items():
        if isinstance(w, Tensor) and w.layout == torch.strided and w.numel() > max(LARGE, w.untyped_storage().nbytes()):
            raise ValueError(
                f"{names[kind]} has the shape {shapes[kind]} but not that many values (an expanded tensor); pass a clone()"
            )
    for kind in ("weight_ih", "weight_hh", "weight_hr"):
        check(kind, len(shapes.get(kind, (0, 0))) == 2, "a matrix is needed")
    rows, out = shapes["weight_hh"]
    hidden = shapes["weight_hr"][1] if "weight_hr" in shapes else out
    gates, rest = divmod(rows, hidden) if hidden else (0, 1)
    of_gates = {cell.gates: cell.name for cell in reversed(CELLS.values())}  # tanh before relu
    if rest or gates not in of_gates:
        known = " or ".join(map(str, sorted(of_gates)))
        raise LookupError(
            f"has a {names['weight_hh']} of the shape {shapes['weight_hh']}, of no RNN, LSTM or GRU ({known} gates)"
        )
    check("weight_ih", shapes["weight_ih"][0] == rows, f"{rows} rows are needed")
    for kind in ("bias_ih", "bias_hh"):
        check(kind, shapes.get(kind, (rows,)) == (rows,), f"({rows},) is needed")
    if "weight_hr" in shapes:
        check("weight_hr", shapes["weight_hr"][0] == out, f"{out} rows are needed")
    return of_gates[gates]
