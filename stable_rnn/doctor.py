"""`stable-rnn doctor`: what is here, what is not, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import _native
from ._errors import printable
from ._version import __version__
from .cells import CELLS
from .ops import cuda_device
from .ops.backends import NAMES
from .ops.kernel_args import DTYPES, TF32
from .ops.recurrence import cuda, policy
from .ops.recurrence.backends import backends
from .ops.recurrence.problem import Problem
from .plans import Verified
from .precision import tf32_allowed

EXPLAIN = {
    "cuda": "Fused kernels for NVIDIA GPUs from sm_80 (A100) on, every plan, float32, float16 and bfloat16. Missing: install from source "
    "with nvcc at hand and STABLE_RNN_CUDA=on; an older driver or GPU is served by triton.",
    "triton": "GPU kernels that Triton compiles at first use, for NVIDIA from sm_75 on and AMD: no nvcc needed, but once gcc or clang, "
    "for Triton's driver. Missing: pip install triton.",
    "cpu": "Compiled C++ kernels, every plan, float32 and bfloat16. Missing after an install with STABLE_RNN_NATIVE=off: install again "
    "without it, with a C++17 compiler at hand. In a source tree: make build.",
    "torch": "torch's own recurrence (oneDNN, cuDNN): plan Recurrent() without a clamped forget gate, where it is the faster one.",
    "reference": "Plain torch operations: every op, plan and dtype, any device, double backward. Slow; the others are tested against it.",
}
WIDE = 2000  # characters of one fact, such as why a binary does not load

Shape = tuple[str, int, int, str]  # cell, hidden size, lanes, dtype
SHAPES: list[Shape] = [
    ("lstm", hidden, lanes, "bfloat16") for hidden in (128, 256, 512, 1024) for lanes in (1, 16, 512)
]
CHOICES: list[Shape] = [("lstm", hidden, batch, "float32") for hidden in (128, 512) for batch in (1, 16)]
LENGTHS = (1024, 8192, 65536)  # T
STEPS = LENGTHS[0]  # of predicted times
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))
H100, H100_CLOCK = (90, 132, 227 * 1024, 16), 1.755e9  # `CudaLimits`; Hz


def doctor(options: argparse.Namespace) -> None:
    """Print versions, threads, GPU state and the table of backends; `--explain` also what each is for, and the kernels of shapes."""
    console = Console(highlight=False)
    facts = Table("", "", show_header=False, box=None)
    for name, value in _facts().items():
        facts.add_row(name, Text(printable(value, WIDE)))
    console.print(facts)

    table = Table("backend", "runs here", "why", title="Backends", title_justify="left")
    for backend in backends():
        mark = "[green]yes[/]" if backend.available else "[yellow]no[/]"
        table.add_row(backend.name, mark, Text(printable(backend.reason, WIDE)))
        if options.explain:
            table.add_row("", "", f"[dim]{EXPLAIN[backend.name]}[/]", end_section=True)
    console.print(table)
    if options.explain:
        console.print(
            "One of them is forced with the argument backend= or the environment variable STABLE_RNN_BACKEND; it then raises, "
            "with the reason, where it cannot run a problem.\nSTABLE_RNN_NATIVE=off: when installing, do not compile; when "
            "running, do not load the compiled module.",
            soft_wrap=True,
        )
    if options.explain or options.shape:
        _print_shapes(console, options.shape or SHAPES)
        _print_choices(console, options.shape or CHOICES)


def _print_shapes(console: Console, shapes: list[Shape]) -> None:
    """Which CUDA kernel each shape gets and what it should take, on this machine's GPU or, without one, on an H100."""
    if cuda_device.lib is None:
        console.print("\nWhich CUDA kernel a shape gets, and its predicted time: they are not built in.")
        return
    limits, _ = cuda_device.limits(0)
    if limits is None:
        limits, clock, where = H100, H100_CLOCK, "an H100, for there is no GPU here"
    else:
        clock, where = cuda_device.clock(0), printable(torch.cuda.get_device_name())
    console.print(
        f"\nCUDA kernels on {where}. Times are predicted, not measured: {clock / 1e9:.4g} GHz, and the constants of "
        f"csrc/include/stable_rnn/step_costs.h ({cuda_device.lib.step_costs_source}).",
        soft_wrap=True,
        markup=False,
    )
    table = Table("cell, H, lanes, dtype", "", "team and tile", "operations, bytes a step", "predicted")
    for cell, hidden, lanes, dtype in shapes:
        kind = DTYPES.get(getattr(torch, dtype))
        kind = TF32 if dtype == "float32" and tf32_allowed() else kind
        for backward in (False, True):
            said = [f"torch or the reference: no kernel takes {dtype}"]
            if kind is not None:
                said = _kernel(limits, clock, backward, cell, kind, hidden, lanes)
            name = f"{cell}, {hidden}, {lanes}, {dtype}" if not backward else ""
            table.add_row(name, "backward" if backward else "forward", *said)
    console.print(table)


