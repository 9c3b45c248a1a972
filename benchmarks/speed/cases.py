"""What is measured: sweeps over T, B, H and k, one quantity at a time, and the operations that each plan takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

import stable_rnn.cells
from stable_rnn import Chunked, Recurrent, Scanned, Verified, Windowed
from stable_rnn.plans import Plan

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SWEEPS = ("T", "B", "H", "k")
PASSES = ("forward", "forward+backward")
PLANS = ("recurrent", "windowed", "chunked", "verified")
CHUNK = 256


@dataclass(frozen=True)
class Case:
    """One comparison. tf32: float32 storage, products in TF32."""

    sweeps: tuple[str, ...]  # that visit it
    cell: str
    dtype: str
    device: str
    model: str  # where the weights come from, see models.py
    passes: str
    T: int
    B: int
    H: int  # also the input size
    k: int  # inputs that each output of a window has seen; warm-up of the chunks
    C: int = 0  # chunk, also of Verified; 0: a usual one, and Verified's own choice

    @property
    def gates(self) -> int:
        return stable_rnn.cells.CELLS[self.cell].gates

    @property
    def backward(self) -> bool:
        return self.passes != "forward"

    @property
    def chunk(self) -> int:
        return self.C or min(CHUNK, max(self.T // 2, 1))

    def plan(self, name: str) -> Plan:
        match name:
            case "windowed":
                return Windowed(self.k)
            case "chunked":
                return Chunked(self.chunk, self.k)
            case "verified":
                return Verified(chunk=self.C, warmup=self.k) if self.C else Verified()
            case "scanned":  # of cascades
                return Scanned()
        return Recurrent()

    def __str__(self) -> str:
        return f"{self.cell} {self.dtype} {self.device} {self.passes} T={self.T} B={self.B} H={self.H} k={self.k} {self.model}"


@dataclass(frozen=True)
class Grid:
    """What each sweep visits. The others stay at a base: what lies nearest to `base` in their own list."""

    T: tuple[int, ...]
    B: tuple[int, ...]
    H: tuple[int, ...]
    k: tuple[int, ...]
    base: tuple[tuple[str, int], ...] = (("T", 4096), ("B", 1), ("H", 256), ("k", 32))
    T_of_B: int = 256  # T in the sweep over B

    def points(self, sweep: str) -> Iterator[dict[str, int]]:
        def nearest(name: str, value: int) -> int:
            return min(getattr(self, name), key=lambda v: abs(math.log(v / value)))

        fixed = {name: nearest(name, value) for name, value in self.base}
        if sweep == "B":
            fixed["T"] = nearest("T", self.T_of_B)
        for value in getattr(self, sweep):
            yield {**fixed, sweep: value}


WHOLE = Grid((256, 1024, 4096, 16384, 65536), (1, 4, 16, 64, 256), (64, 128, 256, 512, 1024), (8, 16, 32, 64, 128, 256))
ON_GPU = replace(WHOLE, base=(("T", 16384), ("B", 1), ("H", 256), ("k", 32)), T_of_B=1024)
QUICK = Grid(
    (256, 1024, 4096), (1, 16), (64, 128, 256), (8, 32, 128), base=(("T", 1024), ("B", 1), ("H", 64), ("k", 32))
)


def cases(
    grids: dict[str, Grid],
    sweeps: list[str],
    cells: list[str],
    dtypes: dict[str, list[str]],
    models: list[str],
    passes: list[str],
    chunk: int = 0,
) -> list[Case]:
    """Every case once. The first of the models runs everywhere, the others only in the sweep over k, where errors are looked at."""
    visits: dict[Case, list[str]] = {}
    for device, cell in product(grids, cells):
        for dtype, model, way, sweep in product(dtypes[device], models, passes, sweeps):
            if model == models[0] or sweep == "k" and way == passes[0]:
                for point in grids[device].points(sweep):
                    visits.setdefault(Case((), cell, dtype, device, model, way, **point, C=chunk), []).append(sweep)
    return [replace(case, sweeps=tuple(sweeps)) for case, sweeps in visits.items()]


def operations(case: Case, plan: Plan) -> int:
    """Multiplications and additions of the products that a plan's function takes, whoever computes it: input projection, recurrence
    (with warm-ups), and for forward+backward the adjoint recursion and the gradients of x and both weights. What an implementation
    computes twice is not counted, nor are gates."""
    T, H, wide = case.T, case.H, case.gates * case.H
    steps = T
    if isinstance(plan, Windowed):
        k = min(plan.k, T)
        steps = k * T - k * (k - 1) // 2
    elif isinstance(plan, Chunked):
        steps = T + sum(min(plan.warmup, start) for start in range(plan.chunk, T, plan.chunk))
    once, recur = 2 * wide * H * T, 2 * wide * H * steps
    if not case.backward:
        return case.B * (once + recur)
    weights = recur if isinstance(plan, Windowed) else 2 * wide * H * T
    return case.B * (3 * once + 2 * recur + weights)
