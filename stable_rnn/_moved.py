"""Names that once stood at top level: they still work from there, with a warning that says where they live."""

from __future__ import annotations

import importlib
import warnings

MOVED = dict.fromkeys(
    ("SpectralState", "row_project_", "spectral_norm_bound", "spectral_project_", "spectral_projection"), "functional"
)
MOVED |= dict.fromkeys(("Certificate", "Stability"), "stability") | {"Report": "reports"}


def moved(name: str) -> object:
    """The package's `__getattr__`."""
    if name not in MOVED:
        raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
    where = f"{__package__}.{MOVED[name]}"
    warnings.warn(f"{__package__}.{name} is now {where}.{name}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(where), name)
