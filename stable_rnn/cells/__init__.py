"""The cells, by the names of the ops' schemas."""
from .lstm import Lstm
from .rnn import Relu, Tanh
from .spec import Cell

CELLS: dict[str, Cell] = {cell.name: cell for cell in (Tanh(), Relu(), Lstm())}
MODES: dict[str, Cell] = {cell.mode: cell for cell in CELLS.values()}


def of_code(code: int) -> Cell:
    return next(cell for cell in CELLS.values() if cell.code == code)


__all__ = ["CELLS", "MODES", "Cell", "of_code"]
