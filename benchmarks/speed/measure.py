"""Running one case: check everybody, look at the memory, then let them take turns."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from stable_rnn.plans import Chunked, Verified, Windowed

from ..baselines import product_rate
from ..timing import Time, clock, race
from .cases import DTYPES, Case, operations
from .contestants import Absent, Contestant, Field, gather, in_a_line, too_much
from .models import certificate_of, plain_module
from .truth import Truth

ROUNDS, FEW = 9, 5


@dataclass(frozen=True)
class Limits:
    seconds: float  # for the turns of one case
    longest: float  # of one call
    memory: int  # bytes, of one call


def tf32(on: bool) -> None:
    """Both of torch's switches: its own default is TF32 in cuDNN's recurrences and not in products."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def run_case(case: Case, who: Field, rate: float, limits: Limits, seed: int = 0) -> tuple[list[dict], list[Absent]]:
    """The rows of a case, and who took no part in it."""
    kind = DTYPES[case.dtype]
    tf32(case.dtype == "tf32")
    plain = plain_module(case.cell, case.H, case.model, kind, case.device, seed).train(case.backward)
    draw = torch.Generator().manual_seed(seed)
    x = (torch.rand(case.T, case.B, case.H, generator=draw) * 2 - 1).to(case.device, kind).requires_grad_(case.backward)
    found, absent = gather(case, plain, x, who)
    truth = Truth(case, plain, x, seed)
    dy = torch.randn(x.shape, generator=draw).to(x.device, kind)
    rows, steps, known = [], {}, {}
    for one in found:
        reason = too_much(case, one, rate, limits.longest, limits.memory)
        if reason is None:
            try:
                row, step = check(case, one, truth, x, seed), call(case, one, x, dy)
                start = time.perf_counter()
                row["peak_bytes"] = peak_bytes(step, case.device)
                steps[one.name], known[one.name] = step, time.perf_counter() - start
                rows.append(row)
            except (
                Exception
            ) as error:  # out of memory, a kernel that refuses the shape, a compiler that fails: their own words
                reason = in_a_line(error)
        if reason is not None:
            absent.append(Absent(one.name, reason))
    times = take_turns(steps, known, limits, case.device)
    for row in rows:
        row["seconds"] = times[row["name"]]
        row["flops"] = operations(case, next(w for w in found if w.name == row["name"]).plan)
        row["rate_share"] = row["flops"] / row["seconds"]["median"] / rate
    speed_ups(rows)
    return rows, absent


