"""What a checked plan runs: chunk, warm-up and correction by a cost model of the device, how far it may go before the plain recurrence
is the better way, and which layers did better without it.

Costs are in steps of one lane. A step of n lanes costs max(1 + more (n - 1), n / gain) of them: lanes share the weights that a step reads
(on CPUs), or run on multiprocessors that one lane leaves idle (on GPUs). All decisions follow from the problem, the device and the runs so
far: equal calls decide alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, log
from typing import NamedTuple

from .problem import AUTO, BackwardInputs, Inputs, Problem
from .report import BUDGET, CHEAPER, DONE, MEMORY

ALLOWANCE = 1.1  # the cost of a call that finds out that lanes do not pay, over that of the plain recurrence
LATER = 1.2  # where it finds out after a stretch of lanes has agreed: the sequence changes its character
WORTH = 0.9  # lanes have to be predicted cheaper than this part of the plain recurrence
RETRY = 64  # calls that a fallback is remembered
CREDIT = 0.5  # what the call after them may lose beside the allowance: hardly anything, over all these calls
EXPECTED = 0.5  # of the plain recurrence, where passes have been seen to go where they should
SMALL = 0.06  # of the plain recurrence
USUAL = 256  # steps of a chunk in which most trained networks agreed after 3 to 8 passes
NEARLY = 1.15  # costs that make no difference
TRIED = 0.5  # of what a call may lose, for the trial
WARMUP = 32  # steps, where nothing is known
LONGEST_WARMUP = 1024
MARGIN = 10  # for cells larger than 1, and gates that only reach the clamp: a lane that just misses `tol` costs a pass
TRIAL = (16, 32, 64)  # steps after which a trial compares states
LONGER = 4  # times as long are the chunks that are tried before giving up


class Device(NamedTuple):
    """Constants of a kind of device."""

    step: float  # seconds of a step that the weights do not count in
    rate: float  # multiply-adds a second of a step of one lane
    lanes: tuple[tuple[float, float, float], ...]  # below so many weights: `gain`, `more`
    host: float  # seconds of a pass outside of the kernel
    mend: float  # seconds of a correction
    most: int  # lanes of one pass, as far as the choice goes
    probes: bool  # whether probe lanes may pay
    source: str = ""  # of these constants


# By the device's type, and for the backend `reference`. cpu and reference: one thread of an AVX-512 server processor, float32, LSTM and RNN
# of 64 to 512 units (reference: LSTM of 16 to 256). cuda: the latency of a step, and as many lanes as keep the multiprocessors of an H100
# busy, until `benchmarks.fit_costs` fits them.
MEASURED, PREDICTED = "measured on another machine", "predicted, none measured"
CPU_LANES = ((2e4, 1.75, 0.45), (1e5, 2.15, 0.3), (5e5, 2.5, 0.28), (inf, 3.4, 0.15))
DEVICES = {
    "cpu": Device(0.0, 3e10, CPU_LANES, 3e-4, 1.2e-3, 32, False, MEASURED),
    "reference": Device(1e-4, 2e9, ((5e4, 8.0, 0.05), (inf, 4.0, 0.1)), 3e-4, 1.2e-3, 32, False, MEASURED),
    "cuda": Device(
        2e-6, 2e11, ((2e5, 1024.0, 0.0), (2e6, 256.0, 0.0), (inf, 64.0, 0.0)), 4e-4, 6e-4, 4096, True, PREDICTED
    ),
}


class Costs:
    """The cost model of one problem."""

    def __init__(self, p: Problem, batch: int, weights: int, device: str) -> None:
        self.device = DEVICES.get(device, DEVICES["cpu"])
        self.batch, self.steps = batch, p.steps
        self.gain, self.more = next(found for bound, *found in self.device.lanes if weights < bound)
        step = self.device.step + weights / self.device.rate
        self.host, self.mend = self.device.host / step, self.device.mend / step  # in steps
        self.plain = self.run(batch, p.steps)

    def run(self, lanes: float, steps: float) -> float:
        """So many lanes of so many steps each."""
        return steps * max(1 + self.more * (lanes - 1), lanes / self.gain, 1)

    def lanes(self, most: float, steps: float) -> int:
        """How many lanes of so many steps cost at most this."""
        each = most / max(steps, 1)
        few = inf if not self.more else (each - 1) / self.more + 1
        return int(min(few, each * self.gain)) if each >= 1 else 0

    def first(self, chunk: int, warmup: int) -> float:
        """The first pass over everything."""
        return self.run(-(-self.steps // chunk) * self.batch, chunk + warmup) + self.host

    def chunk(self, warmup: int) -> int:
        """The shortest chunk with this warm-up, of T / 2, T / 4, ..., that costs hardly more than the cheapest: short ones make short
        stretches. Where a pass is a small part of the plain run, one of USUAL steps or more: long ones agree in fewer passes."""
        chunks, count = [max(self.steps, 1)], 2
        while count * self.batch <= self.device.most and self.steps // count >= max(2 * warmup, 16):
            chunks.append(-(-self.steps // count))
            count *= 2
        small = [chunk for chunk in chunks if chunk >= USUAL and self.first(chunk, warmup) <= SMALL * self.plain]
        if small:
            return small[-1]
        least = min(self.first(chunk, warmup) for chunk in chunks)
        return next(chunk for chunk in reversed(chunks) if self.first(chunk, warmup) <= NEARLY * least)


@dataclass
class Choice:
    """How a checked run begins. Without `why` it runs lanes, else the plain recurrence, for that reason."""

    p: Problem  # chunk and warm-up are numbers
    correct: str
    costs: Costs
    free: bool  # the plan gave the chunk: it runs as told, up to max_passes, while its passes are not as deep as the plain run
    measure: bool = False  # the warm-up is to be found
    why: int = DONE

    @property
    def predicted(self) -> float:
        """The cost of the first pass over that of the plain recurrence."""
        return self.costs.first(self.p.stride, self.p.warmup) / self.costs.plain if self.costs.plain else inf


def choose(p: Problem, batch: int, weights: int, device: str) -> Choice:
    """The choice for a problem with AUTO and given numbers; `weights` is the number of W_hh's entries."""
    costs = Costs(p, batch, weights, device)
    known = p.warmup != AUTO or p.cap < 1 and p.tol > 0
    warmup = p.warmup if p.warmup != AUTO else WARMUP
    if p.warmup == AUTO and known:  # what a clamped forget gate needs to forget
        warmup = min(256, max(WARMUP, ceil(log(p.tol / MARGIN) / log(p.cap))))
    warmup, free = min(warmup, p.steps), p.stride != AUTO
    chunk = min(p.stride if free else costs.chunk(warmup), max(p.steps, 1))
    forgets = p.spec.forgets is not None
    correct = ("decay" if forgets else "none") if p.correct in ("auto", "decay") else p.correct
    made = Choice(p._replace(stride=chunk, warmup=warmup), correct if forgets else "none", costs, free)
    if not batch * p.steps or not free and (made.predicted > WORTH or not Ledger(made).stretch(made.p, 0)):
        made.why = CHEAPER
    made.measure = not (made.why or known or free) and costs.first(chunk, warmup) > (ALLOWANCE - 1) / 2 * costs.plain
    return made


