"""The memory of a training step on the CPU: what is saved lies over xp, dz over what was saved, and the next step takes the same memory,
where nobody else reads it again."""

import pytest
import torch

from stable_rnn import Chunked, StableGRU, StableLSTM, StableRNN, _native, use_plan
from stable_rnn.ops.recurrence import function, native

pytestmark = pytest.mark.skipif(_native.lib is None, reason=f"compiled module: {_native.reason}")

tells = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="this torch does not tell of hooks"
)
T, B, H = 300, 9, 128  # what an LSTM saves is large enough to be kept


@pytest.fixture(autouse=True)
def nothing_kept():
    native._scratch.spare = None
    yield
    native._scratch.spare = None


def made(kind=StableLSTM, **options):
    torch.manual_seed(1)
    return kind(20, H, stability=None, backend="cpu", **options), torch.randn(T, B, 20, requires_grad=True)


def gradients(y, m, x, **options):
    return torch.autograd.grad(y.square().sum(), [x, *m.parameters()], **options)


def same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def fresh(monkeypatch):
    """A function's results with memory of its own for everything."""

    def run(f):
        with monkeypatch.context() as patch:
            patch.setattr(function, "_keeps_graph", lambda: True)
            patch.setattr(native, "_reuse", lambda like, *shape: native._make(like, False, *shape))
            patch.setattr(native, "in_place", False)
            return f()

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, options", [(StableLSTM, {}), (StableLSTM, {"proj_size": 5}), (StableGRU, {}), (StableRNN, {})]
)
def test_bitwise_as_with_fresh_memory(kind, options, dtype, fresh):
    """Also with padding, resets, chunks that read a row twice, and sequences in the other direction."""
    m, x = made(kind, **options, bidirectional=True)
    m, x = m.to(dtype), x.detach().to(dtype).requires_grad_()
    lengths, resets = torch.randint(0, T + 1, (B,)), torch.rand(T, B) < 0.05

    def run(**given):
        y, _ = m(x, **given)
        return y, *gradients(y, m, x)

    for given in ({}, {"lengths": lengths}, {"lengths": torch.full((B,), T)}, {"resets": resets}):
        expected = fresh(lambda given=given: run(**given))
        for _ in range(2):
            same(run(**given), expected)
    with use_plan(m, Chunked(2, 5)):
        same(run(), fresh(run))


def test_a_graph_that_is_kept(fresh):
    m, x = made()
    expected = fresh(lambda: gradients(m(x)[0], m, x))
    y, _ = m(x)
    for kept in (True, True, False):
        same(gradients(y, m, x, retain_graph=kept), expected)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(y, m, x)


@tells
@pytest.mark.parametrize("kind", [StableLSTM, StableGRU])
def test_a_pass_that_an_error_ended_is_not_repeated(kind, fresh):
    """Torch keeps what was saved then, but dz may lie there: no gradients, instead of wrong ones."""
    m, x = made(kind)
    expected = fresh(lambda: gradients(m(x)[0], m, x))
    y, _ = m(x)
    nodes = [y.grad_fn]
    while not nodes[-1].name().startswith("FusedRecurrence"):
        nodes.append(nodes[-1].next_functions[0][0])
    hook = nodes[-1].register_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradients(y, m, x)
    hook.remove()
    with pytest.raises(RuntimeError, match="second time: the first pass, which an error"):
        gradients(y, m, x)
    same(gradients(m(x)[0], m, x), expected)

    y, _ = m(x)
    hook = y.register_hook(lambda _: 1 / 0)  # before anything was overwritten
    with pytest.raises(ZeroDivisionError):
        gradients(y, m, x)
    hook.remove()
    same(gradients(y, m, x), expected)


def test_graphs_side_by_side(fresh):
    """Memory that one graph has left is not another's, whatever the order."""
    m, x = made(num_layers=2)
    xs = [x.detach() * scale for scale in (1, 2, 3)]
    for each in xs:
        each.requires_grad_()
    expected = [fresh(lambda each=each: gradients(m(each)[0], m, each)) for each in xs]
    for order in ((0, 1, 2), (2, 0, 1)):
        ys = [m(each)[0] for each in xs]
        before = [y.clone() for y in ys]
        for i in order:
            same(gradients(ys[i], m, xs[i]), expected[i])
            again = m(xs[i])[0]  # takes what was left
            assert torch.equal(again, before[i])
        same(ys, before)


def test_what_hooks_hold_stays():
    """Hooks on saved tensors may keep what they are given: nothing is written there."""
    m, x = made()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y, _ = m(x)
    before = [t.detach().clone() for t in held]
    gradients(y, m, x)
    m(2 * x)
    same([t.detach() for t in held], before)
    assert native._scratch.spare is None


def test_an_input_projection_of_the_callers(monkeypatch):
    """Without an input product, xp is the caller's, and dz is a gradient."""
    monkeypatch.setattr(native, "_LARGE", 1)
    m, _ = made()
    xp, h = torch.randn(T * B, 4 * H, requires_grad=True), torch.zeros(B, H)
    p = function.Problem("lstm", T, B, backend="cpu")
    before = xp.detach().clone()
    y, *_ = function.layer(xp, None, None, m.weight_hh_l0, None, None, h, h, None, None, None, p)
    (found,) = torch.autograd.grad(y.sum(), xp)
    kept = found.clone()
    for _ in range(2):
        y, _ = m(torch.randn(T, B, 20))
        y.sum().backward()
    assert torch.equal(xp, before) and torch.equal(found, kept)


@tells
def test_the_next_step_takes_the_same_memory():
    """One piece a thread, of what the last backward pass has left, no larger than the limit, and no longer than the next step wants it."""
    m, x = made()
    for _ in range(3):
        m(x)[0].sum().backward()
        assert native._scratch.spare.nbytes == 4 * T * B * 4 * H
    place = native._scratch.spare.data_ptr()
    y, _ = m(x)
    assert native._scratch.spare is None
    y.sum().backward()
    assert native._scratch.spare.data_ptr() == place
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        m(x[:100].clone())  # would hold three times what it needs
    assert native._scratch.spare is None
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in held)


def test_the_limit(monkeypatch):
    m, x = made()
    monkeypatch.setattr(native, "_SPARE", 4 * T * B * 4 * H - 1)
    m(x)[0].sum().backward()
    assert native._scratch.spare is None


def test_nothing_is_made_for_outputs_without_a_gradient(monkeypatch):
    """Zeros as large as what is saved, for outputs of the Function that have none."""
    m, x = made()
    backward, seen = function.FusedRecurrence.backward, []

    def watched(ctx, *given):
        seen.append(given)
        return backward(ctx, *given)

    monkeypatch.setattr(function.FusedRecurrence, "backward", staticmethod(watched))
    for use in (lambda y, h, c: y, lambda y, h, c: h, lambda y, h, c: c):
        y, (h, c) = m(x)
        use(y, h, c).sum().backward()
        assert [t is None for t in seen.pop()].count(False) == 1
