"""The CPU kernels of arm64 (NEON), compiled across and run by an emulator: outputs of params.h against plain float64 loops."""

import re
import shutil
import struct
import subprocess
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import lane_loop as loop
import pytest
import test_native_recurrence as native
import torch
from executor import build
from lane_loop import CELLS, Case
from test_cascade_runs import cascaded

from stable_rnn import _native

CXX = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(_native.lib is None, reason=f"compiled module: {_native.reason}"),
    pytest.mark.skipif(not (CXX and EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (qemu-user)"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """`call.cpp` with the kernels."""
    target = tmp_path_factory.mktemp("arm") / "call"
    cpu = build.ROOT / "csrc/cpu"
    sources = [source for source in (*cpu.glob("*.cpp"), *cpu.glob("kernels/*.cpp")) if source.stem != "spectral"]
    include = (f"-I{folder}" for folder in (build.ROOT / "csrc/include", cpu))
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fopenmp", "-static"]
    build.run([CXX, *flags, *include, str(build.ROOT / "tests/ops/call.cpp"), *map(str, sources), "-o", str(target)])
    return target


def field(value):
    """As `call.cpp` reads it; for `at` below, a tensor stands for its address, and 0 for null."""
    if isinstance(value, torch.Tensor):
        return struct.pack("q", value.nbytes) + value.contiguous().view(torch.uint8).numpy().tobytes()
    return struct.pack("d", value)


@pytest.fixture
def arm(program, monkeypatch):
    """`lane_loop` calls the emulated kernels in place of this machine's."""

    def call(entry, *args, groups=None, **outputs):
        names = re.findall(r"(\w+): ", getattr(_native.lib, entry).__doc__)
        given = dict(zip(names, args)) | outputs
        if groups is not None:
            given |= dict(groups=torch.tensor(groups), n_groups=len(groups) - 1)
        first_pointer = names.index("base")
        pointers = [n for n in names[first_pointer:] if n not in ("n_select", "first", "last", "n_groups")]
        null = struct.pack("q", -1)
        message = b"".join(
            null if name in pointers and not torch.is_tensor(given.get(name)) else field(given[name]) for name in names
        )
        done = subprocess.run([EMULATOR, program, entry], input=message, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        at = 0
        for name in pointers:
            if torch.is_tensor(tensor := given.get(name)):
                if name in outputs and tensor.nbytes:
                    found = torch.frombuffer(bytearray(done.stdout[at : at + tensor.nbytes]), dtype=tensor.dtype)
                    tensor.copy_(found.view_as(tensor))
                at += tensor.nbytes
        assert at == len(done.stdout)

    lib = SimpleNamespace(**{name: partial(call, name) for name in dir(_native.lib) if name.startswith("recurrence")})
    lib.scanned_forward, lib.scanned_backward = partial(call, "scanned_forward"), partial(call, "scanned_backward")
    monkeypatch.setattr(loop, "at", lambda tensor: 0 if tensor is None else tensor)
    monkeypatch.setattr(loop, "_native", SimpleNamespace(lib=lib))
    return lib


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("stride, warmup", [(9, 0), (4, 2), (1, 3)])
def test_lanes(arm, cell, stride, warmup):
    for hidden, threads in (5, 1), (33, 2):
        case = Case(cell, 9, 3, hidden, stride, warmup, lengths=(9, 0, 4), threads=threads)
        native.check(case)
        if stride == 1:
            native.check_windowed(case, groups=1)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layout", ["reverse", "packed", "packed_reverse"])
def test_layouts(arm, cell, layout):
    native.check(Case(cell, 9, 3, 18, 4, 2, layout=layout, lengths=(9, 4, 2)))


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16(arm, cell):
    native.check_forward(Case(cell, 9, 3, 33, 4, 2, dtype=torch.bfloat16))
    case = Case(cell, 9, 1, 33, 9, 0)
    made = case.draw()
    made["w_hh"] = made["w_hh"].bfloat16().float()
    native.equal(loop.run_forward(replace(case, bf16_weights=True), made), loop.run_forward(case, made))


def test_many_units_many_rows(arm):
    """Products in packed blocks, and of one row."""
    for batch in (1, 40):
        native.check(Case("lstm", 5, batch, 200, stride=5, warmup=0, cap=0.8))


def test_projection(arm):
    native.check(Case("lstm", 9, 3, 33, 4, 2, out=20, cap=0.8))


@pytest.mark.parametrize("cell", CELLS)
def test_cascades(arm, cell):
    groups = (0, 5, 16, 21)
    case = Case(cell, 30, 2, 21, stride=30, warmup=0)
    made = case.draw()
    made["w_hh"] = cascaded(made["w_hh"], groups)
    exact, eager = (loop.loop_forward(case, made, kind) for kind in (torch.float64, torch.float32))
    outputs = [name for name in exact if name in ("y", "h_n", "c_n", "saved", "cells")]
    found = loop.run_forward(case, made, call=partial(arm.scanned_forward, groups=groups), only=outputs)
    native.assert_like(found, {k: exact[k] for k in found}, eager, torch.float32, 30, case.p)

    saved = found
    exact, eager = (loop.loop_backward(case, made, saved, kind) for kind in (torch.float64, torch.float32))
    outputs = [name for name in exact if name in ("dz", "dh0", "dc0")]
    found = loop.run_backward(case, made, saved, call=partial(arm.scanned_backward, groups=groups), only=outputs)
    native.assert_like(found, {k: exact[k] for k in found}, eager, torch.float32, 30, case.gates * case.hidden)
