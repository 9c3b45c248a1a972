"""What a host that has to wait for a GPU would do: refused in a test, on a GPU by torch, else on the CPU tensors that stand for a GPU's."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._linalg_eigh.default,
    aten.linalg_qr.default,
    aten._linalg_svd.default,
    aten.linalg_cholesky_ex.L,
    aten._unique2.default,
    aten.unique_dim.default,
}


class NoWaiting(TorchDispatchMode):
    """What would have to wait for a GPU raises: reads, masks as indices, eigenvectors, copies between devices. Tensors that are on the CPU
    beside a GPU's may be read."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.device.type == self.device for t in tensors):
            masks = function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
            masks = masks and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
            copies = function in (aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default)
            devices = {t.device.type for t in tensors} | (
                {torch.device(d).type} if (d := kwargs.get("device")) else set()
            )
            assert function not in WAITING and not masks and not (copies and len(devices) > 1), f"{function} waits"
        return function(*args, **kwargs)


@contextmanager
def no_waiting(gpu):
    if gpu:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with pytest.MonkeyPatch.context() as patch, NoWaiting("cpu"):
        for name in ("tolist", "cpu", "numpy"):  # of a CPU tensor no operation

            def wait(*_, name=name):
                raise AssertionError(f"the host waits: {name}")

            patch.setattr(torch.Tensor, name, wait)
        yield
