"""The demo's picture: error against window, speed against length."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402  after the choice of a backend that needs no screen

from .report import whole  # noqa: E402

COLORS = ("#888888", "#1f77b4", "#d95f02", "#7570b3", "#1b9e77", "#e7298a")
MARKERS = "osD^vP*X"


def draw(path: Path, errors: dict[str, list[dict]], speeds: dict[str, list[float]], lengths: list[int], subtitle: str) -> None:
    """`errors`: model to points of `window_errors`; `speeds`: way to seconds at each of `lengths`."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    figure.suptitle(f"Recurrent models that need not be recurrent\n{subtitle}", fontsize=12)

    for (name, points), color, marker in zip(errors.items(), COLORS, MARKERS):
        measured = [p for p in points if p["error"]]  # 0 has no place on a logarithmic axis
        left.plot(*columns(measured, "error"), color=color, marker=marker, markersize=5, label=f"{name}, measured")
        if points[0]["bound"] is not None:
            left.plot(*columns(points, "bound"), color=color, linestyle="--", label=f"{name}, certified bound")
            left.plot(*columns(points, "bound_float32"), color=color, linestyle=":", label="the same with rounding in float32")
    left.set(
        yscale="log",
        xlabel="window k: inputs that each output has seen",
        ylabel="largest error of any output (|h| ≤ 1)",
        title="Windowed(k) against the full recurrence",
    )
    left.set_xscale("log", base=2)
    left.set_xticks([p["k"] for p in points], [str(p["k"]) for p in points])

    for number, (name, seconds) in enumerate(speeds.items()):
        speed = [length / s / 1e3 for length, s in zip(lengths, seconds, strict=True)]
        torchs = name.startswith("nn.LSTM")
        right.plot(
            lengths,
            speed,
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            label=name,
            color="black" if torchs else COLORS[number % len(COLORS)],
            linestyle=("-", "--")[number % 2] if torchs else "-",
        )
    right.set_xscale("log", base=2)
    right.set(
        yscale="log",
        xlabel="length of the text T (characters, batch 1)",
        ylabel="thousand characters per second",
        title="Speed of the layer, higher is better",
    )
    right.set_xticks(lengths, [str(length) for length in lengths])

    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.minorticks_off()
        axes.legend(fontsize=8)
    whole(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    pyplot.close(figure)


def columns(points: list[dict], what: str) -> tuple[list[int], list[float]]:
    return [p["k"] for p in points], [p[what] for p in points]
