"""`module.stream()`: a module's input as it comes, some steps at a time. The outputs are those of one pass over all steps.

What is kept of each layer, for each of B streams:

| plan                                | kept                                                                   |
|-------------------------------------|------------------------------------------------------------------------|
| `Recurrent`, `Verified`, `Scanned`  | the state h (c)                                                        |
| `Chunked(chunk, w)`, `Windowed(k)`  | the state of the lane under way, the last w (k - 1) inputs, and where it began |

The lanes of a chunked or windowed layer that a push touches run side by side, each as a sequence of its own: one that is under way goes on
from its state; a new one begins w steps before the times that it writes, from zero, or at time 0 where the stream began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.recurrence.function import layer
from .ops.recurrence.problem import WHOLE, Problem
from .validate import describe

if TYPE_CHECKING:
    from .base import StableRNNBase

_VALUES = 1 << 23  # of the input projection of lanes that run at once: longer pushes run in pieces


class State(NamedTuple):
    """All that is kept of B streams, in dimension 1 of each tensor. The tensors are the stream's own: it writes into them."""

    h: Tensor  # (L, B, P)
    c: Tensor | None  # (L, B, H), LSTM
    start_h: Tensor  # where the streams began, as h and c
    start_c: Tensor | None
    position: Tensor  # (1, B) int64 on the CPU: steps since then, counted where a layer runs lanes
    inputs: list[Tensor]  # of each layer (K, B, I), the newest last: K <= w, and 0 where the layer runs no lanes

    def each(self, change: Callable[..., Tensor], *others: State) -> State:
        """change(tensor, its counterparts in others...) of each tensor."""
        counterparts = zip(*((*state[:-1], *state.inputs) for state in (self, *others)))
        changed = [None if found[0] is None else change(*found) for found in counterparts]
        return State(*changed[:5], changed[5:])  # type: ignore[arg-type, call-arg]

    def take(self, slots: Tensor) -> State:
        return self.each(lambda t: t.index_select(1, slots.to(t.device)))

    def put(self, slots: Tensor, part: State) -> State:
        """With part's streams in these slots."""
        return self.each(lambda t, new: _deep(t, len(new)).index_copy_(1, slots.to(t.device), _deep(new, len(t))), part)


