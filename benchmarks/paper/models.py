"""Models: an encoder of the input, a causal body, a read-out. Bodies map (T, B, I) to (T, B, W).

Feed-forward bodies are our own writing after the papers they name: rows are padded with zeros on the left, `context` is the number
of inputs that an output sees."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

import stable_rnn
from stable_rnn import StableGRU, StableLSTM, StableRNN
from stable_rnn._errors import UserError
from stable_rnn.stability import Stability

from .tasks import Task

# What is compared. A recurrent one is CELL or CELL/SET[:options]; another set is one more line.
CONFIGS = [
    "rnn",
    "rnn/certified",
    "lstm",
    "lstm/forgetcap:0.9",
    "lstm/certified",
    "lstm/certified:cap=true",
    "lstm/cascade",
    "rnn/cascade",
    "gru",
    "gru/certified",
    "gru/cascade",
    "tcn",
    "gated-conv",
    "wavenet",
    "transformer",
]
CELLS = {"rnn": StableRNN, "lstm": StableLSTM, "gru": StableGRU}  # NAME-both: with a second direction
BOTH = "-both"
SETS = {
    name.lower(): kind
    for name, kind in vars(stable_rnn).items()
    if isinstance(kind, type) and issubclass(kind, Stability) and kind is not Stability
}


@dataclass(frozen=True)
class Config:
    name: str
    body: str
    stability: Stability | None = None

    @property
    def recurrent(self) -> bool:
        return self.cell in CELLS

    @property
    def cell(self) -> str:
        return self.body.removesuffix(BOTH)

    @property
    def directions(self) -> int:
        return 1 + (self.recurrent and self.body.endswith(BOTH))

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.=]+", "-", self.name)


def parse(name: str) -> Config:
    """`lstm/certified:rate=.95,cap=true` to a Config; `UserError` for what is none."""
    body, slash, text = name.strip().lower().partition("/")
    try:
        if not Config(name, body).recurrent and (slash or body not in BODIES):
            raise ValueError("no such model")
        stability = stable_set(text) if slash and text != "none" else None
        found = Config(name.strip().lower(), body, stability)
        if stability is not None:
            stability.check({"rnn": "rnn_tanh"}.get(found.cell, found.cell))
        return found
    except (ValueError, TypeError, SyntaxError) as error:
        allowed = (
            f"{', '.join(BODIES)}, or {' or '.join(CELLS)} (with {BOTH} for both directions) with /SET[:options], "
            f"SET one of {', '.join(SETS)} or none"
        )
        raise UserError(f"--config {name}: {error}; allowed are {allowed}") from error


def stable_set(text: str) -> Stability:
    """`certified:rate=.95,cap=true`, `forgetcap:.9`."""
    kind, _, options = text.partition(":")
    if kind not in SETS:
        raise ValueError(f"no stable set {kind!r}")
    args, named = [], {}
    for option in filter(None, options.split(",")):
        name, equals, value = option.rpartition("=")
        number = {"true": True, "false": False}.get(value)
        try:
            number = ast.literal_eval(value) if number is None else number
        except (ValueError, SyntaxError):
            number = value  # a word, as in norm=inf
        if equals:
            named[name] = number
        else:
            args.append(number)
    return SETS[kind](*args, **named)


class Model(nn.Module):
    """x (T, B) symbols or (T, B, I) to logits (T, B, O). Embeddings pass tanh, so a body's inputs lie within 1 in eval mode.

    Dropout acts on the body's inputs and outputs (in feed-forward bodies inside too). Where inputs and outputs are the same symbols,
    the read-out goes through the embedding's size and shares its matrix."""

    def __init__(self, config: Config, task: Task, inputs: int, outputs: int, width: int, dropout: float) -> None:
        super().__init__()
        size = task.embedding or inputs
        self.embedding = nn.Embedding(inputs, size) if task.embedding else None
        if config.recurrent:
            both = config.directions == 2
            self.body = CELLS[config.cell](size, width, bidirectional=both, stability=config.stability)
        else:
            self.body = BODIES[config.body](size, width, task.context, dropout)
        self.dropout = nn.Dropout(dropout)
        tied = task.metric in ("bits/char", "perplexity")
        self.readout = nn.Linear(width * config.directions, size if tied else outputs)
        self.bias = nn.Parameter(torch.zeros(outputs)) if tied else None

    def inputs(self, x: Tensor) -> Tensor:
        return x if self.embedding is None else self.embedding(x).tanh()

    def states(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.dropout(self.inputs(x))
        return self.body(x, lengths=lengths)[0] if isinstance(self.body, tuple(CELLS.values())) else self.body(x)

    def read(self, states: Tensor) -> Tensor:
        logits = self.readout(self.dropout(states))
        return logits if self.bias is None else functional.linear(logits, self.embedding.weight, self.bias)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.read(self.states(x, lengths))


class Conv(nn.Module):
    """Causal convolution over time, weight-normalized: (B, I, T) to (B, O, T), kernel taps `dilation` apart."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.reach = (kernel - 1) * dilation
        self.conv = weight_norm(nn.Conv1d(inputs, outputs, kernel, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (self.reach, 0)))


class Stack(nn.Module):
    """Layers over (B, W, T) after a projection of the input; the body's contract is (T, B, I) to (T, B, W)."""

    def __init__(self, inputs: int, width: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.enter = nn.Conv1d(inputs, width, 1)
        self.layers = nn.Sequential(*layers)
        self.context = 1 + sum(layer.reach for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.enter(x.permute(1, 2, 0))).permute(2, 0, 1)


class TCNBlock(nn.Module):
    """Bai et al., arXiv 1803.01271: two dilated convolutions of three taps with relu and dropout, and a residual."""

    def __init__(self, width: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.a, self.b, self.dropout = (
            Conv(width, width, 3, dilation),
            Conv(width, width, 3, dilation),
            nn.Dropout(dropout),
        )
        self.reach = self.a.reach + self.b.reach

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.a(x).relu())
        return (x + self.dropout(self.b(y).relu())).relu()


def tcn(inputs: int, width: int, context: int, dropout: float) -> nn.Module:
    levels = max(1, round(math.log2((context - 1) / 4 + 1)))
    return Stack(inputs, width, [TCNBlock(width, 2**n, dropout) for n in range(levels)])


class GatedBlock(nn.Module):
    """Dauphin et al., arXiv 1612.08083: a convolution with a gated linear unit, and a residual."""

    def __init__(self, width: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.conv, self.dropout, self.reach = Conv(width, 2 * width, kernel), nn.Dropout(dropout), kernel - 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(functional.glu(self.conv(x), 1))


def gated_conv(inputs: int, width: int, context: int, dropout: float, layers: int = 6) -> nn.Module:
    kernel = 1 + max(1, round((context - 1) / layers))
    return Stack(inputs, width, [GatedBlock(width, kernel, dropout) for _ in range(layers)])


class WaveBlock(nn.Module):
    """van den Oord et al., arXiv 1609.03499: two taps, dilated, tanh times sigmoid, then 1x1 to the residual and to the skip sum."""

    def __init__(self, width: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.conv, self.out, self.dropout, self.reach = (
            Conv(width, 2 * width, 2, dilation),
            nn.Conv1d(width, 2 * width, 1),
            nn.Dropout(dropout),
            dilation,
        )

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, skips = both
        a, b = self.conv(self.dropout(x)).chunk(2, 1)
        residual, skip = self.out(a.tanh() * b.sigmoid()).chunk(2, 1)
        return x + residual, skips + skip


class WaveNet(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.permute(1, 2, 0))
        return self.layers((x, torch.zeros_like(x)))[1].relu().permute(2, 0, 1)


def wavenet(inputs: int, width: int, context: int, dropout: float) -> nn.Module:
    levels = max(1, (context - 1).bit_length())
    return WaveNet(inputs, width, [WaveBlock(width, 2**n, dropout) for n in range(levels)])


class Attention(nn.Module):
    """Causal self-attention over the last `window` steps, in blocks, so that work is linear in T; (B, T, W) to (B, T, W).

    Distances enter as linear biases (Press et al., arXiv 2108.12409), so that rows may be longer than those of training."""

    def __init__(self, width: int, window: int, heads: int = 4) -> None:
        super().__init__()
        self.window, self.heads = window, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        size, blocks = self.window, -(-steps // self.window)
        x = functional.pad(x, (0, 0, 0, blocks * size - steps))
        q, k, v = (
            self.qkv(x).view(batch, blocks, size, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        )  # (B, N, heads, C, D) each
        k, v = (
            torch.cat([functional.pad(z, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], z], 3) for z in (k, v)
        )  # with the block before
        back = torch.arange(size)[:, None] + size - torch.arange(2 * size)  # steps from query to key
        slopes = 2.0 ** (-8 * torch.arange(1, self.heads + 1) / self.heads)
        bias = torch.where((back >= 0) & (back < size), -slopes[:, None, None] * back, -torch.inf)  # (heads, C, 2C)
        before = (torch.arange(blocks) == 0)[:, None, None, None] & (
            torch.arange(2 * size) < size
        )  # keys before the start
        y = functional.scaled_dot_product_attention(q, k, v, torch.where(before, -torch.inf, bias))
        return self.out(y.transpose(2, 3).reshape(batch, -1, width)[:, :steps])


class TransformerBlock(nn.Module):
    """Vaswani et al., arXiv 1706.03762, with the norms before (arXiv 2002.04745); over (B, W, T)."""

    def __init__(self, width: int, window: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width, window)
        self.wide, self.narrow, self.dropout = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )
        self.reach = window - 1

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        x = x + self.dropout(self.attention(self.norms[0](x)))
        x = x + self.dropout(self.narrow(functional.gelu(self.wide(self.norms[1](x)))))
        return x.mT


def transformer(inputs: int, width: int, context: int, dropout: float, layers: int = 2) -> nn.Module:
    window = 1 + -(-(context - 1) // layers)
    return Stack(inputs, width, [TransformerBlock(width, window, dropout) for _ in range(layers)])


BODIES = {"tcn": tcn, "gated-conv": gated_conv, "wavenet": wavenet, "transformer": transformer}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fitting_width(config: Config, task: Task, inputs: int, outputs: int, step: int = 4) -> int:
    """The multiple of `step` whose model comes nearest to the task's number of parameters."""
    plain = Config(config.body, config.body)

    def size(n: int) -> int:
        with torch.device("meta"):
            return count(Model(plain, task, inputs, outputs, n * step, 0.0))

    low, high = 1, 2
    while size(high) < task.parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < task.parameters else (low, middle)
    return step * min((low, high), key=lambda n: abs(size(n) - task.parameters))
