"""How products of float32 are rounded, as torch's and Triton's switches say."""

from __future__ import annotations

import os

import torch

from . import _native

TF32_EPS = 2.0**-10  # 10 bits behind the point
TF32X3_EPS = 2.0**-20  # a factor is the sum of two TF32 numbers, and the product of the small ones is left out
BF16X3_EPS = 2.0**-16  # likewise of two bfloat16: 3 * 2^-18 of each product, at most

_tiles = _native.lib is not None and _native.lib.cpu_features()["isa"] == "amx"
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
    return _asked_on_cpu() == "bf16"


def bfloat16x3_allowed() -> bool:
    """Whether float32 recurrences on the CPU take three products of bfloat16 for one of float32: the instruction set has tiles for that
    (`amx`), and the same switches allow TF32, which is less exact (`torch.set_float32_matmul_precision("high")`)."""
    return _tiles and _asked_on_cpu() == "tf32"


def _asked_on_cpu() -> str:
    if _recurrences is None or _products is None:
        return {"medium": "bf16", "high": "tf32"}.get(torch.get_float32_matmul_precision(), "ieee")
    asked = _recurrences.fp32_precision
    return _products.fp32_precision if asked == "none" else asked


def products_eps(on_gpu: bool) -> float:
    """The relative rounding error of float32 products, at most."""
    if not on_gpu:
        return BF16X3_EPS if bfloat16x3_allowed() else torch.finfo(torch.float32).eps
    return TF32_EPS if tf32_allowed() else TF32X3_EPS if tf32x3_asked() else torch.finfo(torch.float32).eps


for _switch in (tf32_allowed, tf32x3_asked, products_eps):
    _switch.__dict__["_dynamo_marked_constant"] = (
        True  # torch.compiler.assume_constant_result, without its import of the whole compiler
    )
