"""The CUDA sources compile for every architecture without a warning, and what `ptxas -v` says of each kernel stays within the budget: no
spills, no static shared memory, registers for the threads that it is launched with. Needs nvcc, no GPU."""

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from executor import build

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = pytest.mark.skipif(not NVCC, reason="no nvcc (CUDACXX, PATH, /usr/local/cuda/bin)")

SOURCES = sorted((build.ROOT / "csrc/cuda").glob("*.cu"))
ARCHS = ["80", "90a", "100", "120"]
REGISTERS = 65536  # of a multiprocessor, and the most that a block may have
FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--expt-relaxed-constexpr",
    "-cudart=static",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    *build.INCLUDE,
]
STRICT = ["-Xcompiler=-Wall,-Wextra", "--Werror=all-warnings", "-Xptxas=-v"]


def compiled(source: Path) -> list[dict]:
    """Every kernel of a source on every architecture: name, arch, registers, threads (its launch bound), spills, stack, shared."""
    command = [NVCC, *FLAGS, *STRICT, *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS)]
    needs = build.run([NVCC, *FLAGS, "-arch=sm_80", "-M", str(source)]).replace("\\\n", " ").split()
    digest = hashlib.sha256(" ".join([*command, build.run([NVCC, "--version"])]).encode())
    for need in [source, *(Path(name) for name in needs if name.startswith(str(build.ROOT)))]:
        digest.update(need.read_bytes())
    kept = build.CACHE / "ptxas" / f"{source.stem}-{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        folder = kept.with_suffix(f".{os.getpid()}")
        folder.mkdir(parents=True)
        try:
            done = subprocess.run(
                [*command, "--keep", "--keep-dir", str(folder), "-c", str(source), "-o", str(folder / "made.o")],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            build.move_into(
                kept,
                lambda name: Path(name).write_text(
                    json.dumps(read(done.stderr, [ptx.read_text() for ptx in folder.glob("*.ptx")]))
                ),
            )
        finally:
            shutil.rmtree(folder)
    return json.loads(kept.read_text())


def read(report: str, texts: list[str]) -> list[dict]:
    bounds = {
        (re.search(r"\.target sm_(\w+)", ptx)[1], name): int(threads)
        for ptx in texts
        for name, threads in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx)
    }
    kernels = []
    for part in re.split(r"Compiling entry function ", report)[1:]:
        name, arch = re.match(r"'(\w+)' for 'sm_(\w+)'", part).groups()
        number = {
            what: int((re.search(rf"(\d+) bytes {what}", part) or [0, 0])[1])
            for what in ("stack frame", "spill stores", "spill loads", "smem")
        }
        kernels.append(
            dict(
                name=name,
                arch=arch,
                registers=int(re.search(r"Used (\d+) registers", part)[1]),
                threads=bounds.get((arch, name)),
                spills=number["spill stores"] + number["spill loads"],
                stack=number["stack frame"],
                shared=number["smem"],
            )
        )
    return kernels


@pytest.fixture(scope="module")
def kernels(request):
    """The compilations of the sources that the selected tests ask for, two at a time."""
    tests = [
        item
        for item in request.session.items
        if getattr(item, "originalname", None) == "test_kernels_stay_within_their_budget"
    ]
    wanted = [test.callspec.params["source"] for test in tests]
    with ThreadPoolExecutor(2) as pool:
        return {source: pool.submit(compiled, source) for source in wanted}


def shown(kernel: dict) -> str:
    name = (
        subprocess.run(["c++filt", kernel["name"]], capture_output=True, text=True).stdout
        if shutil.which("c++filt")
        else kernel["name"]
    )
    name = re.sub(r"\(anonymous namespace\)::|stable_rnn::|^void |\(.*", "", name.strip())
    return (
        f"sm_{kernel['arch']:<4} {kernel['registers']:4d} registers {kernel['threads'] or '?':>5} threads "
        f"{kernel['spills']:5d} bytes spilled {kernel['stack']:5d} on the stack   {name}"
    )


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_kernels_stay_within_their_budget(kernels, source):
    found = kernels[source].result()
    for kernel in found:
        line = shown(kernel)
        print(line)
        assert kernel["threads"], f"no __launch_bounds__: {line}"
        per_warp = -(-kernel["registers"] * 32 // 256) * 256  # handed out by 256
        assert per_warp * -(-kernel["threads"] // 32) <= REGISTERS, line
        assert kernel["spills"] == 0 and kernel["stack"] == 0, line
        assert kernel["shared"] == 0, f"static shared memory: {line}"
    assert {kernel["arch"] for kernel in found} in (set(), set(ARCHS))


def test_the_executors_kernels_compile_for_a_device():
    assert len(compiled(build.HERE / "kernels.cu")) == 14 * len(ARCHS)


def test_a_spill_would_be_seen(tmp_path):
    """`read` on a kernel that cannot keep its values in registers."""
    source = tmp_path / "spills.cu"
    source.write_text("""
        __global__ void __launch_bounds__(1024) crowded(float* x) {
          float v[200];
          for (int i = 0; i < 200; ++i) v[i] = x[i * 1024 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[199 - i];
        }""")
    (kernel, *others) = [k for k in compiled(source) if k["arch"] == "90a"]
    assert not others and kernel["threads"] == 1024 and kernel["spills"] > 0


def test_the_message_names_driver_and_runtime():
    """The device layer alone, linked as in the module: what it says on this machine."""
    library = build.CACHE / "limits.so"
    build.move_into(
        library,
        lambda name: build.run(
            [
                NVCC,
                *FLAGS,
                "-arch=sm_80",
                "-shared",
                "-Xcompiler=-fvisibility=default",
                str(build.ROOT / "csrc/cuda/limits.cu"),
                "-o",
                name,
            ]
        ),
    )
    ask = ctypes.CDLL(str(library))._ZN10stable_rnn19cuda_driver_problemEv
    ask.restype = ctypes.c_char_p
    version = re.search(r"release ([0-9.]+)", build.run([NVCC, "--version"]))[1]
    if torch.cuda.is_available():
        assert ask() is None
    else:
        assert re.search(rf"driver.* CUDA {re.escape(version)}\b", ask().decode())
