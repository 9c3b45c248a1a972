"""Instruction set `amx`: products in the processor's tiles. A build that emulates them runs the kernels' tests on any machine."""

import platform
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from dataclasses import replace
from os import environ
from pathlib import Path
from types import SimpleNamespace

import lane_loop as loop
import numpy as np
import pytest
import torch
from lane_loop import CELLS, Case
from test_native_recurrence import assert_like, equal

from stable_rnn import Chunked, Recurrent, StableGRU, StableLSTM, StableRNN, Verified, Windowed, _native, use_plan
from stable_rnn.doctor import _features
from stable_rnn.precision import BF16X3_EPS, bfloat16x3_allowed

ROOT = Path(__file__).parents[2]
TILES = _native.lib is not None and _native.lib.cpu_features()["isa"] == "amx"
pytestmark = pytest.mark.skipif(_native.lib is None, reason=f"compiled module: {_native.reason}")
with_tiles = pytest.mark.skipif(not TILES, reason="STABLE_RNN_ISA=amx; test_all_of_it_emulated runs this")


@contextmanager
def precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def one_step(w, h, threefold=True):
    """max(0, h w^T), (B, P) and (H, P) -> (B, H), float32, by a step of an RNN."""
    (batch, p), hidden = h.shape, w.shape[0]
    assert p == hidden
    case = Case("rnn_relu", 1, batch, hidden, stride=1, warmup=0, bf16x3=threefold)
    return loop.run_forward(case, dict(xp=torch.zeros(batch, hidden), w_hh=w, h0=h), only=("y",))["y"]


def everything(case, made):
    found = loop.run_forward(case, made)
    return found | (loop.run_windowed(case, made, 0, case.lanes) if case.stride == 1 else {})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("stride, warmup", [(9, 0), (1, 3)])
def test_other_sets_multiply_float32_as_it_is(cell, stride, warmup, isa):
    case = Case(cell, 9, 3, 33, stride, warmup)
    made = case.draw()
    found, plain = everything(replace(case, bf16x3=True), made), everything(case, made)
    if isa != "amx":
        equal(found, plain)
    else:
        assert not torch.equal(found["y"], plain["y"])
        with_hr = Case("lstm", 9, 3, 33, 9, 0, out=20)  # projections stay float32
        made = with_hr.draw()
        equal(everything(replace(with_hr, bf16x3=True), made), everything(with_hr, made))


