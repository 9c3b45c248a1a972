"""The CUDA recurrence kernels with a tiling of the caller's choice: `tiled.cu` by ctypes, in the block executor or on a GPU.

A `Variant` says how the work is divided, as `CudaTiling` does: how many blocks run a tile together and how they meet, lanes and units of a
block, place of the weights. A `Machine` runs `lane_loop` cases by one.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import lane_loop as loop
import torch
from executor import build

HERE = Path(__file__).resolve().parent
CSRC = build.ROOT / "csrc/cuda"
GATES = [loop.Case(cell, 1, 1, 1, 1, 0).gates for cell in loop.CELLS]
REGISTERS, SHARED, L2 = range(3)


def _fields(kind, names):
    return [(name, kind) for name in names.split()]


class Lanes(Structure):
    _fields_ = (
        _fields(c_int64, "steps batch step stride warmup")
        + _fields(c_void_p, "base length resets select")
        + [("n_select", c_int64)]
    )


_HEAD = _fields(c_int, "cell dtype threads") + _fields(c_int64, "hidden out") + [("cap", c_float), ("lanes", Lanes)]


class Forward(Structure):
    _fields_ = _HEAD + _fields(
        c_void_p, "xp w_hh w_hr h0 c0 h_init c_init hidden_bias y h_n c_n saved cells h_start c_start h_end c_end decay"
    )


class Backward(Structure):
    _fields_ = (
        _HEAD
        + _fields(c_void_p, "dy y saved cells w_hh w_hr c0 dh_n dc_n dh_init dc_init h0")
        + _fields(c_void_p, "dz dh dh0 dc0 dh_start dc_start dh_end dc_end decay")
    )


class Tiling(Structure):
    _fields_ = (
        [("message", c_char_p)]
        + _fields(c_int, "blocks cluster lanes units warps place teams")
        + _fields(c_int64, "shared_bytes workspace_bytes")
        + [("clocks", c_double)]
        + _fields(c_int, "product exchange")
    )


class Launch(Structure):
    _fields_ = [("device", c_int), ("stream", c_void_p), ("workspace", c_void_p), ("workspace_bytes", c_int64)]


class Limits(Structure):
    """A device, also one that is not here."""

    _fields_ = [("arch", c_int), ("sms", c_int), ("shared_bytes", c_int64), ("max_cluster", c_int)]


def units(gates: int, backward: bool) -> int:
    """Of a group, as `warp_layout` in csrc/cuda says."""
    return 8 if gates % 2 == 0 and not backward else 16


@dataclass(frozen=True)
class Variant:
    """`blocks` run a tile of 8 x octets x lane_groups lanes; several are a cluster, which meets by its barrier or by transactions, or a
    grid that meets through L2. `wgmma`: warps by four, for which a block may have more units than it needs."""

    blocks: int = 1
    grid: bool = False
    octets: int = 1
    lane_groups: int = 1
    place: int = SHARED
    teams: int = 2
    transactions: bool = False
    wgmma: bool = False

    def __str__(self):
        kind = "block" if self.blocks == 1 else f"{'grid' if self.grid else 'cluster'}{self.blocks}"
        kind += "-transactions" * self.transactions + "-wgmma" * self.wgmma
        return f"{kind}-{self.octets}x{self.lane_groups}-{['registers', 'shared', 'L2'][self.place]}"

    def tiling(self, backward: bool, cell: int, hidden: int) -> Tiling:
        unit = units(GATES[cell], backward)
        groups = -(-hidden // (self.blocks * unit))
        if self.wgmma:
            groups = -(-groups // 4) * 4
        assert (self.blocks - 1) * groups * unit < hidden, "a block without units"
        warps = groups * (4 if GATES[cell] == 4 and backward else 1) * self.lane_groups
        cluster = 1 if self.grid else self.blocks
        return Tiling(
            None,
            self.blocks,
            cluster,
            8 * self.octets * self.lane_groups,
            groups * unit,
            warps,
            self.place,
            self.teams,
            0,
            0,
            0.0,
            int(self.wgmma),
            int(self.transactions and cluster > 1),
        )


class Machine:
    """Where kernels run. `descending`: the executor's blocks and threads in descending order, or by the seed of a random one (above 1);
    `asan`: under AddressSanitizer."""

    def __init__(self, name: str, device: str = "cpu", descending: int = False, asan: bool = False):
        self.name, self.device, self.descending, self.asan = name, device, descending, asan

    def build(self) -> Path:
        sources = [*sorted(CSRC.glob("recurrence*.cu")), HERE / "tiled.cu"]
        if self.device == "cpu":
            return build._link("tiled.so", [*sources, *build.EXECUTOR], self.asan)
        made = build.CACHE / "gpu" / "tiled.so"
        build.move_into(
            made,
            lambda to: build.run(
                [
                    "nvcc",
                    "-std=c++17",
                    build.native(),
                    "--fmad=false",
                    "--expt-relaxed-constexpr",
                    "-shared",
                    "-cudart=static",
                    "-Xcompiler=-fPIC,-fvisibility=hidden",
                    "-t0",
                    *build.INCLUDE,
                    *map(str, sources),
                    str(CSRC / "limits.cu"),
                    "-o",
                    to,
                ]
            ),
        )
        return made

    @cached_property
    def library(self) -> ctypes.CDLL:
        lib = ctypes.CDLL(str(self.build()))
        lib.tiled_forward.restype = lib.tiled_backward.restype = lib.device_limits.restype = c_char_p
        lib.automatic_tiling.restype = Tiling
        lib.automatic_tiling.argtypes = [c_bool, c_int, c_int, c_int64, c_int64, c_int64, POINTER(Limits)]
        lib.complete_tiling.argtypes = [c_bool, c_int, c_int, c_int64, POINTER(Tiling)]
        sizes = (c_int64 * 5)()
        lib.struct_sizes(sizes)
        assert list(sizes) == [ctypes.sizeof(s) for s in (Forward, Backward, Tiling, Launch, Limits)]
        return lib

    @cached_property
    def limits(self) -> Limits:
        """Of the device; the executor's is an H100."""
        found = Limits()
        problem = self.library.device_limits(byref(found))
        if problem:
            raise RuntimeError(problem.decode())
        return found

    def automatic(
        self, limits: Limits, backward: bool, cell: int, dtype: int, hidden: int, entries: int, out: int | None = None
    ) -> Tiling:
        return self.library.automatic_tiling(
            backward, cell, dtype, hidden, hidden if out is None else out, entries, byref(limits)
        )

    def tiling(self, how: Variant, backward: bool, case: loop.Case) -> Tiling:
        cell, dtype = loop.CELLS.index(case.cell), loop.TF32 if case.tf32 else loop.DTYPES[case.dtype]
        tiling = how.tiling(backward, cell, case.hidden)
        self.library.complete_tiling(backward, cell, dtype, case.hidden, byref(tiling))
        return tiling

    def forward(self, case: loop.Case, made: dict, how: Variant | Limits, only: tuple | None = None) -> dict:
        case = replace(case, device=self.device)
        call = lambda *fields, **outputs: self._call(False, case, how, fields, outputs)  # noqa: E731
        return loop.run_forward(case, made, call, only)

    def backward(
        self, case: loop.Case, made: dict, saved: dict, how: Variant | Limits, only: tuple | None = None
    ) -> dict:
        case = replace(case, device=self.device)
        call = lambda *fields, **outputs: self._call(True, case, how, fields, outputs)  # noqa: E731
        return loop.run_backward(case, made, saved, call, only)

    def _call(self, backward, case, how, fields, outputs):
        lanes = Lanes(*(v or None if i in (5, 6, 7, 8) else v for i, v in enumerate(fields[6:16])))
        pointers = [v or None for v in fields[16:]]
        params = (Backward if backward else Forward)(
            *fields[:6], lanes, *pointers, **{k: v or None for k, v in outputs.items()}
        )
        if isinstance(how, Limits):
            tiling = self.automatic(how, backward, params.cell, params.dtype, params.hidden, len(case.ids), params.out)
        else:
            tiling = self.tiling(how, backward, case)
        space = torch.full((tiling.workspace_bytes // 4 + 64,), float("nan"), device=self.device)
        start = space[-space.data_ptr() % 256 // 4 :].data_ptr()
        stream = None if self.device == "cpu" else torch.cuda.current_stream().cuda_stream
        launch = Launch(0, stream, start, tiling.workspace_bytes)
        run = self.library.tiled_backward if backward else self.library.tiled_forward
        if self.device != "cpu":
            problem = run(byref(params), byref(tiling), byref(launch))
        else:
            with build.schedule(self.library, self.descending):
                problem = run(byref(params), byref(tiling), byref(launch))
        if problem:
            raise RuntimeError(problem.decode())
