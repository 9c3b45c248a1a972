"""The Triton spectral step, interpreted or on a GPU: against the float64 projection, no worse than the reference."""

import pytest
import torch
from lane_cases import DEVICE
from spectra import norm, projected, with_spectrum

from stable_rnn.ops.recurrence import triton as recurrence
from stable_rnn.ops.spectral import reference
from stable_rnn.ops.spectral import triton as backend

DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
SHAPES = ((1, 9), (9, 1), (5, 3), (31, 33), (70, 20))


@pytest.fixture(params=[1, 6], ids=["alone", "team"])
def programs(request, monkeypatch):
    divide(request.param, monkeypatch)
    return request.param


def divide(count, monkeypatch):
    device_of = recurrence.device_of
    monkeypatch.setattr(recurrence, "device_of", lambda x: device_of(x)._replace(programs=count))


def block(W, k=16):
    return torch.randn(W.shape[1], min(k, *W.shape), device=DEVICE)


def gapped(m, n):
    """Few singular values outside 0.9, the others far inside: four iterations converge to a few 1e-4."""
    few = min(5, m, n)
    values = torch.cat([torch.linspace(2, 1.2, few), torch.linspace(0.2, 0, min(m, n) - few)])
    return with_spectrum(values, m, n).to(DEVICE)


@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [False, True])
def test_no_worse_than_the_reference(programs, scale, dtype, size):
    if size != 1 and (dtype == torch.float16 or programs > 1):
        return
    shapes = SHAPES if programs == size == 1 else SHAPES[-1:]
    Ws = [gapped(*shape).mul(size).to(dtype) for shape in shapes]
    bounds = [0.9 * size] * len(Ws)
    found, plain = [W.clone() for W in Ws], [W.clone() for W in Ws]
    blocks = [block(W) for W in Ws]
    norms, near = backend.spectral_step(found, blocks, bounds, 2, scale, 4, 7)
    reference.spectral_step(plain, [block(W) for W in Ws], bounds, 2, scale, 4, 7)
    for W, V, R, X, b, shape in zip(Ws, found, plain, blocks, bounds, shapes):
        want = projected(W, b, "scale" if scale else "clip")
        # float32 arithmetic: sums over a side, growing like a random walk; then the rounding of what is stored.
        rounding = 2.0**-24 * max(shape) ** 0.5 * W.double().norm() + torch.finfo(dtype).eps / 2 * want.norm()
        assert (V.double() - want).norm() <= 2 * (R.double() - want).norm() + rounding, shape
        gram = (
            X.double().T @ X.double()
        )  # orthonormal, but for columns dropped (zero) where W maps the block to fewer dimensions
        assert (gram - gram.diagonal().round().diag()).abs().max() <= 2.0**-24 * 8 * max(shape) ** 0.5
        assert gram.diagonal()[: min(5, *shape)].min() > 0.9
    assert near.tolist() == [min(5, *shape) for shape in shapes]
    assert torch.allclose(norms.cpu(), torch.tensor(bounds, dtype=torch.float64), rtol=1e-12)


def test_estimates_from_below_and_nothing_is_written_inside(programs):
    W, Y = gapped(40, 20).float(), gapped(20, 40).float()
    before = W.clone()
    norms, near = backend.spectral_step([W, Y], [block(W), block(Y)], [5.0, 0.9], 2, False, 4, 0)
    assert float(norms[0]) <= norm(before) * (1 + 1e-6) and float(norms[0]) == pytest.approx(norm(before), rel=1e-4)
    assert near.tolist() == [0, 5] and torch.equal(W, before)


def test_members_do_not_matter_and_runs_repeat(monkeypatch):
    results = []
    for count in (1, 1, 4):
        with monkeypatch.context() as patch:
            divide(count, patch)
            torch.manual_seed(0)
            Ws = [torch.randn(70, 36, device=DEVICE), torch.randn(20, 20, device=DEVICE)]
            blocks = [block(W) for W in Ws]
            found = backend.spectral_step(Ws, blocks, [0.5] * 2, 2, False, 1, 3)
            results.append([*Ws, *blocks, *found])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_is_left_alone(bad, programs):
    Ws = [gapped(33, 18).float(), gapped(5, 4).float()]
    Ws[0][32, 17] = bad
    blocks = [block(W) for W in Ws]
    before = [t.clone() for t in (Ws[0], blocks[0])]
    norms, near = backend.spectral_step(Ws, blocks, [0.9, 0.9], 2, False, 1, 0)
    assert norms[0].isnan() and near[0] == 0 and norms[1] == 0.9
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, (Ws[0], blocks[0])))


def test_views_are_written_through():
    whole = gapped(24, 36).float()
    copy = whole.clone()
    for view, same in ((whole[:, 3:20], copy[:, 3:20]), (whole.T[5:25], copy.T[5:25]), (whole[::2], copy[::2])):
        X, version = block(view), whole._version
        contiguous, Y = same.contiguous(), X.clone()
        backend.spectral_step([view], [X], [0.5], 2, False, 1, 1)
        backend.spectral_step([contiguous], [Y], [0.5], 2, False, 1, 1)
        assert whole._version > version  # so that a backward through the old values raises
        same.copy_(contiguous)
        assert torch.equal(whole, copy) and torch.equal(X, Y)


def test_fresh_vectors_find_what_the_block_is_blind_to():
    """A block without the top direction, and random vectors that have it: another seed gives others."""
    W = torch.diag(torch.tensor([3.0] + [0.1] * 19)).to(DEVICE)
    start = torch.zeros(20, 4, device=DEVICE)
    start[1:5] = torch.eye(4)
    found = []
    for fresh, seed in ((0, 1), (1, 1), (1, 1), (1, 2)):
        A, X = W.clone(), start.clone()
        norms, _ = backend.spectral_step([A], [X], [1.0], fresh, False, 1, seed)
        found.append((float(norms), X))
    assert found[0][0] < 0.2 and all(value == 1.0 for value, _ in found[1:])
    assert torch.equal(found[1][1], found[2][1]) and not torch.equal(found[1][1], found[3][1])


def test_empty():
    norms, near = backend.spectral_step([], [], [], 2, False, 1, 0)
    assert norms.shape == near.shape == (0,)
    Ws = [torch.zeros(0, 3, device=DEVICE), torch.zeros(3, 0, device=DEVICE), torch.zeros(3, 3, device=DEVICE)]
    norms, near = backend.spectral_step(Ws, [block(W) for W in Ws], [1.0] * 3, 2, False, 1, 0)
    assert norms.tolist() == [0.0] * 3 and near.tolist() == [0] * 3 and not Ws[2].any()


def test_what_it_takes():
    W = torch.zeros(3, 3, device=DEVICE)
    assert backend.can_run([W], [block(W)]) == (True, "")
    assert "float64" in backend.can_run([W.double()], [block(W)])[1]
    assert "16 vectors" in backend.can_run([W], [torch.zeros(3, 17, device=DEVICE)])[1]
