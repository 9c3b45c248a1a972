"""Text for the demo: the manual pages that every CPython carries, a file, or a folder with a training and a test file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._errors import UserError, printable

HELD_OUT = 10  # one part in ten of a single text
RARE = 20  # characters seen less often than this in the training text share one symbol
LEAST = 10_000  # characters to train on


@dataclass(frozen=True)
class Corpus:
    name: str
    symbols: int  # alphabet size; 0 is "any other character"
    train: Tensor  # (N,) int64
    held_out: Tensor  # (M,) int64

    def __str__(self) -> str:
        return f"{self.name}; {len(self.train)} characters to train on, {len(self.held_out)} held out, {self.symbols} symbols"


def load(text: str | None, data: str | None, length: int) -> Corpus:
    """The corpus of `--text` or `--data`, else CPython's own manual; `UserError` when held-out text is shorter than `length` + 1."""
    if text and data:
        raise UserError("give --text or --data, not both")
    if data:
        name, train, held_out = _folder(Path(data))
    else:
        name, whole = (
            (printable(Path(text).name), _read(Path(text)))
            if text
            else ("the manual pages in pydoc_data.topics", _manual())
        )
        cut = len(whole) - len(whole) // HELD_OUT
        train, held_out = whole[:cut], whole[cut:]
    if len(train) < LEAST:
        raise UserError(f"{name}: {len(train)} characters to train on are too few, at least {LEAST} are needed")
    if len(held_out) <= length:
        raise UserError(
            f"{name}: {len(held_out)} held-out characters are too few for --length {length}, which takes {length + 1}"
        )
    known = {c: i for i, c in enumerate(sorted(c for c, n in Counter(train).items() if n >= RARE), start=1)}
    train_ids, held_out_ids = (torch.tensor([known.get(c, 0) for c in part]) for part in (train, held_out))
    return Corpus(name, len(known) + 1, train_ids, held_out_ids)


def _manual() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[title] for title in sorted(topics))


def _folder(folder: Path) -> tuple[str, str, str]:
    if not folder.is_dir():
        raise UserError(f"--data {printable(folder)}: no such folder")
    for place in (folder, folder / "ptb", folder / "wikitext-2"):
        train = next((place / name for name in ("train.txt", "valid.txt") if (place / name).is_file()), None)
        if train and (place / "test.txt").is_file():
            return (
                f"{printable(place.resolve().name)}, {train.name} and test.txt",
                _read(train),
                _read(place / "test.txt"),
            )
    raise UserError(
        f"--data {printable(folder)}: needs train.txt or valid.txt, and test.txt (in it, or in ptb/ or wikitext-2/ there)"
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{printable(file)}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(file)}: not a UTF-8 text file") from error