def describe(p: Problem, batch: int, weights: int, device: str) -> str:
    """The choice in words."""
    choice = choose(p, batch, weights, device)
    if choice.why:
        small = ", too little a gain to try" * (choice.predicted <= WORTH)
        return f"the plain recurrence; lanes would cost {choice.predicted:.2g} of it{small}"
    p, first = choice.p, Ledger(choice).stretch(choice.p, 0)
    warmup = f"{p.warmup}{', or what a trial finds' if choice.measure else ''}"
    text = f"{p.lanes()} lanes of {p.stride} steps, warm-up {warmup}, correction {choice.correct}, {choice.predicted:.2g} of the plain cost"
    return text + f"; {first} of them first" * (first < p.lanes())


def trial_places(choice: Choice, ledger: Ledger) -> int:
    """At how many times of each row the trial looks, as far as it may cost a part of what the call may lose; it is paid for."""
    costs = choice.costs
    for places in (2, 1):
        count = places * costs.batch
        parts = zip((0, *TRIAL), TRIAL, range(len(TRIAL), 0, -1))  # steps from, to; lengths that are still running
        price = sum(costs.run(count * running, end - begin) for begin, end, running in parts)
        if price + costs.host <= TRIED * (ALLOWANCE - 1) * costs.plain:
            ledger.spent += price + costs.host
            return places
    return 0


def with_memory(choice: Choice, warmup: float, ledger: Ledger) -> Choice:
    """The choice, once a trial has shown what warm-up it takes."""
    if not warmup <= LONGEST_WARMUP:
        return replace(choice, why=MEMORY)
    costs, found = choice.costs, min(16 * ceil(max(WARMUP, warmup) / 16), choice.p.steps)
    made = replace(choice, p=choice.p._replace(stride=costs.chunk(found), warmup=found))
    pays = made.predicted <= WORTH and ledger.stretch(made.p, 0)
    return made if pays else replace(made, why=MEMORY)


