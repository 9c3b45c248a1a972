"""`certificate(module)`: rigorous bounds on how fast a recurrent module forgets, and the window that a tolerance needs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._numbers import to_float, to_int
from ..cells import CELLS
from ..layout import check_lengths
from .bounds import length
from .cells import STABILITY
from .comparison import Comparison
from .contraction import Contraction, Errors
from .layer import LayerCertificate, layer_certificate
from .rounding import local_error
from .weights import LayerWeights, clamp_text, on_cpu, read_module, read_state_dict, saved_clamp

MAX_WINDOW = 2**40
POOR = 1e5  # amplification of a cascade from which on its text says so: float32 keeps two digits then


@dataclass(frozen=True)
class Certificate:
    """What is proven of a stack of recurrent layers in eval mode from a zero initial state, for inputs as `inputs` says.

    stable  every layer and direction contracts: rate < 1
    rate    the largest of the layers' rates, and `norm` the kind of norm it holds in
    layers  a `LayerCertificate` for each layer and direction
    """

    stable: bool
    rate: float
    norm: str
    inputs: str
    levels: tuple[tuple[LayerCertificate, ...], ...] = field(repr=False)

    @property
    def layers(self) -> tuple[LayerCertificate, ...]:
        return tuple(layer for level in self.levels for layer in level)

    def truncation_error(self, k: int, dtype: torch.dtype | None = None) -> float:
        """Bound on the largest absolute error of the module's output when every layer runs `Windowed(k)` against `Recurrent()`; the
        same for `Chunked(chunk, k - 1)`. It never rises with k.

        Rigorous in exact arithmetic. With a `dtype` it adds what rounding may do to the two runs, by a model of rounding errors and
        not by proof (stability/README.md). Never more than the trivial bound (outputs of tanh and LSTM layers are bounded); infinite
        where nothing is known. Raises TypeError or ValueError unless k is an int >= 1 and dtype a floating dtype."""
        k = to_int("truncation_error: k", k, 1)
        error = self._through(lambda layer, c, eps: c.truncated(k, eps))
        return (
            error
            if dtype is None
            else min(error + self.rounding_error(dtype), self._through(lambda layer, c, eps: (math.inf, math.inf)))
        )

    def window(self, eps: float, dtype: torch.dtype | None = None) -> int:
        """The least k with `truncation_error(k, dtype) <= eps`. ValueError with the reason if there is none."""
        eps = to_float("window: eps", eps)
        if not eps > 0:
            raise ValueError(f"window: eps must be positive, got {eps}")
        if self.truncation_error(1, dtype) <= eps:
            return 1
        low, high = 1, 2
        while self.truncation_error(high, dtype) > eps:
            low, high = high, 2 * high
            if high > MAX_WINDOW:
                raise ValueError(f"window: no window brings the error under {eps}: {self._why_not(eps, dtype)}")
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.truncation_error(middle, dtype) <= eps else (middle, high)
        return high

    def rounding_error(self, dtype: torch.dtype) -> float:
        """By how much two runs in `dtype` may differ through rounding alone: a model, not a proof (stability/README.md)."""
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")
        worst = 0.0
        for level in self.levels:
            found = []
            for layer in level:
                dc, dh = local_error(layer, dtype)
                found.append(min(c.rounded(dc, dh, worst)[0] for c in layer.contractions))
            worst = max(found)
        return 2 * worst

    def jump_bound(self, jump: float, chunk: int) -> float:
        """Bound on the largest absolute output error of a run whose states jump at most once in `chunk` steps, by at most `jump` in
        every entry, relative to max(1, |state|): what the plan `Verified` leaves. Infinite if unstable."""

        def built_up(layer: LayerCertificate, c: Contraction | Comparison, eps: float) -> Errors:
            return c.jumped(jump * max(1.0, layer.cell_bound), jump * max(1.0, layer.bound), chunk, eps)

        return self._through(built_up) * (1 + 2.0**-40)

    def _through(self, bound: Callable[[LayerCertificate, Contraction | Comparison, float], Errors]) -> float:
        """The output error of the stack, from `bound(layer, contraction, input error)` in each layer and direction."""
        eps2 = eps = 0.0  # of the inputs of a level, in the 2-norm and as the largest entry
        for level in self.levels:
            squares, largest = 0.0, 0.0
            for layer in level:
                e, e2 = layer.apart * layer.bound, layer.apart * layer.bound2
                for c in layer.contractions:
                    of_inputs = eps2 if c.norm == "2" else eps
                    found, found2 = bound(layer, c, of_inputs)
                    e, e2 = min(e, found), min(e2, found2)
                e, largest = min(e, e2), max(largest, e, min(e, e2))
                squares += e2 * e2
            eps, eps2 = largest, math.sqrt(squares) * (1 + 2.0**-50)
        return eps

    def _why_not(self, eps: float, dtype: torch.dtype | None) -> str:
        if not self.stable:
            worst = max(self.layers, key=lambda layer: layer.rate)
            return (
                f"the module is not certified stable (rate {worst.rate:.4g}{' in ' + worst.name if worst.name else ''})"
            )
        if dtype is not None and self.rounding_error(dtype) > eps:
            return f"rounding in {str(dtype).removeprefix('torch.')} alone may reach {self.rounding_error(dtype):.3g}"
        return f"the bound stays at {self.truncation_error(MAX_WINDOW, dtype):.3g}"

    def __str__(self) -> str:
        lines = [
            f"{'stable' if self.stable else 'NOT certified stable'}: rate {_figure(self.rate)} per step in the {_kind(self.norm)}"
        ]
        if len(self.layers) > 1 or self.layers[0].forget is not None or self.layers[0].depth is not None:
            for layer in self.layers:
                forget = "" if layer.forget is None else f", forget gate <= {layer.forget:.4g}"
                rate = f"rate {_figure(layer.rate)} ({_kind(layer.norm)})"
                depth = "" if layer.depth is None else f", a cascade of {layer.depth} group{'s' * (layer.depth > 1)}"
                lines.append(f"  {layer.name or 'cell'}: {rate}{forget}, |h| <= {layer.bound:.3g}{depth}")
        for eps in (1e-3, 1e-6):
            try:
                lines.append(f"window for an error of {eps:g}: {self.window(eps)} steps")
            except ValueError as error:
                lines.append(str(error))
                break
        amplified = max((layer.amplified for layer in self.layers if layer.depth is not None), default=0.0)
        if amplified > POOR:
            lines.append(
                "poor sensitivity: of small errors at every step (rounding, jumps under Verified) it is only proven that they add up to no "
                f"more than {amplified:.1g} times their size; the windows don't depend on that"
            )
        lines.append(f"assumes {self.inputs}, a zero initial state, eval mode, exact arithmetic")
        return "\n".join(lines)


def _figure(rate: float) -> str:
    return f"{math.ceil(rate * 1e4) / 1e4:.4f}" if rate < 10 else f"{rate:.3g}"


def _kind(norm: str) -> str:
    return {"2": "2-norm", "inf": "max-norm"}[norm]


@on_cpu
def certificate(
    module: nn.Module,
    input: Tensor | PackedSequence | None = None,
    input_bound: float | None = None,
    *,
    lengths: Tensor | None = None,
) -> Certificate:
    """Rigorous bounds on how fast an RNN, GRU or LSTM forgets: one of the stable modules, torch's `nn.RNN`, `nn.GRU`, `nn.LSTM`, or a
    cell of these.

    Without `input` they hold for all inputs with |x_t| <= input_bound in every entry (default: what the module's stable set assumes,
    else 1; `math.inf` is allowed). With `input`, of a shape that the module takes ((T, B, I), (B, T, I) with batch_first, (T, I) or a
    PackedSequence; `lengths` (B,) masks padding), they hold for these inputs, and are sharper: layer 0's gates are bounded by what
    W_ih x_t + b really is. Upper layers are bounded by what the lower ones can give out.

    Raises ValueError for weights or inputs with NaN or infinite entries, weights on the meta device, a negative bound, inputs of another
    width, lengths without an input or that don't fit it; TypeError for modules that have no certificate, a Linear for instance, and for
    weights or inputs that are not real floating point.
    """
    stability = getattr(module, "stability", None)
    levels = read_module(module)
    if not levels[0][0].hidden:
        raise ValueError(
            f"certificate: this {type(module).__name__} has no hidden unit, so nothing to certify (hidden_size=0)"
        )
    width = levels[0][0].w_ih.shape[1]
    if input is not None and input_bound is not None:
        raise ValueError("certificate: pass input or input_bound, not both")
    if input is None and lengths is not None:
        raise ValueError("certificate: lengths need an input to belong to")
    data = None if input is None else _rows(input, lengths, width, getattr(module, "batch_first", False))
    if stability is not None:
        cell = levels[0][0].cell
        bound = stability.input_limit(cell) if input_bound is None else input_bound
        return certify(levels, _checked_bound(bound), data, stability.cap_of(cell), stability.target)
    return certify(levels, _checked_bound(1.0 if input_bound is None else input_bound), data)


def certificate_from_state_dict(state_dict: Mapping[str, Tensor], input_bound: float = 1.0) -> dict[str, Certificate]:
    """The certificate of every stack of RNN, GRU or LSTM layers in a state dict, by the prefix of its names ("" if there is none).

    A state dict doesn't tell tanh from relu: a layer with one gate is taken for tanh. A clamp of the forget gate is known where the state
    dict has torch's metadata, and stands among what the certificate assumes. What has no certificate (weights that are missing
    or computed, layers that don't chain) is skipped with a warning that says why. ValueError names a weight with NaN or infinite entries or
    of a shape that doesn't fit the others, TypeError one that is not a dense tensor of a real floating dtype."""
    found, faults = judge_state_dict(state_dict, input_bound)
    for fault in faults.values():
        if not isinstance(fault, LookupError):
            raise fault
        warnings.warn(f"certificate: {fault.args[0]}; skipped", stacklevel=2)
    return found


