"""Builds the CUDA kernels for the block executor (`executor.h`) with g++ and loads them.

`module()` is `stable_rnn._C` with the CUDA entry points running on CPU tensors; `primitives()` the small kernels of `kernels.cu`.
Objects are kept in `build/executor/` under the hash of what they are made from.

    python tests/executor/build.py [--asan]     prints the path of the module
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "executor"
CXX = os.environ.get("CXX", "g++")
INCLUDE = [f"-I{ROOT / folder}" for folder in ("csrc/include", "csrc/cuda", "csrc/cpu", "tests/executor")]
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", *INCLUDE]
# Sums are fused only where the source says so, as in the other builds; memory is read as one type and written as another, as on a device.
KERNEL = [
    "-DSTABLE_RNN_EXECUTOR",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
]
SANITIZE = ["-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
EXECUTOR = [HERE / name for name in ("executor.cpp", "primitives.cpp", "warpgroups.cpp")]
LIMITS = (90, 132, 232448, 16)  # CudaLimits of executor.cpp: an H100


def missing() -> str:
    """Why nothing can be built here, or an empty string."""
    if not shutil.which(CXX):
        return f"no C++ compiler ({CXX})"
    return "" if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def _flags(source: Path, asan: bool) -> list[str]:
    if source.name == "bindings.cpp":
        import pybind11

        return [
            *COMMON,
            "-O1",
            "-DSTABLE_RNN_CUDA",
            f"-I{pybind11.get_include()}",
            f"-I{sysconfig.get_path('include')}",
        ]
    if source.parent.name == "cpu":
        return [*COMMON, "-O1"]
    fma = ["-mfma"] if "fma" in _cpu_flags() else []
    return [*COMMON, *KERNEL, *fma, *(["-O0", *SANITIZE] if asan else ["-O2"]), "-x", "c++"]


@cache
def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def run(command: list[str]) -> str:
    """What a command prints; raises RuntimeError with all of it where the command fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def _object(source: Path, asan: bool) -> Path:
    command = [CXX, *_flags(source, asan)]
    needs = run([*command, "-MM", "-MT", "", str(source)]).replace("\\\n", " ").split()[1:]
    digest = hashlib.sha256(" ".join([run([CXX, "-dumpfullversion"]), *command]).encode())
    for name in needs:
        digest.update(Path(name).read_bytes())
    made = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if not made.exists():
        move_into(made, lambda to: run([*command, "-c", str(source), "-o", to]))
    return made


def move_into(path: Path, write) -> None:
    """`write(name)` makes the file, which then moves to `path`, so that nobody sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:  # of several test processes one makes it, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        name = f"{path}.{os.getpid()}.tmp"
        write(name)
        os.replace(name, path)


def _link(name: str, sources: list[Path], asan: bool) -> Path:
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _object(source, asan), sources))
    digest = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    made = CACHE / digest / name
    if not made.exists():
        sanitize = SANITIZE if asan else []
        move_into(made, lambda to: run([CXX, "-shared", *sanitize, *map(str, objects), "-o", to]))
    return made


def build_module(asan: bool = False) -> Path:
    csrc = ROOT / "csrc"
    common = [csrc / "cpu" / name for name in ("crowd.cpp", "isa.cpp", "memory.cpp")]
    sources = [csrc / "bindings.cpp", *common, *sorted((csrc / "cuda").glob("*.cu"))]
    return _link("_C" + sysconfig.get_config_var("EXT_SUFFIX"), [*sources, HERE / "absent.cpp", *EXECUTOR], asan)


def build_primitives(asan: bool = False) -> Path:
    return _link("primitives.so", [HERE / "kernels.cu", *EXECUTOR], asan)


@cache
def module() -> ModuleType:
    """The module of the default build."""
    return load(build_module())


def on_cpu_tensors(patch) -> None:
    """`module()` stands for the CUDA kernels, and CPU tensors for a GPU's, as long as the MonkeyPatch `patch` lasts."""
    from stable_rnn.ops import cuda_device

    patch.setattr(cuda_device, "lib", module())
    patch.setattr(cuda_device, "on_gpu", lambda t: t.device.type == "cpu")
    patch.setattr(cuda_device, "stream", lambda index: 0)
    cuda_device.limits.cache_clear()


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("stable_rnn_executor._C", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@cache
def primitives() -> ctypes.CDLL:
    return ctypes.CDLL(str(build_primitives()))


def native() -> str:
    """nvcc's option for the GPU of this machine, with what its architecture alone has."""
    import torch

    return "-arch=sm_90a" if torch.cuda.get_device_capability() == (9, 0) else "-arch=native"


@cache
def gpu_primitives() -> ctypes.CDLL:
    """The same kernels for the GPU of this machine."""
    sources = [HERE / "kernels.cu", ROOT / "csrc/cuda/limits.cu"]
    made = CACHE / "gpu" / "primitives.so"
    move_into(
        made,
        lambda to: run(
            [
                "nvcc",
                "-std=c++17",
                native(),
                "-fmad=false",
                "-shared",
                "-cudart=static",
                "-Xcompiler=-fPIC",
                *INCLUDE,
                *map(str, sources),
                "-o",
                to,
            ]
        ),
    )
    return ctypes.CDLL(str(made))


def _library(of: ModuleType | ctypes.CDLL) -> ctypes.CDLL:
    return of if isinstance(of, ctypes.CDLL) else ctypes.CDLL(of.__file__)


@contextmanager
def schedule(of: ModuleType | ctypes.CDLL, order: int) -> Iterator[None]:
    """Blocks and threads run in ascending (0) or descending order (1) inside; more is the seed of a random one."""
    library = _library(of)
    library.executor_schedule(int(order))
    try:
        yield
    finally:
        library.executor_schedule(0)


@contextmanager
def limits(of: ModuleType | ctypes.CDLL, arch: int, sms: int, shared_bytes: int, max_cluster: int) -> Iterator[None]:
    """`of` runs on another device inside: the fields of `CudaLimits`."""
    library = _library(of)

    def choose(arch: int, sms: int, shared_bytes: int, max_cluster: int) -> None:
        library.executor_limits(arch, sms, ctypes.c_int64(shared_bytes), max_cluster)

    choose(arch, sms, shared_bytes, max_cluster)
    try:
        yield
    finally:
        choose(*LIMITS)


def sanitizer() -> Path | None:
    """The compiler's AddressSanitizer library, where it is installed."""
    found = Path(run([CXX, "-print-file-name=libasan.so"]).strip())
    return found if found.is_absolute() else None


def sanitized_environment() -> dict[str, str]:
    """For a Python process that loads what was built with `asan=True`."""
    return {**os.environ, "LD_PRELOAD": str(sanitizer()), "ASAN_OPTIONS": "detect_leaks=0"}


if __name__ == "__main__":
    print(build_module("--asan" in sys.argv))
