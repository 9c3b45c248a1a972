"""`memory(module, input)`: how long a recurrent module remembers on one input, measured, and the plan that this asks for.

A certificate proves what holds for all inputs; this measures what happens on some, for any weights, without a proof."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from . import layout
from ._numbers import to_int
from .cells import MODES, Cell
from .ops.recurrence import run
from .ops.recurrence.function import project
from .ops.recurrence.problem import Inputs, Problem
from .ops.recurrence.reference import arithmetic
from .plans import Chunked, Plan, Recurrent, Scanned, Verified, Windowed, written
from .stability.comparison import depth
from .stability.weights import LayerWeights, layer_names, on_cpu, read_module
from .validate import describe

TOLERANCES = (1e-3, 1e-6)
LEAST_STARTS, MOST_STARTS, RUNS = 3, 8, 64  # of each sequence, and about how many runs side by side
WORKSPACE = 2**24  # numbers of the input projection that runs copy at a time
TANGENTS, TANGENT_STEPS = 32, 256  # side by side, and how many steps each goes
KEPT = 1e-3  # a cell is slow where the product of its forget gates over a chunk exceeds this
# steps that are not worth cutting; T / k from which cutting pays; k that windows are for
SHORT, FEWER, SMALL = 128, 16, 8
# an exponent from which differences grow: the measured ones of perfect integrators are 0, within their spread
GROWING = 0.01
SHOWN = 16  # slow cells that are listed


@dataclass(frozen=True)
class LayerMemory:
    """One layer and direction. `outputs` and `states` are by tolerance: 1e-3, 1e-6.

    name      "l0", "l0_reverse", ... as in the weights' names
    outputs   steps after which all outputs h of runs from other starts agree with those of the whole run, to the tolerance relative to
              max(1, |h|), and go on doing so: what `Windowed(k)` has to see. None: not within T
    states    the same of h and c together
    exponent  largest Lyapunov exponent, per step: small differences of states grow or shrink like exp(exponent * t). -inf: they vanish
    slow      units whose product of forget gates stays above 1e-3 over some chunk; None for cells without a forget gate
    units     H
    groups    of a cascade, as the weights have them; None for other layers
    """

    name: str
    outputs: Mapping[float, int | None]
    states: Mapping[float, int | None]
    exponent: float
    slow: tuple[int, ...] | None
    units: int
    groups: int | None = None


@dataclass(frozen=True)
class Memory:
    """What `memory` found; `str()` of it is a table.

    steps   T, of the longest sequence
    chunk   steps over which forget gates were multiplied
    layers  a `LayerMemory` for each layer and direction
    plan    what to run such inputs under, and `reason` why
    """

    steps: int
    chunk: int
    layers: tuple[LayerMemory, ...]
    plan: Plan
    reason: str = field(repr=False)

    def __str__(self) -> str:
        wide = max(len("direction"), *(len(layer.name) for layer in self.layers))
        lines = [
            f"measured on {self.steps} steps: when runs from zero states agree with the run from the start",
            f"{'layer,':{wide}} {'outputs agree after':>23} {'states agree after':>23} {'Lyapunov':>9} {'slow':>11}",
            f"{'direction':{wide}}" + f" {'to 1e-3':>11} {'to 1e-6':>11}" * 2 + f" {'exponent':>9} {'cells':>11}",
        ]
        for layer in self.layers:
            after = [found[eps] for found in (layer.outputs, layer.states) for eps in TOLERANCES]
            slow = "-" if layer.slow is None else f"{len(layer.slow)} of {layer.units}"
            times = "".join(f" {'not in T' if steps is None else steps:>11}" for steps in after)
            lines.append(f"{layer.name:{wide}}{times} {layer.exponent:9.4f} {slow:>11}")
        lines += [f"slow cells of {layer.name}: {_listed(layer.slow)}" for layer in self.layers if layer.slow]
        return "\n".join([*lines, f"advice: {written(self.plan)}", f"  {self.reason}"])


def _listed(units: tuple[int, ...]) -> str:
    more = len(units) - SHOWN
    return ", ".join(map(str, units[:SHOWN])) + (f" and {more} more" if more > 0 else "")


@torch.no_grad()
def memory(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    chunk: int = 128,
) -> Memory:
    """How long each layer and direction of a `StableLSTM`, `StableGRU`, `StableRNN`, `nn.LSTM`, `nn.GRU` or `nn.RNN` remembers on this
    input, and the plan to run such inputs under.

    Measured beside the run over whole sequences from `hx`: runs from zero states, started at 3 to 8 times of each sequence (and at its
    start, where `hx` is not zero), to the sequence's end; and the growth of tangents of the cell's step, renormalized at each, over up
    to 32 stretches of 256 steps, of which the first quarter turns them into the direction that grows most (Benettin et al. 1980); it is
    too short to tell directions apart that shrink by less than about 1 % a step, so there the exponent is one of them all. Each layer
    reads what the whole run of the layers below gives it. Eval mode: no dropout. In float64 where the weights are, else float32.

    input (T, B, I), (B, T, I) with batch_first, (T, I) or a PackedSequence; hx (L*D, B, H), of an LSTM a pair, as the module takes them;
    lengths (B,) integers for padded input; chunk: steps over which forget gates are multiplied to find slow cells (sequences that are
    shorter: their whole length). It measures these inputs: others may remember longer, and none of it is proven. See `certificate`.

    Raises TypeError for a module or tensors of other kinds; ValueError for shapes or devices that don't fit, sequences of less than two
    steps, weights or inputs with NaN or infinite entries, and states that become so."""
    cell, chunk = _cell(module), to_int("memory: chunk", chunk, 1)
    levels = on_cpu(read_module)(module)
    assert isinstance(module, nn.RNNBase)
    weight: Any = module.weight_hh_l0
    x, used = _time_major(module, input, lengths, weight.device)
    x = x.to(arithmetic(weight.dtype))
    states = _states(module, cell, hx, isinstance(input, Tensor) and input.dim() == 2, x)
    if not used.numel() or int(used.max()) < 2:
        raise ValueError(f"memory: a sequence of at least 2 steps is needed, got {_shape(input)}")
    backend = getattr(module, "backend", "auto")
    rules = cell, getattr(module, "_cap", 1.0), "auto" if backend == "torch" else backend
    found: list[LayerMemory] = []
    with torch.autocast(x.device.type, enabled=False):
        for names, level in zip(layer_names(module), levels):
            ys = []
            for name, w in zip(names, level):
                back = name.tag.endswith("_reverse")
                start = [s[len(found)] for s in states]
                ran = _whole_run(rules, w, _reversed(x, used) if back else x, used, start)
                found.append(_measured(ran, w, chunk))
                ys.append(_reversed(ran.y, used) if back else ran.y)
            x = torch.cat(ys, -1)
    steps = int(used.max())
    plan, reason = advise(found, steps, all(map(_in_order, (w for level in levels for w in level))))
    return Memory(steps, min(chunk, steps), tuple(found), plan, reason)


def advise(layers: list[LayerMemory], steps: int, scannable: bool = False) -> tuple[Plan, str]:
    """The plan for a module with such layers, and the reason. `scannable`: the layers are cascades in the order of their units."""
    groups = [layer.groups for layer in layers if layer.groups is not None]
    if scannable and FEWER * max(groups) <= steps:
        many = f"{max(groups)} group" + "s" * (max(groups) > 1)
        return Scanned(), f"the weights are a cascade of {many}: all times at once, however long it remembers"
    if steps < SHORT:
        return Recurrent(), f"{steps} steps are too few to gain by cutting them"
    after, longest = max((layer.outputs[TOLERANCES[-1]] or math.inf, layer.name) for layer in layers)
    if after < math.inf:
        k = int(after) + max(4, -(-int(after) // 2))
        if FEWER * k <= steps:
            warmup = k - 1
            plan = Windowed(k) if k <= SMALL else Chunked(1 << (4 * warmup - 1).bit_length(), warmup)
            seen = f"outputs agree to 1e-6 after {after} steps at most ({longest}); {k} leave a margin for other inputs"
            return plan, seen + ", without a check of it: Verified() checks each run"
    grows = max(layers, key=lambda layer: layer.exponent)
    if grows.exponent > GROWING:
        return (
            Recurrent(),
            f"small differences grow in {grows.name}, like exp({grows.exponent:.3g} t): no cut run agrees",
        )
    agree = f"agree to 1e-6 only after {after}" if after < math.inf else "don't agree to 1e-6 within"
    slow = sum(len(layer.slow or ()) for layer in layers)
    cells = f"; {slow} slow cell{'s' * (slow > 1)}" * bool(slow)
    why = f"outputs {agree} {'of ' * (after < math.inf)}{steps} steps ({longest}{cells}), but differences don't grow"
    return Verified(), f"{why}: chunks whose borders are checked, and corrected where they differ"


# ---- what is given


def _cell(module: nn.Module) -> Cell:
    mode = getattr(module, "mode", None)
    if not isinstance(module, nn.RNNBase) or mode not in MODES:
        raise TypeError(
            f"memory: module must be one recurrent module over time, of the modes {', '.join(MODES)} (StableLSTM, "
            f"StableGRU, StableRNN, nn.LSTM, nn.GRU, nn.RNN), got {type(module).__name__}"
        )
    return MODES[mode]


def _shape(input: Tensor | PackedSequence) -> str:
    return describe(input) if isinstance(input, Tensor) else f"PackedSequence of {len(input.batch_sizes)} steps"


def _time_major(
    module: nn.RNNBase, input: Tensor | PackedSequence, lengths: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(T, B, I) with zeros past each length, and lengths (B,)."""
    x = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(x, Tensor):
        raise TypeError(f"memory: input must be a tensor or a PackedSequence, got {type(input).__name__}")
    if not x.is_floating_point() or x.layout is not torch.strided:
        raise TypeError(f"memory: input must be dense and of a real floating dtype, got {describe(x)}")
    if x.device != device:
        raise ValueError(f"memory: input must be on the module's device {device}, got {describe(x)}")
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError("memory: a PackedSequence has its own lengths; pass no others")
        x, used = pad_packed_sequence(input)
        used = used.to(device)
    else:
        if x.dim() not in (2, 3):
            raise ValueError(f"memory: input must have 3 dimensions, or 2 unbatched, got {describe(x)}")
        if x.dim() == 2:
            if lengths is not None:
                raise ValueError("memory: lengths need an input of three dimensions")
            x = x[:, None]
        elif module.batch_first:
            x = x.transpose(0, 1)
        steps, batch = x.shape[:2]
        used = torch.full((batch,), steps, device=device)
        if lengths is not None:
            used = layout.check_lengths(lengths, batch, steps, device)
            x = layout.without_padding(x, used, batch_first=False)
    if x.shape[-1] != module.input_size:
        raise ValueError(f"memory: input must end in the module's input size {module.input_size}, got {_shape(input)}")
    if not torch.isfinite(x).all():
        raise ValueError("memory: input holds NaN or infinite values")
    return x, used


