"""What share of the machine's own peak each CPU kernel reaches: `python -m benchmarks.peak [--out FILE.jsonl]`.

One thread, processor time. A kernel has two numbers, operations and bytes. The machine's rates are measured in the same run, between the
kernels: the best product of the kernel's dtype (operations a second; torch's or, in float32, the kernels' own), and torch's copy of what
fits the second-level cache, and of 256 MB (bytes a second, both ways counted). Weights count once for each step of all its lanes, at the
cache's rate; tensors over all times once, at the memory's. The share is the time that the slower of both, operations or bytes, takes at
these rates, over the kernel's. LSTM, I = H."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from stable_rnn import _native
from stable_rnn._errors import UserError
from stable_rnn.ops.recurrence import native
from stable_rnn.ops.recurrence.problem import SCANNED, Inputs, Problem, WindowedInputs, backward_inputs
from stable_rnn.ops.spectral import native as spectral

from .jsonl import Log
from .speed.results import environment

GROUPS = 8  # of the cascade
K = 32  # steps of a window
BLOCK, ITERATIONS = 8, 4  # vectors and rounds of the spectral step


class Kernel(NamedTuple):
    name: str
    run: Callable[[], object]
    operations: float
    weights: float  # bytes that each step reads, over all steps
    rows: float  # bytes of tensors over all times
    dtype: torch.dtype = torch.float32


def made(p: Problem, batch: int, hidden: int, dtype: torch.dtype = torch.float32) -> Inputs:
    scale = hidden**-0.5
    return Inputs(
        torch.randn(p.steps * batch, 4 * hidden).to(dtype),
        (torch.randn(4 * hidden, hidden) * scale).to(dtype),
        None,
        None,
        torch.zeros(batch, hidden, dtype=dtype),
        torch.zeros(batch, hidden, dtype=dtype),
        None,
        None,
    )


def both(steps: int, batch: int, hidden: int, dtype: torch.dtype = torch.float32) -> list[Kernel]:
    """Forward, saving what backward needs, and backward."""
    p = Problem("lstm", steps, batch).resolved()
    given = made(p, batch, hidden, dtype)
    out = native.forward(given, p)
    dy, dh = torch.randn(steps * batch, hidden).to(dtype), torch.zeros(batch, hidden, dtype=dtype)
    back = backward_inputs(dy, dh, dh, out.y, out.saved, out.cells, given, p)
    size, name = dtype.itemsize, f"B={batch} H={hidden} T={steps} {str(dtype).removeprefix('torch.')}"
    units, matrix = steps * batch * hidden, 4 * hidden * hidden
    operations, weights = 2.0 * steps * batch * matrix, float(steps * matrix * size)
    forward_rows = units * (9 * size + 4)  # xp, saved, y; cells in float32
    backward_rows = units * (9 * size + 2 * 4)  # dy, saved, dz; cells before and after
    return [
        Kernel(f"forward {name}", partial(native.forward, given, p), operations, weights, forward_rows, dtype),
        # adjoints are float32, and so are the products with them
        Kernel(f"backward {name}", partial(native.backward, back, p), operations, weights, backward_rows),
    ]


def windows(steps: int, hidden: int) -> list[Kernel]:
    p = Problem("lstm", steps, 1, 1, K - 1).resolved()
    given, units, matrix = made(p, 1, hidden), steps * hidden, 4 * hidden * hidden
    dy, none = torch.randn(steps, hidden), torch.zeros(1, hidden)
    back = WindowedInputs(dy, none, none, *given)
    step, name = 2.0 * steps * matrix, f"k={K} H={hidden} T={steps}"
    return [
        Kernel(
            f"windows {name}", partial(native.forward, given, p, save=False), step * (K - 1), 0, 4 * units * (4 * K + 1)
        ),
        # the forward run again, the adjoints, and dW
        Kernel(
            f"windows backward {name}",
            partial(native.windowed_backward, back, p),
            step * (3 * K - 3),
            0,
            4 * units * 13 * K,
        ),
    ]


def others(hidden: int) -> list[Kernel]:
    steps, matrix = 8192, 4 * hidden * hidden
    p = Problem("lstm", steps, 1, 256, 32).resolved()
    run, lanes = 288, steps // 256  # steps of a lane
    chunks = Kernel(
        f"chunks (256, 32) B=1 H={hidden} T={steps}",
        partial(native.forward, made(p, 1, hidden), p, save=False),
        2.0 * run * lanes * matrix,
        4 * run * matrix,
        4 * run * lanes * 5 * hidden,
    )
    p = Problem("lstm", steps, 1, SCANNED)
    unit = hidden // GROUPS
    groups = tuple(range(0, hidden + 1, unit))
    below = (torch.arange(hidden) // unit)[:, None] > torch.arange(hidden) // unit
    given = made(p, 1, hidden)
    given = given._replace(w_hh=given.w_hh * below.repeat(4, 1))
    used = matrix * (GROUPS - 1) / (2 * GROUPS)
    scanned = Kernel(
        f"scanned {GROUPS} groups B=1 H={hidden} T={steps}",
        partial(native.scanned_forward, given, p, groups, False),
        2.0 * steps * used,
        0,
        4 * steps * 5 * hidden,
    )
    x, w, (h, c) = torch.randn(1, hidden), torch.randn(4 * hidden, hidden) * hidden**-0.5, torch.zeros(2, 1, hidden)
    cell = Kernel(
        f"cell step B=1 H={hidden}",
        partial(native.cell_step, "lstm", x, h, c, (w, w.clone(), None, None), 1.0),
        4.0 * matrix,
        8 * matrix,
        0,
    )
    ones = [torch.randn(hidden, hidden) * 0.1 * hidden**-0.5 for _ in range(4)]
    blocks = [torch.randn(hidden, BLOCK) for _ in ones]
    norms = Kernel(
        f"spectral step 4 x ({hidden}, {hidden}) {BLOCK} vectors {ITERATIONS} rounds",
        partial(spectral.spectral_step, ones, blocks, [1.0] * 4, 0, False, ITERATIONS, 0),
        4.0 * matrix * BLOCK * ITERATIONS,
        2 * 4 * matrix * ITERATIONS,
        0,
    )
    return [chunks, scanned, cell, norms]


def products(rows: int, hidden: int) -> list[Kernel]:
    x, w, dz = torch.randn(rows, hidden), torch.randn(4 * hidden, hidden), torch.randn(rows, 4 * hidden)
    operations, moved = 2.0 * rows * 4 * hidden * hidden, 4.0 * rows * 5 * hidden
    name = f"N={rows} H={hidden}"
    return [
        Kernel(f"input projection {name}", partial(native.project, x, w, None), operations, 0, moved),
        Kernel(f"dW = dz^T x {name}", partial(native.product, dz.T, x), operations, 0, moved),
        Kernel(f"dx = dz W {name}", partial(native.product, dz, w), operations, 0, moved),
    ]


def clock(run: Callable[[], object], seconds: float) -> list[float]:
    """Processor time of single calls, or of as many as take a millisecond, ascending: one thread, which other programs may interrupt."""
    run()
    start = time.process_time()
    run()
    calls, found = max(1, int(1e-3 / (time.process_time() - start))), []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        start = time.process_time()
        for _ in range(calls):
            run()
        found.append((time.process_time() - start) / calls)
    return sorted(found)


def peaks(seconds: float) -> dict[str, float]:
    """Operations and bytes a second."""
    a, w, small, large = torch.randn(4096, 1024), torch.randn(1024, 1024), torch.randn(2**16), torch.randn(2**26)
    products, copies = 2 * a.numel() * len(w), 2 * small.nbytes
    torch_product, narrow = partial(F.linear, a, w), partial(F.linear, a.bfloat16(), w.bfloat16())
    return {
        "float32 operations": max(
            products / clock(run, seconds)[0] for run in (torch_product, partial(native.product, a, w))
        ),
        "bfloat16 operations": products / clock(narrow, seconds)[0],
        "cache": copies / clock(partial(torch.empty_like(small).copy_, small), seconds)[0],
        "memory": 2 * large.nbytes / clock(partial(torch.empty_like(large).copy_, large), seconds)[0],
    }


def share(kernel: Kernel, seconds: float, peak: dict[str, float]) -> tuple[float, str]:
    """The time that the machine's peak would take over that of the kernel, and what bounds it."""
    bounds = {
        "operations": kernel.operations / peak[f"{str(kernel.dtype).removeprefix('torch.')} operations"],
        "bytes": kernel.weights / peak["cache"] + kernel.rows / peak["memory"],
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return bounds[bound] / seconds, bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each kernel")
    options = parser.parse_args()
    if _native.lib is None:
        parser.error(f"the compiled module is missing: {_native.reason}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        log = Log(options.out, {"what": "benchmarks.peak", "environment": environment(["cpu"])})
    except UserError as error:
        parser.error(str(error))
    kernels = [*both(2048, 1, 256), *both(256, 64, 256), *both(2048, 1, 256, torch.bfloat16)]
    kernels += [*both(256, 64, 256, torch.bfloat16), *windows(4096, 256), *others(256), *products(16384, 256)]
    found: dict[str, list[float]] = {kernel.name: [] for kernel in kernels}
    best: dict[str, float] = {}
    for _ in range(3):  # peaks between the kernels: the machine drifts
        best = {name: max(rate, best.get(name, 0.0)) for name, rate in peaks(options.seconds / 3).items()}
        for kernel in kernels:
            found[kernel.name] += clock(kernel.run, options.seconds / 3)
    print(", ".join(f"{name} {rate / 1e9:.0f} G/s" for name, rate in best.items()))
    log.add({"peaks": best})
    for kernel in kernels:
        seconds = statistics.median(found[kernel.name])
        part, bound = share(kernel, seconds, best)
        row = {"case": kernel.name, "ms": seconds * 1e3, "share": part}
        row |= {"bound": bound, "operations": kernel.operations, "bytes": kernel.weights + kernel.rows}
        log.add(row)
        rate = f"{kernel.operations / seconds / 1e9:7.1f} GFLOP/s"
        print(f"{row['case']:62s} {row['ms']:9.3f} ms {rate}  {part:5.2f} of the peak in {bound}", flush=True)


if __name__ == "__main__":
    main()
