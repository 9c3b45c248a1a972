"""Builds `stable_rnn/_C` with CMake. Everything else is in pyproject.toml.

STABLE_RNN_NATIVE=on    the default: build it, or fail with a message (an install that is silently slow helps nobody)
STABLE_RNN_NATIVE=off   pure-Python wheel, no compiler needed: everything runs through the reference backend
"""

import os
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


def native_wanted() -> bool:
    choice = os.environ.get("STABLE_RNN_NATIVE", "on").lower()
    if choice not in ("on", "off"):
        raise OptionError(f"STABLE_RNN_NATIVE={choice!r}: allowed are 'on' and 'off'")
    return choice == "on"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement, absent where the native module is off

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        # A directory of its own, always new: the paths of pip's build environment must not survive in a CMake cache.
        with tempfile.TemporaryDirectory(prefix="stable_rnn-build-") as build:
            self.cmake("-S", str(ROOT), "-B", build, "-G", "Ninja", *configure)
            self.cmake("--build", build)

    def cmake(self, *arguments: str) -> None:
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
    ext_modules=[Extension("stable_rnn._C", sources=[])] if native_wanted() else [],
    cmdclass={"build_ext": CMakeBuild},
)
