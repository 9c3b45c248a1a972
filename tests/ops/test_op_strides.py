"""Every registered op on arguments that do not lie row by row: the results of row-major copies, and fakes that know their strides."""

import pytest
import torch
from layouts import LAYOUTS, place, plain, row_major
from torch._subclasses import FakeTensorMode

from stable_rnn import _native

ops = torch.ops.stable_rnn
PLANS = {"recurrent": (0, 0, -1.0), "windowed": (1, 2, -1.0), "chunked": (3, 2, -1.0), "verified": (3, 2, 1e-6)}
RECURRENCES = ["recurrence", "recurrence_backward", "windowed_backward"]
CELLS = ["rnn_tanh", "rnn_relu", "lstm", "projected", "gru"]
BACKENDS = ["reference"] + (["cpu"] if _native.lib else [])
SIZES = {"several": (5, 3, 4), "one": (5, 1, 1), "one_step": (1, 1, 4)}  # T, B, H
CHECKS = ("test_schema", "test_faketensor")
TRACED = [name for name in LAYOUTS if name != "negative"]  # of which fake tensors know nothing
pytestmark = pytest.mark.filterwarnings("ignore:stable_rnn runs its slow reference")


def recurrence(name, cell, plan, size, backend):
    """A call of one of RECURRENCES: the op, its tensors, its other arguments."""
    steps, batch, hidden = SIZES[size]
    lstm = cell in ("lstm", "projected")
    gates = 4 if lstm else 3 if cell == "gru" else 1
    n, columns, out = steps * batch, hidden * gates, 2 if cell == "projected" else hidden
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    xp, w_hh, w_hr = rand(n, columns), rand(columns, out), rand(out, hidden) if cell == "projected" else None
    h0, c0 = rand(batch, out), rand(batch, hidden) if lstm else None
    bias, before = (rand(hidden), h0) if cell == "gru" else (None, None)
    cap = 0.9 if cell in ("lstm", "gru") else 1.0
    numbers = ("lstm" if lstm else cell, steps, batch, *PLANS[plan], 4, "auto", False, cap, backend)
    if name == "recurrence":
        return ops.recurrence.default, (xp, w_hh, w_hr, bias, h0, c0, None, None, None), (*numbers, True)
    y, _, _, gates, cells, _ = ops.recurrence(xp, w_hh, w_hr, bias, h0, c0, None, None, None, *numbers, True)
    grads = rand(n, out), rand(batch, out), rand(batch, hidden)
    if name == "recurrence_backward":
        return (
            ops.recurrence_backward.default,
            (*grads, y, gates, cells, w_hh, w_hr, before, c0, None, None, None),
            numbers,
        )
    return ops.windowed_backward.default, (*grads, xp, w_hh, w_hr, bias, h0, c0, None, None, None), numbers


def calls(name, backend):
    """Every cell, plan and size of an op."""
    for cell in CELLS:
        for plan in ["windowed"] if name == "windowed_backward" else PLANS:
            for size in SIZES:
                yield recurrence(name, cell, plan, size, backend)


def spectral(name, dtype=torch.float32):
    """Calls of a spectral op: the op, its tensors (matrices in the first place), its other arguments."""
    g = torch.Generator().manual_seed(0)
    for shape in ((6, 5), (1, 5), (6, 1), (1, 1)):
        if name == "top_singular":
            yield ops.top_singular.default, (torch.randn(shape, generator=g).to(dtype),), ()
            yield ops.top_singular.default, (torch.randn(3, *shape, generator=g).to(dtype),), ()
            yield ops.top_singular.default, (torch.randn(3, 2, *shape, generator=g).to(dtype),), ()
        else:
            wide = torch.promote_types(dtype, torch.float32)
            matrices, blocks = (
                torch.randn(shape, generator=g).to(dtype),
                torch.randn(shape[1], min(shape), generator=g).to(wide),
            )
            yield (
                (lambda W, X, *rest: (*ops.spectral_step_([W], [X], *rest), W, X)),
                (matrices, blocks),
                ([0.5], 1, False, 8, 3),
            )


def test_every_op_is_tried():
    found = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("stable_rnn::")}
    assert found == {*RECURRENCES, "top_singular", "spectral_step_"}


def same(found, expected, backend):
    for a, b in zip(found, expected, strict=True):
        assert row_major(a)
        if backend == "cpu":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=1e-5
            )  # float32: library products sum other strides in another order


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RECURRENCES)
def test_recurrences(name, backend, layout):
    """One argument at a time, and all of them."""
    for op, tensors, rest in calls(name, backend):
        for which in (*range(len(tensors)), None):
            if which is not None and tensors[which] is None:
                continue
            laid = [place(t, layout) if which in (i, None) else t for i, t in enumerate(tensors)]
            same(op(*laid, *rest), op(*map(plain, laid), *rest), backend)


@pytest.mark.parametrize("layout", TRACED)
@pytest.mark.parametrize("name", RECURRENCES)
def test_fakes_of_recurrences(name, layout):
    """Shape, strides, dtype and device of every output, from arguments in the same places of memory."""
    for backend in BACKENDS:
        for op, tensors, rest in calls(name, backend):
            laid = [place(t, layout) for t in tensors]
            real = op(*laid, *rest)
            with FakeTensorMode() as mode:
                fake = op(*(None if t is None else mode.from_tensor(t) for t in laid), *rest)
            for a, b in zip(real, fake, strict=True):
                assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@pytest.mark.parametrize("layout", TRACED)
