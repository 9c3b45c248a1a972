"""What backends say of lanes' borders: decay, and the ends of rows that start anywhere (`ends`, `adjoint_ends`)."""

import pytest
import torch
from executor import build

from stable_rnn import _native
from stable_rnn.cells import CELLS
from stable_rnn.ops.recurrence import cuda, native, reference
from stable_rnn.ops.recurrence.problem import Inputs, Problem, backward_inputs

STEPS, BATCH, HIDDEN, CHUNK = 11, 3, 5, 4  # the last chunk has three times
LANES = -(-STEPS // CHUNK)


@pytest.fixture(
    params=[
        (reference, torch.float64),
        (reference, torch.float32),
        (reference, torch.bfloat16),
        pytest.param((native, torch.float32), marks=pytest.mark.skipif(not _native.lib, reason=f"{_native.reason}")),
        pytest.param((native, torch.bfloat16), marks=pytest.mark.skipif(not _native.lib, reason=f"{_native.reason}")),
        pytest.param(
            (cuda, torch.float32), marks=pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")
        ),
    ],
    ids=lambda p: f"{p[0].__name__.split('.')[-1]}-{p[1]}",
)
def backend(request, monkeypatch):
    """(module, dtype); the CUDA kernels on CPU tensors, in the block executor."""
    if request.param[0] is cuda:
        build.on_cpu_tensors(monkeypatch)
    return request.param


def given(cell, dtype, steps=STEPS, batch=BATCH):
    """The inputs of a padded problem, the adjoints of its outputs, and the problem, in chunks."""
    spec, g = CELLS[cell], torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    sums = spec.gates * HIDDEN
    h0, c0 = rand(batch, HIDDEN), rand(batch, HIDDEN) if spec.has_cell else None
    bias = None if spec.hidden_bias is None else rand(HIDDEN)
    inputs = Inputs(rand(steps * batch, sums), rand(sums, HIDDEN) / 2, None, bias, h0, c0, None, None)
    grads = rand(steps * batch, HIDDEN), rand(batch, HIDDEN), None if c0 is None else rand(batch, HIDDEN)
    cap = 1.0 if spec.forgets is None else 0.75
    return inputs, grads, Problem(cell, steps, batch, CHUNK, 2, cap=cap)


def lanes_as_rows(p, batch):
    """The lanes of a padded problem as rows: the problem of one chunk, base, lengths; lane by lane, as ids count."""
    first = torch.arange(p.lanes()) * p.stride
    base = (first[:, None] * batch + torch.arange(batch)).flatten()
    return p.whole()._replace(steps=p.stride), base, (p.steps - first).clamp(max=p.stride).repeat_interleave(batch)


def runs(module, inputs, grads, p):
    """Forward, backward, and what backward read."""
    out = module.forward(inputs, p, borders=True)
    kept = backward_inputs(*grads, out.y, out.saved, out.cells, inputs, p)
    return out, module.backward(kept, p, borders=True), kept


@pytest.mark.parametrize("cell", CELLS)
def test_lanes_end_where_their_rows_do(cell, backend):
    """Rows of `ends`, with the starts of lanes, give the bits of the lanes' own ends; one that has no time, its start."""
    module, dtype = backend
    inputs, grads, p = given(cell, dtype)
    out, back, kept = runs(module, inputs, grads, p)
    rows, base, lengths = lanes_as_rows(p, BATCH)
    lengths = torch.cat([lengths, torch.tensor([0])])
    base = torch.cat([base, torch.tensor([0])])
    extra = lambda t: torch.cat([t, t[:1] + 1]) if t.numel() else None  # noqa: E731
    ends = module.ends(inputs._replace(base=base, lengths=lengths), rows, extra(out.h_start), extra(out.c_start))
    starts = extra(back.dh_start), extra(back.dc_start)
    before = lambda x, x0: torch.cat([x0, x[base[BATCH:-1] - BATCH].to(dtype), x0[:1]])  # noqa: E731
    of_rows = dict(
        base=base,
        lengths=lengths,
        h0=None if kept.h0 is None else before(out.y, kept.h0),
        c0=None if kept.c0 is None else before(out.cells, kept.c0),
    )
    adjoint_ends = module.adjoint_ends(kept._replace(**of_rows, dh_n=None, dc_n=None), rows, *starts)
    exact, close = dict(rtol=0, atol=0), None
    if module is reference:
        exact = dict(
            rtol=1e-6, atol=1e-6
        )  # its float32 products sum in an order that depends on the number of rows: 1e-7 a rounding
    if dtype == torch.bfloat16:
        close = dict(
            rtol=2**-7, atol=2**-9
        )  # a row's c before time 0 is stored in 8 bits: a unit and a half, also of values near 0.25
    for found, want, start in (
        (ends[0], out.h_end, out.h_start),
        (ends[1], out.c_end, out.c_start),
        (adjoint_ends[0], back.dh_end, back.dh_start),
        (adjoint_ends[1], back.dc_end, back.dc_start),
    ):
        if not CELLS[cell].has_cell and found is not ends[0] and found is not adjoint_ends[0]:
            assert not found.numel()
            continue
        assert torch.equal(found[-1], start[0] + 1)
        torch.testing.assert_close(found[:-1], want, **(close or exact if found is adjoint_ends[0] else exact))


@pytest.mark.parametrize("cell", CELLS)
def test_no_gradient_of_the_outputs_is_a_gradient_of_zeros(cell, backend):
    module, dtype = backend
    inputs, grads, p = given(cell, dtype)
    _, back, kept = runs(module, inputs, grads, p)
    rows, base, lengths = lanes_as_rows(p, BATCH)
    starts = back.dh_start, back.dc_start if back.dc_start.numel() else None
    repeated = {k: None if x is None else x.repeat(LANES, 1) for k, x in (("h0", kept.h0), ("c0", kept.c0))}
    kept = kept._replace(base=base, lengths=lengths, **repeated)
    found = module.adjoint_ends(kept._replace(dy=None), rows, *starts)
    want = module.adjoint_ends(kept._replace(dy=torch.zeros_like(grads[0])), rows, *starts)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.forgets is not None])
