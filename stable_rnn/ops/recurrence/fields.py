"""The fields of the structs of `params.h` and of `CudaLaunch`, in their order, lanes spread out: the one list of them in Python.

A call is such a dict with values: numbers, tensors for pointers, None for null. The compiled kernels take the values in order, Triton's
what they need by name."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]


def _nulls(names: str) -> Fields:
    return dict.fromkeys(names.split())


_SHARED = "cell dtype threads hidden out cap  steps batch step stride warmup base length resets select n_select "
FORWARD = _nulls(
    _SHARED + "xp w_hh w_hr h0 c0 h_init c_init hidden_bias  y h_n c_n saved cells h_start c_start h_end c_end decay"
)
BACKWARD = _nulls(
    _SHARED + "dy y saved cells w_hh w_hr c0 dh_n dc_n dh_init dc_init h0  "
    "dz dh dh0 dc0 dh_start dc_start dh_end dc_end decay"
)
WINDOWED_BACKWARD = _nulls(
    _SHARED + "first last  xp w_hh w_hr h0 c0 dy dh_n dc_n hidden_bias  dz d_hidden h_prev dh m  dxp dh0 dc0"
)
LAUNCH = _nulls("device stream workspace workspace_bytes")
# of one group of a cascade
_GROUP = "cell dtype hidden unit units cap  steps batch step base length resets "
SCAN = _nulls(_GROUP + "xp sums hidden_bias h0 c0  y h_n c_n saved cells before")
SCAN_BACKWARD = _nulls(_GROUP + "dy y saved cells h0 c0 dh_n dc_n sums  dz dh0 dc0 after")
