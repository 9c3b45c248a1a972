"""How products of float32 are rounded, as torch's and Triton's switches say."""

from __future__ import annotations

import os

import torch

TF32_EPS = 2.0**-10  # 10 bits behind the point
TF32X3_EPS = 2.0**-20  # a factor is the sum of two TF32 numbers, and the product of the small ones is left out

_recurrences, _products = (getattr(torch.backends.mkldnn, name, None) for name in ("rnn", "matmul"))  # torch 2.9


def tf32_allowed() -> bool:
    """Whether torch's matrix products may round float32 to TF32 (`torch.set_float32_matmul_precision("high")`): then so do ours."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # torch 2.9
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def tf32x3_asked() -> bool:
    """Whether Triton's default for `tl.dot` is three TF32 products in the place of one in float32 (TRITON_F32_DEFAULT=tf32x3)."""
    return os.environ.get("TRITON_F32_DEFAULT") == "tf32x3"


def bfloat16_weights_allowed() -> bool:
    """Whether float32 recurrences on the CPU may round their state weights to bfloat16: torch's switch for recurrences there says so
    (`torch.backends.mkldnn.rnn.fp32_precision = "bf16"`) or, where it says nothing, that for matrix products
    (`torch.set_float32_matmul_precision("medium")`)."""
    if _recurrences is None or _products is None:
        return torch.get_float32_matmul_precision() == "medium"
    asked = _recurrences.fp32_precision
    return (_products.fp32_precision if asked == "none" else asked) == "bf16"


def products_eps() -> float:
    """The relative rounding error of float32 products on GPUs, at most."""
    return TF32_EPS if tf32_allowed() else TF32X3_EPS if tf32x3_asked() else torch.finfo(torch.float32).eps


for _switch in (tf32_allowed, tf32x3_asked, products_eps):
    _switch.__dict__["_dynamo_marked_constant"] = (
        True  # torch.compiler.assume_constant_result, without its import of the whole compiler
    )