def _states(module: nn.RNNBase, cell: Cell, hx: Any, unbatched: bool, x: Tensor) -> list[Tensor]:
    """h_0 and, of a cell that has one, c_0: (L*D, B, ·), zeros where nothing is given."""
    count, batch = module.num_layers * (1 + module.bidirectional), x.shape[1]
    widths = [module.proj_size or module.hidden_size] + [module.hidden_size] * cell.has_cell
    if hx is None:
        return [x.new_zeros(count, batch, width) for width in widths]
    given = list(hx) if cell.has_cell and isinstance(hx, (tuple, list)) else [hx]
    if len(given) != len(widths) or not all(isinstance(s, Tensor) for s in given):
        raise TypeError(
            f"memory: hx must be {'a pair of tensors (h, c)' if cell.has_cell else 'a tensor'}, got {describe(hx)}"
        )
    shapes = [(count, width) if unbatched else (count, batch, width) for width in widths]
    for name, s, shape in zip(("h_0", "c_0"), given, shapes):
        if tuple(s.shape) != shape or s.device != x.device or not s.is_floating_point():
            raise ValueError(f"memory: {name} must be {shape}, floating on {x.device}, got {describe(s)}")
        if not torch.isfinite(s).all():
            raise ValueError(f"memory: {name} holds NaN or infinite values")
    return [s.to(x.dtype).reshape(count, batch, width) for s, width in zip(given, widths)]


