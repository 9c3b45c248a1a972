"""The backends of the recurrence: the one that runs a problem, and the table that `stable_rnn.backends()` gives."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ... import _native
from .. import cuda_device
from ..backends import Backends, requested
from . import cuda, native, reference, triton
from .problem import Problem

RECURRENCE = Backends("recurrence", "problem", reference, cuda=cuda, triton=triton, cpu=native)


class Backend(NamedTuple):
    name: str
    available: bool
    reason: str


def choose(p: Problem, x: Tensor, w_hh: Tensor, w_hr: Tensor | None) -> ModuleType:
    """The module (with `forward`, `backward`, `windowed_backward`) that runs this problem on tensors like x."""
    name = requested(p.backend)
    if name == "torch":
        raise ValueError(
            "backend 'torch' runs whole Recurrent() stacks without a clamp only; this problem needs one of "
            "auto, cuda, triton, cpu, reference"
        )
    return RECURRENCE.choose(name, x.device, p, x, w_hh, w_hr)


_TILES_OF_BFLOAT16 = _native.lib is not None and _native.lib.cpu_features()["amx_bfloat16"]
SHORT, FEW, NARROW = 8, 8, 64  # steps; rows; units
SMALL, WORK = 1 << 13, 1 << 20  # of all steps but the first: a single row's states; multiply-adds


def leave_to_torch(x: Tensor, cell: str, steps: int | None, batch: int, hidden: int) -> bool:
    """Whether `auto` gives a plain recurrence of so many steps (None: packed) to torch's own.

    Always: other devices, dtypes without a kernel here, no compiled module. On GPUs cuDNN keeps every plain recurrence until the kernels
    here are measured against it. On CPUs torch takes less time for a few steps. Its RNN is a loop, faster while its products are small,
    but for a single step of a batch without gradients. oneDNN's LSTM is faster with few units, trained in float32 or for inference of more
    than one step; in float32 inference also for batches. Any LSTM inference in bfloat16 goes there, too, where the machine has tiles of
    that (AMX): the kernels here that use them (instruction set `amx`) have not been measured."""
    if _native.lib is None or not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16):
        return True
    if steps is None or forward_ad._current_level >= 0:  # oneDNN has no forward mode
        return False
    if cell == "lstm":
        if torch.is_grad_enabled():
            return x.dtype is torch.float32 and steps <= SHORT and hidden <= NARROW
        if steps == 1:
            return False
        if x.dtype is torch.float32:
            return steps <= SHORT and (batch >= FEW or hidden <= NARROW)
        few = native.MULTIPLIES_BFLOAT16 and steps <= 2 * SHORT and hidden < 2 * NARROW
        return _TILES_OF_BFLOAT16 or few
    if cell not in ("rnn_tanh", "rnn_relu") or x.dtype is not torch.float32 or steps > SHORT:
        return False
    small = (steps - 1) * batch * hidden * hidden <= WORK
    if torch.is_grad_enabled():
        return small
    return (steps - 1) * hidden <= SMALL if batch == 1 else steps > 1 and small


def backends() -> list[Backend]:
    """Every backend, whether it can run here, and why or why not."""
    gpu = torch.empty(0, device="cuda") if torch.cuda.is_available() else None
    rows = [
        _on_gpu("cuda", gpu, "compiled CUDA kernels; float32, float16, bfloat16"),
        _on_gpu("triton", gpu, "kernels that Triton compiles at first use; float32, float16, bfloat16"),
    ]
    return rows + [
        Backend("cpu", _native.lib is not None, _native.reason or "compiled C++ kernels; float32, bfloat16"),
        Backend("torch", True, "torch's own recurrence, for plain Recurrent() stacks"),
        Backend("reference", True, "plain torch, any dtype and device, slow"),
    ]


def _on_gpu(name: str, gpu: Tensor | None, what: str) -> Backend:
    able, reason = RECURRENCE.kernels[name].can_run(None, torch.empty(0) if gpu is None else gpu)
    if gpu is None:
        no_driver = cuda_device.limits(0)[1] if name == "cuda" and cuda_device.lib else ""
        reason = no_driver or reason.replace("the tensors are on cpu", "torch finds none here")
    return Backend(name, able, what if able else reason)
