"""Loads the compiled module `stable_rnn._C` and never raises.

lib     the module, or None
reason  why `lib` is None, or None
"""

import ctypes
import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

INTERFACE = 12  # `interface_number` of csrc/include/stable_rnn/params.h


def _show_openmp() -> None:
    """Makes the OpenMP library of torch visible to `_C`, which names none where GCC compiled it: one serves both.

    Torch's wheels bring it as libgomp.so.1 or under a name with a hash in it; a torch that brings none has the system's.
    """
    folder = Path(torch.__file__).parent
    for path in [*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")]:
        with suppress(OSError):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)
            return
    with suppress(OSError):  # where there is none, a `_C` that needs it does not load, and says so
        ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("STABLE_RNN_NATIVE", "").lower() == "off":
        return None, "switched off by STABLE_RNN_NATIVE=off"
    if sys.platform.startswith("linux"):
        _show_openmp()
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
