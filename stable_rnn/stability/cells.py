"""The stability of every cell, by the names in `stable_rnn.cells`: each family of cells has its file here."""

from __future__ import annotations

from importlib import import_module

from ..cells import CELLS
from .cell import CellStability

STABILITY: dict[str, CellStability] = {
    name: import_module(f".{cell.family}", __package__).CELLS[name] for name, cell in CELLS.items()
}
