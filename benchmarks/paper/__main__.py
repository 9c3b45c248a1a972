"""`python -m benchmarks.paper TASK` and `python -m benchmarks.paper report`. Bad input prints one line; the exit code is then 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stable_rnn._errors import UserError
from stable_rnn.cli import Parser, positive

RESULTS = Path(__file__).parents[1] / "results"
TASKS = ("jsb", "nottingham", "muse", "piano", "atis", "ptb-char", "ptb-word", "wikitext-2")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        (report if arguments.task == "report" else run)(arguments)
    except UserError as error:
        print(f"benchmarks.paper {arguments.task}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> Parser:
    top = Parser(
        prog="benchmarks.paper",
        description="Does stability cost accuracy, does truncation? Resumable: finished runs are kept.",
    )
    top.add_argument(
        "task",
        metavar="TASK",
        choices=[*TASKS, "report"],
        help=f"{', '.join(TASKS)}; or report: all results to REPORT.md",
    )
    top.add_argument(
        "--data", metavar="DIR", help="data root (default: STABLE_RNN_DATA, else ../shared/data beside the repository)"
    )
    top.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="results (default benchmarks/results/paper/TASK); report: its parent folder",
    )
    top.add_argument(
        "--config",
        action="append",
        metavar="NAME",
        help="only this model, such as lstm or lstm/certified:rate=.95,cap=true; may be given again (default: the table)",
    )
    top.add_argument(
        "--trials",
        type=positive(int),
        default=4,
        metavar="N",
        help="points of the search that all models share (default 4)",
    )
    top.add_argument(
        "--refine",
        type=int,
        choices=range(9),
        default=2,
        metavar="N",
        help="further points for each model, up to 8, where its results so far point (default 2)",
    )
    top.add_argument(
        "--seeds", type=positive(int), default=2, metavar="N", help="final runs of the chosen point (default 2)"
    )
    top.add_argument("--epochs", type=positive(int), metavar="N", help="instead of the task's own number")
    top.add_argument(
        "--minutes", type=positive(float), metavar="M", help="stop after this long; the same command goes on later"
    )
    top.add_argument(
        "--threads", type=positive(int), metavar="N", help="threads for torch (default: torch's own choice)"
    )
    top.add_argument(
        "--race",
        type=positive(float),
        default=20.0,
        metavar="S",
        help="seconds for the comparison of speeds (default 20)",
    )
    return top


def run(options) -> None:
    import torch  # takes a second: not before the arguments are known to be good

    from .data import root
    from .models import CONFIGS, parse
    from .runs import run_task
    from .tasks import TASKS as TABLE

    configs = [parse(name) for name in options.config or CONFIGS]
    task = TABLE[options.task]
    data = task.load(root(options.data))
    if data.note:
        print(data.note, file=sys.stderr)
    if options.threads:
        torch.set_num_threads(options.threads)
    out = options.out or RESULTS / "paper" / task.name
    run_task(
        task,
        data,
        out,
        configs,
        options.trials,
        options.refine,
        options.seeds,
        options.epochs,
        options.minutes,
        options.race,
    )


def report(options) -> None:
    from .report import write

    out = options.out or RESULTS
    print(f"Wrote {write(out)}.")


if __name__ == "__main__":
    sys.exit(main())
