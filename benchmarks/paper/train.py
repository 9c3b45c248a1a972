"""One training run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from stable_rnn import Recurrent, project_after_step, use_plan
from stable_rnn.plans import Plan
from stable_rnn.stability import Stability

from .data import Data, Rows
from .models import Config, Model
from .tasks import Task, batches, loss, score

PATIENCE = 8  # epochs without a better validation score
CLIP = 1.0  # norm of all gradients


class OutOfTime(Exception):
    """The budget ended within a run, which will be repeated."""


@dataclass(frozen=True)
class Setting:
    """All that a run depends on beside task, configuration and seed."""

    rate: float  # of Adam at the start; a cosine takes it to 0 over `epochs`
    dropout: float
    width: int
    epochs: int
    updates: int | None

    def stored(self) -> dict:
        return asdict(self)


def searched(trial: int) -> tuple[float, float]:
    """Learning rate, log-uniform in 3e-4 … 3e-2, and dropout, uniform in 0 … 0.6, of trial 0, 1, …: the same for every configuration.

    A handful of random points would leave holes; these are quasi-random (Roberts' R2 sequence)."""
    plastic = 1.32471795724474602596
    u, v = ((0.5 + trial / plastic**n) % 1 for n in (1, 2))
    return round(3e-4 * 100**u, 6), round(0.6 * v, 3)


def refined(tried: list[tuple[float, float, float]]) -> tuple[float, float]:
    """The next (learning rate, dropout) after points (learning rate, dropout, loss): at the dropout of the best, three times its rate if
    none tried is higher, a third if none is lower, else halfway (in logarithms) to whichever neighbour is better."""
    tried = sorted(tried)
    at = min(range(len(tried)), key=lambda i: tried[i][2])
    rate, dropout, _ = tried[at]
    lower, higher = [p for p in tried if p[0] < rate], [p for p in tried if p[0] > rate]
    if not higher:
        rate *= 3
    elif not lower:
        rate /= 3
    else:
        rate = math.sqrt(rate * min(lower[-1], higher[0], key=lambda p: p[2])[0])
    return round(rate, 6), dropout


def build(config: Config, task: Task, data: Data, setting: Setting, seed: int) -> Model:
    torch.manual_seed(seed)
    inputs = data.symbols or data.train[0][0].shape[1]
    return Model(config, task, inputs, data.outputs, setting.width, setting.dropout)


def train(
    model: Model,
    task: Task,
    data: Data,
    setting: Setting,
    seed: int,
    deadline: float = math.inf,
    advance: Callable[[str], None] = lambda note: None,
    plan: Plan | None = None,
) -> list[float]:
    """Adam with early stopping; leaves the model with the weights of its best epoch, in eval mode, certified where its set certifies.

    Returns the validation score after each epoch. With a `plan` the model is trained under it, for all epochs, keeping the last weights.
    Raises `OutOfTime` when `time.monotonic()` passes the deadline."""
    torch.manual_seed(seed + 1000)  # dropout: the same masks whatever the plan
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.epochs)
    stability = getattr(model.body, "stability", None)
    if isinstance(stability, Stability):
        project_after_step(optimizer, model)
    if plan is not None:
        model.body.plan = plan
    curve, best, kept = [], math.inf, None
    for epoch in range(setting.epochs):
        model.train()
        for number, (x, y, lengths, real) in enumerate(batches(data.train, task.batch, task.stretch, draw)):
            if time.monotonic() > deadline:
                raise OutOfTime
            if number == setting.updates:
                break
            value = loss(task, model(x, lengths), y, real)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        schedule.step()
        curve.append(evaluate(model, task, data, data.valid))
        advance(f"{curve[-1]:.3f}")
        value = -curve[-1] if task.higher_is_better else curve[-1]
        if value < best and plan is None:
            best, better, kept = value, epoch, {name: w.clone() for name, w in model.state_dict().items()}
        if plan is None and (not math.isfinite(value) or epoch - better >= PATIENCE):
            break
    if kept is not None:
        model.load_state_dict(kept)
    if stability is not None:
        model.body.project_()  # the steps above are the cheap kind; this one certifies
    model.eval()
    return curve


@torch.no_grad()
def evaluate(model: Model, task: Task, data: Data, rows: Rows, plan: Plan = Recurrent()) -> float:  # noqa: B008
    """The task's metric over the rows, in eval mode; a recurrent body runs under the plan."""
    return score(task, data, [(model.read(states), y, real) for states, y, real in outputs(model, task, rows, plan)])


@torch.no_grad()
def outputs(model: Model, task: Task, rows: Rows, plan: Plan = Recurrent()):  # noqa: B008
    """(states (T, B, W), y, real) of batches of rows, in eval mode."""
    model.eval()
    for x, y, lengths, real in batches(rows, 2 * task.batch):
        if isinstance(getattr(model.body, "plan", None), Plan):
            with use_plan(model, plan):
                states = model.states(x, lengths)
        else:
            states = model.states(x, lengths)
        yield states, y, real
