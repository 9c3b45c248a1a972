"""What `StableRNN`, `StableGRU` and `StableLSTM` share: the stack of layers, the plan, the stable set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import _VF, Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from . import layout, watch
from .bookkeeping import Bookkeeping
from .cells import MODES
from .common import autocast_dtype, has_values
from .ops.backends import check_name, requested
from .ops.recurrence import native
from .ops.recurrence.backends import leave_to_torch
from .ops.recurrence.function import Note, layer
from .ops.recurrence.native import PLAIN
from .ops.recurrence.policy import Memory
from .ops.recurrence.problem import Problem
from .plans import Plan, PlanLike, Recurrent
from .reports import Report
from .stability import Certificate, Stability, certificate, check_stability
from .streaming import Stream
from .validate import check_state, check_weight, describe

_TORCH: dict[str, Any] = {"rnn_tanh": _VF.rnn_tanh, "rnn_relu": _VF.rnn_relu, "lstm": _VF.lstm, "gru": _VF.gru}


class StableRNNBase(Bookkeeping, nn.RNNBase):
    """What the modules share: the stack of layers, the plan, the stable set."""

    stability: Stability | None = None
    plan: Plan
    backend: str
    weight_hh_l0: Tensor
    _sequence: Any = None  # the ranks that hold a part of time each, `distributed.SequenceGroup`

    def __init__(
        self, mode: str, *args: Any, stability: Stability | None, plan: PlanLike, backend: str, **kwargs: Any
    ) -> None:
        check_name(backend), check_stability(stability, mode)
        super().__init__(mode, *args, **kwargs)
        self._adopt(stability, plan, backend)
        self._project_fresh()

    _adopted = ("stability", "plan", "backend", "_ran")

    def _adopt(self, stability: Stability | None, plan: PlanLike, backend: str) -> None:
        """Sets `_adopted`, all that a stable module holds beyond torch's; `stabilize` calls it on modules that torch has made."""
        self.stability, self.plan, self.backend = stability, plan, backend  # type: ignore[assignment]  # a plan is made of it
        # what the last checked run left: reports and notes by layer and direction
        self._ran: tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Note]] | None = None

    # ---- stability

    def reset_parameters(self) -> None:
        """torch's initialization, then the projection into the stable set."""
        if self.stability is not None:
            self.stability.projected_names(self)  # raises for computed weights, before anything changes
        super().reset_parameters()
        self._project_fresh()

    def _project_fresh(self) -> None:
        if self.stability is not None and has_values(self.weight_hh_l0):
            self.project_()

    def project_(self, certify: bool = True) -> StableRNNBase:
        """Move the weights into the stable set, in place; `certificate().rate <= rate` holds after it. Weights already inside are left
        bitwise alone. `certify=False` is the cheap warm step for training loops. Without a stable set this raises `ValueError`."""
        if self.stability is None:
            raise ValueError(
                "project_: this module has stability=None; give it a stable set first, module.stability = Certified()"
            )
        self.stability.project_(self, certify=certify)
        watch.settled(self)
        return self

    def certificate(self, input: Tensor | PackedSequence | None = None, **options: Any) -> Certificate:
        """Rigorous bounds on how fast the state forgets, from the weights and, if given, the input. See `stable_rnn.certificate`."""
        return certificate(self, input, **options)

    @property
    def last_report(self) -> Report | None:
        """What the last forward pass under a `Verified` plan did, and its backward pass once that ran; None before one."""
        if self._ran is None:
            return None
        reports, notes = self._ran
        back = {place: note.report for place, note in notes.items() if note.report is not None}
        seen = self._sequence is None and all(
            getattr(self.plan.at(*place), "tol_on", "state") == "state" for place in reports
        )

        def bound(jump: float, chunk: int) -> float | None:
            found = certificate(self)
            return found.jump_bound(jump, chunk) if found.stable and seen else None

        backward = Report.of(tuple(back), tuple(back.values())) if back else None
        return Report.of(tuple(reports), tuple(reports.values()), backward, bound)

    # ---- running

    def stream(self, batch_size: int | None = None, hx: Any = None, state: dict[str, Any] | None = None) -> Stream:
        """Its input as it comes: `stream.push(x)` gives the outputs of the next steps, whatever the plan, those of one pass over all steps.

        batch_size  streams side by side, with numbers to push some of them by; None: the first push tells
        hx          where they begin, as `forward` takes it; None: at zero
        state       what `stream.state` was, to go on from; without the other two

        Dropout is that of each push, in training mode. `ValueError` for a bidirectional module, one that shares time with other ranks, and
        arguments that do not fit."""
        return Stream(self, batch_size, hx, state)

    @property
    def _cell(self) -> str:
        return self.mode.lower()

    def _weights(self, x: Tensor, cast: bool) -> list[list[Tensor]]:
        """The weights of each layer and direction in torch's order, checked against x; with `cast`, they are still to be converted."""
        rows, out, ways = (
            self.hidden_size * MODES[self.mode].gates,
            self.proj_size or self.hidden_size,
            1 + self.bidirectional,
        )
        others = [(rows, out)] + [(rows,)] * 2 * self.bias + [(out, self.hidden_size)] * bool(self.proj_size)
        found, own, dtype, device, strided = [], self._parameters, x.dtype, x.device, torch.strided
        for index, names in enumerate(self._all_weights):
            weights = []
            for name, shape in zip(names, ((rows, self.input_size if index < ways else out * ways), *others)):
                if (w := own.get(name)) is None:
                    w = getattr(self, name)
                if type(w) is not nn.Parameter or not (
                    w.shape == shape and w.dtype is dtype and w.layout is strided and w.device == device
                ):
                    check_weight(name, w, shape, x, cast)
                weights.append(w)
            weights[1] = self._trained(weights[1])
            found.append(weights)
        return found

    def _stack(
        self, x: Tensor, rows: layout.Layout, h0: Tensor, c0: Tensor | None, run: Callable = layer
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All layers and directions over buffer rows: x (N, I) -> y (N, D*P), h_n (L*D, B, P), c_n (L*D, B, H). `run`: one of them."""
        directions = [rows, rows.reversed(x.device)] if self.bidirectional else [rows]
        cast = autocast_dtype(x) is not None
        weights = self._weights(x, cast)
        h_n, c_n = [], []
        reports: dict[tuple[int, int], Tensor] = {}
        notes: dict[tuple[int, int], Note] = {}
        for level in range(self.num_layers):
            ys = []
            for d, way in enumerate(directions):
                index = level * len(directions) + d
                w_ih, w_hh, *rest = weights[index]
                bias, hidden_bias = MODES[self.mode].biases(*rest[:2]) if self.bias else (None, None)
                w_hr = rest[-1] if self.proj_size else None
                if cast:
                    w_ih, w_hh = w_ih.to(x.dtype), w_hh.to(x.dtype)
                    bias, hidden_bias, w_hr = (None if w is None else w.to(x.dtype) for w in (bias, hidden_bias, w_hr))
                plan, place = self.plan.at(level, d), (level, d)
                p = Problem(self._cell, way.steps, way.step, **plan.numbers(x), cap=self._cap, backend=self.backend)
                start = h0[index], None if c0 is None else c0[index]
                if p.checked and not torch.compiler.is_compiling():
                    notes[place] = Note(_memory(self, place, weights[index]))
                y, h, c, report = run(
                    x,
                    w_ih,
                    bias,
                    w_hh,
                    w_hr,
                    hidden_bias,
                    *start,
                    way.base,
                    way.lengths,
                    way.resets,
                    p,
                    notes.get(place),
                )
                ys.append(y)
                h_n.append(h)
                c_n.append(c)
                if p.checked:
                    reports[place] = report
            x = ys[0] if len(ys) == 1 else torch.cat(ys, 1)
            if self.dropout and self.training and level < self.num_layers - 1:
                x = rows.dropout(x, self.dropout)
        if reports and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()):
            self._ran = reports, notes
        return x, torch.stack(h_n), torch.stack(c_n)

    def _one_step(self, x: Tensor, hx: tuple, resets: Tensor | None) -> tuple[Tensor, list[Tensor]] | None:
        """A single step of a stream, x (1, B, I) or with batch_first (B, 1, I), a call into C++ for each layer and direction; None where it
        is more than that. `resets` of as many numbers come before the step, which is behind all that the reverse direction visits."""
        if not (
            isinstance(self.plan, Recurrent)
            and not (self.proj_size or self.dropout and self.training)
            and not torch.is_grad_enabled()
            and requested(self.backend) in ("auto", "cpu")
            and native.can_run(None, x)[0]
        ):
            return None
        last, (h0, c0), states = x.flatten(0, 1), hx, []
        for level in range(self.num_layers):
            for index in range(level * (1 + self.bidirectional), (level + 1) * (1 + self.bidirectional)):
                weights = (*(getattr(self, name) for name in self._all_weights[index]), *(None, None) * (not self.bias))
                h, c = h0[index], None if c0 is None else c0[index]
                if resets is not None and not (self.bidirectional and index % 2):
                    h, c = (s if s is None else s.masked_fill(resets.view(-1, 1), 0) for s in (h, c))
                if not native.plain_step(self._cell, last, h, c, weights):
                    return None
                states.append(native.cell_step(self._cell, last, h, c, weights, self._cap))
            ways = [h for h, _ in states[-1 - self.bidirectional :]]
            last = torch.cat(ways, 1) if self.bidirectional else ways[0]
        hidden = [torch.stack([*each]) for each in zip(*states) if each[0] is not None]
        return last.view(*x.shape[:2], last.shape[1]), hidden

    def _torch_serves(self, x: Tensor, lengths: Tensor | None, resets: Tensor | None) -> tuple[bool, str]:
        """Whether torch's own recurrence computes this call."""
        if not isinstance(self.plan, Recurrent):
            return False, f"it has no {self.plan}"
        if self._cap < 1:
            return False, "its cell has no clamp of the forget gate"
        if lengths is not None:
            return False, "it takes a PackedSequence instead of lengths"
        if resets is not None:
            return False, "it takes no resets"
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False, "it is unrolled over time by torch.compile and fails under torch.func"
        if x.is_cuda and torch.is_grad_enabled() and not self.training:
            return False, "cuDNN has no backward pass in eval mode"
        return True, ""

    def _runs_on_torch(
        self, x: Tensor, lengths: Tensor | None, resets: Tensor | None, steps: int | None, batch: int
    ) -> bool:
        name = requested(self.backend)
        if name not in ("auto", "torch"):
            return False
        able, reason = self._torch_serves(x, lengths, resets)
        if name == "torch" and not able:
            raise ValueError(f"backend 'torch' cannot run this call: {reason}")
        recorded = able and torch.jit.is_tracing()  # torch's own recurrence is all that torch.jit.trace can record
        return able and (name == "torch" or recorded or leave_to_torch(x, self._cell, steps, batch, self.hidden_size))

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        run: Callable = layer,
    ) -> tuple[Tensor | PackedSequence, tuple]:
        """The modules' forward pass; hx is (h0, c0) or None, h0 and c0 of 3 dimensions or, unbatched, 2. `run` as for `_stack`."""
        if self.training:
            watch.trains(self)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: a PackedSequence carries its own; pass one or the other")
            if resets is not None:
                raise ValueError("resets: a PackedSequence has no such mask; pass padded input, lengths and resets")
            data, sizes, order, back = input
            x, hx = self._cast(data, hx)
            hx = self._zeros(x, int(sizes[0])) if hx is None else hx
            self._check_args(x, hx, sizes)
            hx = self._permute(hx, order)
            if self._runs_on_torch(x, None, None, None, hx[0].shape[1]):
                y, hidden = self._run_torch(x, hx, sizes)
            else:
                rows, put = layout.packed(PackedSequence(x, sizes))
                y, *hidden = self._stack(rows.unpacked(x), rows, *hx)
                y = y.index_select(0, put)
            return PackedSequence(y, sizes, order, back), self._permute(tuple(hidden), back)

        batched, one = input.dim() == 3, 0 if self.batch_first else 1
        x, hx = self._cast(input, hx)
        if not batched:
            resets = None if resets is None else layout.check_resets(resets, x).unsqueeze(one)
            x = x.unsqueeze(one)
            hx = None if hx is None else tuple(None if h is None else h.unsqueeze(1) for h in hx)
        batch, steps = (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])
        if hx is None:
            self.check_input(x, None)
            hx = self._zeros(x, batch)
        else:
            self._check_args(x, hx, None)
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        x, lengths, resets = layout.checked(x, self.batch_first, lengths, resets)
        if self._runs_on_torch(x, lengths, resets, steps, batch):
            y, hidden = self._run_torch(x, hx, None)
        elif steps == 1 and lengths is None and (found := self._one_step(x, hx, resets)) is not None:
            y, hidden = found
        else:
            rows = layout.padded(x.shape, self.batch_first, lengths, resets, x.device)
            y, *hidden = self._stack(x.reshape(-1, x.shape[2]), rows, hx[0], hx[1], run)
            y = y.view(*x.shape[:2], y.shape[1])
        if not batched:
            y, hidden = y.squeeze(one), [h.squeeze(1) for h in hidden]
        return y, tuple(hidden)

    def _shared(self, input: Any, hx: Any, *rest: Any) -> tuple[Tensor, Any]:
        """The forward pass of a stretch of time, among the ranks that hold the others; arguments as they are given, checked there."""
        return self._sequence.forward(self, input, hx, *rest)

    def _run_torch(self, x: Tensor, hx: tuple, sizes: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        cast = autocast_dtype(x) is not None
        weights = [w for each in self._weights(x, cast) for w in each]
        weights = [w.to(x.dtype) for w in weights] if cast else weights
        state = hx[0] if hx[1] is None else hx
        rest = (weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        run = _TORCH[self._cell]
        y, *hidden = run(x, state, *rest, self.batch_first) if sizes is None else run(x, sizes, state, *rest)
        return y, hidden

    def _cast(self, x: Tensor, hx: tuple | None) -> tuple[Tensor, tuple | None]:
        """Under autocast everything runs in its dtype, as nn.LSTM does."""
        kind = autocast_dtype(x)
        if kind is not None:
            x = x.to(kind)
            hx = None if hx is None else tuple(None if h is None else h.to(x.dtype) for h in hx)
        return x, hx

    def _zeros(self, x: Tensor, batch: int) -> tuple[Tensor, Tensor | None]:
        count = self.num_layers * (2 if self.bidirectional else 1)
        h0 = x.new_zeros(count, batch, self.proj_size or self.hidden_size)
        return (h0, x.new_zeros(count, batch, self.hidden_size)) if MODES[self.mode].has_cell else (h0, None)

    @staticmethod
    def _permute(hx: tuple, order: Tensor | None) -> tuple:
        return hx if order is None else tuple(h if h is None or not h.numel() else h.index_select(1, order) for h in hx)

    def _check_args(self, x: Tensor, hx: tuple, sizes: Tensor | None) -> None:
        states: Any = hx if MODES[self.mode].has_cell else hx[0]  # as torch's own modules give them
        self.check_forward_args(x, states, sizes)
        for name, h in zip(("h_0", "c_0"), hx):
            if h is not None:
                check_state(name, h, x)

    # ---- conversion and bookkeeping

    def _plain(self, device: str) -> nn.RNNBase:
        options = dict(
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            device=device,
        )
        if self.mode == "LSTM":
            return nn.LSTM(self.input_size, self.hidden_size, proj_size=self.proj_size, **options)
        if self.mode == "GRU":
            return nn.GRU(self.input_size, self.hidden_size, **options)
        return nn.RNN(self.input_size, self.hidden_size, nonlinearity=self.nonlinearity, **options)

    def extra_repr(self) -> str:
        extra = [super().extra_repr(), f"stability={self.stability}", f"plan={self.plan}"]
        return ", ".join(extra + ([f"backend={self.backend!r}"] if self.backend != "auto" else []))


_memories: WeakKeyDictionary[nn.Module, dict[tuple[int, int], Memory]] = WeakKeyDictionary()  # no part of the modules


def _memory(module: nn.Module, place: tuple[int, int], weights: list[Tensor]) -> Memory | None:
    """What earlier calls of a layer and direction found out, as long as its weights are the same: where they lie, and how often they were
    changed. None under transforms, whose tensors have neither."""
    if torch._C._are_functorch_transforms_active() or any(type(w) not in PLAIN for w in weights):
        return None
    kept = _memories.setdefault(module, {}).setdefault(place, Memory())
    return kept.of([(w.data_ptr(), -1 if w.is_inference() else w._version) for w in weights])


class OneStateBase(StableRNNBase):
    """What the modules share whose state is h alone."""

    _not_2d_or_3d: str  # torch's error

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if isinstance(input, Proxy):
            return self._leaf(input, hx, lengths=lengths, resets=resets)
        if self._sequence is not None:
            return self._shared(input, hx, lengths, resets)
        if hx is not None and not isinstance(hx, Tensor):
            raise AttributeError(f"hx must be a tensor h_0, got {describe(hx)}")  # the exception of torch's hx.dim()
        if not isinstance(input, PackedSequence):
            if input.dim() not in (2, 3):
                raise ValueError(self._not_2d_or_3d.format(input.dim()))
            if hx is not None and hx.dim() != input.dim():
                kind = "unbatched 2-D" if input.dim() == 2 else "batched 3-D"
                raise RuntimeError(f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor")
        y, hidden = self._forward(input, None if hx is None else (hx, None), lengths, resets)
        return y, hidden[0]
