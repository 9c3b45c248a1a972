"""A long text under every plan: time, measured error and its bound."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import Certificate, Chunked, Recurrent, StableLSTM, Verified, Windowed, use_plan
from ..plans import Plan
from .train import CharModel

WINDOWS = [2**n for n in range(9)]  # measured; the bound is followed further, until it is small
SMALL, FAR = 1e-8, 2**13
WINDOW_STEPS = 4096  # of the text: a window of 256 costs 256 steps for each output
ROUNDS = 5
OVERLAP = Chunked(256, 32)


class Way(NamedTuple):
    """One way to run the layer over a text."""

    name: str
    run: Callable[[Tensor], Tensor]  # (T, 1, I) -> (T, 1, H)
    plan: Plan | None  # None: torch's own nn.LSTM
    sees: int | None = None  # inputs that every output has seen at least; None: all of them


@dataclass
class Row:
    """What a way gave. `error` is the largest over all outputs of the layer, against `Recurrent()` with the same weights."""

    way: str
    bits: float | None  # per character; None, like the errors, where the way computes another function
    error: float | None
    bound: float | None  # of the error in exact arithmetic
    bound_float32: float | None  # the same plus the rounding term
    seconds: float
    note: str


def stable_layer(model: CharModel) -> StableLSTM:
    """The model's layer as a `StableLSTM`, which has every plan: the same weights, the same function."""
    if isinstance(model.rnn, StableLSTM):
        return model.rnn
    layer = StableLSTM(model.rnn.input_size, model.rnn.hidden_size, stability=None)
    layer.load_state_dict(model.rnn.state_dict())
    return layer.eval().requires_grad_(False)


def certify(model: CharModel) -> Certificate:
    """For every text over the alphabet: all the inputs that there can be are the rows of the embedding."""
    alphabet = torch.arange(model.embedding.num_embeddings)[:, None]
    return stable_layer(model).certificate(model.inputs(alphabet))


def ways(layer: StableLSTM, plans: list[Plan]) -> list[Way]:
    """torch's nn.LSTM, its strongest use for long text (overlapping chunks as a batch), then the plans."""
    plain = layer.to_torch(allow_change=True)
    overlap = next((plan for plan in plans if isinstance(plan, Chunked)), OVERLAP)
    return [
        Way("nn.LSTM", lambda x: plain(x)[0], None),
        Way(
            f"nn.LSTM, {overlap.chunk}+{overlap.warmup} overlapping chunks",
            lambda x: overlapping(plain, x, overlap),
            None,
            overlap.warmup + 1,
        ),
        *(Way(label(plan), lambda x, plan=plan: under(layer, x, plan), plan, sees(plan)) for plan in plans),
    ]


def label(plan: Plan) -> str:
    """`Chunked(256, 32)`, `Verified()`: what the user would write."""
    given = [getattr(plan, f.name) for f in fields(plan) if getattr(plan, f.name) != f.default]
    return f"{type(plan).__name__}({', '.join(map(str, given))})"


def under(layer: StableLSTM, x: Tensor, plan: Plan) -> Tensor:
    with use_plan(layer, plan):
        return layer(x)[0]


def sees(plan: Plan) -> int | None:
    match plan:
        case Windowed(k):
            return k
        case Chunked(_, warmup):
            return warmup + 1
    return None


def overlapping(plain: nn.LSTM, x: Tensor, plan: Chunked) -> Tensor:
    """Chunks with a warm-up as one batch through torch's nn.LSTM; the first chunk starts the text, with no padding."""
    steps, reach = x.shape[0], plan.chunk + plan.warmup
    if steps <= reach:
        return plain(x)[0]
    writes = torch.arange(0, steps, plan.chunk)
    starts = (writes - plan.warmup).clamp(0, steps - reach)  # (L,)
    y = plain(x[starts + torch.arange(reach)[:, None], 0])[0]  # (C + w, L, H)
    t = torch.arange(steps)
    lane = t // plan.chunk
    return y[t - starts[lane], lane][:, None]