class Stream:
    """What `module.stream()` gives."""

    def __init__(self, module: StableRNNBase, batch_size: int | None, hx: Any, state: dict[str, Any] | None) -> None:
        if module.bidirectional:
            raise ValueError(
                "stream: a bidirectional module's reverse direction starts at the end, which no stream has"
            )
        _check_alone("stream", module)
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise ValueError(f"stream: batch_size must be None or an int of at least 1, got {batch_size!r}")
        if state is not None and (hx is not None or batch_size is not None):
            raise ValueError("stream: a state knows its batch_size and hx; pass it alone")
        self.module, self._plan = module, module.plan
        layers = [module.plan.at(level, 0).numbers(module.weight_hh_l0.detach()) for level in range(module.num_layers)]
        self._has_lanes = any(_runs_lanes(Problem("", 0, 1, **numbers)) for numbers in layers)
        self._state: State | None = None
        if state is not None:
            self.state = state
        elif batch_size is not None or hx is not None:
            self._state = self._fresh(batch_size, hx)

    @property
    def batch_size(self) -> int | None:
        """How many streams; None before the first push, where nothing told."""
        return None if self._state is None else self._state.h.shape[1]

    # ---- running

    def push(self, input: Tensor, slots: Tensor | Sequence[int] | None = None) -> Tensor:
        """The outputs of the next steps: input (T, B, I), (B, T, I) with batch_first, or (T, I) of a single stream; the output alike, with
        P columns. `slots`: the numbers of the B streams that are given input, all different; the others stand still.

        Gradients go through a push, not from one to the next. A push that raises leaves the streams where they were: `ValueError` for an
        input or slots that do not fit, another plan than the stream was made under, or a module that shares time with other ranks
        or has forward hooks that chunks and windows would not run; `TypeError` for what is no tensor; the module's own errors."""
        module, state, sequences = self.module, self._state, int(not self.module.batch_first)
        _check_alone("push", module)
        if module.plan is not self._plan and module.plan != self._plan:
            raise ValueError(f"push: the stream was made under the plan {self._plan}, the module now has {module.plan}")
        if not isinstance(input, Tensor):
            raise TypeError(f"push: input must be a Tensor, got {describe(input)}")
        if input.dim() == 2:
            return self.push(input.unsqueeze(sequences), slots).squeeze(sequences)
        if input.dim() != 3:
            raise ValueError(f"push: input must have 3 dimensions, or 2 of a single stream; got {describe(input)}")
        chosen = None if slots is None else self._slots("push", slots)
        state = self._fresh(input.shape[sequences], None) if state is None else state
        expected = state.h.shape[1] if chosen is None else len(chosen)
        if input.shape[sequences] != expected:
            what = "the stream's batch_size" if chosen is None else "the number of slots"
            raise ValueError(
                f"push: input {tuple(input.shape)} has a batch of {input.shape[sequences]}; {what} is {expected}"
            )
        before = state if chosen is None else state.take(chosen)
        y, after = self._run_lanes(input, before) if self._has_lanes else self._run(input, before)
        self._state = after if chosen is None else state.put(chosen, after)
        return y

    def reset(self, slots: Tensor | Sequence[int] | None = None, hx: Any = None) -> None:
        """New streams begin in these slots, or in all: from zero, or from hx, as `stream` takes it, of so many. `ValueError` for slots or
        an hx that do not fit."""
        chosen = None if slots is None else self._slots("reset", slots)
        if chosen is not None and self._state is not None:
            self._state = self._state.put(chosen, self._fresh(len(chosen), hx))
        elif self._state is not None or hx is not None:
            self._state = self._fresh(self.batch_size, hx)

    def _run(self, x: Tensor, before: State) -> tuple[Tensor, State]:
        """The module's own pass, from the state."""
        if before.c is None:
            y, h = self.module(x, _usable(before.h))
            return y, before._replace(h=_kept(h, before))
        y, (h, c) = self.module(x, (_usable(before.h), _usable(before.c)))
        return y, before._replace(h=_kept(h, before), c=_kept(c, before))

    def _run_lanes(self, x: Tensor, before: State) -> tuple[Any, State]:
        """The module's pass, where chunked and windowed layers run the lanes of these steps. It is no call of the module."""
        if self.module._forward_pre_hooks or self.module._forward_hooks:
            raise ValueError(
                f"push: the module has forward hooks, which a push under {self._plan} would not run; remove them, or use Recurrent()"
            )
        before = before.each(_usable)
        inputs: list[Tensor] = []

        def run(rows: Tensor, *given: Any) -> tuple[Tensor, ...]:  # in place of `layer`, for one layer after the other
            level, (h, c), p = len(inputs), given[5:7], given[-2]
            inputs.append(before.inputs[level].to(rows.dtype))
            if not _runs_lanes(p):
                return layer(rows, *given)

            def run_rows(*lanes: Any) -> tuple[Tensor, ...]:  # x, then for h0, c0, base, lengths and p
                return layer(*(lanes[0], *given[:5], *lanes[1:5], *given[9:-2], lanes[5]))[:3]

            start = before.start_h[level], None if before.start_c is None else before.start_c[level]
            steps = rows.view(*x.shape[:2], -1)
            steps = steps.transpose(0, 1) if self.module.batch_first else steps
            y, h, c, inputs[level] = Lanes(p, start, run_rows).run(steps, inputs[level], before.position[0], h, c)
            y = y.transpose(0, 1) if self.module.batch_first else y
            return y.reshape(len(rows), -1), h, y.new_empty(0) if c is None else c, y.new_empty(0)

        y, (h, c) = self.module._forward(x, (before.h, before.c), run=run)
        after = before._replace(h=_kept(h, before), c=None if before.c is None else _kept(c, before))
        steps = x.shape[int(self.module.batch_first)]
        return y, after._replace(position=before.position + steps, inputs=[_kept(t, before) for t in inputs])

    def __repr__(self) -> str:
        return f"Stream({self._of}, batch_size={self.batch_size})"

    # ---- beginning, saving and going on

    @property
    def state(self) -> dict[str, Any] | None:
        """A copy of what is kept, a dict of tensors, lists and a text: `torch.save` it, `torch.load` takes it with `weights_only=True`.
        None before the first push, where nothing told how many streams there are. Set, the streams go on from there; `ValueError` for a
        state of a module of other sizes, or of another plan. The weights are neither in it nor compared."""
        if self._state is None:
            return None
        with torch.inference_mode(False):
            return {"of": self._of, **self._state.each(torch.clone)._asdict()}

    @state.setter
    def state(self, saved: dict[str, Any] | None) -> None:
        if saved is None:
            self._state = None
            return
        if not isinstance(saved, dict) or saved.keys() != {"of", *State._fields}:
            raise ValueError(f"state: it must be what a stream's state was, got {describe(saved)}")
        if saved["of"] != self._of:
            raise ValueError(f"state: it is of {saved['of']}; the stream is of {self._of}")

        def own(t: Tensor, like: Tensor) -> Tensor:
            if t.dtype is not like.dtype or t.shape[1:] != like.shape[1:]:
                raise ValueError(f"state: a tensor is {describe(t)}; expected {describe(like)}")
            return t.to(like.device, copy=True)

        given = State(**{name: saved[name] for name in State._fields})
        self._state = given.each(own, self._fresh(given.h.shape[1], None))

    @property
    def _of(self) -> str:
        m = self.module
        sizes = f"{m.input_size}, {m.hidden_size}, num_layers={m.num_layers}, proj_size={m.proj_size}"
        return f"{m.mode}({sizes}, dtype={m.weight_hh_l0.dtype}, plan={self._plan})"

    def _fresh(self, batch: int | None, hx: Any) -> State:
        """Streams that begin, at zero or at hx."""
        m, like = self.module, self.module.weight_hh_l0.detach()
        given = [] if hx is None else [*hx] if isinstance(hx, (tuple, list)) else [hx]
        given = [h.unsqueeze(1) if isinstance(h, Tensor) and h.dim() == 2 else h for h in given]
        batch = batch or next((h.shape[1] for h in given if isinstance(h, Tensor) and h.dim() == 3), 1)
        states = [h for h in m._zeros(like, batch) if h is not None]
        if hx is not None:
            if [*map(describe, given)] != [*map(describe, states)]:  # shapes, dtypes, devices
                raise ValueError(f"hx: expected {'; '.join(map(describe, states))}, got {describe(hx)}")
            states = [h.detach().clone() for h in given]
        h, c = states if len(states) == 2 else (states[0], None)
        inputs = [like.new_zeros(0, batch, h.shape[2] if level else m.input_size) for level in range(m.num_layers)]
        position = torch.zeros(1, batch, dtype=torch.int64, device="cpu")
        return State(h, c, h.clone(), None if c is None else c.clone(), position, inputs)

    def _slots(self, name: str, slots: Any) -> Tensor:
        """(B,) int64 on the CPU."""
        if self._state is None:
            raise ValueError(f"{name}: slots are for module.stream(batch_size=N), which says how many there are")
        most = self._state.h.shape[1]
        try:
            found = torch.as_tensor(slots, device="cpu")
        except (TypeError, ValueError, RuntimeError):  # of what holds no numbers
            found = torch.empty(0, device="cpu")
        if found.dim() != 1 or found.is_floating_point() or found.is_complex() or found.dtype is torch.bool:
            raise ValueError(f"{name}: slots must be a list or tensor of integers, got {slots!r}")
        if not len(found) or not 0 <= int(found.min()) <= int(found.max()) < most or len(found.unique()) < len(found):
            raise ValueError(f"{name}: slots must be different numbers from 0 to {most - 1}, got {found.tolist()}")
        return found.long()


