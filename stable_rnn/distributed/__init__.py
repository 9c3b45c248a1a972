"""Sequence parallelism: the ranks of a process group hold a stretch of time each, and compute what one process would of the whole.

Built on `torch.distributed` alone: gloo on CPUs, NCCL on GPUs, beside DDP and FSDP2 on other dimensions of a `DeviceMesh`."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..base import StableRNNBase
from .group import SequenceGroup

__all__ = ["sequence_parallel"]

_M = TypeVar("_M", bound=nn.Module)


def sequence_parallel(model: _M, group: ProcessGroup | DeviceMesh | None) -> _M:
    """From now on, each rank of `group` gives the stable recurrent modules in `model` its own stretch of time; changes and returns `model`.

    group: a `ProcessGroup`, or a `DeviceMesh` of one dimension (`mesh["time"]`), whose ranks hold time in their order; None: back to
    whole sequences. A call `module(input, hx, lengths=lengths)` is then one on all ranks of the group, with

        input    (T_r, B, I), or (B, T_r, I) with batch_first: this rank's stretch. Stretches need not be equally long, of one step at least
        hx       the states before time 0, the same on every rank, or None
        lengths  (B,) those of the whole sequences, 0 to the sum of all T_r, the same on every rank, or None

    and returns this rank's stretch of the output, and the final states of the whole sequences on every rank. Every plan but `Recurrent()`
    can run so: `Windowed` and `Chunked` run the lanes that one process would, `Scanned` is equal to rounding, `Verified` holds the borders
    between ranks to its `tol` as those between chunks, in as many rounds as it takes (`module.last_report`), at most one for each rank.

    The loss is the sum of what the ranks' losses are. The gradient of the input is whole; those of the weights and of hx are each rank's
    share, to be added up over the group. DDP and FSDP2 do that if their mesh has this dimension too, and divide by the number of ranks.
    Every rank has to run the backward pass, through any of the outputs. Dropout draws masks from each rank's own generator.

    Raises `TypeError` for something that is no model or group, `ValueError` for a model without any such module, or a mesh of more
    dimensions. A call raises on all ranks if it has to on one, before anything is computed: `ValueError` for `Recurrent()`, stretches
    that do not meet in batch, features, dtype, plan or lengths, a stretch without steps; `TypeError` for a PackedSequence."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"sequence_parallel: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"sequence_parallel: the mesh must have one dimension, that of time; got {group.ndim}: take mesh[name]"
            )
        group = group.get_group()
    if group is not None and not isinstance(group, ProcessGroup):
        raise TypeError(f"sequence_parallel: group must be a ProcessGroup, a DeviceMesh or None, got {group!r}")
    found = [m for m in model.modules() if isinstance(m, StableRNNBase)]
    if not found:
        raise ValueError(
            f"sequence_parallel: {type(model).__name__} holds no StableRNN, StableGRU or StableLSTM (stabilize makes them)"
        )
    for m in found:
        m._sequence = None if group is None else SequenceGroup(group)
    return model
