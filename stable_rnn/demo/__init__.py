"""`stable-rnn demo`: three small character models, their certificates, and a long text under every plan."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import asdict

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import Chunked, Recurrent, Verified, Windowed
from .._errors import UserError
from ..plans import Plan
from . import data, report
from .compare import Result, Speed, run_text, speed
from .train import LAYERS, train_model

PLANS = [Recurrent(), Windowed(32), Chunked(256, 32), Verified()]
FORMS = {
    "recurrent": (Recurrent, ()),
    "windowed": (Windowed, (int,)),
    "chunked": (Chunked, (int, int)),
    "verified": (Verified, (float,)),
}


def demo(options: argparse.Namespace) -> None:
    """Train, compare, print, and write demo.png and demo.json. Bad input raises `UserError` before any work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the picture needs matplotlib: pip install 'stable-rnn[demo]'")
    plans = [parse_plan(text) for text in options.plan] if options.plan else PLANS
    corpus = data.load(options.text, options.data, options.length)
    out = report.prepare(options.out)
    if options.threads:
        torch.set_num_threads(options.threads)

    console = Console(highlight=False)
    setting = f"LSTM of {options.hidden} units, {options.steps} steps of training, float32, {torch.get_num_threads()} CPU thread(s)"
    console.print(f"Text: {corpus}\n{setting}", soft_wrap=True, markup=False)
    results, speeds = run(corpus, plans, options, console)
    report.print_models(console, results)
    for result in results:
        report.print_ways(console, result, options.length)
    report.print_legend(console)

    from .picture import draw  # matplotlib takes its time to import

    draw(out / "demo.png", results, speeds, f"{setting}; text: {corpus.name}")
    given = {name: value for name, value in vars(options).items() if name not in ("run", "command")}
    report.write_json(out / "demo.json", results, {"options": given, "text": str(corpus), "speed": asdict(speeds)})
    console.print(f"Wrote {out / 'demo.png'} and {out / 'demo.json'}.", soft_wrap=True, markup=False)


def run(corpus: data.Corpus, plans: list[Plan], options: argparse.Namespace, console: Console) -> tuple[list[Result], Speed]:
    """Everything that takes time, under progress bars."""
    ids = corpus.held_out[: options.length + 1]
    lengths = sorted({max(options.length >> n, 1) for n in range(5)})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def bar(what: str, total: int) -> Callable[[], None]:
            number = progress.add_task(what, total=total)
            return lambda: progress.advance(number)

        results = []
        for name in LAYERS:
            model = train_model(name, corpus, options.hidden, options.steps, options.seed, bar(f"train {name}", options.steps))
            results.append(run_text(name, model, ids, plans, bar))
        return results, speed(name, model, ids, plans, lengths, bar)


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
    raise UserError(f"--plan {text}: {why}; allowed are recurrent, windowed:K, chunked:CHUNK,WARMUP, verified and verified:TOL")
