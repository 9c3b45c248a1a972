"""The `triton` backend: kernels that Triton compiles on the user's machine, on float32, float16 and bfloat16 tensors.

`triton_small.py` runs what fits on chip, `triton_large.py` the rest; both are imported, and triton with them, as late as can be. Under
`TRITON_INTERPRET=1` they run on the CPU too, slowly, for tests.

float32 products are exact float32 unless torch's switch for matrix products allows TF32 (`torch.set_float32_matmul_precision("high")`),
or Triton's asks for three TF32 products in the place of each (TRITON_F32_DEFAULT=tf32x3): on tensor cores, with errors of up to 2^-20.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ...cells import CELLS, of_code
from ...precision import tf32_allowed, tf32x3_asked
from ..kernel_args import DTYPES, TF32
from . import windows
from .compiled import Kernels, lanes
from .fields import Fields
from .problem import Problem
from .scanned import Scanned

ALL_STEPS = 2**31 - 1
TF32X3 = 4  # a dtype of these kernels alone
PRECISIONS = {TF32: "tf32", TF32X3: "tf32x3"}  # of products; "ieee" of all other dtypes
OLDEST = (3, 3)
MOST_HIDDEN = 16384  # offsets inside W_hh are 32-bit


class Device(NamedTuple):
    kind: str  # cuda | hip | cpu (interpreted)
    arch: int  # 10 x the compute capability of an NVIDIA GPU, else 0
    programs: int  # that may wait for each other: one on each multiprocessor


class Config(NamedTuple):
    """How a kernel is compiled: set by cell, H, dtype, device and whether the lanes are windows; never by the number of lanes."""

    small: bool
    lanes: int  # LANES, and so on: as in the kernels
    units: int
    inner: int
    warps: int
    stages: int


takes_resets = True  # no wait for their number
in_place = False


def can_run(p: Problem | None, x: Tensor, w_hh: Tensor | None = None, w_hr: Tensor | None = None) -> tuple[bool, str]:
    if x.dtype not in DTYPES:
        return False, f"the Triton kernels take float32, float16 and bfloat16, not {x.dtype}"
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreted()):
        return False, f"the Triton kernels run on CUDA and ROCm devices, the tensors are on {x.device}"
    reason = missing()
    if reason:
        return False, reason
    if x.is_cuda and interpreted():
        return False, "Triton's interpreter (TRITON_INTERPRET=1) runs one program after the other, on CPU tensors only"
    if x.is_cuda and (reason := unlaunchable()):
        return False, reason
    device = device_of(x)
    if device.kind == "cpu" and x.dtype == torch.bfloat16:
        return False, "Triton's interpreter has no bfloat16 products"
    needed = 80 if x.dtype == torch.bfloat16 else 75
    if device.kind == "cuda" and device.arch < needed:
        return (
            False,
            f"the Triton kernels need compute capability {needed / 10} for {x.dtype}, this device has {device.arch / 10}",
        )
    if x.dtype == torch.float16 and device.kind == "cuda" and device.arch < 80 and version() < (3, 4):
        return (
            False,
            "before triton 3.4, float16 products do not compile for devices without bfloat16 (compute capability 7.5)",
        )
    if w_hr is not None:
        return False, "the Triton kernels have no projected states (proj_size)"
    if w_hh is not None and w_hh.shape[1] > MOST_HIDDEN:
        return False, f"the Triton kernels take up to {MOST_HIDDEN} hidden units, not {w_hh.shape[1]}"
    return True, ""


@cache
def missing() -> str:
    """Why triton cannot be used, or nothing. Imports it."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:  # a folder of that name is no package
        return "triton is not installed (pip install triton)"
    try:
        found = version()
    except Exception as error:  # a package that does not fit this Python or this system
        return f"triton cannot be imported ({error})"
    if found < OLDEST:
        return f"the Triton kernels need triton {'.'.join(map(str, OLDEST))}, this is {'.'.join(map(str, found))}"
    return ""


@cache
def unlaunchable() -> str:
    """Why Triton cannot launch on this machine's GPUs, or nothing. Its driver is a module that the machine's C compiler makes, once."""
    try:
        import_module("triton.runtime.driver").driver.active.get_current_target()
    except Exception as error:
        return f"triton has no driver here ({error})"
    return ""


@cache
def version() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", import_module("triton").__version__)[:3]))


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_of(x: Tensor) -> Device:
    return Device("cpu", 0, 1) if x.device.type == "cpu" else _gpu(x.device.index or 0)


