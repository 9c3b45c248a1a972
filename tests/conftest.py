"""Small problems: one thread each keeps the tests' time steady; tests about threads set their own number.

`make test` runs what proves the package on this machine, `make check` also what is marked `check`: all of the files below, and single
tests by `@pytest.mark.check`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # oracle.py, certificate_search.py
if (found := find_spec("triton")) and found.origin is None:
    sys.modules["triton"] = None  # not installed; torch would take the folder tests/triton for it
torch.set_num_threads(1)

CHECK = (
    "test_install",
    "test_cuda_compile",
    "test_triton_compiled_recurrence",
    "test_triton_compiled_scan",
    "test_triton_compiled_spectral",  # builds
    "test_paper",
    "test_speed",
    "test_gpu_check",  # benchmarks
    "test_sharded",  # processes
    "test_docs",
    "test_examples",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in CHECK:
            item.add_marker(pytest.mark.check)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