def test_decay_is_the_derivative_of_an_end_by_its_start(cell, backend):
    """Where no unit reads another, on the cells alone: the decay is how a lane's c (else h) moves with its start, both ways in time."""
    module, dtype = backend
    inputs, grads, p = given(cell, torch.float64)
    inputs = inputs._replace(w_hh=torch.zeros_like(inputs.w_hh))
    out, back, kept = runs(reference, inputs, grads, p)
    rows, base, lengths = lanes_as_rows(p, BATCH)
    of_rows = inputs._replace(base=base, lengths=lengths)
    state = out.c_start if CELLS[cell].has_cell else out.h_start

    def end(x):
        start = (out.h_start, x) if CELLS[cell].has_cell else (x, None)
        return reference.ends(of_rows, rows, *start)[CELLS[cell].has_cell].sum(0)

    moved = torch.func.jacrev(end)(state)  # (H, lanes, H): of the sum over lanes
    exact = moved.diagonal(dim1=0, dim2=2)
    roundings = dict(rtol=1e-14, atol=0)  # float64: the same factors below 1, one a step, multiplied in another order
    torch.testing.assert_close(out.decay, exact, **roundings)
    torch.testing.assert_close(back.decay, exact, **roundings)

    cast = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    inputs, grads = Inputs(*map(cast, inputs)), tuple(map(cast, grads))
    out, back, _ = runs(module, inputs, grads, p)
    close = dict(rtol=CHUNK * 2 * torch.finfo(dtype).eps, atol=0) if dtype != torch.float64 else {}
    torch.testing.assert_close(back.decay.double(), out.decay.double(), **close)
    close = dict(rtol=64 * torch.finfo(dtype).eps, atol=0)  # pre-activations of up to 4 rounded, 4 gates
    torch.testing.assert_close(out.decay.double(), exact, **close)


@pytest.mark.parametrize("cell", CELLS)
def test_decay_of_lanes_run_again(cell, backend):
    """The decay of lanes that run again is theirs alone, and 1 where a lane writes nothing; empty without a forget gate. The bits are the
    same, but for the reference, whose products are torch's."""
    module, dtype = backend
    inputs, grads, p = given(cell, dtype)
    lengths = torch.tensor([STEPS, 0, 5])
    inputs = inputs._replace(lengths=lengths)
    out, back, kept = runs(module, inputs, grads, p)
    silent = (torch.arange(LANES)[:, None] * CHUNK >= lengths).flatten()
    width = 0 if CELLS[cell].forgets is None else HIDDEN
    assert out.decay.shape == back.decay.shape == (LANES * BATCH, width)
    assert (out.decay[silent] == 1).all() and (back.decay[silent] == 1).all()
    assert (out.decay[~silent] < 1).all() and (back.decay[~silent] < 1).all()
    ids = torch.tensor([2, 3, 6])
    start = [t[ids] if t.numel() else None for t in (out.h_start, out.c_start, back.dh_start, back.dc_start)]
    spoiled = lambda t: t.clone().index_fill_(0, ids, torch.nan)  # noqa: E731
    again = module.forward(
        inputs, p, borders=True, ids=ids, h_init=start[0], c_init=start[1], out=out._replace(decay=spoiled(out.decay))
    )
    close = dict(rtol=8 * torch.finfo(dtype).eps if module is reference else 0, atol=0)
    torch.testing.assert_close(again.decay, out.decay, **close)
    again = module.backward(
        kept, p, borders=True, ids=ids, dh_init=start[2], dc_init=start[3], out=back._replace(decay=spoiled(back.decay))
    )
    torch.testing.assert_close(again.decay, back.decay, **close)
    plain = module.forward(inputs, p)
    assert not plain.decay.numel() and torch.equal(plain.y, out.y) and torch.equal(plain.h_n, out.h_n)