def call(case: Case, who: Contestant, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """One timed call: y under no_grad, or y and all gradients."""

    def forward() -> Tensor:
        with torch.no_grad():
            return who.run()

    def training() -> Tensor:
        x.grad = None
        who.module.zero_grad(set_to_none=True)
        y = who.run()
        y.backward(dy)
        return y

    run = training if case.backward else forward
    if who.threads is None:
        return run

    def with_threads() -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(who.threads)
        try:
            return run()
        finally:
            torch.set_num_threads(before)

    return with_threads


def check(case: Case, who: Contestant, truth: Truth, x: Tensor, seed: int) -> dict:
    """The row, still without times but for that of the first call, compilers included."""
    run = call(case, who, x, truth.upstream)
    start = time.perf_counter()
    y = run()
    if case.device == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    weight = getattr(who.module, "weight_hh_l0", None)
    gradients = {} if not case.backward else {"x": x.grad} | ({} if weight is None else {"weight_hh_l0": weight.grad})
    allowed, more = truth.allowed, truth.jumps if isinstance(who.plan, Verified) else 0.0
    own, gradient = truth.errors(getattr(truth, who.answer), y, gradients)
    error, relative = truth.error_of_recurrence(y)
    row = asdict(case) | dict(
        name=who.name,
        computes=who.computes,
        ours=who.ours,
        backend=who.backend,
        error=error,
        error_relative=relative,
        error_of_function=own,
        tolerance=allowed.y + more,
        gradient_error=gradient,
        gradient_tolerance=allowed.gradient + more if case.backward else None,
        first_seconds=first,
    )
    row |= dict(zip(("bound", "bound_with_rounding"), bounds(case, who, seed)))
    notes = [who.note] if who.note else []
    if isinstance(who.plan, Verified):
        report = who.module.last_report
        notes.append(
            f"{report.passes} pass{'es' * (report.passes > 1)}"
            + (", fell back to Recurrent()" if report.fallback else "")
        )
    row["note"] = "; ".join(notes)
    row["wrong"] = verdict(row)
    return row


def bounds(case: Case, who: Contestant, seed: int) -> tuple[float | None, float | None]:
    """Certified bound of `error`, in exact arithmetic and with the rounding term; None where nothing is proven or nothing was cut."""
    if not isinstance(who.plan, (Windowed, Chunked)):
        return None, None
    proven = certificate_of(case.cell, case.H, case.model, case.dtype, seed)
    if proven is None:
        return None, None
    seen = case.k + isinstance(who.plan, Chunked)
    found = proven.truncation_error(seen), proven.truncation_error(seen, dtype=DTYPES[case.dtype])
    return tuple(b if math.isfinite(b) else None for b in found)


def verdict(row: dict) -> str | None:
    """What is wrong with a row, or None. NaN is wrong."""
    if not row["error_of_function"] <= row["tolerance"]:
        return f"output error {row['error_of_function']:.2g} > {row['tolerance']:.2g}"
    if row["gradient_error"] is not None and not row["gradient_error"] <= row["gradient_tolerance"]:
        return f"gradient error {row['gradient_error']:.2g} > {row['gradient_tolerance']:.2g}"
    if row["bound_with_rounding"] is not None and not row["error"] <= row["bound_with_rounding"]:
        return f"error {row['error']:.2g} above its certified bound {row['bound_with_rounding']:.2g}"
    return None


def take_turns(steps: dict[str, Callable], known: dict[str, float], limits: Limits, device: str) -> dict[str, dict]:
    """Interleaved times; `known`: about how long a call takes. Who would take twice the case's seconds for a few rounds runs by itself,
    once: its spread is unknown."""
    fast = {name: run for name, run in steps.items() if known[name] * FEW <= 2 * limits.seconds}
    rounds = max(FEW, min(ROUNDS, int(limits.seconds / max(sum(known[name] for name in fast), 1e-9))))
    raced: dict[str, Time] = race(fast, limits.seconds, rounds, device, known) if fast else {}
    found = {name: dict(**t._asdict(), rounds=rounds) for name, t in raced.items()}
    for name in steps.keys() - fast.keys():
        found[name] = dict(median=clock(steps[name], 1, device), low=None, high=None, rounds=1)
    return found


def speed_ups(rows: list[dict]) -> None:
    """Ours over the strongest right baseline that computes the same function here, everybody right over nn.LSTM or nn.RNN."""

    def best(candidates: list[dict]) -> dict | None:
        return min((r for r in candidates if not r["wrong"]), key=lambda r: r["seconds"]["median"], default=None)

    def over(row: dict, base: dict | None) -> dict | None:
        if base is None or row["wrong"] or base is row:
            return None
        return dict(ratio=base["seconds"]["median"] / row["seconds"]["median"], over=base["name"])

    plain = best([r for r in rows if r["name"].startswith("nn.")])
    for row in rows:
        rivals = [r for r in rows if not r["ours"] and r["computes"] == row["computes"]]
        row["speedup"] = over(row, best(rivals)) if row["ours"] else None
        row["speedup_over_torch"] = over(row, plain)


# ---- memory and rates


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """Most memory that one call holds at once beyond what was there before: on a GPU what torch allocated, on the CPU resident memory
    (freed heap is given back first, so that what the call takes shows). None where the system does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")  # VmHWM starts again from VmRSS
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


HOW_MEMORY = {
    "cuda": "torch.cuda.max_memory_allocated over memory_allocated before the call",
    "cpu": "VmHWM (reset) over VmRSS before the call, freed heap trimmed first; what stays from call to call (here up to 64 MiB "
    "a thread for input projections) is in neither",
}


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return {
            key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines) if key == name
        }[name]


def memory_limit(device: str) -> int:
    """Four fifths of a GPU's free memory; on the CPU half of what is available, at most 8 GiB: the machine may be shared."""
    if device == "cuda":
        return int(0.8 * torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(8 * 2**30, free // 2)


def gemm_rate(device: str, dtype: str, seconds: float) -> float:
    """The machine's best product rate in this dtype: FLOP/s of the best of several sizes."""
    tf32(dtype == "tf32")
    sizes = (
        [(8192, (8192,)), (4096, (4096, 16384))] if device == "cuda" else [(256, (1024, 4096)), (1024, (1024, 4096))]
    )
    return max(product_rate(n, n, rows, DTYPES[dtype], device, seconds / len(sizes)) for n, rows in sizes)
