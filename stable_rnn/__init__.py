"""Stable recurrent networks: `nn.RNN` and `nn.LSTM` whose long sequences need not be run one step after the other."""
from typing import TYPE_CHECKING

from ._entry import from_command_line
from ._version import __version__

if TYPE_CHECKING or not from_command_line():
    from . import _ops  # noqa: F401  registers torch.ops.stable_rnn
    from .cells import StableLSTMCell, StableRNNCell
    from .convert import stabilize, unstabilize
    from .dispatch import backends
    from .modules import StableLSTM, StableRNN
    from .ops.spectral import SpectralState, row_project_, spectral_norm_bound, spectral_project_, spectral_projection
    from .optim import project_after_step
    from .plans import Chunked, Recurrent, Report, Verified, Windowed, use_plan
    from .stability import Certificate, Certified, ForgetCap, Stability, certificate
else:
    from ._entry import whole_package as __getattr__  # noqa: F401

__all__ = [
    "Certificate", "Certified", "Chunked", "ForgetCap", "Recurrent", "Report", "SpectralState", "Stability", "StableLSTM",
    "StableLSTMCell", "StableRNN", "StableRNNCell", "Verified", "Windowed", "__version__", "backends", "certificate",
    "project_after_step", "row_project_", "spectral_norm_bound", "spectral_project_", "spectral_projection", "stabilize", "unstabilize",
    "use_plan",
]
