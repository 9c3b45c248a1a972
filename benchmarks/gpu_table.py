"""The table of `benchmarks.gpu_targets`: rows as they come, checked, printed and kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from .jsonl import Log
from .speed import contestants, measure
from .speed.cases import Case

TINY = {"T": 48, "B": 3, "H": 8, "k": 4, "C": 12}  # of a rehearsal


class Table:
    """Rows as they come: printed, and written."""

    def __init__(self, options: argparse.Namespace, log: Log) -> None:
        self.tiny: bool = options.rehearse
        self.device = "cpu" if self.tiny else "cuda"
        self.kernels = ("cpu",) if self.tiny else ("cuda", "triton")
        self.limits = measure.Limits(options.seconds, 20.0, measure.memory_limit(self.device))
        self.rates: dict[str, float] = {}
        self.log = log

    def case(
        self, dtype: str = "float16", passes: str = "forward", cell: str = "lstm", model: str = "plain", **sizes: int
    ) -> Case:
        sizes = {"B": 1, "k": 32} | sizes
        if self.tiny:
            dtype, sizes = (
                "float32" if dtype == "float16" else dtype,
                {name: min(value, TINY[name]) for name, value in sizes.items()},
            )
        return Case((), cell, dtype, self.device, model, passes, **sizes)

    def name(self, case: Case, backend: str, what: str = "") -> str:
        return f"{case.cell.upper()} {case.dtype}{what and ' ' + what} B{case.B} T{case.T} H{case.H} {case.passes} [{backend}]"

    def rate(self, dtype: str) -> float:
        if dtype not in self.rates:
            self.rates[dtype] = 1e10 if self.tiny else measure.gemm_rate(self.device, dtype, 1.0)
        return self.rates[dtype]

    def run(
        self, case: Case, plans: Sequence[str], baselines: Sequence[str], backends: Sequence[str] | None = None
    ) -> Measured:
        field = contestants.Field(tuple(plans), tuple(baselines), tuple(backends or self.kernels))
        rows, absent = measure.run_case(case, field, self.rate(case.dtype), self.limits)
        for one in absent:
            self.note(f"{case}: {one.name}", note=f"absent: {one.reason}")
        return Measured(rows)

    def versus(self, what: str, ours: dict | None, theirs: dict | None, target: float | None) -> dict:
        """A row for one of ours against a baseline: rows of `measure.run_case`, None where it is absent."""
        if ours is None or theirs is None:
            return self.note(
                what, target=target, note=f"not measured: no {'contestant' if ours is None else 'baseline'}"
            )
        fields = {
            "ours": ours["name"],
            "baseline": theirs["name"],
            "ours_ms": ours["seconds"]["median"] * 1e3,
            "baseline_ms": theirs["seconds"]["median"] * 1e3,
            "error": ours["error_of_function"],
            "tolerance": ours["tolerance"],
        }
        wrong = ours["wrong"] or theirs["wrong"] and f"the baseline: {theirs['wrong']}"
        ratio = None if wrong else theirs["seconds"]["median"] / ours["seconds"]["median"]
        return self.note(what, ratio=ratio, target=target, wrong=wrong or None, **fields)

    def again(self, row: dict, what: str, target: float) -> None:
        """A row that is there already, under another name and with a target."""
        self.note(
            what, **{name: value for name, value in row.items() if name not in ("case", "met")} | {"target": target}
        )

    def value(
        self, what: str, ours: dict | None, value: Callable[[dict], float], unit: str, target: float | None, most: bool
    ) -> None:
        """A row for a figure of one of ours, with a target that it may not pass (`most`) or must reach."""
        if ours is None:
            return self.note(what, target=target, note="not measured: no contestant")
        self.note(
            what,
            value=None if ours["wrong"] else value(ours),
            unit=unit,
            target=target,
            most=most,
            wrong=ours["wrong"],
            ours=ours["name"],
            ours_ms=ours["seconds"]["median"] * 1e3,
            error=ours["error_of_function"],
            tolerance=ours["tolerance"],
        )

    def note(self, what: str, **fields: Any) -> dict:
        row = {"case": what, "target": None, "wrong": None, "note": ""} | fields
        figure = row.get("ratio", row.get("value"))
        met = None
        if figure is not None and row["target"] is not None:
            met = figure <= row["target"] if row.get("most") else figure >= row["target"]
        self.log.add(row | {"met": met})
        print(line(self.log.rows[-1]), flush=True)
        return self.log.rows[-1]


class Measured:
    """The rows of one case."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def ours(self, plan: str, backend: str) -> dict | None:
        return next(
            (r for r in self.rows if r["ours"] and r["backend"] == backend and r["name"].startswith(plan)), None
        )

    def best(self, name: str) -> dict | None:
        """The fastest right baseline of that name; a wrong one only if there is no other."""
        found = [r for r in self.rows if not r["ours"] and r["name"].startswith(name)]
        return min(found, key=lambda r: (bool(r["wrong"]), r["seconds"]["median"]), default=None)


def line(row: dict) -> str:
    if row["wrong"]:
        return f"{row['case']}: WRONG: {row['wrong']}"
    if row.get("ratio", row.get("value")) is None:
        return f"{row['case']}: {row['note']}"
    figure = (
        f"{row['ratio']:.2f}x over {row['baseline']}"
        if "ratio" in row
        else f"{row['value']:.4g} {row['unit']}".rstrip()
    )
    if row["target"] is None:
        return f"{row['case']}: {figure}"
    return f"{row['case']}: {figure} (target {aim(row)}: {'met' if row['met'] else 'missed'})"


def aim(row: dict) -> str:
    return (
        ""
        if row["target"] is None
        else f"{'≤' if row.get('most') else '≥'} {row['target']:.3g} {row.get('unit', '')}".rstrip()
    )


def markdown(about: dict, rows: list[dict]) -> str:
    facts = about["environment"]
    where = facts["gpu"]["name"] if "gpu" in facts else facts["processor"]
    said = f"{where}, commit {facts['commit']}, {facts['date']}, torch {facts['torch']}"
    said += (
        " **Not finished.**" * (not about["finished"]) + " **A rehearsal: tiny sizes on the CPU.**" * about["rehearsal"]
    )
    out = [
        "# GPU targets",
        "",
        said,
        "",
        "| case | ours, ms | baseline, ms | figure | target | error (allowed) | |",
        "|---|---|---|---|---|---|---|",
    ]

    def cell(row: dict, name: str, form: str) -> str:
        return format(row[name], form) if row.get(name) is not None else ""

    for row in rows:
        figure = (
            cell(row, "value", ".4g") if row.get("ratio") is None else f"{row['ratio']:.2f}x over {row['baseline']}"
        )
        error = cell(row, "error", ".1e") + (f" ({row['tolerance']:.1e})" if row.get("tolerance") is not None else "")
        verdict = (
            f"**WRONG: {row['wrong']}**"
            if row["wrong"]
            else {True: "met", False: "missed", None: row["note"]}[row["met"]]
        )
        times = f"{cell(row, 'ours_ms', '.4g')} | {cell(row, 'baseline_ms', '.4g')}"
        out.append(f"| {row['case']} | {times} | {figure} | {aim(row)} | {error} | {verdict} |")
    return "\n".join(out) + "\n"
