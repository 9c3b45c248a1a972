"""A long text in every way there is to run it: time, measured error and its bound."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import Cascade, Chunked, Recurrent, Scanned, StableLSTM, Verified, Windowed, use_plan
from ..plans import Plan, written
from ..stability import Certificate
from .progress import Part, Schedule
from .train import CharModel

WINDOWS = [2**n for n in range(9)]  # measured; the bound is followed further, until it is small
WINDOW_STEPS = 4096  # of the text: a window of 256 costs 256 steps for each output
SMALL, FAR = 1e-8, 2**13
ROUNDS = 5
TRIAL, HOPELESS = 256, 3  # steps of a text that show whether more threads take three times as long
OVERLAP = Chunked(256, 32)


class Way(NamedTuple):
    """One way to run the layer over a text."""

    name: str
    run: Callable[[Tensor], Tensor]  # (T, 1, I) -> (T, 1, H)
    plan: Plan | None  # None: torch's own nn.LSTM
    sees: int | None = None  # inputs that every output has seen at least; None: all of them


@dataclass
class Time:
    """Seconds over the rounds."""

    median: float
    low: float
    high: float


@dataclass
class Row:
    """What a way gave. `error` is the largest over all outputs of the layer, against `Recurrent()` with the same weights."""

    way: str
    bits: float | None = None  # per character; None, like the errors, where the way computes another function
    error: float | None = None
    bound: float | None = None  # of the error in exact arithmetic
    bound_float32: float | None = None  # the same plus the rounding term
    note: str = ""
    passes: int | None = None  # of `Verified`; None for other ways
    fell_back: bool = False
    seconds: Time | None = None  # None: not measured


@dataclass
class Point:
    """`Windowed(k)` against `Recurrent()`; fields as in `Row`. Not measured where k is large, or time was up."""

    k: int
    error: float | None
    bound: float | None
    bound_float32: float | None


@dataclass
class Result:
    """One model: its certificate holds for every text over the alphabet."""

    name: str
    steps: int  # of training
    bits: float  # per character, run through from the start
    certificate: Certificate
    ways: list[Row]
    windows: list[Point]


@dataclass
class Speed:
    model: str
    lengths: list[int]
    seconds: dict[str, list[Time | None]]  # of each way, at each length; None: not measured


def run_text(name: str, model: CharModel, ids: Tensor, plans: list[Plan], schedule: Schedule) -> Result:
    """Run ids (T + 1,) in every way."""
    layer, x = stable_layer(model), model.inputs(ids[:-1, None])
    alphabet = torch.arange(model.embedding.num_embeddings)[:, None]
    certificate = layer.certificate(model.inputs(alphabet))  # no other inputs can occur
    truth = under(layer, x, Recurrent())
    found = ways(layer, plans)
    part = schedule.part("run", name, len(found) * ROUNDS, "turns")
    rows = [row(way, layer, certificate, x, truth, lambda y: model.bits(ids, y), part) for way in found]
    for one, seconds in zip(rows, in_turns(found, x, part)):
        one.seconds = seconds
    windows = window_errors(
        layer, certificate, x[:WINDOW_STEPS], schedule.part("windows of", name, len(WINDOWS), "windows")
    )
    return Result(name, model.steps, model.bits(ids, truth), certificate, rows, windows)


def speed(name: str, model: CharModel, ids: Tensor, plans: list[Plan], lengths: list[int], schedule: Schedule) -> Speed:
    """Seconds of each way at each length of ids (T + 1,)."""
    x, found = model.inputs(ids[:-1, None]), ways(stable_layer(model), plans)
    part = schedule.part("speed of", name, len(found) * ROUNDS * len(lengths), "turns")
    table = [in_turns(found, x[:length], part) for length in lengths]
    return Speed(name, lengths, {way.name: list(seconds) for way, *seconds in zip(found, *table)})


def stable_layer(model: CharModel) -> StableLSTM:
    """The model's layer as a `StableLSTM`, which has every plan: the same weights, the same function."""
    if isinstance(model.rnn, StableLSTM):
        return model.rnn
    layer = StableLSTM(model.rnn.input_size, model.rnn.hidden_size, stability=None)
    layer.load_state_dict(model.rnn.state_dict())
    return layer.eval().requires_grad_(False)


def ways(layer: StableLSTM, plans: list[Plan]) -> list[Way]:
    """torch's nn.LSTM, its strongest use for a long text (overlapping chunks as a batch), then the plans that the layer has."""
    plain = layer.to_torch(allow_change=True)
    overlap = next((plan for plan in plans if isinstance(plan, Chunked)), OVERLAP)
    name = f"nn.LSTM, chunks {overlap.chunk}+{overlap.warmup}"
    return [
        Way("nn.LSTM", lambda x: plain(x)[0], None),
        Way(name, lambda x: overlapping(plain, x, overlap), None, sees(overlap)),
        *(
            Way(written(plan), partial(under, layer, plan=plan), plan, sees(plan))
            for plan in plans
            if fits(plan, layer)
        ),
    ]


