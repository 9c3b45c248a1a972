"""`StableRNN` and `StableLSTM`: `nn.RNN` and `nn.LSTM` with a plan and a stable set of weights. (`gru.py` has `StableGRU`.)"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from .base import OneStateBase, StableRNNBase
from .plans import PlanLike, Recurrent
from .stability import Certified, Stability
from .validate import pair


class StableRNN(OneStateBase):
    """Drop-in replacement of `torch.nn.RNN`: h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu.

    Arguments, parameter names, shapes and errors are those of `nn.RNN`; keyword-only extras:

    - `stability`: `Certified(...)` (default: torch's initialization, then projected), `Cascade(...)`, or None (plain weights)
    - `plan`: `Recurrent()` (default), `Windowed(k)`, `Chunked(chunk, warmup)`, `Verified(...)`, `Scanned()`; a list of one per
      layer, or a dict by layer or (layer, direction); may be set later
    - `backend`: "auto" (default), "cuda", "triton", "cpu", "reference", "torch"

    `forward(input, hx=None, *, lengths=None, resets=None)`: input (T, B, I), (B, T, I) with batch_first, (T, I) or a PackedSequence; hx
    (L*D, B, H); lengths (B,) integers on the input's device for padded input of mixed lengths: outputs past a length are zero, final
    states and the reverse direction are those of each sequence's own end; resets as for `StableLSTM`. Returns output (T, B, D*H) and
    h_n (L*D, B, H).
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
        plan: PlanLike = Recurrent(),
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


class StableLSTM(StableRNNBase):
    """Drop-in replacement of `torch.nn.LSTM` (gate order i, f, g, o; `proj_size` as there).

    Arguments, parameter names, shapes and errors are those of `nn.LSTM`; keyword-only extras:

    - `stability`: `Certified(...)` (default: torch's initialization, then projected), `Cascade(...)`, `ForgetCap(f)` (the cell clamps its
      forget gate at f), or None (plain weights)
    - `plan`: `Recurrent()` (default), `Windowed(k)`, `Chunked(chunk, warmup)`, `Verified(...)`, `Scanned()`; a list of one per
      layer, or a dict by layer or (layer, direction); may be set later
    - `backend`: "auto" (default), "cuda", "triton", "cpu", "reference", "torch"

    `forward(input, hx=None, *, lengths=None, resets=None)`: input (T, B, I), (B, T, I) with batch_first, (T, I) or a PackedSequence; hx =
    (h_0, c_0) of shapes (L*D, B, P) and (L*D, B, H); lengths (B,) integers on the input's device for padded input of mixed lengths:
    outputs past a length are zero, final states and the reverse direction are those of each sequence's own end. resets (T, B), (B, T)
    or (T,) booleans: a new sequence begins at these times, for every layer and direction; the result is that of running the pieces apart,
    each from a zero state, and no gradient passes from one to the next. hx counts where no reset stands at the first time, final states
    are those of the pieces that a direction visits last. Not with a PackedSequence. Returns output (T, B, D*P) and (h_n, c_n).
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
        plan: PlanLike = Recurrent(),
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
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        if isinstance(input, Proxy):
            return self._leaf(input, hx, lengths=lengths, resets=resets)
        if self._sequence is not None:
            return self._shared(input, hx, lengths, resets)
        if isinstance(input, PackedSequence):
            hx = None if hx is None else pair(hx, None, input.sorted_indices is None)
        else:
            if input.dim() not in (2, 3):
                raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
            hx = None if hx is None else pair(hx, input.dim())
        return self._forward(input, hx, lengths, resets)
