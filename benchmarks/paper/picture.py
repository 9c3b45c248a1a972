"""Pictures of the report."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from matplotlib import pyplot

from .. import drawing
from .measure import WINDOWS
from .tasks import Task

COLORS = ("#888888", "#e7298a", "#1f77b4", "#d95f02", "#7570b3", "#1b9e77", "#a6761d", "#000000")
MARKERS = "osD^vP*X"
FLOOR = 1e-8


def draw_truncation(path: Path, task: Task, finals: dict) -> None:
    """The metric and the largest output difference of trained models under `Windowed(k)`; certified bounds dashed."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    for (config, runs), color, marker in zip(finals.items(), COLORS, MARKERS):
        style = dict(color=color, marker=marker, markersize=5, label=config)
        points = [run["truncation"]["windows"] for run in runs]
        left.plot(WINDOWS, [mean(p["metric"] for p in column) for column in zip(*points)], **style)
        left.axhline(mean(run["truncation"]["recurrent"] for run in runs), color=color, linewidth=0.6, linestyle=":")
        largest = [max(p["largest"] for p in column) for column in zip(*points)]
        shown = [(k, v) for k, v in zip(WINDOWS, largest) if v > 0]  # 0 has no place on a logarithmic axis
        right.plot(*zip(*shown), **style)
        if all(run["certified_on_data"]["stable"] for run in runs):
            bounds = [max(column) for column in zip(*(run["certified_on_data"]["bounds"] for run in runs))]
            right.plot(WINDOWS, bounds, color=color, linestyle="--", linewidth=1)
    left.set(ylabel=task.metric)
    left.set_title(f"{task.title}: test {task.metric} (dotted: recurrent)", fontsize=10)
    right.set(yscale="log", ylim=(FLOOR, 4))
    right.set_title("largest difference of an output from the full run (dashed: proven bound)", fontsize=10)
    right.set_ylabel("largest |Δh|, any seed")
    finish(figure, (left, right), path, WINDOWS, "window k: inputs that each output has seen")


def draw_distances(path: Path, found: dict) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 5.6), layout="constrained")
    for (config, result), color, marker in zip(found.items(), COLORS, MARKERS):
        points = [(p["k"], p["distance"]) for p in result["points"] if p["k"] and p["distance"]]
        axes.plot(*zip(*points), color=color, marker=marker, markersize=5, label=config)
    axes.set(yscale="log", ylabel="distance, relative to the way of full training")
    axes.set_title("weights after truncated and after full training", fontsize=10)
    windows = sorted({p["k"] for result in found.values() for p in result["points"] if p["k"]})
    finish(figure, (axes,), path, windows, "window k in training")


def finish(figure, all_axes, path: Path, windows: list[int], label: str) -> None:
    for axes in all_axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(windows, map(str, windows))
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.minorticks_off()
    drawing.finish(figure, path)
