"""The cells, by the names of the ops' schemas."""

import importlib

from .gru import Gru
from .lstm import Lstm
from .rnn import Relu, Tanh
from .spec import NOTHING, Cell, State

CELLS: dict[str, Cell] = {cell.name: cell for cell in (Tanh(), Relu(), Lstm(), Gru())}
MODES: dict[str, Cell] = {cell.mode: cell for cell in CELLS.values()}


def of_code(code: int) -> Cell:
    return next(cell for cell in CELLS.values() if cell.code == code)


def __getattr__(name: str) -> object:
    """The modules of one step once stood here, and pickles of whole models still name them so."""
    if name not in ("StableLSTMCell", "StableRNNCell"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("stable_rnn.step_cells"), name)


__all__ = ["CELLS", "MODES", "NOTHING", "Cell", "State", "of_code"]
