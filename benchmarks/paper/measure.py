"""What a trained model does on test data: forgetting, measured and certified; truncation; truncated training; speed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stable_rnn import Chunked, Recurrent, Verified, Windowed, use_plan
from stable_rnn.cells import MODES
from stable_rnn.plans import Plan

from ..timing import race
from .data import Data, Rows
from .models import Model
from .tasks import Task, batches
from .train import evaluate, outputs

WINDOWS = [2**n for n in range(9)]
SWEEP_STEPS = 20_000  # of test data: a window of 256 costs 256 steps for each output
SPANS = [1, 2, 4, 8, 16, 32]
RACED = {
    "Recurrent()": (Recurrent(), None),
    "Chunked(256, 63)": (Chunked(256, 63), 64),
    "Verified()": (Verified(), None),
    "Windowed(32)": (Windowed(32), 32),
}  # and the inputs that every output has seen at least; None: all
STARTS = 24  # states from which products of Jacobians begin
LYAPUNOV_ROWS, LYAPUNOV_STEPS = 32, 512


def certificates(model: Model, task: Task, data: Data) -> dict:
    """The certified rate for all inputs that the stable set allows, and for the inputs there are (the whole alphabet, or the test data)."""
    with torch.no_grad():
        x = model.inputs(torch.arange(data.symbols)) if data.symbols else torch.cat([x for x, _ in data.test])
    found = {}
    for name, known in (
        ("certified", model.body.certificate()),
        ("certified_on_data", model.body.certificate(x[:, None])),
    ):
        found[name] = dict(
            rate=finite(known.rate),
            norm=known.norm,
            stable=known.stable,
            inputs=known.inputs,
            window=least_window(known),
            bounds=[finite(known.truncation_error(k)) for k in WINDOWS],
        )
    return found


def least_window(known, eps: float = 1e-3) -> int | None:
    try:
        return known.window(eps)
    except ValueError:
        return None


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def step(body: nn.Module, xp: Tensor, state: tuple[Tensor, ...], tangent: tuple[Tensor, ...]) -> tuple[tuple, tuple]:
    """One step of state (h,) or (h, c) of (B, H), and of its tangents (B, M, H); xp (B, G*H) is the input projection."""
    cell, w, own = MODES[body.mode], body.weight_hh_l0.mT, None
    if cell.hidden_bias is not None:  # a bias beside the hidden product
        own = torch.zeros_like(xp[0])
        own.view(cell.gates, -1)[cell.hidden_bias] = body.bias_hh_l0.chunk(cell.gates)[cell.hidden_bias]
    many = tangent[0].shape[1]

    def after(*state: Tensor) -> tuple[Tensor, ...]:
        h, c = (*state, state[0])[:2]
        q = h @ w if own is None else h @ w + own
        return cell.step(xp.repeat_interleave(len(h) // len(xp), 0), q, h, c, body._cap)[: len(state)]

    wide = tuple(s.repeat_interleave(many, 0) for s in state)
    moved, tangents = torch.func.jvp(after, wide, tuple(d.flatten(0, 1) for d in tangent))
    return tuple(s.unflatten(0, (-1, many))[:, 0] for s in moved), tuple(d.unflatten(0, (-1, many)) for d in tangents)


@torch.no_grad()
def forgetting(model: Model, rows: Rows) -> dict:
    """On data, forward direction: exp of the largest Lyapunov exponent, from the growth of a tangent renormalized at each step (QR of
    one column) over the longest rows; and the largest 2-norm of a product of k Jacobians, to the power 1/k, over some states that occur.

    One number is an average, the other the worst case seen: a lower bound of what a certificate in the 2-norm of (h, c) could say."""
    rows = [(x[:LYAPUNOV_STEPS], y) for x, y in sorted(rows, key=lambda row: -len(row[0]))[:LYAPUNOV_ROWS]]
    ((x, _, lengths, real),) = batches([(x, y[: len(x)]) for x, y in rows], len(rows))
    body, steps = model.body, int(lengths.max())
    bias, _ = MODES[body.mode].biases(body.bias_ih_l0, body.bias_hh_l0)
    xp = nn.functional.linear(model.inputs(x), body.weight_ih_l0, bias)  # (T, B, G*H)
    parts, draw = 1 + MODES[body.mode].has_cell, torch.Generator().manual_seed(0)
    state = (xp.new_zeros(len(rows), body.hidden_size),) * parts
    tangent = tuple(torch.randn(len(rows), 1, body.hidden_size, generator=draw) for _ in range(parts))
    growth, counted, states = 0.0, 0, []
    for t in range(steps):
        states.append(state)
        size = norm(tangent)
        state, tangent = step(body, xp[t], state, tuple(d / size for d in tangent))
        used = real[t] & (
            t >= torch.clamp(lengths // 4, max=16)
        )  # once the tangent has turned into the slowest direction
        growth += norm(tangent).flatten().clamp(min=1e-38).log()[used].sum().item()
        counted += int(used.sum())
        tangent = tuple(torch.where(norm(tangent) > 1e-15, d, 1e-15) for d in tangent)  # not 0, whose direction is none
    worst = {}
    spans = [k for k in SPANS if k <= steps]
    able = [(t, b) for b in range(len(rows)) for t in range(int(lengths[b]) - spans[-1] + 1)]
    pick = [able[i] for i in torch.randperm(len(able), generator=draw)[:STARTS].tolist()]
    t, b = (torch.tensor(side) for side in zip(*pick))
    state = tuple(torch.stack([states[i][n][j] for i, j in pick]) for n in range(parts))
    eye = torch.eye(parts * body.hidden_size).expand(len(pick), -1, -1)
    tangent = eye.split(body.hidden_size, -1)
    for k in range(1, spans[-1] + 1):
        state, tangent = step(body, xp[t + k - 1, b], state, tangent)
        if k in spans:
            worst[str(k)] = torch.linalg.matrix_norm(torch.cat(tangent, -1), 2).max().item() ** (1 / k)
    return dict(lyapunov=math.exp(growth / max(counted, 1)), steps=counted, worst=worst, starts=len(pick))


def norm(tangent: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(tangent, -1).norm(dim=-1, keepdim=True)  # (B, M, 1)


@torch.no_grad()
def truncation(model: Model, task: Task, data: Data) -> dict:
    """The metric and the outputs of the body under `Windowed(k)` against `Recurrent()`, k = 1 … 256."""
    rows, steps = [], 0
    for row in data.test:
        if steps < SWEEP_STEPS:
            rows.append(row)
            steps += len(row[0])
    truth = list(outputs(model, task, rows))
    found = dict(steps=steps, recurrent=evaluate(model, task, data, rows), windows=[])
    for k in WINDOWS:
        cut = outputs(model, task, rows, Windowed(k))
        off = torch.cat([(a - b)[real].flatten() for (a, _, real), (b, *_) in zip(cut, truth)])
        found["windows"].append(
            dict(
                k=k,
                metric=evaluate(model, task, data, rows, Windowed(k)),
                largest=off.abs().max().item(),
                rms=off.square().mean().sqrt().item(),
            )
        )
    return found


@torch.no_grad()
def speed(models: dict[str, Model], data: Data, steps: int = 4096, seconds: float = 20.0) -> list[dict]:
    """Inference of whole models, inputs to logits, on one row of `steps` steps of test data (repeated where it is shorter)."""
    rows = [x for x, _ in data.test]
    x = torch.cat(rows * (1 + steps // sum(map(len, rows))))[:steps, None]
    ways, context, off, notes = {}, {}, {}, {}
    for name, model in models.items():
        model.eval()
        if not isinstance(getattr(model.body, "plan", None), Plan):
            ways[name], context[name] = (lambda m=model: m(x)), model.body.context
            continue
        truth = under(model, Recurrent(), x)
        for label, (plan, reach) in RACED.items():
            way = f"{name}, {label}"
            ways[way], context[way] = (lambda m=model, plan=plan: under(m, plan, x)), reach
            off[way] = (ways[way]() - truth).abs().max().item()
            if isinstance(plan, Verified):
                report = model.body.last_report
                notes[way] = (
                    f"{report.passes} pass{'es' * (report.passes > 1)}" + ", fell back to Recurrent()" * report.fallback
                )
    found = race(ways, seconds=seconds, rounds=5)
    return [
        dict(
            way=way,
            context=context[way],
            median=t.median,
            low=t.low,
            high=t.high,
            off=off.get(way),
            note=notes.get(way, ""),
            steps=steps,
            threads=torch.get_num_threads(),
        )
        for way, t in found.items()
    ]


def under(model: Model, plan: Plan, x: Tensor) -> Tensor:
    with use_plan(model, plan):
        return model(x)
