"""Builds `stable_rnn/_C` with CMake. Everything else is in pyproject.toml.

STABLE_RNN_NATIVE=on    the default: build it, or fail with a message (an install that is silently slow helps nobody)
STABLE_RNN_NATIVE=off   pure-Python wheel, no compiler needed: GPUs run Triton's kernels, CPUs the reference backend

STABLE_RNN_CUDA=auto    the default: the CUDA kernels too, where nvcc is found (CUDACXX, PATH, CUDA_HOME, /usr/local/cuda) and works
STABLE_RNN_CUDA=on      with them, or fail with a message
STABLE_RNN_CUDA=off     without them
STABLE_RNN_CUDA_ARCHS   architectures instead of all supported ones, such as "90a" or "80-real;90a-real": a much shorter build
CMAKE_ARGS              more arguments for CMake, such as -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent

HELP = """
stable_rnn: the compiled module could not be built: {reason}.
  It needs a C++17 compiler (for example: apt install g++, dnf install gcc-c++, xcode-select --install).
  To install without it, set STABLE_RNN_NATIVE=off:   STABLE_RNN_NATIVE=off pip install ...
  Everything then works through the reference backend (plain torch, slow)."""


NO_CUDA = """
stable_rnn: the CUDA kernels could not be built: {reason}.
  STABLE_RNN_CUDA=on asks for them. Without it they are built where that is possible; with STABLE_RNN_CUDA=off, never."""


def choice(name: str, *allowed: str) -> str:
    """The environment variable `name`; the first allowed value where it is not set."""
    value = os.environ.get(name, allowed[0]).lower()
    if value not in allowed:
        raise OptionError(f"{name}={value!r}: allowed are {', '.join(map(repr, allowed))}")
    return value


def nvcc() -> str | None:
    """The CUDA compiler, where its toolkits usually are."""
    named = os.environ.get("CUDACXX")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [named, "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((found for place in places if place and (found := shutil.which(place))), None)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement, absent where the native module is off

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        cuda, compiler = choice("STABLE_RNN_CUDA", "auto", "on", "off"), nvcc()
        if cuda == "on" and compiler is None:
            raise CompileError(
                NO_CUDA.format(reason="nvcc was not found on CUDACXX, PATH, CUDA_HOME or in /usr/local/cuda")
            )
        without = [*configure, "-DSTABLE_RNN_CUDA=OFF"]
        if cuda == "off" or compiler is None:
            return self.cmake(without)
        archs = os.environ.get("STABLE_RNN_CUDA_ARCHS", "").replace(",", ";")
        try:
            self.cmake(
                [
                    *configure,
                    "-DSTABLE_RNN_CUDA=ON",
                    f"-DCMAKE_CUDA_COMPILER={compiler}",
                    f"-DSTABLE_RNN_CUDA_ARCHS={archs}",
                ]
            )
        except CompileError as error:
            if cuda == "on":
                raise CompileError(NO_CUDA.format(reason="CMake failed, its output is above")) from error
            print(
                NO_CUDA.format(reason=f"CMake failed with {compiler}, its output is above")
                + "\n  Going on without them.",
                flush=True,
            )
            self.cmake(without)

    def cmake(self, configure: list[str]) -> None:
        # A directory of its own, always new: the paths of pip's build environment must not survive in a CMake cache.
        with tempfile.TemporaryDirectory(prefix="stable_rnn-build-") as build:
            self.run_cmake("-S", str(ROOT), "-B", build, "-G", "Ninja", *configure)
            self.run_cmake("--build", build)

    def run_cmake(self, *arguments: str) -> None:
        try:
            run = subprocess.run(["cmake", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except FileNotFoundError as error:  # only without build isolation
            raise CompileError(HELP.format(reason="cmake was not found")) from error
        print(run.stdout, flush=True)
        if run.returncode:
            no_compiler = "No CMAKE_CXX_COMPILER could be found" in run.stdout
            reason = "no C++ compiler was found" if no_compiler else "CMake failed, its output is above"
            raise CompileError(HELP.format(reason=reason))


setup(
    ext_modules=[Extension("stable_rnn._C", sources=[])] if choice("STABLE_RNN_NATIVE", "on", "off") == "on" else [],
    cmdclass={"build_ext": CMakeBuild},
)
