"""Pictures as SVG: text stays text, small enough to keep, and the same rows give the same bytes."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no screen

from matplotlib import pyplot
from matplotlib.figure import Figure

from stable_rnn.demo.report import whole

LOOK = {"svg.fonttype": "none", "svg.hashsalt": "stable_rnn"}
NOTHING = {"Date": None, "Creator": None, "Format": None, "Type": None}  # of these is written into the file


def finish(figure: Figure, path: Path) -> None:
    """One legend for all panels below them; then the file."""
    labels = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    widest = 0.5 + 0.065 * max(map(len, labels), default=0)  # inches, about
    columns = max(1, int(figure.get_figwidth() / widest))
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    drawn = io.StringIO()
    with matplotlib.rc_context(LOOK):
        figure.savefig(drawn, format="svg", metadata=NOTHING)
    pyplot.close(figure)
    text = re.sub(r"\s*\n\s*", " ", drawn.getvalue()) + "\n"  # thousands of lines that nobody compares: one
    whole(path, lambda file: file.write_text(text, encoding="utf-8"))
