"""`spectral_project_`: what a certified call guarantees on hard spectra, and what uncertified steps keep up in a training loop."""

import copy
import pickle

import pytest
import torch
from spectra import KINDS, norm, projected, spectrum, with_spectrum

from stable_rnn.functional import (
    SpectralState,
    row_project_,
    spectral_norm_bound,
    spectral_project_,
    spectral_projection,
)

BOUND = 0.99
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
METHODS = ("clip", "scale")


def inside(W, bound):
    return norm(W) <= bound * (1 + 1e-6) and float(spectral_norm_bound(W)) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_certified(kind, method, dtype):
    for shape in ((1, 1), (1, 9), (16, 17), (33, 33), (64, 100), (200, 31)):
        W = with_spectrum(spectrum(kind, min(shape), BOUND), *shape).to(dtype)
        before = W.clone()
        bound = spectral_project_(W, BOUND, method)
        assert inside(W, BOUND) and bound.dtype == torch.float64 and norm(W) <= bound <= BOUND
        if norm(before) <= BOUND:  # rounding took it inside
            assert torch.equal(W, before)
            continue
        assert norm(W) >= 0.98 * BOUND
        # The target lies one eps inside (and 1e-8), which every outside singular value follows; each entry is then rounded.
        want, eps = projected(before, BOUND, method), torch.finfo(dtype).eps
        assert (W.double() - want).norm() <= (1.01 * eps + eps / 2 + 1e-7) * want.norm() + 3e-4 * (
            before.double() - want
        ).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_inside_is_untouched(method, dtype):
    for values in (
        torch.full((20,), 1 - 1e-3),
        torch.linspace(1 - 1e-3, 0, 20),
        torch.linspace(0.5, 0, 20),
        torch.zeros(20),
    ):
        W = with_spectrum(values * BOUND, 24, 20).to(dtype)
        before, bound = W.clone(), max(BOUND, norm(W) / (1 - 1e-3))  # rounding to storage moves the norm
        for certify in (True, False):
            spectral_project_(W, bound, method, certify)
            assert torch.equal(W, before)


@pytest.mark.parametrize("method", METHODS)
def test_projecting_again_changes_nothing(method):
    for kind in KINDS:
        W = with_spectrum(spectrum(kind, 20, BOUND), 20, 30).float()
        spectral_project_(W, BOUND, method)
        before = W.clone()
        spectral_project_(W, BOUND, method)
        assert torch.equal(W, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "dtype, size",
    [
        (torch.float32, 1e30),
        (torch.float32, 1e36),
        (torch.float32, 1e-40),
        (torch.float64, 1e200),
        (torch.float64, 1e305),
        (torch.float64, 1e-310),
        (torch.bfloat16, 1e30),
    ],
)
def test_any_size_of_weights(dtype, size, method):
    for kind in ("flat", "one far out", "rank 1"):
        W = with_spectrum(spectrum(kind, 12, 1.0), 12, 14).mul(size).to(dtype)
        relative = W.clone()
        spectral_project_(W, BOUND, method)
        assert inside(W, BOUND) and (norm(W) >= 0.98 * BOUND or size < 1)
        spectral_project_(relative, BOUND * size, method)
        assert float(spectral_norm_bound(relative)) <= BOUND * size


def test_extreme_bounds():
    for bound in (1e-300, 5e-324, 1e300):
        for size in (1e-300, 1.0, 1e300):
            W = torch.eye(3, dtype=torch.float64) * size
            spectral_project_(W, bound)
            assert float(spectral_norm_bound(W)) <= bound


def test_rank_is_kept():
    W = torch.outer(torch.arange(1.0, 9), torch.ones(6)).double() * 1e25
    spectral_project_(W, BOUND)
    s = torch.linalg.svdvals(W)
    assert s[0] >= 0.98 * BOUND and s[1] <= 1e-12


