"""Recurrent against windowed: sweeps over T, B, H and k, every plan on every backend here, against what others offer.

    python -m benchmarks.speed [--quick] [--out DIR] [--devices cpu,cuda] [--cells lstm,...] [--plans windowed,...] ...

Writes speed.jsonl, case by case, then speed.md, time.svg, speedup.svg and error.svg.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from stable_rnn._errors import UserError
from stable_rnn.cli import Parser, positive
from stable_rnn.ops.backends import NAMES

from .. import jsonl
from . import cases, contestants, measure, models, results

QUICK_MINUTES = 1.75  # two in all, with imports and pictures


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        return run(options)
    except UserError as error:
        print(f"benchmarks.speed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="benchmarks.speed", description=__doc__.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="a small part of it in under two minutes on two cores")
    made.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/speed"), metavar="DIR", help="default %(default)s"
    )
    made.add_argument(
        "--devices", type=some_of(("cpu", "cuda")), metavar="LIST", help="default: cpu, and cuda where there is one"
    )
    for name, allowed, default in (
        ("sweeps", cases.SWEEPS, None),
        ("cells", cases.CELLS, None),
        ("dtypes", tuple(cases.DTYPES), None),
        ("passes", cases.PASSES, None),
        ("plans", cases.PLANS, ",".join(cases.PLANS)),
        ("models", tuple(models.MODELS), "certified,border"),
        ("baselines", tuple(contestants.BASELINES), None),
        ("backends", NAMES, None),
    ):
        chosen = some_of(allowed)
        made.add_argument(
            f"--{name}",
            type=chosen,
            default=default and chosen(default),
            metavar="LIST",
            help=f"of {','.join(allowed)}",
        )
    for name in cases.SWEEPS:
        made.add_argument(
            f"--{name}", type=sizes, metavar="LIST", help=f"what the sweep over {name} visits, such as 64,128"
        )
    made.add_argument(
        "--chunk",
        type=positive(int),
        default=0,
        metavar="C",
        help="of Chunked and Verified (default: 256, and its own)",
    )
    made.add_argument(
        "--seconds", type=positive(float), metavar="S", help="for the turns of one case (default 3, quick 0.6)"
    )
    made.add_argument(
        "--longest", type=positive(float), metavar="S", help="no call longer than this is tried (default 20, quick 1)"
    )
    made.add_argument(
        "--minutes",
        type=positive(float),
        metavar="M",
        help="start no case after this long; what was left out is listed",
    )
    made.add_argument(
        "--resume", action="store_true", help="keep the cases that DIR holds of this commit and machine, run the others"
    )
    made.add_argument(
        "--threads", type=positive(int), metavar="N", help="for torch and the kernels (default: torch's choice)"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--commit", help="for the rows, where git cannot tell")
    made.add_argument("--list", action="store_true", help="print the cases and stop")
    return made


def some_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",")))
        wrong = [name for name in names if name not in allowed]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(allowed)}")
        return names

    return parse


def sizes(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between them, got {text!r}") from None
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, got {min(found)}")
    return tuple(sorted(set(found)))


def chosen_cases(options: argparse.Namespace) -> list[cases.Case]:
    devices = options.devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    if "cuda" in devices and not torch.cuda.is_available():
        raise UserError("--devices cuda: torch finds no usable GPU here")
    if options.devices == ["cpu"] and options.dtypes == ["tf32"]:
        raise UserError("--dtypes tf32: a GPU's; on the CPU there are float32, float16 and bfloat16")
    given = {name: getattr(options, name) for name in cases.SWEEPS if getattr(options, name)}
    grids, dtypes = {}, {}
    for device in devices:
        grids[device] = replace(
            cases.QUICK if options.quick else cases.ON_GPU if device == "cuda" else cases.WHOLE, **given
        )
        usual = ["bfloat16", "float16", "tf32", "float32"] if device == "cuda" else ["float32", "bfloat16"]
        dtypes[device] = [
            d for d in options.dtypes or (usual[:1] if options.quick else usual) if device == "cuda" or d != "tf32"
        ]
    return cases.cases(
        grids,
        options.sweeps or list(cases.SWEEPS),
        options.cells or ["lstm", "rnn_tanh"],
        dtypes,
        options.models,
        options.passes or list(cases.PASSES),
        options.chunk,
    )


def run(options: argparse.Namespace) -> int:
    begin = time.perf_counter()
    chosen = chosen_cases(options)
    if options.list:
        print(*chosen, sep="\n")
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    minutes = options.minutes or (QUICK_MINUTES if options.quick else float("inf"))
    seconds = options.seconds or (0.6 if options.quick else 3.0)
    longest = options.longest or (1.0 if options.quick else 20.0)
    devices = sorted({case.device for case in chosen})
    environment, file = results.environment(devices, options.commit), options.out / "speed.jsonl"
    log = jsonl.Log(
        file,
        {
            "what": "benchmarks.speed",
            "finished": False,
            "environment": environment,
            "options": {name: value for name, value in vars(options).items() if name not in ("out", "resume", "list")},
            "models": {name: models.MODELS[name] for name in options.models},
            "memory": {d: measure.HOW_MEMORY[d] for d in devices},
            "gemm_rates": {},
            "absent": {},
        },
        options.resume,
        blocks=True,
    )
    if log.about:
        results.comparable(file, log.about["environment"], environment)
    finished = {tuple(row[name] for name in results.CASE) for row in log.rows}
    rates, absent = (dict(log.about.get(name, {})) for name in ("gemm_rates", "absent"))
    left_before = log.about.get("not_run", [])
    left_out = {"reference": options.backends, "flashrnn": options.baselines} if options.quick else {}
    field = contestants.Field(
        tuple(options.plans),
        tuple(options.baselines or contestants.BASELINES),
        options.backends and tuple(options.backends),
        without=tuple(name for name, asked in left_out.items() if not asked),
    )
    last, left = 0.0, []  # seconds that the case before took; cases not begun
    for number, case in enumerate(chosen, 1):
        start = time.perf_counter()
        if start - begin + last > 60 * minutes:
            left = chosen[number - 1 :]
            break
        if tuple(getattr(case, name) for name in results.CASE) in finished:
            continue
        machine = f"{case.device} {case.dtype}"
        if machine not in rates:
            rates[machine] = measure.gemm_rate(case.device, case.dtype, min(1.0, seconds))
        print(f"{number} of {len(chosen)}  {case}", flush=True)
        limits = measure.Limits(seconds, longest, measure.memory_limit(case.device))
        found, missing = measure.run_case(case, field, rates[machine], limits, options.seed)
        print(*map(results.line, found), sep="\n", flush=True)
        missing = [f"{who.name}: {who.reason}" for who in missing]
        for who in missing:
            known = absent.get(who, {"cases": 0, "first": str(case)})
            absent[who] = known | {"cases": known["cases"] + 1}
        log.add(*found, gemm_rates={machine: rates[machine]}, absent={who: absent[who] for who in missing})
        last = time.perf_counter() - start
    begun = {str(case) for case in chosen} - {str(case) for case in left}
    not_run = [case for case in dict.fromkeys([*left_before, *map(str, left)]) if case not in begun]
    log.add(not_run=not_run, finished=not not_run, took_seconds=time.perf_counter() - begin)
    finish(options.out, log.about, log.rows)
    return 1 if any(row["wrong"] for row in log.rows) else 0


def finish(out: Path, about: dict, measured: list[dict]) -> None:
    """The table and the pictures."""
    facts = about["environment"]
    where = (
        facts["gpu"]["name"]
        if "gpu" in facts
        else f"{facts['processor']}, {facts['threads']} thread{'s' * (facts['threads'] > 1)}"
    )
    try:
        from .pictures import draw  # matplotlib takes its time to import

        pictures = draw(out, measured, f"{where}; torch {facts['torch']}; commit {(facts['commit'] or 'unknown')[:10]}")
    except ImportError as error:
        pictures = []
        print(f"no pictures: {error}", file=sys.stderr)
    (out / "speed.md").write_text(results.markdown(about, measured))
    wrong = sum(bool(row["wrong"]) for row in measured)
    print(
        f"{len(measured)} rows, {wrong} wrong, {len(about['not_run'])} cases not run; wrote {out}/speed.jsonl, speed.md"
        + "".join(f", {name}" for name in pictures)
    )


if __name__ == "__main__":
    sys.exit(main())