@with_tiles
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 64, 100, 257])
@pytest.mark.parametrize("batch", [1, 5, 16, 17, 40])
def test_the_order_of_a_sum(size, batch):
    """That of Intel's manual: in blocks of 32, even and odd terms in chains of their own, then both together. Bit by bit."""
    g = torch.Generator().manual_seed(size)
    w, h = (torch.randn(n, size, generator=g).bfloat16().float() for n in (size, batch))
    terms = np.zeros((batch, size, -(-size // 32) * 32), np.float32)
    terms[..., :size] = h.numpy()[:, None] * w.numpy()  # exact
    total = np.zeros((batch, size), np.float32)
    for block in np.split(terms, terms.shape[-1] // 32, -1):
        even, odd = np.zeros_like(total), np.zeros_like(total)
        for k in range(0, 32, 2):
            even, odd = even + block[..., k], odd + block[..., k + 1]
        total = total + (even + odd)
    assert torch.equal(one_step(w, h), torch.from_numpy(total).clamp(min=0))


@with_tiles
@pytest.mark.parametrize("size", [1, 33, 64, 130])
def test_each_of_the_three_products_counts(size):
    """257 = 256 + 1 takes both parts: as a state, as a weight; integers have no rounding errors."""
    g = torch.Generator().manual_seed(size)
    small, large = torch.randint(-1, 2, (size, size), generator=g).float(), torch.full((size, size), 257.0)
    large[::3] = -513.0
    for w, h in ((small, large), (large, small)):
        assert torch.equal(one_step(w, h).double(), (h.double() @ w.double().T).clamp(min=0))


@with_tiles
@pytest.mark.parametrize("size", [5, 64, 200])
def test_the_error_of_a_product(size):
    """At most 3 * 2^-18 of each product, and the rounding of float32 sums."""
    w, h = torch.randn(size, size), torch.randn(50, size)
    exact = (h.double() @ w.double().T).clamp(min=0)
    sizes = h.double().abs() @ w.double().abs().T
    error = (one_step(w, h).double() - exact).abs()
    assert (error <= (3 * 2.0**-18 + (size + 4) * 2.0**-24) * sizes).all() and 3 * 2.0**-18 < BF16X3_EPS
    assert error.max() > (one_step(w, h, threefold=False).double() - exact).abs().max()


@with_tiles
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden, stride, warmup", [(1, 9, 0), (33, 1, 3), (70, 4, 2), (128, 1, 4)])
def test_recurrences_windows_and_threads(cell, hidden, stride, warmup):
    case = Case(
        cell, 20, 3, hidden, stride, warmup, lengths=(20, 0, 11), bf16x3=True, cap=0.8 if cell in loop.CAPPED else 1.0
    )
    made = case.draw()
    found = loop.run_forward(case, made)
    exact, eager = (loop.loop_forward(case, made, kind) for kind in (torch.float64, torch.float32))
    for value in eager.values():  # what float32 errs by, and what its products do here
        value += 2 * BF16X3_EPS
    assert_like(found, exact, eager, case.dtype, min(stride + warmup, 20), hidden)
    windows = stride == 1 and loop.run_windowed(case, made, 0, case.lanes)
    if windows:
        kinds = (torch.float64, torch.float32)
        exact, eager = (loop.loop_windowed(case, made, 0, case.lanes, kind) for kind in kinds)
        for value in eager.values():
            value += 4 * BF16X3_EPS
        assert_like(windows, exact, eager, case.dtype, warmup + 1, case.gates * hidden)
    for threads in (2, 3):
        equal(loop.run_forward(replace(case, threads=threads), made), found)
        if windows:
            equal(loop.run_windowed(replace(case, threads=threads), made, 0, case.lanes), windows)
    for lanes in ((0,), (case.lanes - 1,), (0, 2, 3)):
        for name, value in loop.run_forward(loop.with_lanes(case, lanes), made).items():
            written = ~value.isnan()
            assert torch.equal(value[written], found[name][written]), name


@with_tiles
@pytest.mark.parametrize("make", [StableLSTM, StableGRU, StableRNN])
def test_torchs_switch(make):
    """ "high" moves outputs of every plan by little, and of all plans alike: a checked run is the plain one bit by bit."""
    m, x = make(9, 64, backend="cpu"), torch.randn(60, 4, 9)
    with torch.no_grad():
        exact = m(x)[0]
        with precision("high"):
            assert bfloat16x3_allowed()
            plain = m(x)[0]
            with use_plan(m, Verified(tol=0, chunk=15)):
                assert torch.equal(m(x)[0], plain)
            with use_plan(m, Chunked(60, 0)):
                assert torch.equal(m(x)[0], plain)
        assert not bfloat16x3_allowed() and torch.equal(m(x)[0], exact)
    assert 0 < (plain - exact).abs().max() < 1e-4
    for plan in (Recurrent(), Windowed(5), Chunked(15, 5)):
        grads = []
        for name in ("highest", "high"):
            with precision(name), use_plan(m, plan):
                m.zero_grad()
                m(x)[0].square().sum().backward()
            grads.append([p.grad for p in m.parameters()])
        for a, b in zip(*grads, strict=True):
            assert not torch.equal(a, b) and (a - b).norm() <= 1e-4 * a.norm()


@pytest.mark.parametrize("isa, tiles, told", [("avx512bf16", True, True), ("amx", True, False), ("avx2", False, False)])
def test_doctor_tells_of_tiles_that_are_not_used(isa, tiles, told):
    features = dict(isa=isa, openmp=True, amx_bfloat16=tiles)
    assert ("STABLE_RNN_ISA=amx" in _features(SimpleNamespace(cpu_features=lambda: features))) == told


def test_the_switch_counts_for_tiles_alone():
    with precision("high"):
        assert bfloat16x3_allowed() == TILES


# --- builds


def build(folder, *options, target=()):
    """Configures a build in `folder`, and builds the targets whose names end like these; the configuration's output and what exists."""
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DSTABLE_RNN_CUDA=OFF", *options]
    path = f"{Path(sys.executable).parent}:{environ['PATH']}"
    run = lambda *command: subprocess.run(  # noqa: E731
        command, env=environ | {"PATH": path}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = run(*configure, f"-DPython_EXECUTABLE={sys.executable}")
    assert said.returncode == 0, said.stdout
    targets = [line.split(":")[0] for line in run("ninja", "-C", folder, "-t", "targets", "all").stdout.splitlines()]
    wanted = [name for name in targets if name.endswith(tuple(target))]
    done = run("ninja", "-C", folder, *wanted) if wanted else said
    assert done.returncode == 0, done.stdout
    return said.stdout, targets


builds = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux" or not shutil.which("objdump"),
    reason="builds for Linux on x86-64",
)


@builds
@pytest.mark.check
def test_the_instructions_are_built_where_the_compiler_knows_them(tmp_path):
    said, targets = build(tmp_path / "with", target=["kernels_amx.dir/csrc/cpu/kernels/cell_step.cpp.o"])
    if "STABLE_RNN_HAS_AMX - Success" in said:
        (made,) = (tmp_path / "with").rglob("cell_step.cpp.o")
        code = subprocess.run(["objdump", "-d", made], capture_output=True, text=True, check=True).stdout
        for name in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
            assert name in code, name
    _, without = build(
        tmp_path / "without", "-DSTABLE_RNN_HAS_AMX=OFF", target=["cpu/isa.cpp.o", "cpu/recurrence.cpp.o"]
    )
    assert not any("kernels_amx" in name for name in without)
    code = subprocess.run(
        ["nm", next((tmp_path / "without").rglob("recurrence.cpp.o"))], capture_output=True, text=True, check=True
    ).stdout
    assert "avx512bf16" in code and "amx" not in code


@builds
@pytest.mark.check
def test_all_of_it_emulated(tmp_path):
    build(tmp_path / "build", "-DSTABLE_RNN_EMULATE_AMX=ON", target=[f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"])
    package = tmp_path / "stable_rnn"
    shutil.copytree(ROOT / "stable_rnn", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(next((tmp_path / "build").rglob("_C*.so")), package)
    here = Path(__file__).parent
    names = {
        "": ("native_amx", "native_bfloat16", "native_threads"),
        "amx": ("native_recurrence", "native_product", "cascade_runs"),
    }
    for chosen, files in names.items():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", ROOT]
        command += ["-o", f"pythonpath={tmp_path}", "-m", "not check", "-k", chosen]
        done = subprocess.run(
            command + [here / f"test_{name}.py" for name in files],
            env=environ | {"STABLE_RNN_ISA": "amx", "PYTHONPATH": str(tmp_path)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0 and "passed" in done.stdout, done.stdout