@on_cpu
def judge_state_dict(
    state_dict: Mapping[str, Tensor], input_bound: float
) -> tuple[dict[str, Certificate], dict[str, Exception]]:
    """The certificates of a state dict's stacks, and why the others have none (`read_state_dict`), by their prefixes."""
    bound = _checked_bound(input_bound)
    stacks, faults = read_state_dict(state_dict)
    metadata = getattr(state_dict, "_metadata", None)
    of_modules = metadata if isinstance(metadata, Mapping) else {}
    found = {}
    for prefix, levels in stacks.items():
        cap, cell = saved_clamp(of_modules.get(prefix), 1.0), levels[0][0].cell
        made = certify(levels, bound, cap=cap)
        taken = STABILITY[cell].assumed if CELLS[cell].forgets is None else clamp_text(cap)
        found[prefix] = replace(made, inputs=f"{made.inputs}, {taken}")
    return found, faults


def certify(
    levels: list[list[LayerWeights]],
    bound: float,
    data: Tensor | None = None,
    cap: float = 1.0,
    target: tuple[float, float] | None = None,
) -> Certificate:
    """The certificate of a stack. data (N, I): all inputs there are; else |x_t| <= bound."""
    width = levels[0][0].w_ih.shape[1]
    x = torch.full((width,), float(bound), dtype=torch.float64)  # |inputs| of the level
    x2 = length(x) if math.isfinite(bound) else (math.inf if width else 0.0)
    found = []
    for number, level in enumerate(levels):
        made = [
            layer_certificate(w, x, x2, data if number == 0 else None, cap, target, upper=number > 0) for w in level
        ]
        x = torch.cat([h for _, h in made])
        x2 = math.hypot(*(layer.bound2 for layer, _ in made))
        found.append(tuple(layer for layer, _ in made))
    worst = max((layer for level in found for layer in level), key=lambda layer: layer.rate)
    inputs = f"|inputs| <= {bound:g}" if data is None else f"the {len(data)} given inputs"
    if math.isinf(bound) and data is None:
        inputs = "inputs of any size"
    return Certificate(worst.rate < 1, worst.rate, worst.norm, inputs, tuple(found))


