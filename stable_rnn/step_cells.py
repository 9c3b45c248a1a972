"""`StableRNNCell`, `StableGRUCell` and `StableLSTMCell`: torch's cells with a stable set, and one call into C++ per step on the CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import _VF, Tensor, nn
from torch.fx import Proxy

from . import watch
from .bookkeeping import Bookkeeping
from .cells import MODES, NOTHING
from .common import autocast_dtype, has_values
from .ops.backends import requested
from .ops.recurrence import native
from .ops.recurrence.function import layer
from .ops.recurrence.problem import Problem
from .stability import Certificate, Certified, Stability, certificate
from .validate import cell_pair, check_state, check_weight, describe

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
EXACT = (torch.float32, torch.float64)  # a narrow dtype would be rounded to after each operation


class StableCellBase(Bookkeeping, nn.RNNCellBase):
    """What the cells share. For certificates and projections a cell is a stack of one layer, under the names of `nn.RNNBase`."""

    num_layers, bidirectional, proj_size, batch_first = 1, False, 0, False
    nonlinearity: str  # of the RNN

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Any,
        dtype: Any,
        stability: Stability | None,
        backend: str,
    ) -> None:
        self._adopt(mode, stability, backend)
        super().__init__(input_size, hidden_size, bias, MODES[mode].gates, device=device, dtype=dtype)

    _adopted = ("mode", "_cell", "stability", "backend")

    def _adopt(self, mode: str, stability: Stability | None, backend: str) -> None:
        """Sets `_adopted`, all that a stable cell holds beyond torch's; `stabilize` calls it on cells that torch has made."""
        self.mode, self._cell = mode, mode.lower()
        self.stability, self.backend = stability, backend

    def reset_parameters(self) -> None:
        """torch's initialization, then the projection into the stable set."""
        if self.stability is not None:
            self.stability.projected_names(self)  # raises for computed weights, before anything changes
        super().reset_parameters()
        if self.stability is not None and has_values(self.weight_hh):
            self.project_()

    weight_ih_l0 = property(lambda self: self.weight_ih)
    weight_hh_l0 = property(lambda self: self.weight_hh)
    bias_ih_l0 = property(lambda self: self.bias_ih)
    bias_hh_l0 = property(lambda self: self.bias_hh)

    def project_(self, certify: bool = True) -> StableCellBase:
        """As `StableLSTM.project_`."""
        if self.stability is None:
            raise ValueError(
                "project_: this cell has stability=None; give it a stable set first, cell.stability = Certified()"
            )
        self.stability.project_(self, certify=certify)
        watch.settled(self)
        return self

    def certificate(self, input: Tensor | None = None, **options: Any) -> Certificate:
        """As `StableLSTM.certificate`; `input` (T, B, I) are the steps' inputs."""
        return certificate(self, input, **options)

    def _plain(self, device: str) -> nn.RNNCellBase:
        if self.mode == "LSTM":
            return nn.LSTMCell(self.input_size, self.hidden_size, self.bias, device=device)
        if self.mode == "GRU":
            return nn.GRUCell(self.input_size, self.hidden_size, self.bias, device=device)
        return nn.RNNCell(self.input_size, self.hidden_size, self.bias, self.nonlinearity, device=device)

    def _step(self, x: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One step: x (B, I), h (B, H), c (B, H) or None."""
        if self.training:
            watch.trains(self)
        own = self._parameters
        weights: tuple[Any, ...] = tuple([own[name] if name in own else getattr(self, name) for name in _WEIGHTS])
        w_ih, w_hh, b_ih, b_hh = weights
        backend = requested(self.backend)
        if backend in ("auto", "cpu", "torch") and native.plain_step(self._cell, x, h, c, weights):
            trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*weights, x, h, c))
            if not trains and native.can_run(None, x)[0]:
                return native.cell_step(self._cell, x, h, c, weights, self._cap)
            if trains and backend != "cpu" and (self._cap == 1 or x.dtype in EXACT):
                return self._torch_step(x, h, c, weights)
        kind = autocast_dtype(x)
        self._check_tensors(x, h, c, kind is not None)
        if kind is not None:
            # the results have the dtypes of torch's cells, whose c, or a GRU's h, is added to in its own, but on GPUs
            kept = h if MODES[self.mode].carries else c
            out = torch.promote_types(kind, kept.dtype) if kept is not None and x.device.type == "cpu" else kind
            inner = w_hh.dtype
            with torch.autocast(x.device.type, enabled=False):
                h_new, c_new = self._step(x.to(inner), h.to(inner), None if c is None else c.to(inner))
            return h_new.to(out), None if c_new is None else c_new.to(out)
        if backend == "torch":  # which has no such op; its cell is the reference's
            backend = "cpu" if native.can_run(None, x)[0] else "reference"
        bias, hidden_bias = MODES[self.mode].biases(b_ih, b_hh)
        p = Problem(self._cell, 1, x.shape[0], cap=self._cap, backend=backend)
        w_hh = self._trained(w_hh)
        _, h, c, _ = layer(x, w_ih, bias, w_hh, None, hidden_bias, h, c, None, None, None, p)
        return h, c

    def _torch_step(self, x: Tensor, h: Tensor, c: Tensor | None, weights: tuple) -> tuple[Tensor, Tensor | None]:
        """A step of a training loop by torch's own cell, or with a clamp, which that has not, by such operations: they take less time
        than a Function around our kernel (docs/measurements/cpu.md)."""
        spec, (w_ih, w_hh, b_ih, b_hh) = MODES[self.mode], weights
        w_hh = self._trained(w_hh)
        if self._cap == 1:
            found = getattr(_VF, self._cell + "_cell")(x, h if c is None else (h, c), w_ih, w_hh, b_ih, b_hh)
            return found if spec.has_cell else (found, None)
        h, c, _ = spec.step(
            F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh), h, NOTHING.c if c is None else c, self._cap
        )
        return h, c if spec.has_cell else None

    def _check(self, x: Tensor, *states: Tensor) -> None:
        """torch's own shape errors."""
        if x.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.shape[1]} expected {self.input_size}")
        expected = x.shape[0], self.hidden_size
        for number, h in enumerate(states):
            if h.shape == expected:
                continue
            if h.shape[0] != x.shape[0]:
                raise RuntimeError(
                    f"Input batch size {x.shape[0]} doesn't match hidden{number} batch size {h.shape[0]}"
                )
            if h.dim() < 2:
                raise IndexError(
                    f"hidden{number} is {describe(h)}; expected {expected}"
                )  # the exception of torch's hidden.size(1)
            raise RuntimeError(
                f"hidden{number} has inconsistent hidden_size: got {h.shape[1]}, expected {self.hidden_size}"
            )
        w: Any = self._parameters.get("weight_ih")
        w = self.weight_ih if w is None else w
        if x.dtype != w.dtype and autocast_dtype(x) is None:
            raise RuntimeError(f"{type(self).__name__}: input dtype {x.dtype} does not match weight dtype {w.dtype}")

    def _check_tensors(self, x: Tensor, h: Tensor, c: Tensor | None, cast: bool) -> None:
        """Weights and states are what x needs; with `cast`, after autocast's conversions."""
        rows = self.hidden_size * MODES[self.mode].gates
        shapes = {"weight_ih": (rows, self.input_size), "weight_hh": (rows, self.hidden_size)}
        for name, shape in (shapes | dict.fromkeys(("bias_ih", "bias_hh"), (rows,)) if self.bias else shapes).items():
            check_weight(name, getattr(self, name), shape, x, cast)
        for number, state in enumerate((h, c)):
            if state is not None and not cast:
                check_state(f"hidden{number}", state, x)


