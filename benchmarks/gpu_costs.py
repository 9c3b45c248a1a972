"""A part of `benchmarks.gpu_targets`: the time of a step of the recurrence kernels by themselves, for `benchmarks.fit_costs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch

from stable_rnn import _native
from stable_rnn.cells import CELLS
from stable_rnn.ops import cuda_device
from stable_rnn.ops.recurrence import cuda, native
from stable_rnn.ops.recurrence.problem import Inputs, Problem, backward_inputs

from .gpu_table import Table
from .speed import contestants
from .speed.cases import DTYPES
from .speed.measure import tf32
from .timing import race

STEPS, ELEMENTS = 1024, 1 << 26  # of xp: at most; lanes that are many and large run fewer steps
SECONDS = 0.1  # of one shape, both lengths
Shape = tuple[str, str, int, int]  # cell, dtype, hidden size, lanes

# One lane and many, every arithmetic and kind of cell, sizes for one block, a cluster and the grid: each constant counts in some.
SHAPES: list[Shape] = [
    *(("lstm", "float16", hidden, lanes) for hidden, lanes in product((64, 128, 256, 512, 1024), (1, 16, 512, 8192))),
    *(
        ("lstm", dtype, hidden, lanes)
        for dtype, hidden, lanes in product(("float32", "tf32"), (64, 256), (1, 64, 4096))
    ),
    *(("gru", "float16", hidden, lanes) for hidden, lanes in product((128, 512), (1, 512))),
    *(("rnn_tanh", "float16", hidden, lanes) for hidden, lanes in product((64, 256, 1024), (1, 512, 8192))),
    *(("rnn_tanh", "float32", hidden, lanes) for hidden, lanes in product((64, 256), (1, 512))),
]


def costs(table: Table) -> None:
    """Time of a step of the CUDA kernels alone, for benchmarks.fit_costs: no targets."""
    for shape in [("lstm", "float32", 8, 3)] if table.tiny else SHAPES:
        for backward in (False, True):
            cell, dtype, hidden, lanes = shape
            name = f"step of {cell} {dtype} H{hidden}, {lanes} lanes, {'backward' if backward else 'forward'}"
            try:
                measure(table, name, backward, *shape)
            except Exception as reason:  # no kernel for it, no memory
                table.note(name, note=f"not measured: {contestants.in_a_line(reason)}")
    tf32(False)


@torch.no_grad()
def measure(table: Table, name: str, backward: bool, cell: str, dtype: str, hidden: int, lanes: int) -> None:
    """The difference of a run of 2 T steps and one of T: launches and the packing of the weights are in both."""
    tf32(dtype == "tf32")
    steps = max(8, min(STEPS, ELEMENTS // (2 * lanes * CELLS[cell].gates * hidden)))
    runs = dict(zip((steps, 2 * steps), kernels(table.device, backward, cell, dtype, hidden, lanes, steps)))
    finite = all(bool(run().isfinite().all()) for run in runs.values())
    times = race({str(t): run for t, run in runs.items()}, min(SECONDS, table.limits.seconds), device=table.device)
    seconds = [times[str(t)].median for t in runs]
    step = (seconds[1] - seconds[0]) / steps
    facts = dict(
        backward=backward, cell=cell, dtype=dtype, hidden=hidden, lanes=lanes, steps=list(runs), seconds=seconds
    )
    table.note(
        name,
        value=step * 1e6,
        unit="us",
        wrong=None if finite else "the result is not finite",
        costs=facts | (tiling_of(backward, cell, dtype, hidden, lanes) if table.device == "cuda" else {}),
    )


def kernels(
    device: str, backward: bool, cell: str, dtype: str, hidden: int, lanes: int, steps: int
) -> Iterator[Callable[[], torch.Tensor]]:
    """Calls of the kernel over T and over 2 T steps, each row of the batch one lane."""
    spec, kind, draw = CELLS[cell], DTYPES[dtype], torch.Generator().manual_seed(0)
    backend = cuda if device == "cuda" else native

    def made(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return ((torch.rand(shape, generator=draw) * 2 - 1) * scale).to(device, kind)

    w_hh, state = made(spec.gates * hidden, hidden, scale=hidden**-0.5), made(lanes, hidden)
    bias = made(hidden) if spec.hidden_bias is not None else None
    few = made(steps, spec.gates * hidden)  # the same inputs for every lane
    c0 = state if spec.has_cell else None
    for t in (steps, 2 * steps):
        xp = few.repeat(t // steps, 1).repeat_interleave(lanes, 0)
        p = Problem(cell, t, lanes).whole()
        inputs = Inputs(xp, w_hh, None, bias, state, c0, None, None)
        if not backward:
            yield lambda inputs=inputs, p=p: backend.forward(inputs, p, save=False).y
            continue
        out = backend.forward(inputs, p)
        given = backward_inputs(out.y, state, c0, out.y, out.saved, out.cells, inputs, p)
        yield lambda given=given, p=p: backend.backward(given, p).dz


def tiling_of(backward: bool, cell: str, dtype: str, hidden: int, lanes: int) -> dict:
    """What the model needs to know, and of which kernels."""
    limits, code = cuda_device.limits(0)[0], cuda.code(torch.empty(0, dtype=DTYPES[dtype]))
    found = cuda.tiling(limits, backward, cell, code, hidden, lanes)
    return {
        "code": code,
        "limits": list(limits),
        "clock": cuda_device.clock(0),
        "tiling": found,
        "interface": _native.INTERFACE,
    }