def _checked_bound(bound: float) -> float:
    bound = to_float("input_bound", bound)
    if not bound >= 0:
        raise ValueError(f"input_bound must be 0 or more, got {bound}")
    return abs(bound)  # -0.0 is 0


def _rows(input: Tensor | PackedSequence, lengths: Tensor | None, width: int, batch_first: bool) -> Tensor:
    """All input vectors (N, I) in float64."""
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError("certificate: a PackedSequence has its own lengths; pass no others")
        input = input.data
    if not isinstance(input, Tensor):
        raise TypeError(f"certificate: input must be a tensor or a PackedSequence, got {type(input).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"certificate: input must have a real floating dtype, got {input.dtype}")
    if input.dim() not in (1, 2, 3) or input.shape[-1] != width:
        raise ValueError(
            f"certificate: input must end in the module's input size {width}, got the shape {tuple(input.shape)}"
        )
    data = input.detach().to("cpu", torch.float64)
    if lengths is not None:
        if data.dim() != 3:
            raise ValueError(
                f"certificate: lengths need an input of three dimensions, got the shape {tuple(input.shape)}"
            )
        batch, steps = data.shape[:2] if batch_first else data.shape[1::-1]
        lengths = check_lengths(lengths.cpu() if isinstance(lengths, Tensor) else lengths, batch, steps, data.device)
        real = torch.arange(steps)[:, None] < lengths  # (T, B)
        data = data[real.mT if batch_first else real]
    data = data.reshape(-1, width)
    if not len(data):
        raise ValueError(f"certificate: input holds no step, got the shape {tuple(input.shape)}")
    if not torch.isfinite(data).all():
        raise ValueError("certificate: input holds NaN or infinite values")
    return data
