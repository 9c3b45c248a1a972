"""Which code runs an op: one visible rule, the same for every op.

`auto` tries, on GPU tensors, the CUDA kernels and then Triton's, on CPU tensors the compiled C++ kernels; then the reference in plain
torch. An argument `backend=`, or the environment variable `STABLE_RNN_BACKEND`, forces one, which then raises with the reason if it
cannot run the problem. The backend `torch` (the framework's own recurrence) serves whole plain stacks and is picked by the modules,
see `base.py`.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import Any

import torch

NAMES = ("auto", "cuda", "triton", "cpu", "reference", "torch")
GPU, CPU = ("cuda", "triton"), ("cpu",)  # what `auto` tries before the reference


def check_name(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")
    return name


def requested(name: str = "auto") -> str:
    """The backend asked for by argument, else by environment, else `auto`."""
    if name != "auto":
        return name
    forced = os.environ.get("STABLE_RNN_BACKEND", "auto")
    if forced not in NAMES:
        raise ValueError(f"STABLE_RNN_BACKEND must be one of {', '.join(NAMES)}; got {forced!r}")
    return forced


class Backends:
    """The code of one op: `op` names it in messages, `problem` what it is given; the reference, and the kernels by their backends' names.

    Each of the kernels' modules has `can_run(*problem)`, which gives whether it can and, if not, the reason."""

    def __init__(self, op: str, problem: str, reference: ModuleType, **kernels: ModuleType) -> None:
        self.op, self.problem, self.reference, self.kernels = op, problem, reference, kernels
        self._warned: set[str] = set()

    def find(self, name: str, device: torch.device, *problem: Any) -> tuple[ModuleType | None, str]:
        """The kernels that run a problem on `device`, or None and why there are none: no reason where the reference is asked for."""
        if name in ("reference", "torch"):
            return None, ""
        reasons = []
        for each in (GPU if device.type == "cuda" else CPU) if name == "auto" else (name,):
            able, reason = self.kernels[each].can_run(*problem)
            if able:
                return self.kernels[each], ""
            reasons.append(reason)
        return None, "; ".join(reasons)

    def choose(self, name: str, device: torch.device, *problem: Any) -> ModuleType:
        """What runs a problem. `ValueError` where a backend is forced that cannot; one warning for each reason to run the reference."""
        found, reason = self.find(name, device, *problem)
        if reason and name != "auto":
            raise ValueError(f"backend {name!r} cannot run this {self.problem}: {reason}")
        if reason and reason not in self._warned:
            self._warned.add(reason)
            said = f"stable_rnn runs its slow reference {self.op}: {reason} (`stable-rnn doctor --explain` tells what is missing)"
            warnings.warn(said, RuntimeWarning, stacklevel=3)
        return found or self.reference
