"""The CUDA recurrence kernels in the block executor, each variant on demand: `planned.cpp` by ctypes, called as `lane_loop` calls.

A variant is what `CudaPlan` says: how many blocks run a tile together and how they meet, lanes and units of a block, place of the weights.
"""
from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from executor import build

HERE = Path(__file__).resolve().parent
LSTM, F32, TF32 = 2, 0, 3
REGISTERS, SHARED, L2 = range(3)


def _fields(kind, names):
    return [(name, kind) for name in names.split()]


class Lanes(Structure):
    _fields_ = _fields(c_int64, "steps batch step stride warmup") + _fields(c_void_p, "base length select") + [("n_select", c_int64)]


_HEAD = _fields(c_int, "cell dtype threads") + _fields(c_int64, "hidden out") + [("cap", c_float), ("lanes", Lanes)]


class Forward(Structure):
    _fields_ = _HEAD + _fields(c_void_p, "xp w_hh w_hr h0 c0 h_init c_init y h_n c_n gates cells h_start c_start h_end c_end")


class Backward(Structure):
    _fields_ = _HEAD + _fields(c_void_p, "dy y gates cells w_hh w_hr c0 dh_n dc_n dh_init dc_init dz dh dh0 dc0 dh_start dc_start dh_end dc_end")


class Plan(Structure):
    _fields_ = ([("message", c_char_p)] + _fields(c_int, "blocks cluster lanes units warps place teams")
                + _fields(c_int64, "shared_bytes workspace_bytes"))


class Launch(Structure):
    _fields_ = [("device", c_int), ("stream", c_void_p), ("workspace", c_void_p), ("workspace_bytes", c_int64)]


class Limits(Structure):
    _fields_ = [("arch", c_int), ("sms", c_int), ("shared_bytes", c_int64), ("max_cluster", c_int)]


H100 = Limits(*build.LIMITS)


@cache
def library(asan: bool = False) -> ctypes.CDLL:
    sources = [*sorted((build.ROOT / "csrc/cuda").glob("recurrence*.cu")), HERE / "planned.cpp", *build.EXECUTOR]
    lib = ctypes.CDLL(str(build._link("planned.so", sources, asan)))
    lib.planned_forward.restype = lib.planned_backward.restype = c_char_p
    lib.automatic_plan.restype = Plan
    lib.automatic_plan.argtypes = [ctypes.c_bool, c_int, c_int, c_int64, c_int64, POINTER(Limits)]
    lib.complete_plan.argtypes = [ctypes.c_bool, c_int, c_int, c_int64, POINTER(Plan)]
    sizes = (c_int64 * 4)()
    lib.struct_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(s) for s in (Forward, Backward, Plan, Launch)]
    return lib


@dataclass(frozen=True)
class Variant:
    """One division of the work. `kind`: block | cluster | grid. Units: of a warp, times `groups`; lanes: 8 x octets x lane_groups."""

    kind: str = "block"
    groups: int = 0  # of a block; 0: so many that one block has all units
    octets: int = 1
    lane_groups: int = 1
    place: int = SHARED
    teams: int = 2

    def plan(self, backward: bool, cell: int, dtype: int, hidden: int) -> Plan:
        unit = 8 if cell == LSTM and not backward else 16
        groups = self.groups or -(-hidden // unit)
        blocks = -(-hidden // (unit * groups))
        assert blocks == 1 if self.kind == "block" else 1 < blocks <= (16 if self.kind == "cluster" else 132)
        warps = groups * (4 if cell == LSTM and backward else 1) * self.lane_groups
        plan = Plan(None, blocks, blocks if self.kind == "cluster" else 1, 8 * self.octets * self.lane_groups, unit * groups, warps,
                    self.place, self.teams, 0, 0)
        library().complete_plan(backward, cell, dtype, hidden, byref(plan))
        return plan


def automatic(backward: bool, cell: int, dtype: int, hidden: int, entries: int, limits: Limits = H100) -> Plan:
    return library().automatic_plan(backward, cell, dtype, hidden, entries, byref(limits))


def caller(backward: bool, choose, descending: bool = False, asan: bool = False):
    """A function with the arguments of `recurrence_forward` (`recurrence_backward`). `choose`: (cell, dtype, hidden) -> Plan."""
    def call(*fields, **outputs):
        kind = Backward if backward else Forward
        head, lanes, rest = fields[:6], Lanes(*(v or None if i in (5, 6, 7) else v for i, v in enumerate(fields[6:15]))), fields[15:]
        params = kind(*head, lanes, *(v or None for v in rest), **{k: v or None for k, v in outputs.items()})
        plan = choose(params.cell, params.dtype, params.hidden)
        space = torch.full((plan.workspace_bytes // 4 + 64,), float("nan"))
        start = -space.data_ptr() % 256 // 4
        launch = Launch(0, None, space[start:].data_ptr(), plan.workspace_bytes)
        with build.schedule(library(asan), descending):
            run = library(asan).planned_backward if backward else library(asan).planned_forward
            problem = run(byref(params), byref(plan), byref(launch))
        if problem:
            raise RuntimeError(problem.decode())
    return call
