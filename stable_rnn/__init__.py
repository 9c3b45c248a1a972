"""Stable recurrent networks: `nn.RNN` and `nn.LSTM` whose long sequences need not be run one step after the other."""
from ._version import __version__
from . import _ops  # noqa: F401  registers torch.ops.stable_rnn
from .backends import backends
from .cells import StableLSTMCell, StableRNNCell
from .convert import stabilize
from .modules import StableLSTM, StableRNN
from .ops.spectral import row_project_, SpectralState, spectral_norm_bound, spectral_project_, spectral_projection
from .optim import project_after_step
from .plans import Chunked, Recurrent, Report, use_plan, Verified, Windowed
from .stability import Certificate, certificate, Certified, ForgetCap, Stability

__all__ = [
    "Certificate", "Certified", "Chunked", "ForgetCap", "Recurrent", "Report", "SpectralState", "Stability", "StableLSTM",
    "StableLSTMCell", "StableRNN", "StableRNNCell", "Verified", "Windowed", "__version__", "backends", "certificate",
    "project_after_step", "row_project_", "spectral_norm_bound", "spectral_project_", "spectral_projection", "stabilize", "use_plan",
]
