"""Two processes run these files. Triton's interpreter is chosen as the kernels are imported, so it needs one of its own:

TRITON_INTERPRET=1 pytest tests/triton     the kernels' arithmetic, on the CPU
pytest                                     compiled for devices that are not here; on a GPU, where there is one, the same tests on it
"""

import os
import sys
from pathlib import Path

import torch

from stable_rnn.ops.recurrence import triton

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # lane_loop.py, spectra.py

RUN, COMPILED = "test_triton_run_*", "test_triton_compiled*"
collect_ignore_glob = []
if triton.missing():
    collect_ignore_glob = [RUN, COMPILED]
elif os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = [COMPILED]
elif not torch.cuda.is_available():
    collect_ignore_glob = [RUN]


def _dot_in_order(self, a, b, d, *_):
    """The interpreter's product, its sums in ascending order for every row alike: NumPy's BLAS may sum a tile's last rows differently."""
    total = np.zeros_like(d.data)
    for k in range(a.data.shape[1]):
        total += a.data[:, k, None].astype(total.dtype) * b.data[k].astype(total.dtype)
    return TensorHandle(total + d.data, d.dtype.scalar)


if COMPILED in collect_ignore_glob and RUN not in collect_ignore_glob:
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    InterpreterBuilder.create_dot = _dot_in_order
