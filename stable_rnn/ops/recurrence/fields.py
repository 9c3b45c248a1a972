"""The fields of the structs of `params.h` and of `CudaLaunch`, in their order: the one list of them in Python.

The compiled kernels take a struct's fields in this order, Triton's what they need of them by name. Lanes are spread out. Tensors stand for
pointers until a call is made; absent ones are None."""
from __future__ import annotations

from collections import namedtuple

_SHARED = "cell dtype threads hidden out cap  steps batch step stride warmup base length select n_select"
_REST = {
    "Forward": "xp w_hh w_hr h0 c0 h_init c_init hidden_bias  y h_n c_n saved cells h_start c_start h_end c_end",
    "Backward": "dy y saved cells w_hh w_hr c0 dh_n dc_n dh_init dc_init h0  dz dh dh0 dc0 dh_start dc_start dh_end dc_end",
    "WindowedBackward": "first last  xp w_hh w_hr h0 c0 dy dh_n dc_n hidden_bias  dz d_hidden h_prev dh m  dxp dh0 dc0",
}


def _struct(name: str):  # noqa: ANN202  a class
    rest = _REST[name].split()
    return namedtuple(name, [*_SHARED.split(), *rest], defaults=[None] * len(rest))


Forward, Backward, WindowedBackward = map(_struct, _REST)
Launch = namedtuple("Launch", "device stream workspace workspace_bytes")
