"""When the `triton` backend runs, what it says when it does not, and that importing this package imports no Triton."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from stable_rnn import precision
from stable_rnn.ops.recurrence import triton as backend
from stable_rnn.ops.recurrence.problem import Problem

P = Problem("lstm", 3, 1)


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors pass for tensors of a GPU of the given compute capability."""

    def of(arch):
        monkeypatch.setattr(backend, "interpreted", lambda: True)
        monkeypatch.setattr(backend, "device_of", lambda x: backend.Device("cuda", arch, 100))

    return of


@pytest.mark.skipif(bool(backend.missing()), reason=backend.missing() or "-")
def test_reasons(gpu, monkeypatch):
    f32, bf16 = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    assert backend.can_run(P, f32) == (False, "the Triton kernels run on CUDA and ROCm devices, the tensors are on cpu")
    gpu(75)
    assert backend.can_run(P, f32) == (True, "") == backend.can_run(None, f32)
    assert backend.can_run(P, bf16) == (
        False,
        "the Triton kernels need compute capability 8.0 for torch.bfloat16, this device has 7.5",
    )
    gpu(70)
    assert "7.5 for torch.float32, this device has 7.0" in backend.can_run(P, f32)[1]
    gpu(90)
    assert backend.can_run(P, bf16)[0]
    assert "not torch.float64" in backend.can_run(P, f32.double())[1]
    assert "proj_size" in backend.can_run(P, f32, torch.zeros(8, 1), torch.zeros(1, 2))[1]
    assert "16384 hidden units, not 20000" in backend.can_run(P, f32, torch.zeros(1, 20000))[1]
    gpu(75)
    monkeypatch.setattr(backend, "version", lambda: (3, 3, 1))
    assert backend.can_run(P, f32)[0] and "before triton 3.4" in backend.can_run(P, f32.half())[1]


@pytest.mark.skipif(bool(backend.missing()), reason=backend.missing() or "-")
def test_a_machine_where_nothing_can_be_launched(monkeypatch):
    """Triton's driver is compiled by the machine's C compiler; without one other backends run."""
    from triton.runtime import driver

    def target():
        raise RuntimeError("Failed to find C compiler")

    x = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", 0), is_cuda=True)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(backend, "device_of", lambda x: backend.Device("cuda", 90, 100))
    for stub, expected in (
        (target, (False, "triton has no driver here (Failed to find C compiler)")),
        (lambda: "a GPU", (True, "")),
    ):
        monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=stub))
        backend.unlaunchable.cache_clear()
        assert backend.can_run(P, x) == expected
    backend.unlaunchable.cache_clear()


def test_programs_that_may_wait_for_each_other(monkeypatch):
    """On AMD's gfx9 none may."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for name, programs in (("gfx942:sramecc+:xnack-", 1), ("gfx90a", 1), ("gfx1100", 96)):
        found = SimpleNamespace(multi_processor_count=96, gcnArchName=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, found=found: found)
        backend._gpu.cache_clear()
        assert backend._gpu(0) == backend.Device("hip", 0, programs)
    backend._gpu.cache_clear()


def test_products_of_float32(gpu, monkeypatch):
    """After torch's switch first, then Triton's; `Verified` allows for what they round."""
    f32, allowed = torch.zeros(1), []
    monkeypatch.setattr(precision, "tf32_allowed", lambda: bool(allowed))
    monkeypatch.setattr(backend, "tf32_allowed", lambda: bool(allowed))
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    gpu(90)
    plain = backend._dtype(f32)
    assert plain == backend.DTYPES[torch.float32] and precision.products_eps(True) == 2.0**-23
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32x3")
    assert backend.PRECISIONS[backend._dtype(f32)] == "tf32x3" and precision.products_eps(True) == 2.0**-20
    assert backend._dtype(f32.half()) == backend.DTYPES[torch.float16]
    allowed.append(True)
    assert backend.PRECISIONS[backend._dtype(f32)] == "tf32" and precision.products_eps(True) == 2.0**-10
    monkeypatch.setattr(backend, "device_of", lambda x: backend.Device("hip", 0, 100))
    assert backend._dtype(f32) == plain


@pytest.mark.parametrize(
    "missing, reason",
    [
        (
            "sys.modules['triton'] = None; importlib.util.find_spec = lambda name, *rest: None",
            "triton is not installed (pip install triton)",
        ),
        (
            "triton = types.ModuleType('triton'); triton.__version__ = '3.1.0'; sys.modules['triton'] = triton; "
            "importlib.util.find_spec = lambda name, *rest: types.SimpleNamespace(origin='here')",
            "the Triton kernels need triton 3.3, this is 3.1.0",
        ),
    ],
)
def test_without_triton(missing, reason):
    program = f"""
import importlib.util, os, sys, types
import torch
given = importlib.util.find_spec
{missing}
os.environ["TRITON_INTERPRET"] = "1"
from stable_rnn.ops.recurrence import triton as backend
from stable_rnn.ops.spectral import triton as spectral
importlib.util.find_spec = given
x = torch.zeros(3, 3)
assert backend.can_run(None, x) == spectral.can_run([x], [x]) == (False, {reason!r}), backend.can_run(None, x)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_import_is_late():
    program = "import sys, torch; before = 'triton' in sys.modules; import stable_rnn; assert ('triton' in sys.modules) == before"
    subprocess.run([sys.executable, "-c", program], check=True)
