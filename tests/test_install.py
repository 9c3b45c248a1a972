"""What a user installs: the sdist, the wheel built from it without torch, the pure-Python wheel, and imports with no or a broken binary."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from stable_rnn import _native

ROOT = Path(__file__).parent.parent
SOURCES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "csrc", "pyproject.toml", "setup.py", "stable_rnn")
EXT = sysconfig.get_config_var("EXT_SUFFIX")
USE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]  # this checkout's own _C
import torch, stable_rnn
from stable_rnn import _native
y = stable_rnn.StableLSTM(3, 5, plan=stable_rnn.Chunked(4, 2))(torch.zeros(9, 2, 3))[0]
assert y.shape == (9, 2, 5) and y.isfinite().all()
print(stable_rnn.__file__)
print(_native.lib is not None, _native.reason)
"""


def run(*command, ok=True, **environment):
    """Output of a command whose Python sees neither this source tree nor the installed package's variables."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("STABLE_RNN", "PYTHON"))}
    cwd = environment.pop("cwd", "/")
    done = subprocess.run(
        command, env=clean | environment, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def use(package, **environment):
    """Last line that `USE` prints with the package that lies in folder `package`."""
    *_, where, state = run(
        sys.executable, "-W", "ignore", "-c", USE, PYTHONPATH=str(package), **environment
    ).splitlines()
    assert Path(where).is_relative_to(package)
    return state


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of the sources without anything built."""
    copy = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="session")
def pure_wheel(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("pure")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        out,
        cwd=tree,
        STABLE_RNN_NATIVE="off",
        PATH=str(Path(sys.executable).parent),
    )  # no compiler on the path
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture
def pure(pure_wheel, tmp_path):
    zipfile.ZipFile(pure_wheel).extractall(tmp_path)
    return tmp_path


def python_files(tree):
    return {str(file.relative_to(tree)) for file in (tree / "stable_rnn").rglob("*.py")} | {"stable_rnn/py.typed"}


def test_pure_wheel_is_complete_and_for_any_machine(tree, pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(pure_wheel).namelist() if ".dist-info/" not in name}
    assert names == python_files(tree)


def test_pure_install_runs(pure):
    assert use(pure).startswith("False not built")


def test_sdist_gives_the_native_wheel_without_torch_in_the_build(tree, tmp_path):
    # pip's build isolation: the build environment has what pyproject.toml asks for and nothing else
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('sdist')", cwd=tree)
    (sdist,) = (tree / "sdist").glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", sdist, "--no-deps", "-w", tmp_path, STABLE_RNN_CUDA="off")
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == python_files(tree) | {f"stable_rnn/_C{EXT}"}

    binary = archive.read(f"stable_rnn/_C{EXT}")
    for trace in (b"libtorch", b"libc10", b"_ZN5torch", b"_ZN3c10", b"_ZN2at"):
        assert trace not in binary
    archive.extractall(tmp_path / "installed")
    assert use(tmp_path / "installed") == "True None"


def test_without_a_compiler_the_message_names_the_way_out(tree):
    out = run(
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        "nowhere",
        ok=False,
        cwd=tree,
        PATH=str(Path(sys.executable).parent),
    )
    assert "no C++ compiler was found" in out and "STABLE_RNN_NATIVE=off" in out


def test_a_wrong_choice_is_named(tree):
    out = run(sys.executable, "setup.py", "--version", ok=False, cwd=tree, STABLE_RNN_NATIVE="maybe")
    assert "STABLE_RNN_NATIVE='maybe': allowed are 'on', 'off'" in out
    out = run(
        sys.executable, "setup.py", "build_ext", "--build-lib", "nowhere", ok=False, cwd=tree, STABLE_RNN_CUDA="maybe"
    )
    assert "STABLE_RNN_CUDA='maybe': allowed are 'auto', 'on', 'off'" in out


def test_cuda_without_its_compiler_is_an_error_where_asked_for_and_left_out_elsewhere(tree, tmp_path):
    hidden = dict(cwd=tree, CUDACXX="", CUDA_HOME="", PATH=str(Path(sys.executable).parent))
    if shutil.which("/usr/local/cuda/bin/nvcc"):
        pytest.skip("nvcc lies where it is always looked for")
    out = run(
        sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, ok=False, STABLE_RNN_CUDA="on", **hidden
    )
    assert "nvcc was not found" in out and "STABLE_RNN_CUDA=off" in out


