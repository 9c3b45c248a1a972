"""`report`: every result under `paper/` to REPORT.md and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

from stable_rnn._errors import UserError
from stable_rnn.demo.report import whole

from .. import jsonl
from .models import CONFIGS, parse
from .tasks import TASKS, Task

NAMES = {"nll": "nll per frame", "F1": "F1", "bits/char": "bits/char", "perplexity": "perplexity"}
METHOD = """\
Every model of a task has about the same number of parameters, the same batches, loss, optimizer (Adam, gradients clipped at norm 1,
cosine schedule, early stopping on validation) and the same budget of the search, one seed: first the same points for all, quasi-random,
learning rate (log-uniform, 3e-4 … 3e-2) and dropout (uniform, 0 … 0.6); then points at the dropout of the model's best one so far, its
learning rate tripled if none tried is higher, a third if none is lower, else halfway to its better neighbour. The point of the best
validation score is trained again with other seeds; only these see the test data. Recurrent models have one layer; text is trained on in
random stretches and tested in rows of 2048 symbols, each from a zero state. Embeddings pass tanh, so inputs lie within 1. *Price* is how
much worse than the unconstrained model of the same cell, in the task's metric (below 0: it trained better within this budget). Figures are
means over seeds (lowest … highest).

*Certified*: the proven rate per step, for all inputs within 1 (`cap=true`: for any input), and for the inputs there are (all symbols, or
the test data); "none" where nothing below 1 is proven. *Measured*: exp of the largest Lyapunov exponent on test data, and the largest
2-norm of a product of k Jacobians of (h, c), to the power 1/k, seen from a few states; one step may be above 1 in this norm although some
other norm shrinks. *Window*: the k that is proven to bring the error of any output below 1e-3. All of these: the worst over seeds.
"""
THEIRS = """\
## Other people's figures

None of these were measured here, and none of their models has our sizes, so that only the differences between columns compare.

