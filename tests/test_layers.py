"""The package's layers: a module imports from its own layer's neighbours and from below, never from above, and never in a circle."""

import ast
from pathlib import Path

import pytest

import stable_rnn
from stable_rnn._moved import MOVED

ROOT = Path(stable_rnn.__file__).parent

# From the top down: a module belongs to the first line that names it or its package. A line may import from itself, and from below.
LAYERS = [
    ("__main__", "cli", "demo", "doctor", "certify"),
    ("__init__",),
    ("_moved",),
    ("convert", "optim", "distributed"),
    ("base", "modules", "gru", "streaming", "step_cells", "functional", "memory"),
    ("bookkeeping", "watch", "validate", "checkpoint"),
    ("plans", "reports", "stability", "layout"),
    ("_ops",),  # the registry: from here down, ops and what they run on
    (
        "ops.spectral.__init__",
        "ops.spectral.project",
        "ops.spectral.certified",
        "ops.spectral.function",
        "ops.spectral.rows",
        "ops.recurrence.function",
        "ops.recurrence.batching",
    ),
    ("ops.spectral.registration", "ops.recurrence.run"),
    ("ops.recurrence.verified", "ops.recurrence.checks", "ops.recurrence.backends"),
    (
        "ops.recurrence.native",
        "ops.recurrence.cuda",
        "ops.recurrence.triton",
        "ops.spectral.native",
        "ops.spectral.cuda",
        "ops.spectral.triton",
        "ops.spectral.triton_step",
        "ops.recurrence.triton_small",
        "ops.recurrence.triton_large",
    ),
    ("ops.recurrence", "ops.spectral"),  # problems, fields, references, and what the backends share
    ("ops",),
    ("cells", "common", "precision"),
    ("_native", "_numbers", "_errors", "_version", "_entry"),
]


def modules() -> dict[str, Path]:
    return {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in ROOT.rglob("*.py")}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that one imports, at its top or inside functions, but for those that only a type checker sees."""
    found: set[str] = set()
    package = ["stable_rnn", *name.split(".")[:-1]]

    def module(parts: list[str]) -> str:
        inner = ".".join(parts[1:])
        return inner if inner in known else f"{inner}.__init__".lstrip(".")

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(
                module(alias.name.split(".")) for alias in node.names if alias.name.split(".")[0] == "stable_rnn"
            )
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            parts = [*start, *(node.module or "").split(".")] if node.module else start
            if parts[:1] == ["stable_rnn"]:
                for alias in node.names:
                    inner = ".".join([*parts[1:], alias.name])
                    found.add(
                        inner
                        if inner in known
                        else module([*parts, alias.name])
                        if f"{inner}.__init__" in known
                        else module(parts)
                    )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found & known.keys() - {name}


def layer(name: str) -> int:
    """The line of a module: the one that names it, or else the package that it is in."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        for line, names in enumerate(LAYERS):
            if ".".join(parts[:count]) in names:
                return line
    raise AssertionError(f"{name} belongs to no layer; LAYERS has to say where it stands")


def test_imports_of_every_form_are_seen():
    known = modules()
    seen = {name: imports(name, path, known) for name, path in known.items()}
    assert {"_ops", "functional", "stability.__init__", "modules"} <= seen[
        "__init__"
    ]  # from . import x; from .x import y
    assert {"_native", "ops.cuda_device", "ops.backends", "ops.recurrence.triton"} <= seen["ops.recurrence.backends"]
    assert "ops.spectral.triton_step" in seen["ops.spectral.triton"]  # inside a function
    assert "stability.sets" not in seen["stability.projection"]  # for type checkers alone


def test_no_import_goes_up():
    known = modules()
    arrows = [(name, other) for name, path in known.items() for other in imports(name, path, known)]
    upward = [f"{name} imports {other}" for name, other in arrows if layer(other) < layer(name)]
    assert not upward


def test_no_circle():
    known = modules()
    graph = {name: imports(name, path, known) for name, path in known.items()}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " imports ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                walk(other, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_nobody_imports_a_name_from_where_it_once_stood(folder):
    imported = [
        (name.name, path.name)
        for path in (Path(__file__).parent.parent / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "stable_rnn"
        for name in node.names
    ]
    assert imported and not [found for found in imported if found[0] in MOVED]
