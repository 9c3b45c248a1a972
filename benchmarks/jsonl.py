"""Measured rows in JSON Lines, a line a row, each on disk as soon as it is measured.

A line is a row, or `{"about": {...}}`: what all rows of the file share (device, versions, commit). A later `about` adds to earlier ones and
to the dictionaries in them, so that a run only ever appends.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stable_rnn._errors import UserError
from stable_rnn.demo.report import whole


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all rows share, and the rows.

    A last line that was cut (an interrupted writer) is left out, with a warning; UserError for any other line that is no JSON object."""
    about, rows = {}, []
    for entry, _ in _entries(path):
        _take(entry, about, rows)
    return about, rows


def write(path: Path, about: dict, rows: Iterable[dict]) -> None:
    """The whole file at once; what was there is replaced when all is written."""
    text = "".join(map(_line, ({"about": about}, *rows)))
    whole(path, lambda draft: draft.write_text(text))


class Log:
    """A file of rows that grows: what was added is in the file. `path` None keeps the rows in memory alone.

    `about` goes before the first rows. With `resume` they follow what the file holds; without, they replace it. `blocks`: rows count once
    an `about` line came after them, and resuming drops those at the end that lack one. UserError where the file cannot be written."""

    def __init__(
        self, path: Path | None, about: dict | None = None, resume: bool = False, blocks: bool = False
    ) -> None:
        self.path, self.about, self.rows = path, {}, []
        self._header: dict[str, Any] = about or {}
        self._stale: int | None = None  # where the file is cut before the first line is added
        self._seam = b""  # what the last line lacks
        if path is None:
            return
        try:  # now, not when the first row is there
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            path.open("ab").close()
            if new:
                return path.unlink()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        entries = list(_entries(path)) if resume else []
        while blocks and entries and "about" not in entries[-1][0]:
            entries.pop()
        for entry, _ in entries:
            _take(entry, self.about, self.rows)
        content, end = path.read_bytes(), entries[-1][1] if entries else 0
        self._stale = end if end < len(content) else None
        self._seam = b"" if content[:end].endswith(b"\n") or not end else b"\n"

    def add(self, *rows: dict, **about: Any) -> None:
        """Rows, then facts that hold for all of them."""
        header, self._header = self._header, {}
        known = self.about | header == self.about
        entries = [
            _finite(e) for e in (*([] if known else [{"about": header}]), *rows, *([{"about": about}] if about else []))
        ]
        for entry in entries:
            _take(entry, self.about, self.rows)
        if self.path is None:
            return
        with self.path.open("ab") as file:
            if self._stale is not None:
                file.truncate(self._stale)
            file.write(self._seam + "".join(map(_line, entries)).encode())
        self._stale, self._seam = None, b""


def _entries(path: Path) -> list[tuple[dict, int]]:
    """Each line's object, and where the line ends in the file."""
    found, end = [], 0
    content = path.read_bytes()
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        end += len(line)
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not an object")
            if not isinstance(entry.get("about", {}), dict):
                raise ValueError("`about` is not an object")
        except ValueError as error:
            if not line.endswith(b"\n"):
                warnings.warn(f"{path}, line {number}: cut short by an interrupted run, left out", stacklevel=4)
                break
            raise UserError(f"{path}, line {number}: not a row ({error})") from error
        found.append((entry, end))
    return found


def _take(entry: dict, about: dict, rows: list[dict]) -> None:
    if "about" not in entry:
        rows.append(entry)
        return
    for name, value in entry["about"].items():
        known = about.get(name)
        about[name] = known | value if isinstance(known, dict) and isinstance(value, dict) else value


def _line(entry: dict) -> str:
    return json.dumps(_finite(entry), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON lacks, become null."""
    match value:
        case dict():
            return {key: _finite(v) for key, v in value.items()}
        case list() | tuple():
            return [_finite(v) for v in value]
        case float() if not math.isfinite(value):
            return None
    return value
