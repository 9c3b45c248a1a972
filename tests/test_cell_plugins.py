"""A cell is a plug-in: what isn't its own file knows it by its table only, and the files import one another in one direction."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import stable_rnn
from stable_rnn.cells import CELLS
from stable_rnn.stability.cells import STABILITY

ROOT = Path(stable_rnn.__file__).parent
OWN = {f"{cell.family}.py" for cell in CELLS.values()}
NAMES = {*CELLS, *(cell.mode for cell in CELLS.values())}
NAMES -= {"LSTM", "GRU"}  # torch's cells have no mode: `weights.py` says it


def trees(folder):
    return {
        file.stem: ast.parse(file.read_text()) for file in sorted((ROOT / folder).glob("*.py")) if file.name not in OWN
    }


@pytest.mark.parametrize("folder, which", [("stability", ""), ("cells", ""), ("ops/recurrence", "triton")])
def test_no_other_file_names_a_cell(folder, which):
    found = {
        stem: {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in NAMES}
        for stem, tree in trees(folder).items()
        if stem.startswith(which) and stem != "triton_cells"
    }
    assert len(found) > 1 and not {stem: names for stem, names in found.items() if names}


def test_every_cell_has_its_stability():
    assert list(STABILITY) == list(CELLS)
    assert all(
        type(STABILITY[name]).__module__ == f"stable_rnn.stability.{cell.family}" for name, cell in CELLS.items()
    )


def test_no_circle_among_the_files_of_stability():
    """Also none that an import inside of a function, or one for types alone, hides."""
    below = {}
    for file in (ROOT / "stability").glob("*.py"):
        found = [
            node
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 1
        ]
        below[file.stem] = {
            name for node in found for name in ([node.module] if node.module else [alias.name for alias in node.names])
        }
    below["cells"] |= {Path(name).stem for name in OWN}  # by name
    order = list(TopologicalSorter(below).static_order())
    assert order.index("rounding") < order.index("certificate") and order.index("projection") < order.index("sets")
