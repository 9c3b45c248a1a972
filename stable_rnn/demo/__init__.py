"""`stable-rnn demo`: three small character models, their certificates, and a long text under every plan."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import asdict

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import Chunked, Recurrent, Verified, Windowed
from .._errors import UserError
from ..plans import Plan
from . import compare, report
from .data import load
from .train import LAYERS, train

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
    corpus = load(options.text, options.data, options.length)
    out = report.prepare(options.out)
    if options.threads:
        torch.set_num_threads(options.threads)

    console = Console(highlight=False)
    console.print(
        f"Text: {corpus.name}; {len(corpus.train)} characters to train on, {len(corpus.held_out)} held out, "
        f"{corpus.symbols} symbols. {options.steps} steps each, H = {options.hidden}, {torch.get_num_threads()} threads.",
        soft_wrap=True,
        markup=False,
    )
    ids = corpus.held_out[: options.length + 1]
    lengths = sorted({max(options.length >> n, 2) for n in range(5)})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def task(what: str, total: int):
            number = progress.add_task(what, total=total)
            return lambda: progress.advance(number)

        models = {
            name: train(name, corpus, options.hidden, options.steps, options.seed, task(f"train {name}", options.steps)) for name in LAYERS
        }
        certificates = {name: compare.certify(model) for name, model in models.items()}
        count = (len(plans) + 2) * compare.ROUNDS
        rows = {name: compare.run_ways(model, certificates[name], ids, plans, task(f"run {name}", count)) for name, model in models.items()}
        errors = {
            name: compare.window_errors(model, certificates[name], ids, task(f"windows of {name}", len(compare.WINDOWS)))
            for name, model in models.items()
        }
        *_, last = models
        speeds = compare.speed(models[last], ids, plans, lengths[:-1], task("speed against length", count * (len(lengths) - 1)))
    for row in rows[last]:
        speeds[row.way].append(row.seconds)

    bits = {name: compare.bits(model, ids) for name, model in models.items()}
    report.print_models(console, bits, certificates)
    for name in models:
        report.print_rows(console, name, options.length, rows[name])

    from .picture import draw

    draw(
        out / "demo.png",
        errors,
        speeds,
        lengths,
        f"character LSTM, H = {options.hidden}, text: {corpus.name}; {torch.get_num_threads()} CPU threads, float32",
    )
    report.write_json(
        out / "demo.json",
        {
            "environment": report.environment(),
            "options": {k: v for k, v in vars(options).items() if k not in ("run", "command")},
            "text": {
                "name": corpus.name,
                "train": len(corpus.train),
                "held_out": len(corpus.held_out),
                "symbols": corpus.symbols,
            },
            "models": {
                name: {
                    "bits_per_character": bits[name],
                    "certificate": report.summary(certificates[name]),
                    "ways": [asdict(row) for row in rows[name]],
                    "windows": errors[name],
                }
                for name in models
            },
            "speed": {"model": last, "lengths": lengths, "seconds": speeds},
        },
    )
    console.print(f"Wrote {out / 'demo.png'} and {out / 'demo.json'}.", soft_wrap=True, markup=False)


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
