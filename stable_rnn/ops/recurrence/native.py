"""The `cpu` backend: the compiled kernels of `csrc/cpu/recurrence.cpp`, on float32 and bfloat16 tensors (see `params.h`).

State weights of float32 are rounded to bfloat16, half the bytes of each step, where torch's switches allow that (`bfloat16_weights_allowed`
in `precision.py`); states, sums and the input projection stay float32. With tiles of bfloat16 (instruction set `amx`) the switches that
allow TF32 turn the forward recurrence's float32 products into three of bfloat16 each (`bfloat16x3_allowed`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ... import _native
from ...cells import CELLS
from ...precision import bfloat16_weights_allowed, bfloat16x3_allowed
from ..kernel_args import BF16_WEIGHTS, BF16X3, CPU_DTYPES, DTYPES, addresses, at, dense, rows_like
from .compiled import Kernels, shared
from .fields import WINDOWED_BACKWARD, Fields
from .problem import Adjoint, BackwardInputs, Inputs, Output, Problem, WindowedInputs

PLAIN = (Tensor, torch.nn.Parameter)
_ROWS, _WORK = 16, 1 << 18  # rows and multiply-adds from which the packed products beat torch's
_SMALL, _LARGE, _KEPT, _SPARE = 1 << 18, 1 << 22, 1 << 26, 1 << 28  # bytes
MULTIPLIES_BFLOAT16 = _native.lib is not None and _native.lib.cpu_features()["isa"] in ("avx512bf16", "amx")
_scratch = threading.local()
_WORKSPACE = 1 << 23  # floats that the backward pass of windows may use at once


takes_resets = False  # rows come cut into pieces
in_place = True  # a step reads all that it needs of a row before it writes there


def can_run(p: Problem | None, xp: Tensor, w_hh: Tensor | None = None, w_hr: Tensor | None = None) -> tuple[bool, str]:
    if _native.lib is None:
        return False, f"the compiled module is missing ({_native.reason})"
    if xp.device.type != "cpu":
        return False, f"the compiled kernels run on the CPU, the tensors are on {xp.device}"
    if xp.dtype not in CPU_DTYPES:
        return False, f"the compiled kernels take float32 and bfloat16, not {xp.dtype}"
    return True, ""


def _make(like: Tensor, zero: bool, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A fresh output. Large ones ask for huge pages before they are touched: page faults would cost as much as the kernel."""
    t = like.new_empty(shape, dtype=dtype)
    if t.nbytes >= _LARGE:
        _native.lib.prefer_huge_pages(t.data_ptr(), t.nbytes)
    return t.zero_() if zero else t