def longer(choice: Choice, ledger: Ledger) -> Choice | None:
    """The choice with chunks LONGER times as long, where a few passes over them may be paid."""
    costs, p = choice.costs, choice.p
    stride = LONGER * p.stride
    lanes = -(-p.steps // stride)
    if ledger.free or choice.why == BUDGET or lanes < LONGER:
        return None
    passes = (
        costs.run(lanes * costs.batch, stride + p.warmup)
        + 2 * costs.run(lanes * costs.batch, stride)
        + 3 * (costs.host + costs.mend)
    )
    return replace(choice, p=p._replace(stride=stride), why=DONE) if passes <= ledger.left(stride) else None


def needed_warmup(jumps: list[float], lengths: Sequence[int], tol: float) -> float:
    """The warm-up after which the state agrees to `tol`, from the largest differences after `lengths` (two, ascending): the first
    that did, or by the exponential through both."""
    for jump, length in zip(jumps, lengths):
        if jump <= tol:
            return length
    short, long = jumps
    if not 0 < long < short or tol <= 0:
        return inf
    return 1.25 * (lengths[1] + (lengths[1] - lengths[0]) * log(long / tol) / log(short / long))


class Ledger:
    """What a call may spend: never more than ALLOWANCE times the plain recurrence, should it have to run that in the end."""

    def __init__(self, choice: Choice) -> None:
        self.costs, self.free, self.spent = choice.costs, choice.free, 0.0
        self.agreed = False  # some stretch has
        self.credit = 0.0  # for corrections, in plain recurrences

    def left(self, exact: int) -> float:
        """What may be spent if times before `exact` need no further run."""
        if self.free:
            return inf
        unit = self.costs.plain / max(self.costs.steps, 1)
        return (LATER if self.agreed else ALLOWANCE) * self.costs.plain - self.spent - (self.costs.steps - exact) * unit

    def allows(self, price: float, exact: int, in_all: float) -> bool:
        """Whether a pass may be run; `in_all` is what it takes with all that follow, where that is known."""
        credit = self.credit * self.costs.plain
        return price <= self.left(exact) + credit or self.spent + in_all <= EXPECTED * self.costs.plain

    def stretch(self, p: Problem, first: int) -> int:
        """The end of the stretch of lanes that begins with lane `first`; `first` itself where none may be paid."""
        if self.free:
            return p.lanes()
        certain = max(first, 1) * p.stride  # the first lane of all starts from the caller's state
        most = self.left(certain) - self.costs.host
        last = min(p.lanes(), first + self.costs.lanes(most, p.stride + p.warmup) // max(self.costs.batch, 1))
        return last if last - first >= min(2, p.lanes() - first) else first

    def spend(self, lanes: float, steps: float) -> None:
        self.spent += self.costs.run(lanes, steps) + self.costs.host


class Case(NamedTuple):
    """What a fallback is remembered for."""

    p: Problem  # T to a factor of two
    batch: int  # likewise
    backward: bool
    resets: bool  # then rows may be cut into others at every call

    @classmethod
    def of(cls, inputs: Inputs | BackwardInputs, p: Problem) -> Case:
        alike = p._replace(steps=p.steps.bit_length(), step=1 if p.step > 0 else -1)
        backward, resets = isinstance(inputs, BackwardInputs), inputs.resets is not None
        return cls(alike, inputs.state.shape[0].bit_length(), backward, resets)


class Memory:
    """The fallbacks of one layer and direction, for as long as its weights stay as they are."""

    def __init__(self) -> None:
        self._weights: object = None
        self._calls: dict[Case, int] = {}  # since the fallback
        self._credit: set[Case] = set()  # of what is tried again, and what then agreed

    def of(self, weights: object) -> Memory:
        """Itself; what it knows of other weights is forgotten."""
        if weights != self._weights:
            self._weights, self._calls, self._credit = weights, {}, set()
        return self

    def fell_back(self, case: Case) -> bool:
        """Whether such a run did, not RETRY calls ago."""
        calls = self._calls.get(case)
        if calls is None:
            return False
        if calls >= RETRY:
            del self._calls[case]
            self._credit.add(case)
            return False
        self._calls[case] = calls + 1
        return True

    def credit(self, case: Case) -> float:
        return CREDIT * (case in self._credit)

    def falls_back(self, case: Case) -> None:
        self._calls[case] = 0
        self._credit.discard(case)
