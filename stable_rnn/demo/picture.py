"""The demo's picture: error against window, speed against length."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no screen

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from .compare import SMALL, Point, Result, Speed
from .report import whole

COLORS = ("#888888", "#1f77b4", "#d95f02", "#7570b3", "#1b9e77", "#e7298a", "#a6761d")
MARKERS = "osD^vP*X"


def draw(path: Path, results: list[Result], speed: Speed, subtitle: str) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6.2), layout="constrained")
    figure.suptitle(
        f"Recurrent models that need not be recurrent\n{subtitle}", fontsize=11, parse_math=False
    )  # a file's name may have a $
    draw_errors(left, results)
    draw_speed(right, speed)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.minorticks_off()
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    whole(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    pyplot.close(figure)


def draw_errors(axes: Axes, results: list[Result]) -> None:
    for result, color, marker in zip(results, COLORS, MARKERS):
        measured = [point for point in result.windows if point.error]  # 0 has no place on a logarithmic axis
        exact = next((f", 0 at {point.k}" for point in result.windows if point.error == 0), "")
        axes.plot(
            *columns(measured, "error"),
            color=color,
            marker=marker,
            markersize=5,
            label=f"{result.name}, {result.bits:.2f} bits/char: measured{exact}",
        )
        if result.certificate.stable:
            axes.plot(
                *columns(result.windows, "bound"), color=color, linestyle="--", label=f"{result.name}, certified bound"
            )
            axes.plot(
                *columns(result.windows, "bound_float32"),
                color=color,
                linestyle=":",
                label=f"{result.name}, the same with rounding in float32",
            )
    ticks = sorted({point.k for result in results for point in result.windows})
    axes.set(
        yscale="log",
        ylim=(SMALL, 4),
        xlabel="window k: inputs that each output has seen",
        ylabel="largest error of any output (|h| ≤ 1)",
        title="Windowed(k) against the full recurrence",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))


def columns(points: list[Point], what: str) -> tuple[list[int], list[float]]:
    return [point.k for point in points], [getattr(point, what) for point in points]


def draw_speed(axes: Axes, speed: Speed) -> None:
    for number, (way, seconds) in enumerate(speed.seconds.items()):
        of_torch = way.startswith("nn.LSTM")
        measured = [(length, length / 1e3, time) for length, time in zip(speed.lengths, seconds) if time]
        fast = [count / time.median for _, count, time in measured]
        spread = [
            [value - count / time.high, count / time.low - value] for value, (_, count, time) in zip(fast, measured)
        ]
        axes.errorbar(
            [length for length, _, _ in measured],
            fast,
            list(zip(*spread)) or None,  # slowest and fastest round
            color="black" if of_torch else COLORS[number % len(COLORS)],
            linestyle=("-", "--")[number] if of_torch else "-",
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            capsize=2,
            elinewidth=0.8,
            label=way,
        )
    axes.set(
        yscale="log",
        xlabel="length of the text T (characters, batch 1)",
        ylabel="thousand characters per second",
        title=f"Speed of the layer {speed.model}, higher is better; bars: all rounds",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(speed.lengths, map(str, speed.lengths))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
