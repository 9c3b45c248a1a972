"""`stable-rnn doctor`: what is here, what is not, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
from rich.console import Console
from rich.table import Table

from . import _native
from ._version import __version__
from .dispatch import backends

EXPLAIN = {
    "cuda": "Fused kernels for NVIDIA GPUs.",
    "triton": "GPU kernels that Triton compiles at first use.",
    "cpu": "Compiled C++ kernels, every plan, float32 and bfloat16. Missing after an install with STABLE_RNN_NATIVE=off: install again "
    "without it, with a C++17 compiler at hand. In a source tree: make build.",
    "torch": "torch's own recurrence (oneDNN, cuDNN): plan Recurrent() without a clamped forget gate, where it is the faster one.",
    "reference": "Plain torch operations: every op, plan and dtype, any device, double backward. Slow; the others are tested against it.",
}


def doctor(explain: bool = False) -> None:
    """Print versions, threads, GPU state and the table of backends."""
    console = Console(highlight=False)
    facts = Table("", "", show_header=False, box=None)
    for name, value in _facts().items():
        facts.add_row(name, value)
    console.print(facts)

    table = Table("backend", "runs here", "why", title="Backends", title_justify="left")
    for backend in backends():
        mark = "[green]yes[/]" if backend.available else "[yellow]no[/]"
        table.add_row(backend.name, mark, backend.reason)
        if explain:
            table.add_row("", "", f"[dim]{EXPLAIN[backend.name]}[/]", end_section=True)
    console.print(table)
    if explain:
        console.print(
            "One of them is forced with the argument backend= or the environment variable STABLE_RNN_BACKEND; it then raises, "
            "with the reason, where it cannot run a problem.\nSTABLE_RNN_NATIVE=off: when installing, do not compile; when "
            "running, do not load the compiled module.",
            soft_wrap=True,
        )


def _facts() -> dict[str, str]:
    return {
        "stable_rnn": __version__,
        "compiled module": f"loaded; {_features()}" if _native.lib else f"none: {_native.reason}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "cuda": f"not built in this version; {_gpu()}",
        "STABLE_RNN_BACKEND": os.environ.get("STABLE_RNN_BACKEND", "not set"),
    }


def _features() -> str:
    found = _native.lib.cpu_features()
    return f"instruction set in use: {found['isa']}; {'OpenMP' if found['openmp'] else 'one thread, no OpenMP'}"


def _gpu() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch for CUDA {torch.version.cuda} finds no usable GPU or driver"
    return f"torch for CUDA {torch.version.cuda} sees {torch.cuda.get_device_name()}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
