"""The command line looks at its arguments before torch is imported, which takes seconds: on the way to it the package waits."""

from __future__ import annotations

import importlib
import sys
from types import FrameType

COMMAND_LINE = ("stable_rnn.cli", "stable_rnn.__main__")
IMPORTERS: dict[tuple[str | None, str], str] = {
    ("importlib._bootstrap", "_find_and_load"): "name",
    ("runpy", "_get_module_details"): "mod_name",
}


def from_command_line() -> bool:
    """Whether `import stable_rnn.cli`, or `python -m` of it, is what imports the package now. Where Python cannot tell: no."""
    frame: FrameType | None = sys._getframe() if hasattr(sys, "_getframe") else None
    while frame:
        local = IMPORTERS.get((frame.f_globals.get("__name__"), frame.f_code.co_name))
        if local and frame.f_locals.get(local) in COMMAND_LINE:
            return True
        frame = frame.f_back
    return False


def whole_package(name: str) -> object:
    """The package's `__getattr__` while it waits: the first name that is asked for imports all of it."""
    if name.startswith("__"):
        raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
    package = sys.modules[__package__]
    vars(package).pop("__getattr__", None)
    return getattr(importlib.reload(package), name)
