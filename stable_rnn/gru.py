"""`StableGRU`: `nn.GRU` with a plan and a stable set of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .base import OneStateBase
from .common import autocast_dtype
from .plans import PlanLike, Recurrent
from .stability import Certified, Stability


class StableGRU(OneStateBase):
    """Drop-in replacement of `torch.nn.GRU` (gate order r, z, n; the reset gate comes after the product):

        r, z = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr), sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn));   h_t = (1 - z) n + z h_{t-1}

    Arguments, parameter names, shapes and errors are those of `nn.GRU`; keyword-only extras:

    - `stability`: `Certified(...)` (default: torch's initialization, then projected), `Cascade(...)`, `ForgetCap(f)` (the cell clamps its
      update gate z, which keeps h, at f), or None (plain weights)
    - `plan`, `backend` as for `StableLSTM`

    `forward(input, hx=None, *, lengths=None, resets=None)` as of `StableRNN`.
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
        plan: PlanLike = Recurrent(),
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

    def _forward(
        self, input: Tensor | PackedSequence, hx: tuple | None, *rest: Any, **options: Any
    ) -> tuple[Tensor | PackedSequence, tuple]:
        found = self._wide(input.data if isinstance(input, PackedSequence) else input, None if hx is None else hx[0])
        if found is None:
            return super()._forward(input, hx, *rest, **options)
        inner, out = found
        with torch.autocast("cpu", enabled=False):
            hx = None if hx is None else (hx[0].to(inner), None)
            y, hidden = super()._forward(input.to(inner), hx, *rest, **options)
        return y.to(out), (hidden[0].to(out), None)

    def _shared(self, input: Any, hx: Any, *rest: Any) -> tuple[Tensor, Any]:
        found = self._wide(input, hx)
        if found is None:
            return super()._shared(input, hx, *rest)
        inner, out = found
        with torch.autocast("cpu", enabled=False):
            hx = hx.to(inner) if isinstance(hx, Tensor) else hx
            y, h = super()._shared(input.to(inner), hx, *rest)
        return y.to(out), h.to(out)

    def _wide(self, x: Any, h: Any) -> tuple[torch.dtype, torch.dtype] | None:
        """Under autocast h keeps its dtype on CPUs, as in nn.GRU; so does the arithmetic, in that of the weights: this one, and h's."""
        kind = autocast_dtype(x) if isinstance(x, Tensor) and x.is_cpu else None
        if kind is None:
            return None
        state = h if isinstance(h, Tensor) else x
        return self.weight_hh_l0.dtype, torch.promote_types(kind, state.dtype)