def _kernel(limits: tuple[int, ...], clock: float, *shape: Any) -> list[str]:
    """The last columns of a row: tiling, operations and bytes, time."""
    found = cuda.tiling(limits, *shape)
    team = cuda.describe(found)
    if not found.get("blocks"):  # no kernel, or nothing to do
        return [team]
    operations, moved, weights = map(_si, cuda.numbers(*shape))
    step = found["clocks"] / clock
    streamed = f"; W from L2 for each tile: {weights}B" * (found["place"] == cuda.L2)
    return [team, f"{operations.strip()}, {moved}B{streamed}", f"{_si(step)}s; T = {STEPS}: {_si(step * STEPS)}s"]


def _si(value: float) -> str:
    """Three digits and the unit's prefix."""
    factor, prefix = next((f, p) for f, p in PREFIXES if value >= f or p == "n")
    return f"{value / factor:.3g} {prefix}"


def _print_choices(console: Console, shapes: list[Shape]) -> None:
    """What `Verified()` begins with, by the cost model of this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = policy.DEVICES[device].source
    console.print(
        f"\nWhat Verified() begins with on this {device} (constants of the cost model: {known}):", soft_wrap=True
    )
    table = Table("cell, H, rows of the batch, dtype", "T", "choice")
    for cell, hidden, batch, dtype in shapes:
        kind, weights = getattr(torch, dtype), CELLS[cell].gates * hidden * hidden
        for steps in LENGTHS:
            p = Problem(cell, steps, batch, **Verified().numbers(torch.empty(0, dtype=kind, device=device)))
            name = f"{cell}, {hidden}, {batch}, {dtype}" if steps == LENGTHS[0] else ""
            table.add_row(name, str(steps), policy.describe(p, batch, weights, device))
    console.print(table)


def _facts() -> dict[str, str]:
    return {
        "stable_rnn": __version__,
        "compiled module": f"loaded; {_features(_native.lib)}" if _native.lib else f"none: {_native.reason}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "cuda": f"{'kernels built in' if cuda_device.lib else 'kernels not built in'}; {_gpu()}",
        "STABLE_RNN_BACKEND": _forced(),
    }


def _forced() -> str:
    name, allowed = os.environ.get("STABLE_RNN_BACKEND", "not set"), ", ".join(NAMES)
    return (
        name
        if name in (*NAMES, "not set")
        else f"'{printable(name)}', which is no backend: runs will fail; allowed are {allowed}"
    )


def _features(lib: ModuleType) -> str:
    found = lib.cpu_features()
    idle = found["amx_bfloat16"] and found["isa"] != "amx"
    amx = " (the processor has AMX; STABLE_RNN_ISA=amx takes its kernels, which are not measured yet)" if idle else ""
    return f"instruction set in use: {found['isa']}{amx}; {'OpenMP' if found['openmp'] else 'one thread, no OpenMP'}"


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