class Lanes(NamedTuple):
    """The lanes of one layer, over streams that may stand at different times."""

    p: Problem  # of the plan
    start: tuple[Tensor, Tensor | None]  # h (B, P), c (B, H) at time 0
    layer: Callable[..., tuple[Tensor, ...]]  # (rows, h0, c0, base, lengths, p) -> y, h_n, c_n

    def run(
        self, x: Tensor, seen: Tensor, position: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """x (T, B, I) -> y (T, B, P), and after them h, c of the lanes under way and `seen`, the last inputs (K, B, I)."""
        chunk, warmup = self.p.stride, self.p.warmup
        most = _VALUES // (self.p.spec.gates * h.shape[1] * len(h))  # times of each stream
        pieces = []
        for piece in x.split(max(1, (most - warmup) * chunk // (chunk + warmup))):
            y, h, c = self._piece(piece, seen, position, h, c)
            pieces.append(y)
            seen = torch.cat([seen, piece])
            seen = seen[max(len(seen) - warmup, 0) :].clone()
            position = position + len(piece)
        return torch.cat(pieces), h, c, seen

    def _piece(
        self, x: Tensor, seen: Tensor, position: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # Lane (i, b) writes from time `first` on; it runs from time `begin`, `length` steps. All (n, B), on the CPU.
        chunk, warmup, (steps, batch) = self.p.stride, self.p.warmup, x.shape[:2]
        end, current = position + steps, position // chunk
        count = int(((end - 1) // chunk - current).max()) + 1
        first = (current + torch.arange(count)[:, None]) * chunk
        under_way, from_start = first < position, first <= warmup
        begin = torch.where(under_way, position, (first - warmup).clamp(min=0))
        length = torch.where(first < end, torch.minimum(end, first + chunk) - begin, 0)

        # Their inputs, one lane after the other
        base = length.flatten().cumsum(0).view_as(length) - length
        lane = torch.arange(length.numel()).repeat_interleave(length.flatten())
        time = torch.arange(len(lane)) + (begin - base - position + len(seen)).flatten()[lane]  # since the oldest seen
        rows = torch.cat([seen, x]).flatten(0, 1).index_select(0, (time * batch + lane % batch).to(x.device))

        def lanes_start(now: Tensor, start: Tensor) -> Tensor:
            old, zero = (which.to(x.device)[:, :, None] for which in (under_way, ~from_start))
            return torch.where(old, now, start.to(now.dtype).masked_fill(zero, 0)).flatten(0, 1)

        h0 = lanes_start(h, self.start[0])
        c0 = None if c is None or self.start[1] is None else lanes_start(c, self.start[1])
        p = self.p._replace(steps=int(length.max()), step=1, stride=WHOLE, warmup=0)
        y, h, c_n = self.layer(rows, h0, c0, *(t.flatten().to(x.device) for t in (base, length)), p)

        # What each time and stream reads of it, and where its last lane ended
        at = position + torch.arange(steps)[:, None]
        lane = (at // chunk - current) * batch + torch.arange(batch)
        rows = (base - begin).flatten()[lane] + at
        y = y.index_select(0, rows.flatten().to(x.device)).view(steps, batch, -1)
        last = lane[-1].to(x.device)
        return y, h.index_select(0, last), None if c is None else c_n.index_select(0, last)


def _check_alone(name: str, module: StableRNNBase) -> None:
    if module._sequence is not None:
        raise ValueError(
            f"{name}: the module shares time with other ranks, which a stream does not; sequence_parallel(model, None) ends that"
        )


def _runs_lanes(p: Problem) -> bool:
    """Chunked and windowed layers; a checked one carries its exact state."""
    return p.stride > 0 and not p.checked


def _kept(t: Tensor, before: State) -> Tensor:
    """Without its graph, and in the state's dtype, which holds what autocast narrowed exactly."""
    return t.detach().to(before.h.dtype)


def _deep(t: Tensor, rows: int) -> Tensor:
    """With so many rows at least, older ones that nothing reads before them."""
    return F.pad(t, (0, 0) * (t.dim() - 1) + (rows - len(t), 0)) if len(t) < rows else _usable(t)


def _usable(t: Tensor) -> Tensor:
    """Outside of inference mode, what was made in it can neither be written to nor go through autograd."""
    return t if torch.is_inference_mode_enabled() or not t.is_inference() else t.clone()
