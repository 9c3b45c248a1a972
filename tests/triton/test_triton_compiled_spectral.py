"""The Triton spectral step compiled for devices that are not here."""

import pytest
from compiling import SHARED, spectral

SPILLED = 64  # bytes of a thread


@pytest.mark.parametrize(
    "arch, kind, scale, alone",
    [
        (80, "float32", False, False),
        (90, "bfloat16", False, False),
        (100, "float16", True, True),
        ("gfx942", "float32", False, False),
    ],
)
def test_memory_and_registers(arch, kind, scale, alone):
    use = spectral(arch, kind, scale, alone)
    assert use.shared <= SHARED[arch] << 10 and use.spilled <= SPILLED
    assert "atom.add.f" not in use.code and "atom.global.add.f" not in use.code


@pytest.mark.parametrize("arch", [80, 90])
def test_sums_that_several_threads_hold_are_not_fused(arch):
    code = spectral(arch, "float32", False, False).code
    assert "mul.f64" in code or "mul.rn.f64" in code
    assert "fma.rn.f64" not in code
    assert "fma.rn.f32" in code  # products of blocks are