class OneStateCellBase(StableCellBase):
    """What the cells share whose state is h alone."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return self._leaf(input, hx)
        name = self.mode.partition("_")[0] + "Cell"  # torch's
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is not None and not isinstance(hx, Tensor):
            raise AttributeError(
                f"{name}: hx must be a tensor, got {describe(hx)}"
            )  # the exception of torch's hx.dim()
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        h = x.new_zeros(x.shape[0], self.hidden_size) if hx is None else hx if batched else hx.unsqueeze(0)
        self._check(x, h)
        h, _ = self._step(x, h, None)
        return h if batched else h.squeeze(0)


class StableRNNCell(OneStateCellBase):
    """Drop-in replacement of `torch.nn.RNNCell`: h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu.

    input (B, I) or (I,), hx (B, H) or (H,) or None -> h' of hx's shape. Keyword-only extras `stability`, `backend` as `StableRNN`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        stability: Stability | None = Certified(),
        backend: str = "auto",
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity: {nonlinearity}")
        self.nonlinearity = nonlinearity
        super().__init__(
            "RNN_" + nonlinearity.upper(), input_size, hidden_size, bias, device, dtype, stability, backend
        )


class StableGRUCell(OneStateCellBase):
    """Drop-in replacement of `torch.nn.GRUCell` (gate order r, z, n).

    input (B, I) or (I,), hx (B, H) or (H,) or None -> h' of hx's shape. Keyword-only extras `stability`, `backend` as `StableGRU`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        stability: Stability | None = Certified(),
        backend: str = "auto",
    ) -> None:
        super().__init__("GRU", input_size, hidden_size, bias, device, dtype, stability, backend)


class StableLSTMCell(StableCellBase):
    """Drop-in replacement of `torch.nn.LSTMCell` (gate order i, f, g, o).

    input (B, I) or (I,), hx = (h, c) of (B, H) or (H,) or None -> (h', c'). Keyword-only extras `stability`, `backend` as `StableLSTM`.
    On the CPU a step without gradients is one call into C++; step by step it gives bitwise what a full pass of the same backend gives for
    the same input projection. With gradients it is torch's own, unless `backend="cpu"` asks for ours."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        stability: Stability | None = Certified(),
        backend: str = "auto",
    ) -> None:
        super().__init__("LSTM", input_size, hidden_size, bias, device, dtype, stability, backend)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(input, Proxy):
            return self._leaf(input, hx)
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            h = c = x.new_zeros(x.shape[0], self.hidden_size)
        else:
            h, c = cell_pair(hx, batched)
            if not batched:
                h, c = h.unsqueeze(0), c.unsqueeze(0)
        self._check(x, h, c)
        h, c = cast("tuple[Tensor, Tensor]", self._step(x, h, c))  # given a c, it gives one
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))
