"""The machine in words, and the table."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import stable_rnn
from stable_rnn import _native
from stable_rnn._errors import UserError

SIZES = {"T": "T", "B": "B", "H": "H", "k": "k"}
CASE = ("cell", "dtype", "device", "passes", "model", *SIZES, "C")  # what tells the cases of a file apart
SAME = ("commit", "torch", "processor", "cores", "threads")  # of runs that may stand in one file


def environment(devices: list[str], commit: str | None = None) -> dict[str, Any]:
    """Device, versions and commit: what a figure means nothing without."""
    found = {
        "commit": commit or os.environ.get("STABLE_RNN_COMMIT") or _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "stable_rnn": stable_rnn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in ("triton", "flashrnn", "haste_pytorch")},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "features": _native.lib.cpu_features() if _native.lib else None,
        "backends": {b.name: b.reason if b.available else f"no: {b.reason}" for b in stable_rnn.backends()},
    }
    if "cuda" in devices:
        card = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory": card.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
            "l2": "not flushed between calls",
        }
    return found


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """With `-dirty` where tracked files differ from it."""
    try:
        here = Path(__file__).parent
        return (
            subprocess.run(
                ["git", "describe", "--always", "--abbrev=40", "--dirty"],
                cwd=here,
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            ).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
            .stdout.split("\n")[0]
            .strip()
        )
    except (OSError, subprocess.SubprocessError):
        return None


def comparable(path: Path, earlier: dict, now: dict) -> None:
    """UserError where the environment of an earlier run is another commit or machine."""
    for name in SAME:
        if earlier.get(name) != now[name]:
            raise UserError(
                f"--resume: {path} was measured with {name} {earlier.get(name)}, here it is {now[name]}; choose another --out"
            )


# ---- table


def milliseconds(seconds: dict) -> str:
    if seconds["low"] is None:
        return f"{seconds['median'] * 1e3:.4g} (once)"
    return f"{seconds['median'] * 1e3:.4g} ({seconds['low'] * 1e3:.4g} … {seconds['high'] * 1e3:.4g})"


def figure(value: float | None, form: str = ".1e") -> str:
    return "" if value is None else format(value, form)


def ratio(speedup: dict | None, with_name: bool) -> str:
    if speedup is None:
        return ""
    return f"{speedup['ratio']:.2f}" + (f" over {speedup['over']}" if with_name else "")


def line(row: dict) -> str:
    """One row for a terminal."""
    verdict = f"WRONG: {row['wrong']}" if row["wrong"] else ratio(row["speedup"], True)
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:8.1f} MiB"
    return (
        f"    {row['name']:32s} {row['seconds']['median'] * 1e3:10.3f} ms  error {row['error']:.1e}  {memory:12s} "
        f"{row['rate_share']:6.1%} of GEMM  {verdict}"
    )


def markdown(about: dict, rows: list[dict]) -> str:
    """Every row, by case; then who took no part."""
    out = ["# Speed: recurrent against windowed", ""]
    facts = about["environment"]
    out += [
        f"commit {facts['commit']}, {facts['date']}, torch {facts['torch']}, {facts['processor']}, {facts['threads']} of "
        f"{facts['cores']} cores" + (f", {facts['gpu']['name']}" if "gpu" in facts else ""),
        "",
    ]
    if not about["finished"]:
        out += ["**Not finished.**", ""]
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in about["gemm_rates"].items())
    out += [
        f"Best product rates here, GFLOP/s: {rates}. Times are medians (fastest … slowest) in ms of turns taken by all in the case. "
        "Errors are the largest |y − y64| against the float64 recurrent run; bound: certified, in exact arithmetic. "
        "x: speed-up over the strongest baseline that computes the same function.",
        "",
    ]
    head = "| contestant | ms | x | over nn | error | bound | peak MiB | of GEMM rate | note |"
    case = None
    for row in rows:
        now = tuple(row[name] for name in ("cell", "dtype", "device", "passes", "model", *SIZES))
        if now != case:
            case = now
            sizes = " ".join(f"{name}={row[name]}" for name in SIZES)
            out += [
                "",
                f"**{row['cell']} {row['dtype']} {row['device']} {row['passes']} {sizes}** ({row['model']} weights)",
                "",
                head,
                "|" + "---|" * head.count(" | ") + "---|",
            ]
        note = f"**WRONG: {row['wrong']}**" if row["wrong"] else row["note"]
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        out.append(
            f"| {row['name']} | {milliseconds(row['seconds'])} | {ratio(row['speedup'], True)} | "
            f"{ratio(row['speedup_over_torch'], False)} | {figure(row['error'])} | {figure(row['bound'])} | {memory} | "
            f"{row['rate_share']:.0%} | {note} |"
        )
    if about["absent"]:
        out += ["", "## Took no part", "", "| who | cases | why |", "|---|---|---|"]
        for who, found in about["absent"].items():
            name, _, reason = who.partition(": ")
            out.append(f"| {name} | {found['cases']}, first {found['first']} | {reason} |")
    if about["not_run"]:
        out += ["", "## Cases not run", ""] + [f"- {case}" for case in about["not_run"]]
    return "\n".join(out) + "\n"
