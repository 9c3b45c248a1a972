"""Stable recurrent networks: `nn.RNN`, `nn.GRU` and `nn.LSTM` whose long sequences need not be run one step after the other."""

from typing import TYPE_CHECKING

from ._entry import from_command_line
from ._version import __version__  # noqa: F401

if TYPE_CHECKING or not from_command_line():
    from . import functional, stability  # noqa: F401
    from ._moved import moved as __getattr__
    from ._ops import decompositions  # it registers torch.ops.stable_rnn
    from .convert import stabilize, unstabilize
    from .gru import StableGRU
    from .memory import memory
    from .modules import StableLSTM, StableRNN
    from .ops.recurrence.backends import backends
    from .optim import project_after_step
    from .plans import Chunked, Recurrent, Scanned, Verified, Windowed, use_plan
    from .stability import Cascade, Certified, ForgetCap
    from .stability.certificate import certificate
    from .step_cells import StableGRUCell, StableLSTMCell, StableRNNCell
else:
    from ._entry import whole_package as __getattr__  # noqa: F401

__all__ = [
    "Cascade",
    "Certified",
    "Chunked",
    "ForgetCap",
    "Recurrent",
    "Scanned",
    "StableGRU",
    "StableGRUCell",
    "StableLSTM",
    "StableLSTMCell",
    "StableRNN",
    "StableRNNCell",
    "Verified",
    "Windowed",
    "backends",
    "certificate",
    "decompositions",
    "memory",
    "project_after_step",
    "stabilize",
    "unstabilize",
    "use_plan",
]
