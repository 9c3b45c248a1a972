"""`StableRNN`, `StableGRU` and `StableLSTM`: `nn.RNN`, `nn.GRU` and `nn.LSTM` with a plan and a stable set of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import _VF, Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from . import layout, watch
from .bookkeeping import Bookkeeping
from .cells import MODES
from .common import autocast_dtype, has_values
from .ops.backends import check_name, requested
from .ops.recurrence.backends import leave_to_torch
from .ops.recurrence.function import Note, layer
from .ops.recurrence.problem import Problem
from .plans import Plan, Recurrent, Report, Verified, check_plan
from .stability import Certificate, Certified, Stability, certificate, check_stability
from .validate import check_state, check_weight, describe, pair

_TORCH: dict[str, Any] = {"rnn_tanh": _VF.rnn_tanh, "rnn_relu": _VF.rnn_relu, "lstm": _VF.lstm, "gru": _VF.gru}


class StableRNNBase(Bookkeeping, nn.RNNBase):
    """What the modules share: the stack of layers, the plan, the stable set."""

    stability: Stability | None = None
    plan: Plan
    backend: str
    weight_hh_l0: Tensor

    def __init__(
        self, mode: str, *args: Any, stability: Stability | None, plan: Plan, backend: str, **kwargs: Any
    ) -> None:
        check_plan(plan), check_name(backend), check_stability(stability, mode)
        super().__init__(mode, *args, **kwargs)
        self._adopt(stability, plan, backend)
        self._project_fresh()

    _adopted = ("stability", "plan", "backend", "_ran")

    def _adopt(self, stability: Stability | None, plan: Plan, backend: str) -> None:
        """Sets `_adopted`, all that a stable module holds beyond torch's; `stabilize` calls it on modules that torch has made."""
        self.stability, self.plan, self.backend = stability, plan, backend
        self._ran: tuple[list[Tensor], list[Note], int] | None = (
            None  # what the last checked run left: reports, notes, chunk
        )

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
        reports, notes, chunk = self._ran
        back = [note.report for note in notes if note.report is not None]

        def bound(jump: float) -> float | None:
            found = certificate(self)
            return found.jump_bound(jump, chunk) if found.stable else None

        return Report.of(reports, backward=Report.of(back) if back else None, bound=bound)

    # ---- running

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
        found = []
        for index, names in enumerate(self._all_weights):
            shapes = [(rows, self.input_size if index < ways else out * ways), *others]
            found.append([getattr(self, name) for name in names])
            for name, w, shape in zip(names, found[-1], shapes):
                check_weight(name, w, shape, x, cast)
            found[-1][1] = self._trained(found[-1][1])
        return found

    def _stack(self, x: Tensor, rows: layout.Layout, h0: Tensor, c0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """All layers and directions over buffer rows: x (N, I) -> y (N, D*P), h_n (L*D, B, P), c_n (L*D, B, H)."""
        directions = [rows, rows.reversed(x.device)] if self.bidirectional else [rows]
        numbers, cast = self.plan.numbers(x), autocast_dtype(x) is not None
        weights = self._weights(x, cast)
        h_n, c_n, reports = [], [], []
        noting = isinstance(self.plan, Verified) and not torch.compiler.is_compiling()
        notes: list[Note] = []
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
                p = Problem(self._cell, way.steps, way.step, **numbers, cap=self._cap, backend=self.backend)
                start = h0[index], None if c0 is None else c0[index]
                notes += [Note()] if noting else []
                y, h, c, report = layer(
                    x,
                    w_ih,
                    bias,
                    w_hh,
                    w_hr,
                    hidden_bias,
                    *start,
                    way.base,
                    way.lengths,
                    p,
                    notes[-1] if noting else None,
                )
                ys.append(y)
                h_n.append(h)
                c_n.append(c)
                reports.append(report)
            x = ys[0] if len(ys) == 1 else torch.cat(ys, 1)
            if self.dropout and self.training and level < self.num_layers - 1:
                x = rows.dropout(x, self.dropout)
        if isinstance(self.plan, Verified) and (not noting or not torch._C._are_functorch_transforms_active()):
            self._ran = reports, notes, p.resolved(rows.batch, x.device).stride
        return x, torch.stack(h_n), torch.stack(c_n)

    def _torch_serves(self, x: Tensor, lengths: Tensor | None) -> tuple[bool, str]:
        """Whether torch's own recurrence computes this call."""
        if not isinstance(self.plan, Recurrent):
            return False, f"it has no {self.plan}"
        if self._cap < 1:
            return False, "its cell has no clamp of the forget gate"
        if lengths is not None:
            return False, "it takes a PackedSequence instead of lengths"
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False, "it is unrolled over time by torch.compile and fails under torch.func"
        if x.is_cuda and torch.is_grad_enabled() and not self.training:
            return False, "cuDNN has no backward pass in eval mode"
        return True, ""

    def _runs_on_torch(self, x: Tensor, lengths: Tensor | None) -> bool:
        name = requested(self.backend)
        if name not in ("auto", "torch"):
            return False
        able, reason = self._torch_serves(x, lengths)
        if name == "torch" and not able:
            raise ValueError(f"backend 'torch' cannot run this call: {reason}")
        recorded = able and torch.jit.is_tracing()  # torch's own recurrence is all that torch.jit.trace can record
        return able and (name == "torch" or recorded or leave_to_torch(x))

    def _forward(
        self, input: Tensor | PackedSequence, hx: Any, lengths: Tensor | None
    ) -> tuple[Tensor | PackedSequence, tuple]:
        """The modules' forward pass; hx is (h0, c0) or None, h0 and c0 of 3 dimensions or, unbatched, 2."""
        if self.training:
            watch.trains(self)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: a PackedSequence carries its own; pass one or the other")
            data, sizes, order, back = input
            x, hx = self._cast(data, hx)
            hx = self._zeros(x, int(sizes[0])) if hx is None else hx
            self._check_args(x, hx, sizes)
            hx = self._permute(hx, order)
            if self._runs_on_torch(x, None):
                y, hidden = self._run_torch(x, hx, sizes)
            else:
                rows, put = layout.packed(PackedSequence(x, sizes))
                y, *hidden = self._stack(rows.unpacked(x), rows, *hx)
                y = y.index_select(0, put)
            return PackedSequence(y, sizes, order, back), self._permute(tuple(hidden), back)

        batched = input.dim() == 3
        x, hx = self._cast(input, hx)
        if not batched:
            x = x.unsqueeze(0 if self.batch_first else 1)
            hx = None if hx is None else tuple(None if h is None else h.unsqueeze(1) for h in hx)
        batch, steps = (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])
        hx = self._zeros(x, batch) if hx is None else hx
        self._check_args(x, hx, None)
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if lengths is not None:
            lengths = layout.check_lengths(lengths, batch, steps, x.device)
            x = layout.without_padding(x, lengths, self.batch_first)
        if self._runs_on_torch(x, lengths):
            y, hidden = self._run_torch(x, hx, None)
        else:
            rows = layout.padded(x.shape, self.batch_first, lengths, x.device)
            y, *hidden = self._stack(x.reshape(-1, x.shape[2]), rows, *hx)
            y = y.view(*x.shape[:2], y.shape[1])
        if not batched:
            y, hidden = y.squeeze(0 if self.batch_first else 1), [h.squeeze(1) for h in hidden]
        return y, tuple(hidden)

    def _run_torch(self, x: Tensor, hx: tuple, sizes: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        weights = [
            w.to(x.dtype) for layer_weights in self._weights(x, autocast_dtype(x) is not None) for w in layer_weights
        ]
        state = hx if MODES[self.mode].has_cell else hx[0]
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


class OneStateBase(StableRNNBase):
    """What the modules share whose state is h alone."""

    _not_2d_or_3d: str  # torch's error

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if isinstance(input, Proxy):
            return self._leaf(input, hx, lengths=lengths)
        if hx is not None and not isinstance(hx, Tensor):
            raise AttributeError(f"hx must be a tensor h_0, got {describe(hx)}")  # the exception of torch's hx.dim()
        if not isinstance(input, PackedSequence):
            if input.dim() not in (2, 3):
                raise ValueError(self._not_2d_or_3d.format(input.dim()))
            if hx is not None and hx.dim() != input.dim():
                kind = "unbatched 2-D" if input.dim() == 2 else "batched 3-D"
                raise RuntimeError(f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor")
        y, hidden = self._forward(input, None if hx is None else (hx, None), lengths)
        return y, hidden[0]


class StableRNN(OneStateBase):
    """Drop-in replacement of `torch.nn.RNN`: h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu.

    Arguments, parameter names, shapes and errors are those of `nn.RNN`; keyword-only extras:

    - `stability`: `Certified(...)` (default: torch's initialization, then projected), `Cascade(...)`, or None (plain weights)
    - `plan`: `Recurrent()` (default), `Windowed(k)`, `Chunked(chunk, warmup)`, `Verified(...)`, `Scanned()`; may be set later
    - `backend`: "auto" (default), "cuda", "triton", "cpu", "reference", "torch"

    `forward(input, hx=None, *, lengths=None)`: input (T, B, I), (B, T, I) with batch_first, (T, I) or a PackedSequence; hx (L*D, B, H);
    lengths (B,) integers on the input's device for padded input of mixed lengths: outputs past a length are zero, final states and
    the reverse direction are those of each sequence's own end. Returns output (T, B, D*H) and h_n (L*D, B, H).
    """

    _not_2d_or_3d = "RNN: Expected input to be 2D or 3D, got {}D tensor instead"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        stability: Stability | None = Certified(),
        plan: Plan = Recurrent(),
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(
            "RNN_" + nonlinearity.upper(),
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            stability=stability,
            plan=plan,
            backend=backend,
            **kwargs,
        )


class StableGRU(OneStateBase):
    """Drop-in replacement of `torch.nn.GRU` (gate order r, z, n; the reset gate comes after the product):

        r, z = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr), sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn));   h_t = (1 - z) n + z h_{t-1}

    Arguments, parameter names, shapes and errors are those of `nn.GRU`; keyword-only extras:

    - `stability`: `Certified(...)` (default: torch's initialization, then projected), `Cascade(...)`, `ForgetCap(f)` (the cell clamps its
      update gate z, which keeps h, at f), or None (plain weights)
    - `plan`, `backend` as for `StableLSTM`

    `forward(input, hx=None, *, lengths=None)` as of `StableRNN`.
    """

    _not_2d_or_3d = "GRU: Expected input to be 2D or 3D, got {}D instead"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        stability: Stability | None = Certified(),
        plan: Plan = Recurrent(),
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            stability=stability,
            plan=plan,
            backend=backend,
            **kwargs,
        )


class StableLSTM(StableRNNBase):
    """Drop-in replacement of `torch.nn.LSTM` (gate order i, f, g, o; `proj_size` as there).

    Arguments, parameter names, shapes and errors are those of `nn.LSTM`; keyword-only extras:

    - `stability`: `Certified(...)` (default: torch's initialization, then projected), `Cascade(...)`, `ForgetCap(f)` (the cell clamps its
      forget gate at f), or None (plain weights)
    - `plan`: `Recurrent()` (default), `Windowed(k)`, `Chunked(chunk, warmup)`, `Verified(...)`, `Scanned()`; may be set later
    - `backend`: "auto" (default), "cuda", "triton", "cpu", "reference", "torch"

    `forward(input, hx=None, *, lengths=None)`: input (T, B, I), (B, T, I) with batch_first, (T, I) or a PackedSequence; hx = (h_0, c_0)
    of shapes (L*D, B, P) and (L*D, B, H); lengths (B,) integers on the input's device for padded input of mixed lengths: outputs past
    a length are zero, final states and the reverse direction are those of each sequence's own end. Returns output (T, B, D*P) and
    (h_n, c_n).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        stability: Stability | None = Certified(),
        plan: Plan = Recurrent(),
        backend: str = "auto",
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            stability=stability,
            plan=plan,
            backend=backend,
        )

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    # nn.LSTM's own have other signatures than its base's, too
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        if isinstance(input, Proxy):
            return self._leaf(input, hx, lengths=lengths)
        if isinstance(input, PackedSequence):
            hx = None if hx is None else pair(hx, None, input.sorted_indices is None)
        else:
            if input.dim() not in (2, 3):
                raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
            hx = None if hx is None else pair(hx, input.dim())
        return self._forward(input, hx, lengths)
