"""Stable recurrent networks: `nn.RNN` and `nn.LSTM` whose long sequences need not be run one step after the other."""
from . import _ops  # noqa: F401  registers torch.ops.stable_rnn
from ._version import __version__
from .cells import StableLSTMCell, StableRNNCell
from .convert import stabilize, unstabilize
from .dispatch import backends
from .modules import StableLSTM, StableRNN
from .ops.spectral import SpectralState, row_project_, spectral_norm_bound, spectral_project_, spectral_projection
from .optim import project_after_step
from .plans import Chunked, Recurrent, Report, Verified, Windowed, use_plan
from .stability import Certificate, Certified, ForgetCap, Stability, certificate

__all__ = [
    "Certificate", "Certified", "Chunked", "ForgetCap", "Recurrent", "Report", "SpectralState", "Stability", "StableLSTM",
    "StableLSTMCell", "StableRNN", "StableRNNCell", "Verified", "Windowed", "__version__", "backends", "certificate",
    "project_after_step", "row_project_", "spectral_norm_bound", "spectral_project_", "spectral_projection", "stabilize", "unstabilize",
    "use_plan",
]