def _reversed(x: Tensor, used: Tensor) -> Tensor:
    """(T, B, F), each sequence from its own end."""
    t = torch.arange(len(x), device=x.device)[:, None]
    return x[torch.where(t < used, used - 1 - t, t), torch.arange(len(used), device=x.device)]


def _in_order(w: LayerWeights) -> bool:
    """Units read earlier units alone."""
    return w.w_hr is None and not w.w_hh.unflatten(0, (-1, w.hidden)).triu().any()


# ---- one layer and direction; what runs backward is turned round, so that time goes forward here


class _Run(NamedTuple):
    """The run over whole sequences, and what it takes to run from elsewhere."""

    cell: Cell
    clamp: float
    backend: str
    xp: Tensor  # (T, B, G*H)
    w_hh: Tensor
    w_hr: Tensor | None
    hidden_bias: Tensor | None
    start: list[Tensor]  # h_0 (B, P), c_0 (B, H)
    used: Tensor  # (B,) steps of each sequence
    y: Tensor  # (T, B, P), zeros past each length
    c: Tensor | None  # (T, B, H)
    saved: Tensor  # (T, B, S*H)

    @property
    def states(self) -> list[Tensor]:
        return [self.y] if self.c is None else [self.y, self.c]


def _whole_run(rules: tuple[Cell, float, str], w: LayerWeights, x: Tensor, used: Tensor, start: list[Tensor]) -> _Run:
    cell = rules[0]
    w_ih, w_hh, w_hr, *biases = (
        None if t is None else t.to(x.device, x.dtype) for t in (w.w_ih, w.w_hh, w.w_hr, w.bias_ih, w.bias_hh)
    )
    assert w_hh is not None
    bias, hidden_bias = cell.biases(*biases)
    ran = _Run(*rules, project(x, w_ih, bias), w_hh, w_hr, hidden_bias, start, used, x, None, x)
    (y, *c), _, saved = _advance(ran, ran.xp, start, used, save=True)
    if not all(torch.isfinite(s).all() for s in (y, *c)):
        raise ValueError(f"memory: the states of {w.tag} become NaN or infinite on this input")
    return ran._replace(y=y, c=c[0] if c else None, saved=saved)


