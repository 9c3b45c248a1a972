"""`stable-rnn demo`: four small character models, their certificates, and a long text under every plan."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import asdict

import torch
from rich.console import Console

from .. import Chunked, Recurrent, Scanned, Verified, Windowed
from .._errors import UserError, printable
from ..plans import Plan
from . import data, report
from .compare import Result, Speed, run_text, speed, worthwhile
from .progress import Schedule
from .train import LAYERS, rehearsal, train_model

PLANS: list[Plan] = [Recurrent(), Windowed(32), Chunked(256, 32), Verified(), Scanned()]
FORMS: dict[str, tuple[type[Plan], tuple[type, ...]]] = {
    "recurrent": (Recurrent, ()),
    "windowed": (Windowed, (int,)),
    "chunked": (Chunked, (int, int)),
    "verified": (Verified, (float,)),
    "scanned": (Scanned, ()),
}


def demo(options: argparse.Namespace) -> None:
    """Train, compare, print, and write demo.png and demo.json. Bad input raises `UserError` before any work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the picture needs matplotlib: pip install 'stable-rnn[demo]'")
    chosen = [parse_plan(text) for text in options.plan] if options.plan else PLANS
    corpus = data.load(options.text, options.data, options.length)
    out = report.prepare(options.out)
    threads = options.threads or worthwhile(rehearsal(options.hidden))[-1]
    torch.set_num_threads(threads)

    console = Console(highlight=False)
    setting = f"LSTM of {options.hidden} units, {options.steps} steps of training, float32, {threads} CPU thread(s)"
    console.print(f"Text: {corpus}\n{setting}", soft_wrap=True, markup=False)
    with Schedule(console, options.budget, len(LAYERS)) as schedule:
        results, speeds = run(corpus, chosen, options, schedule)
    report.print_models(console, results, options.steps)
    for result in results:
        report.print_ways(console, result, options.length)
    report.print_legend(console)
    if schedule.cut:
        console.print(
            f"\nCut short, to end within about {options.budget:g} s (--budget): {'; '.join(schedule.cut)}.",
            soft_wrap=True,
        )

    given = {name: value for name, value in vars(options).items() if name != "command"}
    more = {"options": given, "text": str(corpus), "cut": schedule.cut, "speed": asdict(speeds)}
    report.write_json(out / "demo.json", results, more)

    from .picture import draw  # matplotlib takes its time to import

    draw(out / "demo.png", results, speeds, f"{setting}; text: {corpus.name}{'; cut short' * bool(schedule.cut)}")
    console.print(
        f"Wrote {printable(out / 'demo.png', 1000)} and {printable(out / 'demo.json', 1000)}.",
        soft_wrap=True,
        markup=False,
    )


def run(
    corpus: data.Corpus, chosen: list[Plan], options: argparse.Namespace, schedule: Schedule
) -> tuple[list[Result], Speed]:
    """Everything that takes time."""
    ids = corpus.held_out[: options.length + 1]
    lengths = sorted({max(options.length >> n, 1) for n in range(5)})
    results = []
    for name in LAYERS:
        model = train_model(
            name, corpus, options.hidden, options.seed, schedule.part("train", name, options.steps, "steps")
        )
        results.append(run_text(name, model, ids, chosen, schedule))
    return results, speed(name, model, ids, chosen, lengths, schedule)


def parse_plan(text: str) -> Plan:
    """`windowed:32` to `Windowed(32)`; `UserError` for what is no plan."""
    name, _, rest = text.partition(":")
    try:
        plan, kinds = FORMS[name]
        numbers = rest.split(",") if rest else []
        if len(numbers) != len(kinds) and not (name == "verified" and not numbers):
            raise ValueError
        return plan(*(kind(number) for kind, number in zip(kinds, numbers)))
    except KeyError:
        why = "no such plan"
    except ValueError as error:
        why = str(error) or "wrong numbers"
    raise UserError(
        f"--plan {printable(text)}: {why}; allowed are recurrent, windowed:K, chunked:CHUNK,WARMUP, verified, "
        "verified:TOL and scanned"
    )
