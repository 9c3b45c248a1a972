"""Loads the compiled module `stable_rnn._C` and never raises.

lib     the module, or None
reason  why `lib` is None, or None
"""

import importlib
import os
from types import ModuleType

import torch  # noqa: F401  before _C, so that the OpenMP runtime that torch brings serves both


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("STABLE_RNN_NATIVE", "").lower() == "off":
        return None, "switched off by STABLE_RNN_NATIVE=off"
    try:
        return importlib.import_module("stable_rnn._C"), None
    except ModuleNotFoundError as error:
        if error.name == "stable_rnn._C":
            return None, "not built: a pure-Python install, or a source tree before `make build`"
        return None, f"does not load: {error}"
    except Exception as error:  # whatever a damaged or foreign binary does, `import stable_rnn` has to work
        return None, f"does not load: {type(error).__name__}: {error}"


lib, reason = _load()
