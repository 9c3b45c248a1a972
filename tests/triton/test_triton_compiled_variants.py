"""What Triton compiles when the backend runs: a driver that stands for a GPU takes the launches, and nothing is launched."""

import pytest
import torch
import triton
from compiling import device, target
from triton.runtime.jit import JITFunction

from stable_rnn.cells import CELLS
from stable_rnn.ops.recurrence import triton as backend
from stable_rnn.ops.recurrence.problem import BackwardInputs, Inputs, Problem
from stable_rnn.ops.spectral import triton as spectral

ARCHES = [75, 80, 86, 90, 100, "gfx942"]


class Driver:
    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return ARCHES.index(self.arch)

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return target(self.arch)


@pytest.fixture(params=ARCHES)
def compiled(request, monkeypatch):
    """The launches of a test as (kernel, everything that a compiled kernel depends on, launch options)."""
    made = []

    def compile(self, key, signature, device, constexprs, options, attrs, warmup):
        made.append((self.fn.__name__, key, options))
        self.device_caches[device][0][key] = made[-1]
        return made[-1]

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(request.param))
    monkeypatch.setattr(JITFunction, "_do_compile", compile)
    monkeypatch.setattr(
        JITFunction, "__getitem__", lambda self, grid: lambda *a, **k: self.run(*a, grid=grid, warmup=True, **k)
    )
    monkeypatch.setattr(backend, "device_of", lambda x: device(request.param))
    return made


def run(cell, hidden, dtype, steps, batch, stride, warmup, resets=None):
    gates = CELLS[cell].gates
    p = Problem(cell, steps, batch, stride, warmup, cap=0.5).resolved()
    zeros = lambda *shape: torch.zeros(*shape, dtype=dtype)  # noqa: E731
    h, c = zeros(batch, hidden), zeros(batch, hidden) if cell == "lstm" else None
    bias, before = (zeros(hidden), h) if cell == "gru" else (None, None)
    w = zeros(gates * hidden, hidden)
    out = backend.forward(Inputs(zeros(steps * batch, gates * hidden), w, None, bias, h, c, None, None, resets), p)
    dy = zeros(steps * batch, hidden)
    backend.backward(BackwardInputs(dy, h, c, out.y, out.saved, out.cells, w, None, before, c, None, None, resets), p)


SHAPES = [(5, 3), (1, 1), (16, 16), (17, 1), (300, 2), (1, 64), (4096, 1)]


KERNELS = [("lstm", 64, torch.float16), ("rnn_tanh", 130, torch.float32), ("lstm", 500, torch.float16)]
KERNELS += [("gru", 64, torch.float16), ("gru", 500, torch.float16)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cell, hidden, dtype", KERNELS)
def test_neither_time_nor_batch_compiles_anything_anew(compiled, cell, hidden, dtype, masked):
    for steps, batch in SHAPES:
        for stride, warmup in ((0, 0), (4, 2), (16, 16)):
            resets = torch.zeros(steps * batch, dtype=torch.bool) if masked else None
            run(cell, hidden, dtype, steps, batch, stride, warmup, resets)
    names = [name for name, *_ in compiled]
    # a team of one program and one of several are different kernels
    assert sorted(set(names)) == ["backward", "forward"] and len(names) <= 4, names
    by_team = {(name, options.launch_cooperative_grid) for name, _, options in compiled}
    assert len(by_team) == len(names)


def test_spectral_shapes_compile_nothing_anew(compiled):
    for shapes, seed in ((((3, 5),), 1), (((16, 64), (700, 32)), 16), (((1, 1),), 2**40 + 7)):
        Ws = [torch.zeros(*shape) for shape in shapes]
        blocks = [torch.zeros(W.shape[1], min(16, *W.shape)) for W in Ws]
        for iterations in (1, 8):
            spectral.spectral_step(Ws, blocks, [1.0] * len(Ws), 2, False, iterations, seed)
    assert (
        len(compiled) == len({options.launch_cooperative_grid for *_, options in compiled}) == 2
    )  # a program a matrix, or several
