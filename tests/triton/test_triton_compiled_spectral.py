"""The Triton spectral step compiled for devices that are not here."""
import pytest
from compiling import SHARED, spectral

SPILLED = 64  # bytes of a thread


@pytest.mark.parametrize("arch, kind, scale, alone", [
    (80, "float32", False, False), (90, "bfloat16", False, False), (100, "float16", True, True), ("gfx942", "float32", False, False),
])
def test_memory_and_registers(arch, kind, scale, alone):
    use = spectral(arch, kind, scale, alone)
    assert use.shared <= SHARED[arch] << 10 and use.spilled <= SPILLED
    assert "atom.add.f" not in use.code and "atom.global.add.f" not in use.code