def _borrow(dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory of this thread: what the allocator would map and clear anew at each call of this size is kept, up to a limit."""
    size = dtype.itemsize * prod(shape)
    if not _SMALL <= size <= _KEPT:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if getattr(_scratch, "memory", None) is None or _scratch.memory.numel() < size:
        _scratch.memory = _make(torch.empty(0, dtype=torch.uint8, device="cpu"), False, size)
    return _scratch.memory[:size].view(dtype).view(shape)


def _reuse(like: Tensor, *shape: int) -> Tensor:
    """A fresh output, in what this thread's last backward pass has left, if that is of about this size."""
    memory, size = getattr(_scratch, "spare", None), like.dtype.itemsize * prod(shape)
    _scratch.spare = None
    if memory is None or not size <= len(memory) <= 2 * size:
        return _make(like, False, *shape)
    return memory[:size].view(like.dtype).view(shape)


def leave(saved: Tensor) -> None:
    """Keeps the memory of what a forward pass saved for this thread's next forward pass, up to a limit; otherwise each training step would
    map and clear it anew. Nobody reads `saved` again, and no other tensor shares its storage."""
    if saved.is_cpu and _LARGE <= saved.untyped_storage().nbytes() <= _SPARE:
        _scratch.spare = torch.empty(0, dtype=torch.uint8, device="cpu").set_(saved.untyped_storage())


class _Kernels(Kernels):
    make = staticmethod(_make)

    def dtype(self, x: Tensor) -> int:
        if x.dtype is not torch.float32:
            return DTYPES[x.dtype]
        return BF16_WEIGHTS if bfloat16_weights_allowed() else BF16X3 if bfloat16x3_allowed() else DTYPES[x.dtype]

    def padded(self, lengths: Tensor | None, rows: int) -> bool:
        """Not for sequences end to end, nor for pieces: here it costs nothing to look, and zeros as much as some kernels."""
        return lengths is not None and int(lengths.sum()) < rows

    def call(self, backward: bool, fields: Fields) -> tuple[Callable, Sequence, None]:
        lib = _native.lib
        return lib.recurrence_backward if backward else lib.recurrence_forward, addresses(fields.values()), None


_kernels = _Kernels()
forward, backward = _kernels.forward, _kernels.backward
ends, adjoint_ends = _kernels.ends, _kernels.adjoint_ends


class _Scanned(_Kernels):
    """Over a cascade of these groups."""

    def __init__(self, groups: tuple[int, ...]) -> None:
        self._groups = torch.tensor(groups, device="cpu")

    def dtype(self, x: Tensor) -> int:  # a weight of a panel serves all times of a block, whatever its bytes
        return DTYPES[x.dtype]

    def call(self, backward: bool, fields: Fields) -> tuple[Callable, Sequence, None]:
        kernel = _native.lib.scanned_backward if backward else _native.lib.scanned_forward
        return kernel, [*addresses(fields.values()), self._groups.data_ptr(), len(self._groups) - 1], None


def scanned_forward(inputs: Inputs, p: Problem, groups: tuple[int, ...], save: bool = True) -> Output:
    """As `scanned.Scanned.forward`, in one pass over time."""
    return _Scanned(groups).forward(inputs, p.whole(), save)


def scanned_backward(inputs: BackwardInputs, p: Problem, groups: tuple[int, ...]) -> Adjoint:
    return _Scanned(groups).backward(inputs, p.whole())


def windowed_backward(inputs: WindowedInputs, p: Problem) -> tuple[Tensor | None, ...]:
    """As `reference.windowed_backward`: groups of lanes in a bounded workspace, dW by one GEMM a group, in a fixed order."""
    given = WindowedInputs._make(dense(*inputs))
    _, dh_n, dc_n, xp, w_hh, w_hr, hidden_bias, h0, c0, _, lengths, _ = given
    batch, width, k = h0.shape[0], w_hh.shape[1], p.warmup + 1
    hidden = w_hh.shape[0] // p.spec.gates
    made = partial(_make, xp, True, dtype=torch.float32)
    dxp, dh0, dc0 = made(*xp.shape), made(batch, width), made(batch, hidden)
    dw_hh, dw_hr = made(*w_hh.shape), None if w_hr is None else made(*w_hr.shape)
    d_bias = None if hidden_bias is None else made(hidden)
    own_bias = p.spec.hidden_bias  # its gate: then the hidden product has a gradient of its own
    columns = [w_hh.shape[0], width] + ([width, hidden] if w_hr is not None else [])
    columns += [w_hh.shape[0]] if own_bias is not None else []
    lanes = p.lanes() * batch
    group = min(lanes, max(1, _WORKSPACE // (k * sum(columns))))
    space = [xp.new_empty(group * k, c, dtype=torch.float32) for c in columns]
    for first in range(0, lanes, max(group, 1)):
        last = min(first + group, lanes)
        dz, h_prev, *projected = (s[: (last - first) * k] for s in space)
        d_hidden = projected.pop() if own_bias is not None else dz
        dh, m = projected or (None, None)
        fields = shared(WINDOWED_BACKWARD, p, _kernels.dtype(xp), given, batch)
        fields.update(
            first=first,
            last=last,
            dz=dz,
            d_hidden=None if own_bias is None else d_hidden,
            h_prev=h_prev,
            dh=dh,
            m=m,
            dxp=dxp,
            dh0=dh0,
            dc0=dc0,
        )
        _native.lib.recurrence_windowed_backward(*addresses(fields.values()))
        product(d_hidden.T, h_prev, dw_hh)
        if d_bias is not None and own_bias is not None:
            d_bias += d_hidden.chunk(p.spec.gates, 1)[own_bias].sum(0)
        if dh is not None and m is not None and dw_hr is not None:
            product(dh.T, m, dw_hr)
    if lengths is not None:  # empty sequences: dh0 = dh_n, dc0 = dc_n
        none = (lengths == 0)[:, None]
        dh0 = torch.where(none, dh_n.float(), dh0)
        dc0 = dc0 if dc_n is None else torch.where(none, dc_n.float(), dc0)
    found = (dxp, dw_hh, dw_hr, d_bias, dh0, None if c0 is None else dc0)
    return tuple(None if t is None else t.to(xp.dtype) for t in found)


def can_project(x: Tensor, w_ih: Tensor, bias: Tensor | None, backend: str) -> bool:
    """Whether the kernel computes xp: float32, or bfloat16 where it multiplies that, and enough rows to pay for packing the weights."""
    return (
        _native.lib is not None
        and backend in ("auto", "cpu")
        and x.dim() == w_ih.dim() == 2
        and x.shape[0] >= _ROWS
        and x.shape[0] * w_ih.numel() >= _WORK
        and x.shape[1] == w_ih.shape[1]
        and (bias is None or bias.shape == w_ih.shape[:1])
        and (x.dtype is torch.float32 or MULTIPLIES_BFLOAT16 and x.dtype is torch.bfloat16)
        and all(_plain(t, x.dtype) for t in ((x, w_ih) if bias is None else (x, w_ih, bias)))
    )


def _plain(t: Tensor, dtype: torch.dtype) -> bool:
    return type(t) in PLAIN and t.dtype is dtype and t.is_cpu and not t.is_neg()


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, (m, k), (k, n) -> (m, n), where nothing watches: by the kernel where that takes less time, for an a stored by rows or, as
    the transposed of such, by columns. `out` is added to."""
    (m, k), n = a.shape, b.shape[1]
    plain = _plain(a, torch.float32) and _plain(b, torch.float32)
    if _native.lib is None or k < _ROWS or m * k * n < _WORK or not plain:
        return a @ b if out is None else out.addmm_(a, b)
    transposed = a.stride(0) == 1 and a.stride(1) == m
    (a,), (b,) = ((a,) if transposed else dense(a)), dense(b)
    found = _make(b, False, m, n) if out is None else out
    _native.lib.product(
        threads=torch.get_num_threads(),
        transposed=transposed,
        more=out is not None,
        rows=m,
        inner=k,
        columns=n,
        a=at(a),
        b=at(b),
        c=at(found),
    )
    return found


def project(x: Tensor, w_ih: Tensor, bias: Tensor | None, passing: bool = False) -> Tensor:
    """xp = x W_ih^T + bias: (N, I), (S, I), (S,) -> (N, S). `passing`: it lies in this thread's scratch memory, until the next call."""
    x, w_ih, bias = dense(x, w_ih, bias)
    xp = (partial(_borrow, x.dtype) if passing else partial(_reuse, x))(x.shape[0], w_ih.shape[0])
    (rows, inputs), sums = x.shape, w_ih.shape[0]
    _native.lib.input_projection(
        dtype=DTYPES[x.dtype],
        threads=torch.get_num_threads(),
        rows=rows,
        input=inputs,
        sums=sums,
        x=at(x),
        w_ih=at(w_ih),
        b_ih=at(bias),
        b_hh=0,
        xp=at(xp),
    )
    return xp


def plain_step(cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: tuple) -> bool:
    """Whether one step of a cell is all there is: no transform, mode or autocast, plain CPU tensors of one dtype, weights that have the
    shapes of torch's cell's."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    kind, inputs, hidden = x.dtype, x.shape[1], h.shape[1]
    rows = CELLS[cell].gates * hidden
    w_ih, w_hh, b_ih, b_hh = weights
    if w_ih is None or w_hh is None or w_ih.shape != (rows, inputs) or w_hh.shape != (rows, hidden):
        return False
    if b_ih is None or b_hh is None:
        if b_ih is not b_hh:
            return False
    elif b_ih.shape != (rows,) or b_hh.shape != (rows,):
        return False
    for t in (x, h, c, *weights):
        if t is not None and (
            t.dtype is not kind or not t.is_cpu or type(t) not in PLAIN or t.is_neg() or t.layout is not torch.strided
        ):
            return False
    return True


def cell_step(
    cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: tuple, cap: float
) -> tuple[Tensor, Tensor | None]:
    """One call into C++ for a `plain_step` that `can_run`: x (B, I), h (B, H), c (B, H) or None; weights w_ih, w_hh, b_ih, b_hh."""
    tensors = [t if t is None or t.is_contiguous() else t.contiguous() for t in (x, h, c, *weights)]
    h_out, c_out = rows_like(h), None if c is None else rows_like(c)
    addresses = [0 if t is None else t.data_ptr() or at(t) for t in (*tensors, h_out, c_out)]
    _native.lib.cell_step(
        CELLS[cell].code, DTYPES[x.dtype], torch.get_num_threads(), *x.shape, h.shape[1], cap, *addresses
    )
    return h_out, c_out
