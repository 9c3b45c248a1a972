"""The rows of `benchmarks.targets` as a table: `python -m benchmarks.targets_table FILE.jsonl` writes FILE.md beside it."""

from __future__ import annotations

import sys
from pathlib import Path

from . import jsonl


def markdown(path: Path) -> str:
    about, rows = jsonl.read(path)
    machine = about["environment"]
    measured = [row for row in rows if row["target"] is not None]
    missed = sum(row["ratio"] < row["target"] for row in measured)
    head = f"""# CPU targets, every row

{machine["processor"]}, {machine["cores"]} cores, {machine["threads"]} threads, torch {machine["torch"]}, commit {machine["commit"][:7]}, \
{machine["date"][:10]}. Float32 unless a row says otherwise, input projection included on both sides. Times in ms: median
(fastest … slowest). Ratio: baseline / ours of medians, so above 1 ours is faster. Of {len(measured)} targets {missed} are missed.

| case | ours | baseline | which | ratio | target |
|---|---|---|---|---|---|
"""
    return head + "".join(map(line, rows))


def line(row: dict) -> str:
    times = [span(row[f"{who}_ms"], row[f"{who}_range_ms"]) if "ours_ms" in row else "" for who in ("ours", "baseline")]
    target = row["target"]
    aim = "" if target is None else f"{target:g}: {'met' if row['ratio'] >= target else 'missed'}"
    return f"| {row['case']} | {times[0]} | {times[1]} | {row['baseline']} | {row['ratio']:.2f} | {aim} |\n"


def span(median: float, ends: list[float]) -> str:
    return f"{median:.3g} ({ends[0]:.3g} … {ends[1]:.3g})"


def write(path: Path) -> None:
    path.with_suffix(".md").write_text(markdown(path), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