def test_many_matrices_and_bounds():
    shapes, bounds = [(5, 5), (40, 33), (1, 7), (0, 4), (64, 20), (20, 20)], [0.5, 0.9, 2.0, 1.0, 0.1, 100.0]
    for certify in (True, False):
        for given in (bounds, torch.tensor(bounds, dtype=torch.float64)):
            Ws = [torch.randn(s) for s in shapes]
            last, alone = Ws[-1].clone(), [W.clone() for W in Ws]
            norms = spectral_project_(iter(Ws), given, certify=certify)
            assert norms.shape == (6,) and torch.equal(Ws[-1], last)
            for W, one, b in zip(Ws, alone, bounds):
                if certify:
                    spectral_project_(one, b)
                    assert torch.equal(W, one) and inside(W, b)
    assert spectral_project_([], 1.0).shape == (0,)
    assert spectral_project_([], 1.0, certify=False).shape == (0,)


@pytest.mark.parametrize("certify", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_views_are_written_through(dtype, certify):
    stacked = torch.nn.Parameter(torch.randn(4 * 12, 12, dtype=dtype))
    copies = [W.clone() for W in stacked.detach().chunk(4)]
    gates = list(stacked.chunk(4))  # views that require grad
    spectral_project_(gates[1:], BOUND, certify=certify)
    spectral_project_(copies[1:], BOUND, certify=certify)
    assert torch.equal(stacked.detach(), torch.cat(copies)) and stacked.grad is None and stacked.requires_grad
    big = torch.randn(40, 50, dtype=dtype)
    for view in (big[3:20, 5:17], big[::2, ::3], big.T[2:9, 4:30]):
        outside, dense = big.clone(), view.clone()
        spectral_project_(view, BOUND, certify=certify)
        spectral_project_(dense, BOUND, certify=certify)
        assert torch.equal(view, dense)
        view.zero_()
        assert int((big != outside).sum()) <= view.numel()  # nothing beside the view


def test_a_blind_warm_block():
    """A block that has converged to other directions, and a new one that grew to 1.3: a certified call must see it."""
    k = 40
    W = with_spectrum(torch.linspace(0.9, 0.1, k), k, k).float()
    state = SpectralState()
    for _ in range(5):
        spectral_project_(W, BOUND, certify=False, state=state)
    new = torch.linalg.svd(W.double()).Vh[-1]  # orthogonal to the block
    W += 1.2 * torch.outer(torch.linalg.svd(W.double()).U[:, -1], new).float()
    assert norm(W) > 1.29
    spectral_project_(W, BOUND, state=state)
    assert inside(W, BOUND)


def update(kind, n, generator, size):
    """An endless series of n x n updates."""
    fixed = torch.randn(n, n, generator=generator, dtype=torch.float64)
    fixed = torch.outer(fixed[0], fixed[1]) if kind == "one direction" else fixed
    while True:
        D = torch.randn(n, n, generator=generator, dtype=torch.float64) if kind == "noise" else fixed
        yield (D * (size / torch.linalg.matrix_norm(D, 2))).float()


@pytest.mark.parametrize("kind", ["noise", "steady", "one direction"])
@pytest.mark.parametrize("start", ["uniform", "orthogonal"])
def test_a_training_loop_stays_close(start, kind):
    """Each update adds at most its norm to the norm (Weyl), and at the latest every 16th call takes all excess away where the block is
    full; where it is not, it holds every direction that is outside but for new ones, which it finds within a few calls."""
    n, size = 64, 2e-3
    W = (
        (torch.rand(n, n) * 2 - 1) * 1.5 / n**0.5
        if start == "uniform"
        else torch.linalg.qr(torch.randn(n, n)).Q.contiguous()
    )
    state = SpectralState()
    spectral_project_(W, BOUND, state=state)
    updates, worst = update(kind, n, torch.Generator().manual_seed(1), size), 0.0
    for step in range(80):
        W += next(updates)
        spectral_project_(W, BOUND, certify=False, state=state)
        worst = max(worst, norm(W) - BOUND) if step % 4 == 3 else worst
    assert worst <= 16 * size + 1e-5
    spectral_project_(W, BOUND, state=state)
    assert inside(W, BOUND)


def test_every_direction_growing():
    """The worst case: all singular values at the bound, all growing by the whole norm of the update."""
    W = torch.linalg.qr(torch.randn(64, 64)).Q.contiguous() * BOUND
    step, state = W * 1e-3, SpectralState()
    for _ in range(40):
        W += step
        spectral_project_(W, BOUND, certify=False, state=state)
        assert norm(W) <= BOUND * (1 + 16 * 1.001e-3)


def test_a_cold_step_on_a_flat_spectrum():
    W = with_spectrum(torch.full((50,), 7.0), 50, 60).float()
    spectral_project_(W, BOUND, certify=False)
    assert norm(W) <= BOUND * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uncertified_clip_is_the_projection_where_a_block_is_outside(dtype):
    for shape in ((60, 60), (90, 40), (40, 90), (12, 14)):
        values = torch.cat([torch.linspace(2, 1.2, 6), torch.linspace(0.5, 0, min(shape) - 6)])
        W = with_spectrum(values * BOUND, *shape).to(dtype)
        want = projected(W, BOUND, "clip")
        state = SpectralState()
        for _ in range(2):
            estimate = spectral_project_(W, BOUND, certify=False, state=state)
        assert (W.double() - want).norm() <= 1e-3 * want.norm()
        assert estimate <= BOUND * (1 + 1e-6)


def test_state_follows_its_matrices():
    state = SpectralState()
    Ws = [torch.randn(20, 30), torch.randn(8, 8)]
    spectral_project_(Ws, BOUND, certify=False, state=state)
    blocks = [b.clone() for b in state.blocks]
    assert [tuple(b.shape) for b in blocks] == [(30, 16), (8, 8)]
    spectral_project_([Ws[0], torch.randn(9, 5, dtype=torch.float64)], BOUND, state=state)
    assert state.blocks[1].shape == (5, 5) and state.blocks[1].dtype == torch.float64
    spectral_project_(Ws[:1], BOUND, state=state)
    assert len(state.blocks) == 1


def test_state_copies_and_repeats():
    """Copied or pickled, the state goes on bitwise alike: no hidden generator."""
    W, state = torch.randn(30, 30), SpectralState(seed=3)
    spectral_project_(W, BOUND, certify=False, state=state)
    results = []
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), state):
        V = W.clone()
        for _ in range(3):
            V += 0.01 * torch.eye(30)
            spectral_project_(V, BOUND, certify=False, state=other)
        results.append(V)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("certify", [True, False])
