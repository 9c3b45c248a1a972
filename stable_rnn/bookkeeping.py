"""What stable modules and cells do beside computing: checked attributes, state dicts, leaving training, the way back to torch."""

from __future__ import annotations

import warnings
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from . import watch
from .cells import MODES
from .ops.backends import check_name
from .plans import plan_of
from .stability import Stability, check_stability
from .stability.weights import CLAMP, clamp_text, saved_clamp


class Bookkeeping(nn.Module):
    """Shared by the modules and the cells, before torch's class in the order of bases."""

    mode: str  # torch's: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU"
    stability: Stability | None
    backend: str
    num_layers: int  # of modules that have a plan
    bidirectional: bool
    hidden_size: int
    _adopted: tuple[str, ...]  # the attributes that torch's class doesn't have

    def __setattr__(self, name: str, value: Any) -> None:
        """`plan`, `stability` and `backend` are checked whenever they are set."""
        if name == "plan":
            value = plan_of(value, self.num_layers, 1 + self.bidirectional)
        elif name == "stability":
            check_stability(value, self.mode, getattr(self, "proj_size", 0))
        elif name == "backend":
            check_name(value)
        super().__setattr__(name, value)

    @property
    def _cap(self) -> float:
        """What the cell clamps its forget gate at; 1.0 means no clamp."""
        cell = MODES[self.mode]
        return 1.0 if self.stability is None or cell.forgets is None else self.stability.cap_of(cell.name)

    def _trained(self, w_hh: Tensor) -> Tensor:
        """W_hh as the forward pass takes it; the stable set says what of it trains."""
        if (
            self.stability is None or not torch.is_grad_enabled() or torch.jit.is_tracing()
        ):  # a trace is checked without
            return w_hh
        return self.stability.trained(w_hh, self.hidden_size)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`. On the way to eval mode, a module that promises a certified set and was trained without a projection
        since says so, once."""
        if self.training and not mode:
            watch.leaves_training(self)
        return super().train(mode)

    # ---- state dicts: torch's keys, and the clamp in the metadata

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})[CLAMP] = self._cap

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any) -> None:
        saved = saved_clamp(local_metadata, self._cap)
        if saved != self._cap and any(key.startswith(prefix) for key in state_dict):
            name = prefix[:-1] or f"this {type(self).__name__}"
            warnings.warn(
                f"load_state_dict: {name} computes another function with these weights: its cell has {clamp_text(self._cap)} "
                f"(stability={self.stability}), theirs had {clamp_text(saved)}",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        watch.settled(self)

    # ---- the way back to torch

    def to_torch(self, allow_change: bool = False) -> nn.Module:
        """The plain module or cell of torch with a copy of these weights, for ONNX, TorchScript and quantization. Weights that are one
        Parameter here are one there; each keeps its dtype, device and `requires_grad`. The plan is dropped. For a whole model:
        `stable_rnn.unstabilize`.

        A clamped cell computes another function than torch's: `ValueError` unless `allow_change`."""
        if self._cap < 1 and not allow_change:
            raise ValueError(
                f"to_torch: the forget gate is clamped at {self._cap}, which torch's cell does not do; "
                "pass allow_change=True to drop the clamp"
            )
        plain, copies = self._plain(device="meta"), {}
        for name, _ in plain.named_parameters():
            own = getattr(self, name)  # computed, where it is parametrized
            if own not in copies:
                copies[own] = nn.Parameter(own.detach().clone(), own.requires_grad)
            setattr(plain, name, copies[own])
        if isinstance(plain, nn.RNNBase):
            plain.flatten_parameters()
        return plain.train(self.training)

    def _plain(self, device: str) -> nn.Module:
        """torch's module of the same shape, with fresh weights."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}; give it the plain module, module.to_torch(), or "
            "the whole model, unstabilize(model)"
        )

    def _leaf(self, *args: Any, **named: Any) -> Proxy:
        """The call of this module as one node of a torch.fx graph: torch.fx does so for torch's own modules, and goes into others."""
        tracer = next(arg for arg in args if isinstance(arg, Proxy)).tracer
        path = tracer.path_of_module(self) if isinstance(tracer, Tracer) else ""
        if not path or self._forward_hooks or self._forward_pre_hooks:
            why = "its forward hooks would be traced and run again" if path else "it is no graph of operations"
            raise RuntimeError(
                f"torch.fx cannot trace through {type(self).__name__}: {why}; trace a model that holds it, with a Tracer "
                "whose is_leaf_module is true for it, or trace unstabilize(model)"
            )
        while args and args[-1] is None:
            args = args[:-1]
        return tracer.create_proxy(
            "call_module", path, args, {name: value for name, value in named.items() if value is not None}
        )
