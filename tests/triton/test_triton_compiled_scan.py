"""The Triton scans of a cascade compiled for devices that are not here: they fit, and spill nothing."""

import pytest
import triton
from compiling import MASK, ROWS, SHARED, TYPES, target, use
from triton.compiler import ASTSource

from stable_rnn.cells import CELLS
from stable_rnn.ops.recurrence import triton as backend
from stable_rnn.ops.recurrence import triton_scan

CASES = [
    (80, "gru", "float32"),
    (90, "lstm", "bfloat16"),
    (100, "rnn_tanh", "float32"),
    (120, "lstm", "float32"),
    ("gfx942", "lstm", "float16"),
]
WIDE = ("q", "maps", "cells", "dh0")  # float32 in every storage type


def compiled(arch, name, cell, kind, resets=False):
    """The kernel with all the tensors that it gets of a cell."""
    kernel, spec = getattr(triton_scan, name), CELLS[cell]
    fixed = dict(H=200, TIMES=backend.TIMES, UNITS=backend.COLUMNS, CELL=cell)
    missing = set() if spec.has_cell else {"c0", "c_n", "cells", "dc_n", "dc0"}
    missing |= set() if spec.saved else {"saved", "maps"}
    missing |= {"hidden_bias"} if spec.hidden_bias is None else set()
    missing |= set() if resets else {MASK}
    missing |= {"dh0", *(("h0",) if "backward" in name else ())} if not spec.carries else set()
    kinds = {of: "fp32" for of in WIDE} | dict.fromkeys(ROWS, "i64") | {MASK: "i1"}
    signature, attributes = {}, {}
    for index, of in enumerate(kernel.arg_names):
        if of in fixed or of in missing:
            signature[of] = "constexpr"
        elif of == "cap":
            signature[of] = "fp32"
        elif of in triton_scan.NUMBERS:
            signature[of] = "i32"
        else:
            signature[of] = "*" + kinds.get(of, TYPES[kind])
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {of: fixed.get(of) for of, what in signature.items() if what == "constexpr"}
    source = ASTSource(kernel, signature, constants, attributes)
    return use(triton.compile(source, target=target(arch), options=backend.SCAN_OPTIONS))


@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("name", ["forward_totals", "backward_totals", "starts", "forward", "backward"])
@pytest.mark.parametrize("arch, cell, kind", CASES)
def test_memory_and_registers(arch, cell, kind, name, resets):
    if not CELLS[cell].saved and name in ("forward_totals", "backward_totals", "starts"):
        return  # it keeps nothing of its own
    found = compiled(arch, name, cell, kind, resets)
    assert found.shared <= SHARED[arch] << 10
    assert found.spilled == 0
    assert "atom." not in found.code
