"""The demo's tables on the screen and its files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch
from rich import box
from rich.console import Console
from rich.table import Column, Table

from .._errors import UserError, printable
from .._version import __version__
from ..stability import Certificate
from .compare import Result, Row

TOLERANCES = (1e-3, 1e-6)


def print_models(console: Console, results: list[Result], steps: int) -> None:
    found = table("layer", "bits/char", "rate", *(f"window {eps:g}" for eps in TOLERANCES), "Verified")
    for result in results:
        known = summary(result.certificate)
        rate = f"{known['rate']:.4f} ({known['norm']})" if known["stable"] else "none"
        windows = (str(k or "none") for k in known["windows"].values())
        found.add_row(result.name, f"{result.bits:.3f}", rate, *windows, passes(result.ways))
    title(console, "Trained models on held-out text: certified rate, window for an error, passes of Verified()")
    console.print(found)
    for result in results:
        if result.steps < steps:
            console.print(f" {result.name}: {result.steps} of {steps} steps of training, time was up", soft_wrap=True)


def passes(ways: list[Row]) -> str:
    """Of the first `Verified` plan among them."""
    row = next((row for row in ways if row.passes is not None), None)
    return "-" if row is None else "fell back" if row.fell_back else str(row.passes)


def print_ways(console: Console, result: Result, steps: int) -> None:
    found = table("way", "ms", "A", "B", "bits", "error", "bound", "float32")
    bases = [row.seconds and row.seconds.median for row in result.ways[:2]]
    for row in result.ways:
        time = "-" if row.seconds is None else f"{row.seconds.median * 1e3:.1f}"
        ratios = (f"{base / row.seconds.median:.2f}x" if base and row.seconds else "-" for base in bases)
        errors = ("" if value is None else f"{value:.1e}" for value in (row.error, row.bound, row.bound_float32))
        found.add_row(row.way, time, *ratios, "" if row.bits is None else f"{row.bits:.3f}", *errors)
    title(console, f"{result.name} on {steps} characters, batch 1")
    console.print(found)
    for row in result.ways:
        note = "; ".join(filter(None, (row.note, "not timed, time was up" if row.seconds is None else "")))
        if note:
            console.print(f" {row.way}: {note}", soft_wrap=True, markup=False)


def print_legend(console: Console) -> None:
    console.print(
        "\nCertificates hold for every text over the alphabet.\n"
        "A: speed-up over nn.LSTM run through. B: over nn.LSTM on overlapping chunks, as a batch.\n"
        "error: largest of any output against Recurrent(); bound: of it, in exact arithmetic; float32: with the rounding term.",
        soft_wrap=True,
    )


def title(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]", soft_wrap=True)


def table(first: str, *numbers: str) -> Table:
    made = Table(
        Column(first, no_wrap=True), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    return made


class Summary(TypedDict):
    stable: bool
    rate: float | None
    norm: str | None
    windows: dict[str, int | None]  # by tolerance


def summary(certificate: Certificate) -> Summary:
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
        raise UserError(f"--out {printable(folder)}: {error.strerror}") from error
    return out


def write_json(path: Path, results: list[Result], more: Mapping[str, object]) -> None:
    models = {}
    for result in results:
        models[result.name] = {
            "steps": result.steps,
            "bits_per_character": result.bits,
            "certificate": summary(result.certificate),
            "ways": [asdict(row) for row in result.ways],
            "windows": [asdict(point) for point in result.windows],
        }
    text = json.dumps({"environment": environment(), **more, "models": models}, indent=1, allow_nan=False)
    whole(path, lambda file: file.write_text(text + "\n"))


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name beside `path` and rename it, so that `path` is never half a file. OSError names `path`."""
    try:
        write(draft(path))
        draft(path).replace(path)
    except OSError as error:  # a full disk has no name of its own
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        draft(path).unlink(missing_ok=True)


def draft(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}-{path.name}")
