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