def test_errors_write_nothing(certify):
    good = torch.randn(6, 6) * 5
    before = good.clone()
    nan, inf = torch.randn(4, 4), torch.randn(4, 4).bfloat16()
    nan[3, 3], inf[0, 1] = float("nan"), float("inf")
    cases = [
        (([good, nan], 1.0), ValueError, "NaN"),
        (([good, inf], 1.0), ValueError, "infinite"),
        (([good], 0.0), ValueError, "0.0"),
        (([good], -1), ValueError, "-1"),
        (([good], float("inf")), ValueError, "inf"),
        (([good], float("nan")), ValueError, "nan"),
        (([good, good], [1.0]), ValueError, "per matrix"),
        (([good], 1.0, "clop"), ValueError, "clop"),
        (([good, torch.ones(2, 2, dtype=torch.int32)], 1.0), TypeError, "int32"),
        (([good, torch.ones(3)], 1.0), ValueError, r"\(3,\)"),
        (([good, torch.ones(2, 3, 4)], 1.0), ValueError, r"\(2, 3, 4\)"),
        (([good, [[1.0]]], 1.0), TypeError, "list"),
    ]
    for arguments, error, word in cases:
        with pytest.raises(error, match=word):
            spectral_project_(*arguments, certify=certify)
        assert torch.equal(good, before)
    with pytest.raises(ValueError, match="kept"):
        SpectralState(kept=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_global_settings_change_nothing(backend, monkeypatch):
    """torch's default device and dtype, and autocast."""
    monkeypatch.setenv("STABLE_RNN_BACKEND", backend)
    W = torch.randn(40, 40)

    def results():
        found = [spectral_norm_bound(W), spectral_projection(W, 0.9)]
        for certify in (True, False):
            V = W.clone()
            found += [spectral_project_(V, 0.9, certify=certify), V]
        return [*found, row_project_(W.clone(), 0.9)]

    want = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = results()
    before = torch.get_default_dtype()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        defaults = results()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    for other in (autocast, defaults):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(want, other))


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize(
    "view", [lambda W: W, lambda W: W[:16], lambda W: W.detach(), lambda W: W.mT, lambda W: W[:, ::2]]
)
def test_autograd_learns_of_the_write(view, certify):
    W = torch.nn.Parameter(torch.randn(32, 32) * 10)
    x = torch.randn(4, 32, requires_grad=True)
    y = (x @ W).sum()  # the gradient of x needs W as it was
    before = W._version
    spectral_project_([view(W)], 1.0, certify=certify)
    assert W._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("certify", [False, True])