def _advance(
    ran: _Run, xp: Tensor, start: list[Tensor], used: Tensor, save: bool
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Rows of xp (K, n, G*H), of which each has so many steps: the states at all times (K, n, ·), those in the end, what is saved."""
    h0, c0 = start[0], start[1] if ran.cell.has_cell else None
    inputs = Inputs(xp.flatten(0, 1), ran.w_hh, ran.w_hr, ran.hidden_bias, h0, c0, None, used)
    p = Problem(ran.cell.name, xp.shape[0], xp.shape[1], cap=ran.clamp, backend=ran.backend)
    y, h_n, c_n, saved, cells, *_ = run.forward(inputs, p, save or ran.cell.has_cell)
    shape = xp.shape[:2]
    if not ran.cell.has_cell:
        return [y.unflatten(0, shape)], [h_n], saved.unflatten(0, shape) if saved.numel() else saved
    past = torch.arange(len(xp), device=xp.device)[:, None] >= used
    c = cells.unflatten(0, shape).masked_fill(past[:, :, None], 0)
    return [y.unflatten(0, shape), c], [h_n, c_n], saved.unflatten(0, shape)


def _measured(ran: _Run, w: LayerWeights, chunk: int) -> LayerMemory:
    outputs, states = _agreement(ran)
    slow = None if ran.cell.forgets is None else _slow(ran, chunk)
    return LayerMemory(w.tag, outputs, states, _exponent(ran), slow, w.hidden, depth(w))


def _agreement(ran: _Run) -> tuple[dict[float, int | None], dict[float, int | None]]:
    """Steps after which runs from zero states agree with the whole run: of outputs, of states.

    All runs go side by side, a block of time after the other in a bounded workspace."""
    device, batch = ran.xp.device, len(ran.used)
    parts = max(LEAST_STARTS, min(MOST_STARTS, RUNS // batch)) + 1
    at = ran.used[:, None] * torch.arange(parts, device=device) // parts  # (B, parts), some twice in short sequences
    elsewhere = torch.stack([s.flatten(1).any(1) for s in ran.start]).any(0)  # not zero at the start
    real = torch.cat([(elsewhere & (ran.used > 0))[:, None], at[:, 1:] > at[:, :-1]], 1)
    row, part = real.nonzero(as_tuple=True)
    first = at[row, part]  # (n,)
    left = ran.used[row] - first
    states = [s.new_zeros(len(row), s.shape[-1]) for s in ran.start]
    last = torch.zeros(2, len(TOLERANCES), len(row), dtype=torch.long, device=device)  # step at which they were apart
    longest, size = int(left.max()), max(16, WORKSPACE // (len(row) * ran.xp.shape[-1]))
    for begin in range(0, longest, size):
        step = begin + torch.arange(min(size, longest - begin), device=device)[:, None]  # (K, 1)
        where = (first + step).clamp(max=len(ran.xp) - 1), row
        found, states, _ = _advance(ran, ran.xp[where], states, (left - begin).clamp(0, len(step)), save=False)
        off = [
            ((a - whole[where]).abs() / whole[where].abs().clamp(min=1)).amax(-1) for a, whole in zip(found, ran.states)
        ]
        for of, values in enumerate((off[0], torch.stack(off).amax(0))):
            for which, eps in enumerate(TOLERANCES):
                apart = ~(values <= eps) & (step < left)  # a NaN is apart
                last[of, which] = torch.maximum(last[of, which], torch.where(apart, step + 1, 0).amax(0))
    outputs, both = ({eps: _after(of[n], left) for n, eps in enumerate(TOLERANCES)} for of in last)
    return outputs, both


def _after(last: Tensor, left: Tensor) -> int | None:
    """Steps until agreement, of runs of `left` steps that were apart at step `last` and not later. A run that ended apart says that it
    takes more than its steps: nothing new where others took longer."""
    agreed = last < left
    if not agreed.any():
        return None
    after = int(last[agreed].max()) + 1
    return after if agreed.all() or int(left[~agreed].max()) < after else None


def _exponent(ran: _Run) -> float:
    """Mean logarithm of the growth of tangents over stretches of the whole run."""
    reach = min(TANGENT_STEPS, int(ran.used.max()))
    t = torch.arange(0, len(ran.xp) - reach + 1, reach, device=ran.xp.device)
    t, row = (t[:, None] + reach <= ran.used).nonzero(as_tuple=True)
    t = t * reach
    some = torch.linspace(0, len(t) - 1, min(len(t), TANGENTS)).long().to(t.device)
    t, row = t[some], row[some]
    state = tuple(torch.where((t > 0)[:, None], s[t - 1, row], s0[row]) for s, s0 in zip(ran.states, ran.start))
    draw = torch.Generator().manual_seed(0)
    tangent = tuple(torch.randn(s.shape, generator=draw, device="cpu").to(s) for s in state)
    own = torch.zeros_like(ran.xp[0, 0])
    if ran.hidden_bias is not None and ran.cell.hidden_bias is not None:
        own.view(ran.cell.gates, -1)[ran.cell.hidden_bias] = ran.hidden_bias

    def step(x: Tensor, own: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        h, c = (*state, x[:, :0])[:2]
        h, c, _ = ran.cell.step(x, h @ ran.w_hh.T + own, h, c, ran.clamp)
        h = h if ran.w_hr is None else h @ ran.w_hr.T
        return (h, c)[: len(state)]

    growth, settle = ran.xp.new_zeros(len(t)), reach // 4
    still = torch.zeros_like(ran.xp[0, :1]).expand(
        len(t), -1
    )  # a tangent for all: torch is slow to add one that is missing
    with forward_ad.dual_level():
        for n in range(reach):
            given = (ran.xp[t + n, row], own, *state), (still, still[0], *tangent)
            state, tangent = zip(*map(forward_ad.unpack_dual, step(*map(forward_ad.make_dual, *given))))
            size = torch.cat(tangent, -1).norm(dim=-1)
            if n >= settle:
                growth += size.log()
            tangent = tuple(d / size.clamp(min=torch.finfo(d.dtype).tiny)[:, None] for d in tangent)
    return float(growth.mean()) / (reach - settle)


def _slow(ran: _Run, chunk: int) -> tuple[int, ...]:
    chunk = min(chunk, int(ran.used.max()))
    gate = ran.saved.unflatten(-1, (ran.cell.saved, -1))[:, :, ran.cell.forgets]  # (T, B, H)
    count = len(gate) // chunk
    kept = gate[: count * chunk].clamp(min=torch.finfo(gate.dtype).tiny).log().unflatten(0, (count, chunk)).sum(1)
    full = torch.arange(1, count + 1, device=gate.device)[:, None] * chunk <= ran.used  # (chunks, B)
    return tuple(
        torch.where(full[:, :, None], kept > math.log(KEPT), False).flatten(0, 1).any(0).nonzero()[:, 0].tolist()
    )
