"""Norms and projections of weight matrices: what they compute and how is in README.md."""

from . import registration as _registration  # noqa: F401  registers the ops
from .function import SpectralProjection, spectral_projection
from .norm import spectral_norm_bound
from .project import SpectralState, spectral_project_
from .rows import row_project_

__all__ = [
    "SpectralProjection",
    "SpectralState",
    "row_project_",
    "spectral_norm_bound",
    "spectral_project_",
    "spectral_projection",
]