| task | RNN unstable / stable | LSTM unstable / stable | source |
|---|---|---|---|
| WikiText-2, perplexity | 146.7 / 143.5 | 92.3 / 95.1 | the authors' blog post, "When Recurrent Models Don't Need to be Recurrent" |
| JSB Chorales, nll | 8.9 / 8.9 | 8.5 / 8.5 | the paper, unverified, from memory |
| Penn Treebank, bits/char | 1.8 / 1.9 | 1.4 / 1.9 | the paper, unverified, from memory |
| ATIS, F1 | 94.7 / 94.7 | 95.1 / 94.6 | the paper, unverified, from memory |
"""


def write(folder: Path) -> Path:
    """Reads folder/paper/TASK/*.jsonl; writes folder/REPORT.md and the pictures beside the rows."""
    from .picture import draw_distances, draw_truncation  # matplotlib takes its time to import

    tasks = {name: found for name in TASKS if (found := read(folder / "paper" / name))}
    if not any(results["final"] for results in tasks.values()):
        raise UserError(f"{folder / 'paper'}: no finished results; run python -m benchmarks.paper TASK first")
    title = "# Does stability cost accuracy; does truncation?\n"
    text = [title, "By `python -m benchmarks.paper report`, from the files in `paper/`.\n", METHOD, prices(tasks)]
    for name, results in tasks.items():
        task, place = TASKS[name], folder / "paper" / name
        if not results["final"]:
            continue
        text += [f"## {task.title}\n", setting(results), accuracy(task, results), searches(task, results)]
        recurrent = {config: runs for config, runs in results["final"].items() if "truncation" in runs[0]}
        if recurrent:
            draw_truncation(place / "truncation.svg", task, recurrent)
            text += [
                forgetting(recurrent),
                truncation(task, recurrent),
                f"![truncation](paper/{name}/truncation.svg)\n",
            ]
        if results["distance"]:
            draw_distances(place / "distance.svg", results["distance"])
            text += [distances(results["distance"]), f"![distance of weights](paper/{name}/distance.svg)\n"]
        if results["speed"]:
            text += [speed(results["speed"])]
    text += [THEIRS, missing(tasks)]
    file = folder / "REPORT.md"
    whole(file, lambda draft: draft.write_text("\n".join(text)))
    return file


def read(place: Path) -> dict:
    """{"search": {config: {trial: result}}, "final": {config: [result, ...]}, "distance": {config: result}, "speed": rows}"""
    found: dict = dict(search={}, final={}, distance={}, speed=[])
    if (place / "speed.jsonl").is_file():
        found["speed"] = jsonl.read(place / "speed.jsonl")[1]
    runs = jsonl.read(place / "runs.jsonl")[1] if (place / "runs.jsonl").is_file() else []
    last = {result["run"]: result for result in runs}  # of a run that was repeated with another setting, the last
    for name, result in sorted(last.items()):
        kind, _, number = name.rpartition(".")[2].partition("-")
        if kind == "search":
            found["search"].setdefault(result["config"], {})[int(number)] = result
        elif kind == "seed":
            found["final"].setdefault(result["config"], []).append(result)
        else:
            found["distance"][result["config"]] = result
    for part in ("search", "final", "distance"):
        found[part] = {config: found[part][config] for config in in_order(found[part])}
    return found if found["search"] else {}


def in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (CONFIGS.index(name) if name in CONFIGS else len(CONFIGS), name))


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def spread(values: list[float | None], digits: int = 2) -> str:
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return f"diverged ({len(values) - len(known)} of {len(values)})"
    return f"{mean(known):.{digits}f}" + (
        f" ({min(known):.{digits}f} … {max(known):.{digits}f})" if len(known) > 1 else ""
    )


def test(runs: list[dict]) -> float | None:
    values = [run["test"] for run in runs]
    return None if None in values else mean(values)


def price(task: Task, finals: dict, config: str) -> float | None:
    cell, slash, _ = config.partition("/")
    if not slash or cell not in finals or test(finals[cell]) is None or test(finals[config]) is None:
        return None
    return (test(finals[config]) - test(finals[cell])) * (-1 if task.higher_is_better else 1)


def prices(tasks: dict) -> str:
    names = in_order({config for found in tasks.values() for config in found["final"] if "/" in config})
    rows = []
    for name, found in tasks.items():
        known = [price(TASKS[name], found["final"], config) if config in found["final"] else None for config in names]
        if any(value is not None for value in known):
            what = f"{TASKS[name].title}, {NAMES[TASKS[name].metric]}"
            rows.append([what, *("" if value is None else f"{value:+.2f}" for value in known)])
    return "## The price of stability\n\n" + table(["task", *names], rows)


def setting(results: dict) -> str:
    runs = [run for finals in results["final"].values() for run in finals]
    runs += [run for found in results["search"].values() for run in found.values()]
    trials, seeds = (sorted({len(v) for v in results[part].values()}) for part in ("search", "final"))
    hours = sum(run["seconds"] for run in runs) / 3600

    def of(key: str, most: int = 40) -> str:
        return ", ".join(sorted({str(run[key])[:most] for run in runs}))

    epochs = ", ".join(map(str, sorted({run["setting"]["epochs"] for run in runs})))
    return (
        f"{to_text(trials)} point(s) searched and {to_text(seeds)} seed(s) for each model, at most {epochs} epochs; {len(runs)} runs, "
        f"{hours:.1f} hours of {of('threads')} thread(s) of a CPU ({of('machine')}), torch {of('torch')}, commit {of('commit', 10)}.\n"
    )


def to_text(counts: list[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def accuracy(task: Task, results: dict) -> str:
    rows = []
    for config, runs in results["final"].items():
        cost, first = price(task, results["final"], config), runs[0]
        context = "all" if first["context"] is None else str(first["context"])
        rows.append(
            [
                config,
                str(first["setting"]["width"]),
                f"{first['parameters']:,}",
                context,
                f"{first['setting']['rate']:.2g}",
                f"{first['setting']['dropout']:.2g}",
                spread([run["valid"] for run in runs]),
                spread([run["test"] for run in runs]),
                "" if cost is None else f"{cost:+.2f}",
            ]
        )
    return table(
        [
            "model",
            "width",
            "parameters",
            "context",
            "rate",
            "dropout",
            "validation",
            f"test {NAMES[task.metric]}",
            "price",
        ],
        rows,
    )


def searches(task: Task, results: dict) -> str:
    found = results["search"]
    trials = sorted({trial for runs in found.values() for trial in runs})
    points = {t: {point(runs[t]) for runs in found.values() if t in runs} for t in trials}
    shared = [t for t in trials if len(points[t]) == 1]
    head = [*(points[t].copy().pop() if t in shared else f"then {t}" for t in trials)]
    rows = [
        [
            config,
            *(shown(runs.get(t)) + (f" ({point(runs[t])})" if t not in shared and t in runs else "") for t in trials),
        ]
        for config, runs in found.items()
    ]
    text = f"Validation {NAMES[task.metric]} at each point (learning rate, dropout) of the search:\n\n" + table(
        ["model", *head], rows
    )
    for end, which in ((max, "highest"), (min, "lowest")):
        edge = [
            config
            for config, runs in results["final"].items()
            if runs[0]["setting"]["rate"] == end(run["setting"]["rate"] for run in found[config].values())
        ]
        if edge:
            text += f"\nThe chosen learning rate is the {which} that was tried for {', '.join(edge)}: more points may find better.\n"
    return text


def point(run: dict) -> str:
    return f"{run['setting']['rate']:.2g}, {run['setting']['dropout']:.2g}"


def shown(run: dict | None) -> str:
    return "not run" if run is None else "diverged" if run["valid"] is None else f"{run['valid']:.2f}"


def forgetting(finals: dict) -> str:
    rows = []
    for config, runs in finals.items():
        worst = [[run["measured"]["worst"].get(k) for run in runs] for k in ("1", longest(runs))]
        exponent = max(run["measured"]["lyapunov"] for run in runs)
        rows.append(
            [
                config,
                rate(runs, "certified"),
                rate(runs, "certified_on_data"),
                f"{exponent:.3f}",
                *(f"{max(w):.3f}" for w in worst),
                window(runs, "certified"),
                window(runs, "certified_on_data"),
            ]
        )
    k = longest(next(iter(finals.values())))
    return table(
        [
            "model",
            "certified rate",
            "on these inputs",
            "measured: Lyapunov",
            "worst step",
            f"worst {k} steps",
            "window",
            "on these inputs",
        ],
        rows,
    )


def longest(runs: list[dict]) -> str:
    return max(runs[0]["measured"]["worst"], key=int)


def rate(runs: list[dict], kind: str) -> str:
    return f"{max(run[kind]['rate'] for run in runs):.4f}" if all(run[kind]["stable"] for run in runs) else "none"


def window(runs: list[dict], kind: str) -> str:
    known = [run[kind]["window"] for run in runs]
    return "none" if None in known else str(max(known))


def truncation(task: Task, finals: dict) -> str:
    windows = [point["k"] for point in next(iter(finals.values()))[0]["truncation"]["windows"]]
    steps = next(iter(finals.values()))[0]["truncation"]["steps"]

    def rows(show: Callable[[list[float]], str], key: str) -> Iterable[list[str]]:
        for config, runs in finals.items():
            points = zip(*([point[key] for point in run["truncation"]["windows"]] for run in runs))
            whole_run = [show([run["truncation"]["recurrent"] for run in runs])] if key == "metric" else []
            yield [config, *map(show, points), *whole_run]

    head = ["model", *(f"k = {k}" for k in windows)]
    return (
        f"Test {NAMES[task.metric]} of the trained models under `Windowed(k)`, the first {steps} steps of test data (a window as "
        "long as the longest row is the recurrent run):\n\n"
        + table([*head, "recurrent"], rows(lambda v: f"{mean(v):.2f}", "metric"))
        + "\nLargest difference of any output of the recurrent layer (|h| ≤ 1) from the recurrent run, worst seed:\n\n"
        + table(head, rows(lambda v: f"{max(v):.1e}", "largest"))
    )


def distances(found: dict) -> str:
    some = next(iter(found.values()))
    windows = [point["k"] for point in some["points"] if point["k"]]
    head = [
        "model",
        *(f"k = {k}" for k in windows),
        "one rounding",
        *(f"test, k = {k}" for k in (windows[0], windows[-1])),
        "full",
    ]
    rows = []
    for config, result in found.items():
        full, *points = result["points"]
        tests = [points[0], points[-1], full]
        away = [p["distance"] for p in points] + [result["rounding"]]
        rows.append(
            [
                config,
                *("diverged" if distance is None else f"{distance:.2g}" for distance in away),
                *("diverged" if p["test"] is None else f"{p['test']:.2f}" for p in tests),
            ]
        )
    return (
        f"Truncated training against full: the same start, batches and dropout masks, {some['setting']['epochs']} epochs, the chosen "
        "point, one seed. Distance of the recurrent layer's weights at the end, relative to the way that full training went; the same "
        "for full training from recurrent weights one rounding away, below which no window can be expected to come; and the test "
        "metric, each model run as it was trained:\n\n" + table(head, rows)
    )


def speed(found: list[dict]) -> str:
    steps, threads = found[0]["steps"], found[0]["threads"]
    lines = []
    for row in found:
        context = "all" if row["context"] is None else str(row["context"])
        off = "" if row["off"] is None else f"{row['off']:.0e}" if row["off"] else "0"
        median, low, high = (f"{1e3 * row[key]:.1f}" for key in ("median", "low", "high"))
        lines.append(
            [
                row["way"],
                context,
                median,
                f"{low} … {high}",
                f"{row['steps'] / row['median'] / 1e3:.0f}",
                off,
                row["note"],
            ]
        )
    return (
        f"Inference, inputs to logits, one row of {steps} steps, batch 1, float32, {threads} CPU thread(s), all in turns in one "
        "process, beside other work on the machine; *context*: inputs that every output has seen at least, or sees at "
        "most (feed-forward); *off*: largest difference of a logit from the model run recurrently:\n\n"
        + table(["model", "context", "ms", "lowest … highest", "thousand steps/s", "off", ""], lines)
    )


def missing(tasks: dict) -> str:
    lines = []
    for name, task in TASKS.items():
        finals = tasks.get(name, {}).get("final", {})
        lacking = [config for config in CONFIGS if config not in finals]
        searched = sum(map(len, tasks.get(name, {}).get("search", {}).values()))
        if lacking:
            what = (
                f"no final runs of {', '.join(lacking)} ({searched} search runs exist)"
                if finals or searched
                else "nothing was run"
            )
            lines.append(f"- {task.title} (`{name}`): {what}.")
        unstable = [config for config in finals if "/" in config and parse(config).body not in finals]
        lines += [f"- {task.title}: {config} has no unconstrained counterpart to compare with." for config in unstable]
    lines.append(
        "- Weight distances: JSB only, one seed. Larger models, more layers and longer searches: not run. No GPU was used."
    )
    return "## What was not run\n\n" + "\n".join(lines) + "\n"
