"""What torch's switches say about the rounding of products on GPUs."""
from __future__ import annotations

import torch

TF32_EPS = 2.0**-10  # 10 bits behind the point


def tf32_allowed() -> bool:
    """Whether torch's matrix products may round float32 to TF32 (`torch.set_float32_matmul_precision("high")`): then so do ours."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # torch 2.9
    return matmul.allow_tf32 if precision is None else precision == "tf32"


tf32_allowed._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its import of the whole compiler
