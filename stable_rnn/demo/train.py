"""The character model and its training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import Cascade, Certified, ForgetCap, StableLSTM, project_after_step
from .data import Corpus
from .progress import Part

EMBEDDING = 32
BATCH, CHUNK = 16, 64
RATE = 1e-2

LAYERS: dict[str, Callable[[int, int], nn.LSTM | StableLSTM]] = {
    "nn.LSTM": nn.LSTM,
    "ForgetCap(0.9)": lambda inputs, hidden: StableLSTM(inputs, hidden, stability=ForgetCap(0.9)),
    "Certified()": lambda inputs, hidden: StableLSTM(inputs, hidden, stability=Certified()),
    "Cascade()": lambda inputs, hidden: StableLSTM(
        inputs, hidden, stability=Cascade()
    ),  # the last has every plan: for speed
}


class CharModel(nn.Module):
    """Symbol ids (T, B) to logits of the next symbol (T, B, V). The embedding passes tanh, so inputs of `rnn` are within 1."""

    def __init__(self, symbols: int, rnn: nn.LSTM | StableLSTM) -> None:
        super().__init__()
        self.steps = 0  # of training
        self.embedding = nn.Embedding(symbols, EMBEDDING)
        self.rnn = rnn
        self.readout = nn.Linear(rnn.hidden_size, symbols)

    def inputs(self, ids: Tensor) -> Tensor:
        return self.embedding(ids).tanh()  # (T, B, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.readout(self.rnn(self.inputs(ids))[0])

    def bits(self, ids: Tensor, states: Tensor) -> float:
        """Bits per character over ids[1:] (T + 1,), given the outputs of `rnn` over ids[:-1] (T, 1, H)."""
        logits = self.readout(states[:, 0])
        return functional.cross_entropy(logits, ids[1:]).item() / math.log(2)


def train_model(layer: str, corpus: Corpus, hidden: int, seed: int, part: Part) -> CharModel:
    """Adam over random stretches of the training text, the same for every layer; the projection follows each step. The part's `total` is
    the number of steps; the first one is always made."""
    torch.manual_seed(seed)
    model = CharModel(corpus.symbols, LAYERS[layer](EMBEDDING, hidden))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, part.total)
    if isinstance(model.rnn, StableLSTM):
        project_after_step(optimizer, model)
    draw = torch.Generator().manual_seed(seed)
    reach = torch.arange(CHUNK + 1)
    while model.steps < part.total and (part.room() or not model.steps):
        starts = torch.randint(len(corpus.train) - CHUNK, (BATCH,), generator=draw)
        ids = corpus.train[starts + reach[:, None]]  # (CHUNK + 1, BATCH)
        loss = functional.cross_entropy(model(ids[:-1]).flatten(0, 1), ids[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.steps += 1
        part.advance(f"loss {loss.item() / math.log(2):.2f} bits/char")
    if isinstance(model.rnn, StableLSTM):
        model.rnn.project_()  # the steps above are the cheap kind; this one certifies
    return model.eval().requires_grad_(False)


def rehearsal(hidden: int) -> Callable[[], None]:
    """A short step of training, to be timed."""
    rnn, x = nn.LSTM(EMBEDDING, hidden), torch.zeros(CHUNK // 4, BATCH, EMBEDDING)
    return lambda: rnn(x)[0].sum().backward()
