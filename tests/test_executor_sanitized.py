"""The executor's kernels under AddressSanitizer."""

import subprocess
import sys
import textwrap

import pytest
from executor import build

SANITIZED = """
    import ctypes, sys
    library = ctypes.CDLL(sys.argv[1])
    library.run_kernel.restype = ctypes.c_char_p
    def run(kernel, blocks, threads, cluster, shared, cooperative, count, mode):
        hidden = blocks * threads
        floats = lambda n: (ctypes.c_float * n)(*[0.01] * n)
        given, more, out = floats(hidden * hidden), floats(count * hidden), floats(max(count, 1) * hidden)
        flags = (ctypes.c_uint * blocks)()
        message = library.run_kernel(kernel.encode(), blocks, threads, cluster, ctypes.c_int64(shared), cooperative, None,
                                     given, more, None, out, flags, count, mode)
        if message: raise SystemExit(message.decode())
        return list(out)
"""


@pytest.fixture(scope="module")
def sanitized():
    """Runs Python lines with the kernels compiled under AddressSanitizer."""
    if not build.sanitizer():
        pytest.skip(f"{build.CXX} has no AddressSanitizer library")
    library = build.build_primitives(asan=True)

    def run(lines):
        code = textwrap.dedent(SANITIZED) + lines
        return subprocess.run(
            [sys.executable, "-c", code, str(library)],
            env=build.sanitized_environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_sound_kernels_run_clean_under_address_sanitizer(sanitized):
    done = sanitized(
        "results = []\n"
        "for descending in (0, 1):\n"
        "    library.executor_schedule(descending)\n"
        "    results += [run('recurrence', 2, 32, 2, 512, 0, 3, 0), run('recurrence', 2, 32, 1, 512, 1, 3, 1)]\n"
        "assert all(r == results[0] for r in results) and results[0][5] != 0.01\n"
    )
    assert done.returncode == 0 and "Sanitizer" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "call, report",
    [
        ("run('faults', 1, 64, 1, 256, 0, 1, 2)", "heap-buffer-overflow"),  # just past shared memory
        ("run('faults', 1, 1024, 1, 256, 0, 1, 3)", "heap-buffer-overflow"),  # shared memory has 64 floats
        ("run('faults', 1, 32, 1, 256, 0, 1024, 4)", "heap-buffer-overflow"),  # and the global array 1024
        ("run('cluster_exchange', 8, 64, 4, 16, 0, 1, 2)", "use-after-poison"),  # a block that has ended
        ("run('faults', 1, 32, 1, 256, 0, 1, 5)", "misaligned address"),
    ],
)
def test_address_sanitizer_finds(sanitized, call, report):
    done = sanitized(call)
    assert done.returncode != 0 and report in done.stderr, done.stderr
