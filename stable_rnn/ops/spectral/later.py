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
    """Results of one call, which are being copied to host memory."""

    call: int
    values: list[Tensor]
    arrived: torch.cuda.Event | None

    def read(self) -> list[Tensor]:
        """The results; waits for the copy."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values


def on_gpu(matrices: Sequence[Tensor]) -> bool:
    return bool(matrices) and all(map(cuda_device.on_gpu, matrices))


def capturing(matrices: Sequence[Tensor]) -> bool:
    """Whether the work is being recorded into a CUDA graph: then nothing can be read."""
    return matrices[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def send(call: int, *results: Tensor) -> Sent:
    device = results[0].device
    cuda = device.type == "cuda"
    values = [
        torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=cuda).copy_(t, non_blocking=True) for t in results
    ]
    return Sent(call, values, torch.cuda.current_stream(device).record_event() if cuda else None)


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