def bits(model: CharModel, ids: Tensor) -> float:
    """Bits per character over ids (T + 1,), run through from the start."""
    return model.bits(ids, under(stable_layer(model), model.inputs(ids[:-1, None]), Recurrent()))


def run_ways(model: CharModel, certificate: Certificate, ids: Tensor, plans: list[Plan], advance: Callable[[], None]) -> list[Row]:
    """A row for each way over ids (T + 1,), timed in turns."""
    layer, x = stable_layer(model), model.inputs(ids[:-1, None])
    truth = under(layer, x, Recurrent())
    clamped = layer.stability is not None and layer.stability.cap < 1
    found = ways(layer, plans)
    rows = []
    for way in found:
        y = way.run(x)
        report = layer.last_report if isinstance(way.plan, Verified) else None
        if clamped and way.plan is None:
            rows.append(Row(way.name, None, None, None, None, 0.0, "its cell has no clamp: for the time only"))
            continue
        if report:
            bound, bound_float32 = report.forward_bound, None
            note = f"{report.passes} pass{'es' * (report.passes > 1)}, " + (
                "fell back to Recurrent()" if report.fallback else f"{report.lanes_rerun} chunks rerun"
            )
        else:
            bound, bound_float32, note = *bounds(certificate, way.sees), ""
        rows.append(Row(way.name, model.bits(ids, y), (y - truth).abs().max().item(), bound, bound_float32, 0.0, note))
    for row, seconds in zip(rows, in_turns(found, x, advance), strict=True):
        row.seconds = seconds
    return rows


def bounds(certificate: Certificate, window: int | None) -> tuple[float | None, float | None]:
    """Bound on the error of outputs that have seen at least `window` inputs: in exact arithmetic, and in float32."""
    if window is None or not certificate.stable:
        return None, None
    return certificate.truncation_error(window), certificate.truncation_error(window, dtype=torch.float32)


def in_turns(found: list[Way], x: Tensor, advance: Callable[[], None]) -> list[float]:
    """Median seconds of each way; a round runs every way once, so that a busy moment of the machine hits them alike."""
    seconds: list[list[float]] = [[] for _ in found]
    for _ in range(ROUNDS):
        for way, times in zip(found, seconds, strict=True):
            begin = time.perf_counter()
            way.run(x)
            times.append(time.perf_counter() - begin)
            advance()
    return [statistics.median(times) for times in seconds]


def window_errors(model: CharModel, certificate: Certificate, ids: Tensor, advance: Callable[[], None]) -> list[dict[str, float | None]]:
    """Measured and certified error of `Windowed(k)` for k = 1, 2, 4, ..., on the beginning of the text."""
    layer, x = stable_layer(model), model.inputs(ids[:WINDOW_STEPS, None])
    truth = under(layer, x, Recurrent())
    points = []
    for k in WINDOWS:
        points.append(point(certificate, k, (under(layer, x, Windowed(k)) - truth).abs().max().item()))
        advance()
    while certificate.stable and points[-1]["bound"] > SMALL and 2 * k <= FAR:
        k *= 2
        points.append(point(certificate, k, None))
    return points


def point(certificate: Certificate, k: int, error: float | None) -> dict[str, float | None]:
    bound, bound_float32 = bounds(certificate, k)
    return {"k": k, "error": error, "bound": bound, "bound_float32": bound_float32}


def speed(model: CharModel, ids: Tensor, plans: list[Plan], lengths: list[int], advance: Callable[[], None]) -> dict[str, list[float]]:
    """Median seconds of each way at each length."""
    layer, x = stable_layer(model), model.inputs(ids[:-1, None])
    found = ways(layer, plans)
    table = [in_turns(found, x[:length], advance) for length in lengths]
    return {way.name: list(seconds) for way, *seconds in zip(found, *table, strict=True)}
