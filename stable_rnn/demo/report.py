"""The demo's tables on the screen and its files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .. import Certificate
from .._errors import UserError
from .._version import __version__
from .compare import Result

TOLERANCES = (1e-3, 1e-6)


def print_models(console: Console, results: list[Result]) -> None:
    windows = (f"window for {eps:g}" for eps in TOLERANCES)
    title = "Trained models, on held-out text; the certificate holds for every text over the alphabet"
    table = Table("layer", "bits per character", "certified rate", *windows, title=title, title_justify="left")
    for result in results:
        found = summary(result.certificate)
        rate = f"{found['rate']:.4f} ({found['norm']}-norm)" if found["stable"] else "none"
        windows = (str(k or "none") for k in found["windows"].values())
        table.add_row(result.name, f"{result.bits:.3f}", rate, *windows)
    console.print(table)


def print_ways(console: Console, result: Result, steps: int) -> None:
    title = f"{result.name}: {steps} characters, batch 1. Speed-up A: over nn.LSTM run through; B: over nn.LSTM on overlapping chunks"
    table = Table("way", "time", "A", "B", "bits", "error", "bound", "+ rounding", "", title=title, title_justify="left")
    through, chunks = (row.seconds for row in result.ways[:2])
    for row in result.ways:
        speed = (f"{row.seconds * 1e3:.1f} ms", f"{through / row.seconds:.2f}x", f"{chunks / row.seconds:.2f}x")
        errors = ("" if value is None else f"{value:.1e}" for value in (row.error, row.bound, row.bound_float32))
        table.add_row(row.way, *speed, "" if row.bits is None else f"{row.bits:.3f}", *errors, row.note)
    console.print(table)


def summary(certificate: Certificate) -> dict[str, object]:
    stable = certificate.stable
    return {
        "stable": stable,
        "rate": certificate.rate if stable else None,
        "norm": certificate.norm if stable else None,
        "windows": {f"{eps:g}": window(certificate, eps) for eps in TOLERANCES},
    }


def window(certificate: Certificate, tolerance: float) -> int | None:
    """Least window for the tolerance, or None where the certificate gives none."""
    try:
        return certificate.window(tolerance)
    except ValueError:
        return None


def environment() -> dict[str, object]:
    return {
        "stable_rnn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def prepare(folder: str) -> Path:
    """The output folder, made and known to be writable before any work is done."""
    out = Path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        draft(out / "demo.json").touch()
        draft(out / "demo.json").unlink()
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from error
    return out


def write_json(path: Path, results: list[Result], more: dict[str, object]) -> None:
    models = {}
    for result in results:
        models[result.name] = {
            "bits_per_character": result.bits,
            "certificate": summary(result.certificate),
            "ways": [asdict(row) for row in result.ways],
            "windows": [asdict(point) for point in result.windows],
        }
    text = json.dumps({"environment": environment(), **more, "models": models}, indent=1, allow_nan=False)
    whole(path, lambda file: file.write_text(text + "\n"))


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name beside `path` and rename it, so that `path` is never half a file."""
    try:
        write(draft(path))
        draft(path).replace(path)
    finally:
        draft(path).unlink(missing_ok=True)


def draft(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}-{path.name}")
