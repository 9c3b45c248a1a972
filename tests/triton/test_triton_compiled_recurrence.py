"""The Triton recurrence kernels compiled for devices that are not here, as their table says: what they take of a device's memory, and
that nothing is spilled where all of a run is to stay on chip."""

import re

import pytest
from compiling import BORDERS, MASK, SHARED, STARTS, recurrence

SMALL = 0  # bytes of a thread that leave its registers
LARGE = 128  # a step of these waits for L2 many times longer
MASKED = 16  # of small ones with resets: what is needed before and after the loop over time

CASES = [
    # architecture, cell, dtype, hidden, windows
    (80, "lstm", "bfloat16", 128, False),
    (80, "lstm", "float16", 512, False),
    (80, "lstm", "float32", 200, False),
    (80, "rnn_tanh", "bfloat16", 256, False),
    (86, "lstm", "tf32", 64, False),
    (90, "lstm", "bfloat16", 64, False),
    (90, "lstm", "bfloat16", 128, False),
    (90, "lstm", "bfloat16", 512, False),
    (90, "lstm", "bfloat16", 512, True),
    (90, "rnn_relu", "tf32", 500, False),
    (80, "lstm", "tf32x3", 256, True),
    (90, "lstm", "tf32x3", 32, False),
    (90, "rnn_tanh", "tf32x3", 64, False),
    (90, "lstm", "tf32x3", 64, False),
    (90, "lstm", "tf32x3", 512, False),
    (90, "lstm", "tf32x3", 512, True),
    (100, "lstm", "tf32x3", 512, True),
    (90, "lstm", "float32", 32, False),
    (100, "lstm", "float16", 128, False),
    (100, "lstm", "bfloat16", 512, True),
    (80, "gru", "float16", 512, False),
    (90, "gru", "bfloat16", 128, False),
    (90, "gru", "bfloat16", 512, True),
    (90, "gru", "float32", 200, False),
    (90, "gru", "tf32x3", 64, False),
    (100, "gru", "tf32x3", 512, True),
    ("gfx942", "gru", "float16", 32, False),
    ("gfx942", "lstm", "float16", 32, False),
    ("gfx942", "lstm", "bfloat16", 512, False),
]


# What calls for nothing but the ends of lanes do without: starts of rows, and every output of a time.
ENDS_ALONE = {
    False: "h0 c0 ids y h_n c_n saved cells h_start c_start decay resets".split(),
    True: "dy dh_n dc_n ids dz dh0 dc0 dh_start dc_start decay resets".split(),
}


@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("arch, cell, kind, hidden, windows", CASES)
def test_memory_and_registers(arch, cell, kind, hidden, windows, backward, resets):
    alone = windows or hidden <= 256  # else by teams
    absent = (*STARTS, *BORDERS, *(() if backward else ("saved", "cells"))) if windows else ()
    absent += () if resets else (MASK,)
    small, use = recurrence(arch, backward, cell, kind, hidden, windows, alone, absent)
    assert use.shared <= SHARED[arch] << 10
    assert use.spilled <= (LARGE if not small else MASKED if resets else SMALL)
    assert not (small and use.looped)
    if isinstance(arch, int):
        assert ("mma" in use.code) == (kind != "float32")  # tensor cores
        assert ("cvt.rna.tf32" in use.code) == (kind == "tf32x3")  # parts are rounded, not cut off
        waits = [bool(re.search(rf"(red|atom|ld)\.\S*{order}", use.code)) for order in ("release", "acquire")]
        assert waits == [not alone] * 2
    assert "atom.add.f32" not in use.code and "atom.global.add.f32" not in use.code


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "arch, cell, kind, hidden",
    [
        (80, "rnn_tanh", "bfloat16", 256),
        (90, "lstm", "bfloat16", 128),
        (90, "gru", "float16", 512),
        (100, "lstm", "tf32x3", 64),
    ],
)
def test_the_ends_alone(arch, cell, kind, hidden, backward):
    small, use = recurrence(arch, backward, cell, kind, hidden, absent=ENDS_ALONE[backward])
    assert use.shared <= SHARED[arch] << 10
    assert use.spilled <= (LARGE if not small else SMALL)
    stores = [
        len(re.findall(r"st\.global", made.code)) for made in (use, recurrence(arch, backward, cell, kind, hidden)[1])
    ]
    assert stores[0] < stores[1]
