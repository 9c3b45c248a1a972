"""Compiles the kernels in their table configurations for devices that are not here, and reads what they take."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stable_rnn.cells import CELLS, Cell
from stable_rnn.ops.recurrence import triton as backend
from stable_rnn.ops.recurrence import triton_large, triton_small
from stable_rnn.ops.recurrence.compiled import DTYPES, TF32
from stable_rnn.ops.spectral import triton as backend_spectral
from stable_rnn.ops.spectral import triton_step

KINDS = {
    "float32": DTYPES[torch.float32],
    "tf32": TF32,
    "tf32x3": backend.TF32X3,
    "float16": DTYPES[torch.float16],
    "bfloat16": DTYPES[torch.bfloat16],
}
TYPES = {"float32": "fp32", "tf32": "fp32", "tf32x3": "fp32", "float16": "fp16", "bfloat16": "bf16"}
SHARED = {75: 64, 80: 163, 86: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}  # KB that a program may use
ROWS, COUNTER, MASK = ("base", "lengths", "ids"), "arrivals", "resets"
STARTS = ("h_init", "c_init", "dh_init", "dc_init", "ids")  # of lanes that run again
BORDERS = (*(f"{name}_{end}" for name in ("h", "c", "dh", "dc") for end in ("start", "end")), "decay")
WIDE = (*STARTS[:4], *BORDERS, "cells", "c_planes", "dc_planes")  # float32 in every storage type
OF_CELLS = (
    "c0 c_n cells c_init dc_init c_start c_end dc_n dc0 dc_start dc_end c_planes dc_planes".split()
)  # that have a c


def lacking(cell: Cell, backward: bool) -> set[str]:
    """Tensors that the kernels don't get of a cell."""
    missing = set() if cell.has_cell else set(OF_CELLS)
    missing |= set() if cell.saved else {"saved"}
    missing |= {"decay"} if cell.forgets is None else set()
    missing |= {"hidden_bias"} if cell.hidden_bias is None else set()
    if cell.carries and backward:
        return missing - {"dc_planes"}
    return missing | {"h0"} if backward else missing


class Use(NamedTuple):
    shared: int  # bytes
    spilled: int  # bytes of a thread's stack (NVIDIA), spilled vector registers (AMD)
    looped: bool  # a loop touches them
    code: str


def device(arch) -> backend.Device:
    return backend.Device("cuda", arch, 100) if isinstance(arch, int) else backend.Device("hip", 0, 100)


def target(arch) -> GPUTarget:
    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


def recurrence(
    arch, backward: bool, cell: str, kind: str, hidden: int, windows: bool = False, alone: bool = True, absent=()
) -> tuple[bool, Use]:
    """The kernel that a shape gets, with all its tensors but those `absent`: whether it is a small one, and what it takes."""
    found = backend.config(backward, cell, KINDS[kind], hidden, windows, device(arch))
    kernels = triton_small if found.small else triton_large
    kernel = kernels.backward if backward else kernels.forward
    fixed = dict(
        H=hidden,
        UNITS=found.units,
        LANES=found.lanes,
        CELL=cell,
        PRECISION=backend.PRECISIONS.get(KINDS[kind], "ieee"),
        INNER=found.inner,
        WIDTH=-(-hidden // 16) * 16,
        ALONE=alone,
    )
    missing = {*absent, *lacking(CELLS[cell], backward)}
    kinds = {name: "fp32" for name in WIDE} | dict.fromkeys(ROWS, "i64") | {COUNTER: "i32", MASK: "i1"}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed or name in missing:
            signature[name] = "constexpr"
        elif name == "cap":
            signature[name] = "fp32"
        elif name in triton_large.NUMBERS:
            signature[name] = "i32"
        else:
            signature[name] = "*" + kinds.get(name, TYPES[kind])
            attributes[(place,)] = [["tt.divisibility", 16]]
    constants = {name: fixed.get(name) for name, what in signature.items() if what == "constexpr"}
    options = backend.options(found, KINDS[kind], device(arch)) | dict(launch_cooperative_grid=not alone)
    return found.small, use(
        triton.compile(ASTSource(kernel, signature, constants, attributes), target=target(arch), options=options)
    )


def use(kernel) -> Use:
    if "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]
        spilled = int(re.search(r"vgpr_spill_count:\s+(\d+)", code)[1])
        return Use(kernel.metadata.shared, spilled, spilled > 0, code)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        spilled = int(re.search(r"STACK:(\d+)", cuobjdump("--dump-resource-usage", file.name))[1])
        looped = spilled > 0 and in_loops(cuobjdump("--dump-sass", file.name))
    return Use(kernel.metadata.shared, spilled, looped, kernel.asm["ptx"])


def cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def in_loops(sass: str) -> bool:
    """Whether an access of a thread's stack lies between a branch and an earlier place that it goes to."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*);", sass)
    stack = [int(at, 16) for at, what in lines if re.search(r"\b(LDL|STL)\b", what)]
    jumps = [(int(at, 16), int(to[1], 16)) for at, what in lines if (to := re.search(r"\bBRA\b.*0x([0-9a-f]+)", what))]
    assert stack and jumps
    return any(to <= place <= at for place in stack for at, to in jumps)


def spectral(arch, kind: str, scale: bool, alone: bool = True) -> Use:
    """The spectral step for matrices of one dtype."""
    fixed = dict(
        DTYPE=getattr(triton.language, kind),
        SCALE=scale,
        ALONE=alone,
        FIELDS=triton_step.FIELDS,
        BAND=triton_step.BAND,
        TILE=triton_step.TILE,
    )
    pointers = dict(
        table="*i64", bounds="*fp64", norms="*fp64", near="*i64", space="*fp32", grams="*fp64", arrivals="*i32"
    )
    signature = {
        name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in triton_step.step.arg_names
    }
    attributes = {(place,): [["tt.divisibility", 16]] for place in range(len(pointers))}
    options = backend_spectral.OPTIONS | dict(launch_cooperative_grid=not alone)
    return use(
        triton.compile(ASTSource(triton_step.step, signature, fixed, attributes), target=target(arch), options=options)
    )