def test_a_compiler_without_openmp_is_named_with_the_way_out(tree, tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    configure = ["cmake", "-S", tree, "-G", "Ninja", "-DSTABLE_RNN_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    without = run(*configure, "-B", tmp_path / "without", "-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON", PATH=path)
    assert "CMake Warning" in without and "one thread" in without and "libomp-dev" in without
    usual = run(*configure, "-B", tmp_path / "usual", PATH=path)
    assert ("Found OpenMP: TRUE" in usual) == ("has no OpenMP" not in usual)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_cuda_wheel_loads_without_a_driver(tree, tmp_path):
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        cwd=tree,
        STABLE_RNN_CUDA="on",
        STABLE_RNN_CUDA_ARCHS="90a-real",
    )
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    binary = next((tmp_path / "installed").rglob("_C*"))
    needed = run("readelf", "-d", binary)
    assert "libcuda" not in needed and "libtorch" not in needed
    assert use(tmp_path / "installed") == "True None"
    show = "from stable_rnn import backends; print(next(b for b in backends() if b.name == 'cuda'))"
    out = run(sys.executable, "-c", show, PYTHONPATH=str(tmp_path / "installed"))
    assert "available=True" in out or "driver" in out or "on cpu" in out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (f"_C{EXT}", "not a shared object"),
        ("_C.py", "raise RuntimeError('a module built for another machine')"),
        ("_C.py", "import a_module_that_is_missing"),
    ],
)
def test_a_broken_binary_never_breaks_the_import(pure, name, content):
    (pure / "stable_rnn" / name).write_text(content)
    assert use(pure).startswith("False does not load: ")


def test_a_binary_of_other_sources_is_not_used(pure):
    """Its kernels would take addresses for sizes."""
    (pure / "stable_rnn" / "_C.py").write_text("interface = 1")
    assert use(pure) == (
        "False was built from other sources than this Python code; install the package again, or `make build` in a "
        "source tree"
    )
    (pure / "stable_rnn" / "_C.py").unlink()
    header = (ROOT / "csrc/include/stable_rnn/params.h").read_text()
    assert f"interface_number = {_native.INTERFACE};" in header


def test_the_binary_can_be_switched_off():
    out = run(
        sys.executable,
        "-c",
        "from stable_rnn import _native; print(_native.lib, _native.reason)",
        STABLE_RNN_NATIVE="off",
        cwd=ROOT,
    )
    assert out == "None switched off by STABLE_RNN_NATIVE=off\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime_serves_torch_and_the_kernels():
    show = "import stable_rnn; print({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l})"
    assert run(sys.executable, "-c", show, cwd=ROOT).count("libgomp") <= 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of libraries on Linux")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
@pytest.mark.parametrize("name", ["torch/lib/libgomp.so.1", "torch.libs/libgomp-0123abcd.so.1.0.0"])
def test_the_openmp_library_of_torch_is_visible_under_any_name(tmp_path, name):
    """Wheels of torch before 2.6 and those for arm64 have a hash in its name, so a module that needs `libgomp.so.1` would want a second."""
    library = tmp_path / name
    for folder in (library.parent, tmp_path / "torch"):
        folder.mkdir(exist_ok=True, parents=True)
    (tmp_path / "of_torch.c").write_text("int of_torch(void) { return 7; }")
    run("gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", tmp_path / "of_torch.c", "-o", library)
    (tmp_path / "torch/__init__.py").write_text(f"import ctypes\nlibrary = ctypes.CDLL({str(library)!r})")
    load = f"import ctypes, runpy; runpy.run_path({_native.__file__!r}); print(ctypes.CDLL(None).of_torch())"
    assert run(sys.executable, "-c", load, PYTHONPATH=str(tmp_path)) == "7\n"
    hidden = "import ctypes, torch; print(hasattr(ctypes.CDLL(None), 'of_torch'))"
    assert run(sys.executable, "-c", hidden, PYTHONPATH=str(tmp_path)) == "False\n"
