"""What an uncertified step on a GPU found, on its way to the host, where nobody waits for it: it is read some calls later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import cuda_device

LAG = 4  # calls between sending and reading: by then the copy has long arrived, so reading keeps no step waiting


@dataclass
class Sent:
    """Results of one step: `norms` (float64) and `near` (int64) are being copied to host memory."""

    call: int
    norms: Tensor
    near: Tensor
    arrived: torch.cuda.Event | None

    def counts(self) -> list[int]:
        """`near`; waits for the copy. ValueError if the step found a matrix that is not finite."""
        if self.arrived is not None:
            self.arrived.synchronize()
        check_finite(self.norms)
        return self.near.tolist()


def on_gpu(matrices: Sequence[Tensor]) -> bool:
    return bool(matrices) and all(map(cuda_device.on_gpu, matrices))


def capturing(matrices: Sequence[Tensor]) -> bool:
    """Whether the work is being recorded into a CUDA graph: then nothing can be read."""
    return matrices[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def send(call: int, norms: Tensor, near: Tensor) -> Sent:
    cuda = norms.device.type == "cuda"
    host_norms, host_near = (
        torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=cuda).copy_(t, non_blocking=True)
        for t in (norms, near)
    )
    return Sent(call, host_norms, host_near, torch.cuda.current_stream(norms.device).record_event() if cuda else None)


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers; `torch.tensor` would wait for the device."""
    cuda = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=cuda).to(device, non_blocking=cuda)


def check_finite(norms: Tensor) -> None:
    """Waits for the device."""
    bad = norms.isnan().nonzero().flatten().tolist()
    if bad:
        names = ", ".join(f"W[{i}]" for i in bad)
        raise ValueError(
            f"{names} holds NaN or infinite values, or did so when the projection last looked, and was left as it was"
        )
