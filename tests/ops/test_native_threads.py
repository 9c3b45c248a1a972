"""Teams of threads on cores that others use too: whichever threads leave, and whenever, the results are those of one thread, bit by bit."""

import platform
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import replace

import lane_loop as loop
import pytest
import torch
from executor import build
from lane_loop import CELLS, Case

from stable_rnn import _native
from stable_rnn.ops.spectral import native as spectral

pytestmark = pytest.mark.skipif(
    not (_native.lib and _native.lib.cpu_features()["openmp"]), reason=f"no threads: {_native.reason}"
)
LONG = 60  # seconds


@contextmanager
def leaving(round):
    """Threads leave at every (round + 1)-th barrier of the one call in this block: some must have done so."""
    try:
        _native.lib.leave_at(round, LONG)
        yield
        assert _native.lib.crowd()["threads"], "nobody left"
    finally:
        _native.lib.leave_at(-1)


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value.nan_to_num(nan=7e7), expected[name].nan_to_num(nan=7e7)), name


def few_lanes(cell, steps=40, out=None, **how):
    """A case whose weights are shared among the threads."""
    hidden = {"lstm": 200 if out else 130, "gru": 150}.get(cell, 260)
    return Case(cell, steps, 2, hidden, how.pop("stride", steps), how.pop("warmup", 0), out=out, **how)


@pytest.mark.parametrize(
    "cell, out, dtype",
    [*((cell, None, torch.float32) for cell in CELLS), ("lstm", 100, torch.float32), ("lstm", None, torch.bfloat16)],
)
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_recurrence(cell, out, dtype, threads):
    case = few_lanes(cell, out=out, dtype=dtype)
    made = case.draw()
    saved = loop.run_forward(case, made)
    back = loop.run_backward(case, made, saved)
    team = replace(case, threads=threads)
    for round in (0, 1, 2, 3, 4, 17):
        with leaving(round):
            equal(loop.run_forward(team, made), saved)
        with leaving(round):
            equal(loop.run_backward(team, made, saved), back)


@pytest.mark.parametrize("cell", CELLS)
def test_windows(cell):
    case = few_lanes(cell, 12, stride=1, warmup=5)
    made = case.draw()
    expected = loop.run_windowed(case, made, 0, case.lanes)
    for threads in (2, 3):
        for round in (0, 1, 2, 5, 9, 15):
            with leaving(round):
                equal(loop.run_windowed(replace(case, threads=threads), made, 0, case.lanes), expected)


def test_tiles_of_their_own():
    case = Case("lstm", 83, 2, 18, stride=1, warmup=3)
    made = case.draw()
    expected = loop.run_windowed(case, made, 0, case.lanes), loop.run_forward(case, made)
    team = replace(case, threads=5)
    with leaving(0):
        equal(loop.run_windowed(team, made, 0, case.lanes), expected[0])
    with leaving(1):
        equal(loop.run_windowed(team, made, 0, case.lanes), expected[0])
    with leaving(0):
        equal(loop.run_forward(team, made), expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_projection(dtype, isa):
    barriers = (
        4 if dtype == torch.bfloat16 and isa not in ("avx512bf16", "amx") else 2
    )  # more where rows are widened first
    x, w = torch.randn(6, 300).to(dtype), torch.randn(270, 300).to(dtype)

    def project(threads):
        xp = torch.full((6, 270), loop.NAN, dtype=dtype)
        _native.lib.input_projection(
            loop.DTYPES[dtype], threads, 6, 300, 270, loop.at(x), loop.at(w), 0, 0, loop.at(xp)
        )
        return xp

    expected = project(1)
    for round in range(barriers):
        with leaving(round):
            assert torch.equal(project(3), expected)


def test_cell_step():
    x, h, c, w_ih, w_hh = (torch.randn(*shape) for shape in ((16, 200), (16, 200), (16, 200), (800, 200), (800, 200)))

    def step(threads):
        new = torch.full((2, 16, 200), loop.NAN)
        _native.lib.cell_step(
            2, 0, threads, 16, 200, 200, 1.0, *map(loop.at, (x, h, c, w_ih, w_hh)), 0, 0, *map(loop.at, new)
        )
        return new

    expected = step(1)
    with leaving(0):
        assert torch.equal(step(3), expected)


@pytest.mark.parametrize("scale", [False, True])
def test_spectral_step(scale):
    def project(threads):
        torch.set_num_threads(threads)  # what the kernel asks for
        torch.manual_seed(0)
        Ws = [torch.randn(300, 70), torch.randn(20, 20), torch.randn(65, 130)]
        blocks = [torch.randn(W.shape[1], 16) for W in Ws]
        norms, near = spectral.spectral_step(Ws, blocks, [0.5] * 3, 2, scale, 2, 0)
        torch.set_num_threads(1)
        return [*Ws, *blocks, norms, near]

    expected = project(1)
    for round in range(9):
        with leaving(round):
            assert all(torch.equal(a, b) for a, b in zip(project(3), expected, strict=True))


def test_later_calls_start_with_fewer_threads_for_a_while():
    lib, case = _native.lib, few_lanes("lstm", threads=2)
    made = case.draw()
    try:
        lib.leave_at(3, LONG)
        assert lib.crowd() == {"threads": None, "seconds": 0}
        loop.run_forward(case, made)
        first = lib.crowd()
        assert (
            first["threads"] == 1 and 0 < first["seconds"] <= 5
        )  # whatever happened, threads come back within seconds
        loop.run_forward(case, made)  # alone: nobody can leave, which would start the time anew
        assert lib.crowd()["seconds"] < first["seconds"]
    finally:
        lib.leave_at(-1)
    assert lib.crowd()["threads"] is None


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """The program of `team.cpp`, under ThreadSanitizer where there is one."""
    if not shutil.which(build.CXX):
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("team") / "team"
    command = [
        build.CXX,
        "-std=c++17",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pthread",
        f"-I{build.ROOT / 'csrc/cpu'}",
        str(build.ROOT / "tests/ops/team.cpp"),
        str(build.ROOT / "csrc/cpu/crowd.cpp"),
        "-o",
        str(program),
    ]
    fixed = ["setarch", platform.machine(), "-R"]  # the sanitizer wants fixed addresses
    try:
        build.run([*command, "-fsanitize=thread"])
        build.run([*fixed, str(program), "memory"])
        return [*fixed, str(program)]
    except (RuntimeError, FileNotFoundError):
        build.run(command)
        return [str(program)]


@pytest.mark.parametrize("check", ["told", "late", "many", "memory", "calls"])
def test_team(team, check):
    done = subprocess.run([*team, check], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
