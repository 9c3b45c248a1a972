"""Loads the compiled module `stable_rnn._C` and never raises.

lib     the module, or None
reason  why `lib` is None, or None
"""

import importlib
import os
from types import ModuleType
from typing import Any

import torch  # noqa: F401  before _C, so that the OpenMP runtime that torch brings serves both

INTERFACE = 11  # `interface_number` of csrc/include/stable_rnn/params.h


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("STABLE_RNN_NATIVE", "").lower() == "off":
        return None, "switched off by STABLE_RNN_NATIVE=off"
    try:
        module = importlib.import_module("stable_rnn._C")
    except ModuleNotFoundError as error:
        if error.name == "stable_rnn._C":
            return None, "not built: a pure-Python install, or a source tree before `make build`"
        return None, f"does not load: {error}"
    except Exception as error:  # whatever a damaged or foreign binary does, `import stable_rnn` has to work
        return None, f"does not load: {type(error).__name__}: {error}"
    if getattr(module, "interface", None) != INTERFACE:
        return (
            None,
            "was built from other sources than this Python code; install the package again, or `make build` in a source tree",
        )
    return module, None


lib: Any  # its functions have no types
lib, reason = _load()
