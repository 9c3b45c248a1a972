"""Time against T for each plan, speed-up against k, error against k with the certified bound."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, ScalarFormatter

from .. import drawing

COLORS = {
    "nn": "#222222",
    "unfold": "#c49a00",
    "shifted": "#8c564b",
    "overlap": "#7f7f7f",
    "FlashRNN": "#17becf",
    "haste": "#bcbd22",
    "Recurrent": "#1f77b4",
    "Windowed": "#d95f02",
    "Chunked": "#1b9e77",
    "Verified": "#7570b3",
}
STYLES = {"auto": "-", "cuda": "-", "cpu": "-", "triton": "--", "torch": "-.", "reference": ":"}
MARKERS = "os^Dv*"


def draw(folder: Path, rows: list[dict], subtitle: str) -> list[str]:
    """Writes the pictures that the rows allow and returns their names."""
    right = [row for row in rows if not row["wrong"]]
    first = right[0]["model"] if right else None
    made = {
        "time.svg": _panels(
            folder / "time.svg", [r for r in right if "T" in r["sweeps"]], _times, "Time of a call against T", subtitle
        ),
        "speedup.svg": _panels(
            folder / "speedup.svg",
            [r for r in right if "k" in r["sweeps"] and r["model"] == first],
            _speedups,
            "Speed-up against the window k (warm-up of the chunks)",
            subtitle,
        ),
        "error.svg": _panels(
            folder / "error.svg",
            [r for r in rows if "k" in r["sweeps"] and r["passes"] == "forward"],
            _errors,
            "Error against the window k, and its certified bound",
            subtitle,
        ),
    }
    return [name for name, drawn in made.items() if drawn]


def _panels(path: Path, rows: list[dict], panel, title: str, subtitle: str) -> bool:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        passes = "" if panel is _errors else f" {row['passes']}"
        groups.setdefault(f"{row['cell']} {row['dtype']} {row['device']}{passes}", []).append(row)
    if not groups:
        return False
    columns = len(groups) if len(groups) < 4 else 2
    lines = -(-len(groups) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(6 * columns, 4 * lines + 1), squeeze=False, layout="constrained"
    )
    figure.suptitle(f"{title}\n{subtitle}", fontsize=10)
    for axis, (name, group) in zip(axes.flat, groups.items()):
        panel(axis, group)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    drawing.finish(figure, path)
    return True


def _times(axis: Axes, rows: list[dict]) -> None:
    sizes = rows[0]
    for name, points in _by(rows, "name", "T"):
        look = _look(points[0])
        axis.plot([r["T"] for r in points], [r["seconds"]["median"] * 1e3 for r in points], label=name, **look)
        low, high = ([(r["seconds"][side] or r["seconds"]["median"]) * 1e3 for r in points] for side in ("low", "high"))
        axis.fill_between([r["T"] for r in points], low, high, color=look["color"], alpha=0.12, linewidth=0)
    _axes(axis, f"T  (B={sizes['B']}, H={sizes['H']}, k={sizes['k']})", "ms")


def _speedups(axis: Axes, rows: list[dict]) -> None:
    for name, points in _by(
        [r for r in rows if r["ours"] and r["speedup"] and r["computes"] != "recurrent"], "name", "k"
    ):
        look = _look(points[0])
        axis.plot(
            [r["k"] for r in points],
            [r["speedup"]["ratio"] for r in points],
            label=f"{name} over the strongest baseline",
            **look,
        )
        over = [r for r in points if r["speedup_over_torch"]]
        axis.plot(
            [r["k"] for r in over],
            [r["speedup_over_torch"]["ratio"] for r in over],
            label=f"{name} over nn",
            alpha=0.45,
            **look | {"marker": "x"},
        )
    axis.axhline(1, color="#999999", linewidth=0.8)
    _axes(axis, f"k  (T={rows[0]['T']}, B={rows[0]['B']}, H={rows[0]['H']})", "times as fast")


def _errors(axis: Axes, rows: list[dict]) -> None:
    """One curve a model: `Windowed(k)`, of the first backend that ran it."""
    windows = [r for r in rows if r["ours"] and r["computes"] == "windowed"]
    for number, (model, points) in enumerate(_by(windows, "model", "k")):
        points = [r for r in points if r["backend"] == points[0]["backend"]]
        color, k = f"C{number}", [r["k"] for r in points]
        axis.plot(
            k,
            [max(r["error"], 1e-18) for r in points],
            color=color,
            marker="o",
            markersize=4,
            label=f"{model} weights: measured",
        )
        for field, style, what in (("bound", "--", "proven"), ("bound_with_rounding", ":", "proven, and rounding")):
            known = [r for r in points if r[field]]
            if known:
                bound = [max(r[field], 1e-18) for r in known]
                axis.plot([r["k"] for r in known], bound, style, color=color, label=f"{model} weights: {what}")
    if windows:
        _axes(axis, f"k  (T={rows[0]['T']}, B={rows[0]['B']}, H={rows[0]['H']})", "largest |y − y64|")


def _by(rows: list[dict], field: str, order: str) -> Iterable[tuple[str, list[dict]]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        name = re.sub(r"nn\.(LSTM|GRU|RNN)", "nn", row[field])  # one legend for all cells
        if order == "k" and field == "name":  # Windowed(8), Windowed(16), ...: one curve
            name = name.replace(f"({row['k']})", "(k)").replace(f", {row['k']})", ", k)")
        elif order == "T" and field == "name" and name.startswith("Chunked"):
            name = f"Chunked [{row['backend']}]"  # the chunk is shorter where T is
        groups.setdefault(name, []).append(row)
    return [(name, sorted(group, key=lambda r: r[order])) for name, group in groups.items()]


def _look(row: dict) -> dict:
    name = next((n for n in COLORS if row["name"].startswith(n)), "nn")
    marker = MARKERS[list(STYLES).index(row["backend"]) % len(MARKERS)] if row["ours"] else "."
    style = "--" if row["name"].endswith("one thread") else STYLES.get(row["backend"], "-")
    return {"color": COLORS[name], "linestyle": style, "marker": marker, "markersize": 4}


def _axes(axis: Axes, x: str, y: str) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axis.get_ylim()
    if high > 1e3 * low:
        axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