def test_inference_tensors(certify):
    with torch.inference_mode():
        W = torch.randn(16, 16) * 10
        spectral_project_(W, 1.0, certify=certify)
    assert torch.linalg.matrix_norm(W, 2) < 1.1


@pytest.mark.parametrize(
    "project",
    [
        spectral_project_,
        spectral_projection,
        row_project_,
        lambda W, bound: spectral_project_([W], [bound]),
        lambda W, bound: row_project_(W, [bound] * 4),
    ],
)
@pytest.mark.parametrize(
    "bound, error, text",
    [
        ("1.0", TypeError, "bound must be a number or several, got '1.0'"),
        (True, TypeError, "bound must be a number or several, got True"),
        (torch.tensor(True), TypeError, "bound must be a number or several, got True"),
        (torch.tensor(1.0, requires_grad=True), ValueError, "bound requires grad"),
    ],
)
def test_bounds_that_are_no_constant_numbers(project, bound, error, text):
    W = torch.randn(4, 4) * 10
    before = W.clone()
    with pytest.raises(error, match=text):
        project(W, bound)
    assert torch.equal(W, before)


def test_a_state_of_another_kind():
    W = torch.randn(4, 4) * 10
    before = W.clone()
    with pytest.raises(TypeError, match="state must be a SpectralState or None, got dict"):
        spectral_project_(W, 1.0, state={})
    assert torch.equal(W, before)


@pytest.mark.parametrize(
    "W, error, text",
    [
        (None, TypeError, "W must be a tensor or several, got NoneType"),
        (3.0, TypeError, "W must be a tensor or several, got float"),
        (torch.ones(3, 3, device="meta"), ValueError, "W is on the meta device"),
        ([torch.ones(3, 3, device="meta")], ValueError, r"W\[0\] is on the meta device"),
        (torch.ones(3, 3).to_sparse(), TypeError, "W must be a dense tensor, got the layout torch.sparse_coo"),
        (torch.ones(3).expand(3, 3), ValueError, "W overlaps itself"),
    ],
)
@pytest.mark.parametrize("certify", [True, False])
def test_what_cannot_be_projected(W, error, text, certify):
    with pytest.raises(error, match=text):
        spectral_project_(W, 1.0, certify=certify)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ((1.5,), TypeError, "kept must be an int, got 1.5"),
        ((True,), TypeError, "kept must be an int, got True"),
        (("a",), TypeError, "kept must be an int, got 'a'"),
        ((2, 0), ValueError, "fresh must be at least 1, got 0"),
        ((2, 2, "a"), TypeError, "seed must be an int, got 'a'"),
        ((2, 2, 2**70), ValueError, "seed must lie between"),
    ],
)
def test_states_that_cannot_be(arguments, error, text):
    with pytest.raises(error, match=text):
        SpectralState(*arguments)