@pytest.mark.parametrize("name", RECURRENCES)
def test_opcheck_of_recurrences(name, layout):
    """For windows only on the compiled kernels: opcheck cannot look into torch.func.vjp, by which the reference differentiates them."""
    backend = BACKENDS[-1]
    if name == "windowed_backward" and backend == "reference":
        return
    for cell in CELLS:
        for plan in ["windowed"] if name == "windowed_backward" else PLANS:
            op, tensors, rest = recurrence(name, cell, plan, "one" if layout == "odd_ones" else "several", backend)
            torch.library.opcheck(op, (*(place(t, layout) for t in tensors), *rest), test_utils=CHECKS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["top_singular", "spectral_step_"])
def test_spectral_ops(name, layout):
    """Matrices in any layout that can be written; what is written comes back to where they lie."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for op, (W, *blocks), rest in spectral(name, dtype):
            laid = place(W, layout)
            copies = [plain(laid), *map(plain, blocks)]
            if name == "spectral_step_" and laid.is_neg():
                with pytest.raises(RuntimeError, match="negation"):
                    op(laid, *blocks, *rest)
                continue
            if name == "spectral_step_" and layout == "expanded" and W.shape[0] > 1:
                with pytest.raises(ValueError, match=r"matrices\[0\] overlaps itself"):
                    op(laid, *blocks, *rest)
                continue
            found, expected = op(laid, *blocks, *rest), op(*copies, *rest)
            assert all(map(row_major, found if name == "top_singular" else found[:2]))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", TRACED)
def test_opcheck_of_spectral_ops(layout):
    for op, (W,), _ in spectral("top_singular"):
        torch.library.opcheck(op, (place(W, layout),), test_utils=CHECKS)
    for _, (W, X), rest in spectral("spectral_step_"):
        if layout != "expanded":
            torch.library.opcheck(ops.spectral_step_.default, ([place(W, layout)], [X], *rest), test_utils=CHECKS)


def test_blocks_in_every_layout():
    """By the compiled code or by the reference: the same projection."""
    for layout in TRACED:
        for op, (W, X), rest in spectral("spectral_step_"):
            laid = place(X, layout)
            if layout == "expanded" and X.shape[0] > 1:
                with pytest.raises(ValueError, match=r"blocks\[0\] overlaps itself"):
                    op(W, laid, *rest)
                continue
            copy, other = plain(laid), W.clone()
            expected = op(W, copy, *rest)
            for a, b in zip(op(other, laid, *rest)[:3], expected):
                torch.testing.assert_close(a, b)
            torch.testing.assert_close(laid @ laid.T, copy @ copy.T)  # the space that the block spans


@pytest.mark.parametrize(
    "matrices, blocks, bounds, word",
    [
        ([torch.ones(3, 4)], [torch.ones(3, 2)], [1.0], r"blocks\[0\] \(3, 2\)"),
        ([torch.ones(3)], [torch.ones(3, 2)], [1.0], r"\(3,\)"),
        ([torch.ones(3, 4)], [torch.ones(4, 2, device="meta")], [1.0], "meta"),
        ([torch.ones(3, 4)], [], [1.0], "got 0 and 1"),
        ([torch.ones(3, 4)], [torch.ones(4, 2)], [1.0, 1.0], "got 1 and 2"),
        (
            [torch.ones(3, 4), torch.ones(3, 4, device="meta")],
            [torch.ones(4, 2), torch.ones(4, 2, device="meta")],
            [1.0] * 2,
            "meta",
        ),
        ([torch.ones(8).as_strided((3, 4), (2, 1))], [torch.ones(4, 2)], [1.0], "overlaps itself"),
    ],
)
def test_what_the_spectral_step_cannot_write(matrices, blocks, bounds, word):
    with pytest.raises(ValueError, match=word):
        ops.spectral_step_(matrices, blocks, bounds, 1, False, 2, 0)


@pytest.mark.parametrize("name", RECURRENCES)
def test_tensors_on_the_meta_device_are_refused(name):
    """The dispatcher sends such a call to the fake, whose results nobody has computed."""
    for cell in CELLS:
        op, tensors, rest = recurrence(name, cell, "windowed", "several", BACKENDS[-1])
        for which, t in enumerate(tensors):
            if t is None or not t.numel() or name != "recurrence" and which == 2 and cell not in ("lstm", "projected"):
                continue
            with pytest.raises(ValueError, match="meta"):
                op(*(t.to("meta") if i == which else t for i, t in enumerate(tensors)), *rest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RECURRENCES)
def test_vmap(name, backend):
    """Over any dimension of any argument: the loop over samples."""
    for cell in CELLS:
        for plan in ["windowed"] if name == "windowed_backward" else ("recurrent", "chunked"):
            op, tensors, rest = recurrence(name, cell, plan, "several", backend)
            given = [i for i, t in enumerate(tensors) if t is not None and t.numel()]
            for dim in (0, 1, 2):
                for mapped in [given] if dim else [[i] for i in given] + [given]:
                    dims = tuple(min(dim, t.dim()) if i in mapped else None for i, t in enumerate(tensors))
                    many = [t if d is None else torch.stack([t, -t], d) for t, d in zip(tensors, dims)]
                    found = torch.func.vmap(lambda *ts, op=op, rest=rest: op(*ts, *rest), dims)(*many)
                    for v, sign in enumerate((1, -1)):
                        alone = op(*(sign * t if i in mapped else t for i, t in enumerate(tensors)), *rest)
                        for a, b in zip(found, alone, strict=True):
                            torch.testing.assert_close(a[v], b, rtol=1e-5, atol=1e-5)  # float32 sums in another order
