"""Which code runs a recurrence: one visible rule.

`auto` tries, on GPU tensors, the CUDA kernels and then Triton's, on CPU tensors the compiled C++ kernels; then the reference in plain
torch. An argument `backend=`, or the environment variable `STABLE_RNN_BACKEND`, forces one, which then raises with the reason if it
cannot run the problem. The backend `torch` (the framework's own recurrence) serves whole plain stacks and is picked by the modules,
see `modules.py`.
"""
from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from .ops.recurrence import cuda, native, reference, triton
from .ops.recurrence.problem import Problem

NAMES = ("auto", "cuda", "triton", "cpu", "reference", "torch")
_RUNNERS = {"cuda": cuda, "triton": triton, "cpu": native, "reference": reference}
_GPU, _CPU = ("cuda", "triton"), ("cpu",)  # what `auto` tries before the reference
_warned: set[str] = set()


class Backend(NamedTuple):
    name: str
    available: bool
    reason: str


def backends() -> list[Backend]:
    """Every backend, whether it can run here, and why or why not."""
    gpu = torch.empty(0, device="cuda") if torch.cuda.is_available() else None
    rows = [_on_gpu("cuda", gpu, "compiled CUDA kernels; float32, float16, bfloat16"),
            _on_gpu("triton", gpu, "kernels that Triton compiles at first use; float32, float16, bfloat16")]
    return rows + [
        Backend("cpu", _native.lib is not None, _native.reason or "compiled C++ kernels; float32, bfloat16"),
        Backend("torch", True, "torch's own recurrence, for plain Recurrent() stacks"),
        Backend("reference", True, "plain torch, any dtype and device, slow"),
    ]


def _on_gpu(name: str, gpu: Tensor | None, what: str) -> Backend:
    able, reason = _RUNNERS[name].can_run(None, torch.empty(0) if gpu is None else gpu)
    if gpu is None:
        no_driver = cuda.device_limits(0)[1] if name == "cuda" and cuda.lib else ""
        reason = no_driver or reason.replace("the tensors are on cpu", "torch finds none here")
    return Backend(name, able, what if able else reason)


def check_name(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")
    return name


def requested(name: str) -> str:
    """The backend asked for by argument, else by environment, else `auto`."""
    if name != "auto":
        return name
    forced = os.environ.get("STABLE_RNN_BACKEND", "auto")
    if forced not in NAMES:
        raise ValueError(f"STABLE_RNN_BACKEND must be one of {', '.join(NAMES)}; got {forced!r}")
    return forced


def choose(p: Problem, x: Tensor, w_hh: Tensor, w_hr: Tensor | None) -> ModuleType:
    """The module (with `forward`, `backward`, `windowed_backward`) that runs this problem on tensors like x."""
    name = requested(p.backend)
    if name == "torch":
        raise ValueError("backend 'torch' runs whole Recurrent() stacks without a clamp only; this problem needs one of "
                         "auto, cuda, triton, cpu, reference")
    if name != "auto":
        able, reason = _RUNNERS[name].can_run(p, x, w_hh, w_hr)
        if not able:
            raise ValueError(f"backend {name!r} cannot run this problem: {reason}")
        return _RUNNERS[name]
    reasons = []
    for name in _GPU if x.device.type == "cuda" else _CPU:
        able, reason = _RUNNERS[name].can_run(p, x, w_hh, w_hr)
        if able:
            return _RUNNERS[name]
        reasons.append(reason)
    reason = "; ".join(reasons)
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"stable_rnn runs its slow reference recurrence: {reason}", RuntimeWarning, stacklevel=2)
    return reference


def leave_to_torch(x: Tensor) -> bool:
    """Whether `auto` gives a plain recurrence to torch's own: other devices, dtypes without a kernel here, no compiled module. On GPUs
    cuDNN keeps every plain recurrence until the kernels here are measured against it. On CPUs oneDNN is level for large batches, slower for
    small ones and packed input (benchmarks/README.md)."""
    return _native.lib is None or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16)