def fits(plan: Plan, layer: StableLSTM) -> bool:
    """`Scanned()` is for cascades."""
    return not isinstance(plan, Scanned) or isinstance(layer.stability, Cascade)


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


def overlapping(plain: nn.Module, x: Tensor, plan: Chunked) -> Tensor:
    """Chunks with a warm-up as one batch through torch's nn.LSTM; the first chunk starts the text, with no padding."""
    steps, reach = x.shape[0], plan.chunk + plan.warmup
    if steps <= reach:
        return plain(x)[0]
    starts = (torch.arange(0, steps, plan.chunk) - plan.warmup).clamp(0, steps - reach)  # (L,)
    y = plain(x[starts + torch.arange(reach)[:, None], 0])[0]  # (C + w, L, H)
    t = torch.arange(steps)
    lane = t // plan.chunk
    return y[t - starts[lane], lane][:, None]


def row(
    way: Way,
    layer: StableLSTM,
    certificate: Certificate,
    x: Tensor,
    truth: Tensor,
    bits: Callable[[Tensor], float],
    part: Part,
) -> Row:
    """What the way gives for x; without its time."""
    if not part.room():
        return Row(way.name, note="not run, time was up")
    if way.plan is None and layer.stability is not None and layer.stability.cap_of("lstm") < 1:
        return Row(way.name, note="its cell has no clamp: for the time only")
    with threads(1 if way.plan is None else torch.get_num_threads()):  # of nn.LSTM's threads see `in_turns`
        y = way.run(x)
    made = Row(way.name, bits(y), largest(y - truth), *bounds(certificate, way.sees))
    if isinstance(way.plan, Verified):
        report = layer.last_report
        assert report is not None
        made.bound = report.forward_bound
        made.passes, made.fell_back = report.passes, report.fallback
        made.note = str(report).removeprefix("layer 0: ")
    return made


def bounds(certificate: Certificate, window: int | None) -> tuple[float | None, float | None]:
    """Bound on the error of outputs that have seen at least `window` inputs: in exact arithmetic, and in float32."""
    if window is None or not certificate.stable:
        return None, None
    return certificate.truncation_error(window), certificate.truncation_error(window, dtype=torch.float32)


def largest(error: Tensor) -> float:
    return error.abs().max().item()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(count: int, run: Callable[[], object]) -> float:
    """Seconds with so many threads."""
    with threads(count):
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


def worthwhile(run: Callable[[], object]) -> list[int]:
    """One thread, and torch's own number unless something short takes hopelessly long with it: torch's threads wait for each other at
    every step, and where the cores are shared they wait long, up to minutes for what one thread does in a moment."""
    many = torch.get_num_threads()
    if many == 1:
        return [1]
    once = statistics.median(timed(1, run) for _ in range(ROUNDS))
    for _ in range(ROUNDS):
        if timed(many, run) > HOPELESS * once:
            return [1]
    return [1, many]


def in_turns(found: list[Way], x: Tensor, part: Part) -> list[Time | None]:
    """Seconds of each way, None if there is no time for it; a round runs every way once, so that a busy moment of the machine hits
    them alike. torch's own recurrence gets the better of all threads and one."""
    seconds: list[dict[int, list[float]]] = [{} for _ in found]
    for number in range(ROUNDS):
        for way, by_threads in zip(found, seconds):
            if not part.room(sum(times[-1] for times in by_threads.values())):
                continue
            if number == 0:
                counts = worthwhile(lambda: way.run(x[:TRIAL])) if way.plan is None else [torch.get_num_threads()]  # noqa: B023
                by_threads.update((count, []) for count in counts)
            for count, times in by_threads.items():
                times.append(timed(count, lambda: way.run(x)))  # noqa: B023
            least = min(times[-1] for times in by_threads.values())
            for count in [count for count, times in by_threads.items() if times[-1] > HOPELESS * least]:
                del by_threads[count]
            part.advance()
    best = [min(by_threads.values(), key=statistics.median, default=None) for by_threads in seconds]
    return [Time(statistics.median(times), min(times), max(times)) if times else None for times in best]


def window_errors(layer: StableLSTM, certificate: Certificate, x: Tensor, part: Part) -> list[Point]:
    """Measured and certified error of `Windowed(k)` for k = 1, 2, 4, ..."""
    truth = under(layer, x, Recurrent())
    points = []
    for k in WINDOWS:
        points.append(Point(k, None, *bounds(certificate, k)))
        if part.room():
            points[-1].error = largest(under(layer, x, Windowed(k)) - truth)
            part.advance()
    while (bound := points[-1].bound) is not None and bound > SMALL and 2 * k <= FAR:
        k *= 2
        points.append(Point(k, None, *bounds(certificate, k)))
    return points
