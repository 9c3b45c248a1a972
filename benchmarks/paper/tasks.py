"""The tasks: data, sizes, loss and metric. Every model of a task has about the same number of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from . import data as sets
from .chunks import f1
from .data import Data


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    metric: str  # "nll" per frame, "F1", "bits/char", "perplexity"
    load: Callable[[Path], Data]
    embedding: int | None  # size; None for inputs that are vectors
    parameters: int  # about, in all
    context: int  # inputs that a feed-forward model sees, about
    stretch: int  # longest row in training; longer ones are cut at random places
    batch: int
    epochs: int
    updates: int | None = None  # of an epoch; None: a pass over the rows

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "F1"


TASKS = {
    task.name: task
    for task in (
        Task("jsb", "JSB Chorales", "nll", sets.music("JSB_Chorales"), None, 60_000, 64, 256, 8, 50),
        Task("nottingham", "Nottingham", "nll", sets.music("Nottingham"), None, 130_000, 64, 256, 16, 30),
        Task("muse", "MuseData", "nll", sets.music("MuseData"), None, 130_000, 64, 256, 16, 30),
        Task("piano", "Piano-midi", "nll", sets.music("Piano_midi"), None, 130_000, 64, 256, 16, 40),
        Task("atis", "ATIS slot filling", "F1", sets.atis, 64, 100_000, 32, 64, 32, 12),
        Task("ptb-char", "Penn Treebank, characters", "bits/char", sets.characters, 32, 300_000, 128, 128, 32, 20, 500),
        Task("ptb-word", "Penn Treebank, words", "perplexity", sets.penn_words, 128, 1_700_000, 64, 64, 32, 20, 500),
        Task("wikitext-2", "WikiText-2", "perplexity", sets.wikitext, 128, 4_700_000, 64, 64, 32, 20, 1000),
    )
}


def loss(task: Task, logits: Tensor, y: Tensor, real: Tensor) -> Tensor:
    """Mean over real steps; logits (T, B, O), y (T, B) or (T, B, O), real (T, B) bool. Nats; a frame of music is the sum of its keys."""
    if task.metric == "nll":
        each = functional.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(-1)
    else:
        each = functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
    return each[real].mean()


def score(task: Task, data: Data, outputs: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """The metric over batches of (logits, y, real)."""
    if task.metric == "F1":
        names = data.labels
        pairs = []
        for logits, y, real in outputs:
            guess = logits.argmax(-1)
            for row in range(y.shape[1]):
                keep = real[:, row]
                pairs.append(([names[i] for i in y[keep, row]], [names[i] for i in guess[keep, row]]))
        return f1(pairs)
    steps = [int(real.sum()) for *_, real in outputs]
    nats = sum(loss(task, *out).double().item() * n for out, n in zip(outputs, steps)) / sum(steps)
    return (
        nats
        if task.metric == "nll"
        else nats / math.log(2)
        if task.metric == "bits/char"
        else math.exp(min(nats, 700.0))
    )


def batches(
    rows: list[tuple[Tensor, Tensor]], size: int, stretch: int | None = None, draw: torch.Generator | None = None
):
    """(x (T, B, ...), y (T, B, ...), lengths (B,), real (T, B)) over rows of similar length, padded with zeros.

    With `stretch` and `draw`: rows cut to at most `stretch` steps at a random place, batches in random order."""
    if stretch:
        rows = [piece for row in rows for piece in stretches(*row, stretch, draw)]
    shuffle = torch.randperm(len(rows), generator=draw) if draw else torch.arange(len(rows))
    order = sorted(shuffle.tolist(), key=lambda i: len(rows[i][0]))  # stable: rows of equal length stay shuffled
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    if draw:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=draw).tolist()]
    for group in groups:
        x, y = (torch.nn.utils.rnn.pad_sequence([rows[i][side] for i in group]) for side in (0, 1))
        lengths = torch.tensor([len(rows[i][0]) for i in group])
        yield x, y, lengths, torch.arange(len(x))[:, None] < lengths


def stretches(x: Tensor, y: Tensor, length: int, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    if len(x) <= length:
        return [(x, y)]
    first = int(torch.randint(min(length, len(x) - length) + 1, (), generator=draw))
    return [(x[i : i + length], y[i : i + length]) for i in range(first, len(x) - length + 1, length)]
