"""The demo's tables on the screen and its files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .. import Certificate
from .._errors import UserError
from .._version import __version__
from .compare import Row

TOLERANCES = (1e-3, 1e-6)


def window(certificate: Certificate, tolerance: float) -> int | None:
    """Least window for the tolerance, or None where the certificate gives none."""
    try:
        return certificate.window(tolerance)
    except ValueError:
        return None


def summary(certificate: Certificate) -> dict[str, object]:
    stable = certificate.stable
    return {
        "stable": stable,
        "rate": certificate.rate if stable else None,
        "norm": certificate.norm if stable else None,
        "windows": {f"{eps:g}": window(certificate, eps) for eps in TOLERANCES},
    }


def print_models(console: Console, bits: dict[str, float], certificates: dict[str, Certificate]) -> None:
    table = Table(
        "layer",
        "bits per character",
        "certified rate",
        *(f"window for {eps:g}" for eps in TOLERANCES),
        title="Trained models: held-out text, certificate for every text over the alphabet",
        title_justify="left",
    )
    for name, certificate in certificates.items():
        rate = f"{certificate.rate:.4f} ({certificate.norm}-norm)" if certificate.stable else "none"
        windows = (window(certificate, eps) for eps in TOLERANCES)
        table.add_row(name, f"{bits[name]:.3f}", rate, *("none" if k is None else str(k) for k in windows))
    console.print(table)


def print_rows(console: Console, name: str, steps: int, rows: list[Row]) -> None:
    table = Table(
        "way",
        "time",
        "over nn.LSTM",
        "over chunks",
        "bits",
        "error",
        "bound",
        "with rounding",
        "",
        title=f"{name}: {steps} characters, batch 1; speed-up over nn.LSTM run through, and over nn.LSTM on overlapping chunks",
        title_justify="left",
    )
    through, chunks = rows[0].seconds, rows[1].seconds
    for row in rows:
        table.add_row(
            row.way,
            f"{row.seconds * 1e3:.1f} ms",
            f"{through / row.seconds:.2f}x",
            f"{chunks / row.seconds:.2f}x",
            *(
                "-" if value is None else form.format(value)
                for form, value in (
                    ("{:.3f}", row.bits),
                    ("{:.1e}", row.error),
                    ("{:.1e}", row.bound),
                    ("{:.1e}", row.bound_float32),
                )
            ),
            row.note,
        )
    console.print(table)


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
        whole(out / "demo.json", lambda file: file.write_text("{}"), keep=False)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from error
    return out


def write_json(path: Path, results: dict[str, object]) -> None:
    whole(path, lambda file: file.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n"))


def whole(path: Path, write: Callable[[Path], object], keep: bool = True) -> None:
    """Write a file under another name beside `path` and rename it, so that `path` is never half a file."""
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(draft)
        if keep:
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
