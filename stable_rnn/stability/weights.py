"""The weights of a recurrent module, cell or state dict, as float64 matrices on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps

import torch
from torch import Tensor, nn

KINDS = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")
CELLS = {"LSTM": "lstm", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}


def on_cpu(function: Callable) -> Callable:
    """New tensors of the function are made on the CPU, whatever torch's default device is, and autocast is off."""

    @wraps(function)
    def run(*args, **kwargs):
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
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

    w_ih (G*H, I), w_hh (G*H, P), bias (G*H,), w_hr (P, H) or None; G = 4 (i, f, g, o) for "lstm", 1 for "rnn_tanh", "rnn_relu".
    """

    cell: str
    tag: str
    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor
    w_hr: Tensor | None

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
        return self.w_hh.shape[0] // (4 if self.cell == "lstm" else 1)


def cell_of(module: nn.Module) -> str:
    """"lstm", "rnn_tanh" or "rnn_relu"; TypeError for what has no certificate."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        if isinstance(module, nn.LSTMCell):
            return "lstm"
        if isinstance(module, nn.RNNCell):
            return "rnn_" + module.nonlinearity
        if getattr(module, "mode", None) in CELLS:
            return CELLS[module.mode]
    raise TypeError(f"a certificate needs an RNN or LSTM (module or cell), got {type(module).__name__}")


def layer_names(module: nn.Module) -> list[list[Names]]:
    """For each layer, its one or two directions."""
    if isinstance(module, nn.RNNCellBase):
        return [[Names("")]]
    ways = ("", "_reverse") if module.bidirectional else ("",)
    return [[Names(f"l{level}{way}") for way in ways] for level in range(module.num_layers)]


def read_module(module: nn.Module) -> list[list[LayerWeights]]:
    """All layers and directions of a module. ValueError names a weight with NaN or infinite entries or on the meta device."""
    cell = cell_of(module)
    return [[read(lambda name: getattr(module, name, None), names, cell) for names in level] for level in layer_names(module)]


def check_values(name: str, w: Tensor) -> None:
    if w.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no values; give it some first, module.to_empty(device=...) and weights")


def check_finite(name: str, w: Tensor) -> None:
    if not torch.isfinite(w).all():
        raise ValueError(f"{name} holds NaN or infinite values")


def read(get, names: Names, cell: str) -> LayerWeights:
    """One layer and direction, from `get(name)`, which answers None for a tensor that there isn't."""

    def matrix(kind: str) -> Tensor | None:
        found = get(names[kind])
        if found is None:
            return None
        check_values(names[kind], found)
        found = found.detach().to("cpu", torch.float64)
        check_finite(names[kind], found)
        return found

    w_ih, w_hh = matrix("weight_ih"), matrix("weight_hh")
    biases = [b for b in (matrix("bias_ih"), matrix("bias_hh")) if b is not None]
    bias = sum(biases, torch.zeros(w_hh.shape[0], dtype=torch.float64))
    return LayerWeights(cell, names.tag, w_ih, w_hh, bias, matrix("weight_hr"))


def read_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, list[list[LayerWeights]]], list[str]]:
    """Every stack of recurrent layers by its prefix, and the prefixes of those that are GRUs.

    The cell is told by the number of gates; a single gate is taken for tanh."""
    tags: dict[str, set[str]] = {}
    for key in state_dict:
        prefix, _, name = key.rpartition(".")
        if name.startswith("weight_hh"):
            tags.setdefault(prefix, set()).add(name.removeprefix("weight_hh").removeprefix("_"))
    stacks, gru = {}, []
    for prefix, found in tags.items():
        start = prefix + "." if prefix else ""
        cells = {_cell_of_shapes(state_dict, start, tag) for tag in found}
        if cells == {"gru"}:
            gru.append(prefix)
        elif len(cells) == 1 and None not in cells:
            get = lambda name, start=start: state_dict.get(start + name)  # noqa: E731
            levels: dict[int, list[LayerWeights]] = {}
            for tag in sorted(found, key=lambda t: (_level(t), t)):
                levels.setdefault(_level(tag), []).append(read(get, Names(tag), cells.copy().pop()))
            if _chained(levels):
                stacks[prefix] = [levels[level] for level in sorted(levels)]
    return stacks, gru


def _level(tag: str) -> int:
    digits = tag.removeprefix("l").removesuffix("_reverse")
    return int(digits) if digits.isdigit() else 0


def _cell_of_shapes(state_dict: Mapping[str, Tensor], start: str, tag: str) -> str | None:
    """The cell whose shapes these are, or None if they are no recurrent layer's."""
    names = Names(tag)
    w_ih, w_hh, w_hr = (state_dict.get(start + names[kind]) for kind in ("weight_ih", "weight_hh", "weight_hr"))
    if not isinstance(w_ih, Tensor) or not isinstance(w_hh, Tensor) or w_ih.dim() != 2 or w_hh.dim() != 2:
        return None
    hidden = w_hh.shape[1] if w_hr is None else w_hr.shape[1]
    gates, rest = divmod(w_hh.shape[0], hidden) if hidden else (0, 1)
    return None if rest or w_ih.shape[0] != w_hh.shape[0] else {1: "rnn_tanh", 3: "gru", 4: "lstm"}.get(gates)


def _chained(levels: dict[int, list[LayerWeights]]) -> bool:
    """Whether the layers are numbered from 0 and each takes what the one below gives."""
    if sorted(levels) != list(range(len(levels))):
        return False
    widths = [sum(w.w_hh.shape[1] for w in levels[level]) for level in sorted(levels)]
    return all(w.w_ih.shape[1] == width for level, width in enumerate(widths[:-1], 1) for w in levels[level])