@cache
def _gpu(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        # gfx9: a release of one wave does not wait for the stores of the program's other waves, so no program may wait for another
        return Device("hip", 0, 1 if found.gcnArchName.startswith("gfx9") else found.multi_processor_count)
    return Device("cuda", 10 * found.major + found.minor, found.multi_processor_count)


def config(backward: bool, cell: str, dtype: int, hidden: int, windows: bool, device: Device) -> Config:
    """The table: no value was tuned on a device yet, all were chosen to fit its memory and registers (`tests/triton`)."""
    units = max(16, 1 << (hidden - 1).bit_length())
    element = (
        12 if dtype == TF32X3 else 4 if dtype in (DTYPES[torch.float32], TF32) else 2
    )  # bytes; TF32X3: with its two parts
    weights = CELLS[cell].gates * units**2 * element
    if weights <= on_chip(device) and not plain(dtype, device):
        warps = 4 if units <= 32 or device.kind == "hip" else 8 if units <= 128 else 16
        return Config(True, 16, units, units, warps, 2 if weights <= 32 << 10 else 1)
    if plain(dtype, device):
        return Config(False, 16, 32, 32, 4, 2)
    wide = dtype in PRECISIONS  # four bytes for each element
    if not windows or device.kind == "hip":
        return Config(False, 16, 32, 32 if wide else 64, 4, 3)
    if device.arch == 90 and not wide:
        return Config(False, 64, 64, 32 if backward else 64, 8, 3)
    return Config(False, 32, 64, 16 if backward and wide else 32, 8, 3)


def options(found: Config, dtype: int, device: Device) -> dict:
    """For Triton's compiler. With tensor cores a thread may have all registers: they are worth more here than programs side by side."""
    most = {} if device.kind != "cuda" or plain(dtype, device) else dict(maxnreg=255 if found.warps <= 8 else 128)
    return dict(num_warps=found.warps, num_stages=found.stages, enable_fp_fusion=True, **most)


def plain(dtype: int, device: Device) -> bool:
    """Products without tensor cores."""
    return dtype == DTYPES[torch.float32] or device.kind == "cuda" and device.arch < 80


def on_chip(device: Device) -> int:
    """Bytes of weights that a program keeps, in shared memory where nothing else is said, beside what else it needs there."""
    if device.kind == "cuda":
        return 128 << 10 if device.arch in (80, 87, 90, 100, 103) else 64 << 10  # of 163 or 227 KB; of 99 KB
    return 8 << 10  # in registers


# What the kernels take of the fields, in their order.
_FORWARD = itemgetter(
    *"xp w_hh h0 c0 h_init c_init base length resets select y h_n c_n saved cells h_start c_start h_end c_end decay".split()
)
_BACKWARD = itemgetter(
    *(
        "dy y saved cells w_hh c0 dh_n dc_n dh_init dc_init base length resets select dz dh0 dc0 "
        "dh_start dc_start dh_end dc_end decay"
    ).split()
)


def _forward(fields: Fields, many: bool = False) -> None:
    if fields["xp"] is None or fields["steps"] == 0:  # no time, or no unit
        return _hand_on(fields, h0="h_n", c0="c_n")
    stages = min(fields["steps"], fields["stride"] + fields["warmup"])
    _launch(False, fields, _FORWARD(fields), fields["cap"], stages, many, hidden_bias=fields["hidden_bias"])


def _backward(fields: Fields, many: bool = False) -> None:
    if fields["y"] is None or fields["steps"] == 0:
        return _hand_on(fields, dh_n="dh0", dc_n="dc0")
    cap, dtype = fields["cap"], fields["y"].dtype
    cap = float(torch.tensor(cap, dtype=dtype)) if cap < 1 else float("inf")  # as the saved forget gates were rounded
    stages = min(fields["steps"], fields["stride"] + fields["warmup"]) + 1
    _launch(True, fields, _BACKWARD(fields), cap, stages, many, h0=fields["h0"])


def _hand_on(fields: Fields, **names: str) -> None:
    for given, state in names.items():
        if fields[state] is not None:
            fields[state].copy_(fields[given])


def _launch(
    backward: bool, fields: Fields, tensors: tuple, cap: float, stages: int, many: bool, **of_some_cells: Tensor | None
) -> None:
    """`tensors` in the kernels' order, before those of some cells alone; `many` asks for the configuration of windows."""
    count = lanes(fields)
    if not count:
        return
    x, steps, stride = fields["w_hh"], fields["steps"], fields["stride"]
    numbers = (cap, count, steps, fields["batch"], fields["step"], stride, fields["warmup"])
    cell, dtype, hidden, device = of_code(fields["cell"]), fields["dtype"], fields["hidden"], device_of(x)
    found = config(backward, cell.name, dtype, hidden, many or stride == 1 < steps, device)
    kernels = import_module(f".triton_{'small' if found.small else 'large'}", __package__)
    kernel = kernels.backward if backward else kernels.forward
    shape = dict(
        H=hidden, UNITS=found.units, LANES=found.lanes, CELL=cell.name, PRECISION=PRECISIONS.get(dtype, "ieee")
    )
    shape |= options(found, dtype, device) | of_some_cells
    tiles = -(-count // found.lanes)
    if found.small:
        with torch.cuda.device_of(x):  # Triton launches on torch's current device
            kernel[(tiles,)](*tensors, *numbers, **shape)
        return
    members, teams = team(tiles, -(-hidden // found.units), device.programs)
    width, gates = -(-hidden // 16) * 16, cell.gates if backward else 1
    planes = x.new_empty(2, teams * found.lanes, gates * width)
    floats = cell.has_cell or backward and cell.carries
    cells = x.new_empty(2, teams * found.lanes, width, dtype=torch.float32) if floats else None
    arrivals = torch.zeros(teams, dtype=torch.int32, device=x.device)
    alone, cooperative = members == 1, members > 1 and device.kind != "cpu"
    spans = [(-1, ALL_STEPS)] if alone or cooperative else [(s, s + 1) for s in range(-1, stages)]
    with torch.cuda.device_of(x):
        for begin, end in spans:
            kernel[(teams * members,)](
                *tensors,
                planes,
                cells,
                arrivals,
                *numbers,
                members,
                begin,
                end,
                INNER=found.inner,
                WIDTH=width,
                ALONE=alone,
                launch_cooperative_grid=cooperative,
                **shape,
            )


_SCAN = itemgetter(*"xp sums hidden_bias h0 c0 base length resets".split())
_SCANNED = itemgetter(*"y h_n c_n saved cells before".split())
_SCAN_BACKWARD = itemgetter(*"dy sums dh_n dc_n y saved cells h0 c0 base length resets".split())
_SCANNED_BACKWARD = itemgetter(*"dz dh0 dc0 after".split())
TIMES, COLUMNS = 32, 32  # of a program that scans: chosen to fit registers, not tuned on a device yet
SCAN_OPTIONS = dict(num_warps=4, enable_fp_fusion=True)


def _scan(backward: bool, fields: Fields) -> None:
    """The scan of one group of a cascade."""
    kernels = import_module(".triton_scan", __package__)
    fields = {name: None if isinstance(x, Tensor) and not x.numel() else x for name, x in fields.items()}
    cell, x, cap = of_code(fields["cell"]), fields["y"], fields["cap"]
    unit, units, steps, batch = (fields[name] for name in ("unit", "units", "steps", "batch"))
    if not batch or x is None:
        return
    if backward:
        cap = float(torch.tensor(cap, dtype=x.dtype)) if cap < 1 else float("inf")  # as in `_backward`
        given, kernel, out = _SCAN_BACKWARD(fields), kernels.backward, _SCANNED_BACKWARD(fields)
        dy, q, dh_n, dc_n, *rest = given
        totals = kernels.backward_totals, (dy, q, dh_n, *rest)
        start = dc_n if cell.has_cell else None
    else:
        given, kernel, out = _SCAN(fields), kernels.forward, _SCANNED(fields)
        xp, q, bias, h0, c0, *rest = given
        totals = kernels.forward_totals, (xp, q, bias, *rest)
        start = c0 if cell.has_cell else h0
    width = min(COLUMNS, max(1, 1 << (units - 1).bit_length()))
    chunks, tiles = -(-steps // TIMES), -(-units // width)
    shape = dict(H=fields["hidden"], TIMES=TIMES, UNITS=width, **SCAN_OPTIONS)
    numbers = (cap, unit, units, steps, batch, fields["step"], chunks)
    maps = None
    with torch.cuda.device_of(x):
        if cell.has_cell or cell.carries:
            maps = x.new_empty(batch * chunks * 2 * units, dtype=torch.float32)
            totals[0][(chunks, batch * tiles)](*totals[1], maps, *numbers, CELL=cell.name, **shape)
            kernels.starts[(batch * tiles,)](start, fields["resets"], maps, unit, units, batch, chunks, **shape)
        kernel[(chunks, batch * tiles)](*given, maps, *out, *numbers, CELL=cell.name, **shape)


def team(tiles: int, blocks: int, programs: int) -> tuple[int, int]:
    """Members of a team, and teams, for so many tiles of lanes and blocks of hidden units, where `programs` may wait for each other."""
    members = min(blocks, max(1, programs // tiles))
    members = -(-blocks // -(-blocks // members))  # no member has more blocks than another needs
    return members, min(tiles, 4 * programs) if members == 1 else tiles


def _dtype(x: Tensor) -> int:
    if x.dtype != torch.float32 or device_of(x).kind != "cuda":
        return DTYPES[x.dtype]
    return TF32 if tf32_allowed() else TF32X3 if tf32x3_asked() else DTYPES[x.dtype]


class _Kernels(Kernels):
    """`many`: for the windows that `windows.py` gathers as rows of their own."""

    dtype = staticmethod(_dtype)

    def __init__(self, many: bool = False) -> None:
        self._many = many

    def call(self, backward: bool, fields: Fields) -> tuple[Callable, Sequence, None]:
        there = {name: None if isinstance(x, Tensor) and not x.numel() else x for name, x in fields.items()}
        return _backward if backward else _forward, (there, self._many), None


_kernels = _Kernels()
forward, backward = _kernels.forward, _kernels.backward
ends, adjoint_ends = _kernels.ends, _kernels.adjoint_ends
scans = Scanned(partial(_scan, False), partial(_scan, True), lambda dtype: torch.float32, lambda dtype: dtype)
scanned_forward, scanned_backward = scans.forward, scans.backward
windowed_backward = partial(windows.windowed_backward, _Kernels(many=True))
