"""`spectral_project_` as it runs on a GPU, where nothing may wait: on one where there is one, else on CPU tensors that are taken for a
GPU's, with the CUDA kernel in the block executor."""

import copy
import math
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from executor import build
from spectra import KINDS, norm, projected, spectrum, with_spectrum
from waiting import no_waiting

from stable_rnn import StableLSTM
from stable_rnn.functional import SpectralState, spectral_norm_bound, spectral_project_
from stable_rnn.ops import cuda_device
from stable_rnn.ops.spectral import certified, cuda, later

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")

GPU = torch.cuda.is_available() and cuda_device.lib is not None
DEVICE = "cuda" if GPU else "cpu"
BOUND = 0.99


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    if not GPU:
        build.on_cpu_tensors(monkeypatch)
        monkeypatch.setenv("STABLE_RNN_BACKEND", "cuda")
    cuda_device.limits.cache_clear()
    yield
    cuda_device.limits.cache_clear()


@pytest.fixture
def looks(monkeypatch):
    """How often the host waited for proofs, and how many matrices went the slow way."""
    counted = {"look": 0, "alone": 0}
    for name, function in (("look", certified.look), ("_alone", certified._alone)):

        def count(*arguments, name=name, function=function):
            counted[name.strip("_")] += 1
            return function(*arguments)

        monkeypatch.setattr(certified, name, count)
    return counted


def inside(W, bound):
    return norm(W) <= bound * (1 + 1e-6) and float(spectral_norm_bound(W)) <= bound


def test_no_step_of_a_loop_waits():
    Ws, state = [torch.randn(30, 20, device=DEVICE), torch.randn(8, 9, device=DEVICE).bfloat16()], SpectralState()
    norms = spectral_project_(Ws, BOUND, certify=False, state=state)
    assert norms.device.type == DEVICE
    for call in range(2, 40):
        for W in Ws:
            W += 1e-3 * torch.randn(W.shape, device=DEVICE).to(W.dtype)
        if state.sent is not None and call >= state.sent.call + later.LAG:  # what has long arrived is read
            assert call in (20, 36)
            spectral_project_(Ws, BOUND, certify=False, state=state)
            continue
        with no_waiting(GPU):
            norms = spectral_project_(Ws, BOUND, certify=False, state=state)
    assert norms.shape == (2,) and norms.dtype == torch.float64
    assert all(norm(W) <= BOUND + 0.02 for W in Ws)


@pytest.mark.parametrize("start", ["uniform", "orthogonal"])
def test_a_training_loop_stays_close(start):
    """As on the CPU, but that what a full block hides is seen up to 20 calls late."""
    n, size = 40, 2e-3
    W = (
        (torch.rand(n, n) * 2 - 1) * 1.5 / n**0.5
        if start == "uniform"
        else torch.linalg.qr(torch.randn(n, n)).Q.contiguous()
    )
    W, state = W.to(DEVICE), SpectralState()
    spectral_project_(W, BOUND, certify=False, state=state)
    worst = 0.0
    for _ in range(50):
        D = torch.randn(n, n, device=DEVICE)
        W += D * (size / torch.linalg.matrix_norm(D, 2))
        spectral_project_(W, BOUND, certify=False, state=state)
        worst = max(worst, norm(W) - BOUND)
    assert worst <= 20 * size + 1e-5
    spectral_project_(W, BOUND, state=state)
    assert inside(W, BOUND)


def test_every_direction_growing():
    """The worst case. What the block hides grows from look to look, and each takes all of it away."""
    W = (torch.linalg.qr(torch.randn(40, 40)).Q * BOUND).contiguous().to(DEVICE)
    step, state, norms = W * 1e-3, SpectralState(), []
    for _ in range(60):
        W += step
        spectral_project_(W, BOUND, certify=False, state=state)
        norms.append(norm(W))
    assert max(norms) <= BOUND * (1 + 20 * 1.001e-3)
    assert sum(b < a - 5e-3 for a, b in zip(norms, norms[1:])) == 3  # calls 20, 36 and 52


def test_a_matrix_that_is_not_finite_raises_when_looked_at():
    Ws, state = [torch.randn(12, 12, device=DEVICE), torch.randn(9, 12, device=DEVICE)], SpectralState()
    bad = torch.full((9, 12), math.nan, device=DEVICE)
    with pytest.raises(ValueError, match=r"W\[1\]"):  # a cold step looks at once
        spectral_project_([Ws[0], bad], BOUND, certify=False)
    spectral_project_(Ws, BOUND, certify=False, state=state)
    kept, Ws[1][3, 4] = Ws[1].clone(), math.inf
    for _ in range(2, 20):
        Ws[0] += 0.1
        norms = spectral_project_(Ws, BOUND, certify=False, state=state)
        assert norms.isnan().tolist() == [False, True] and norm(Ws[0]) < 3
    before = Ws[0].clone()
    with pytest.raises(ValueError, match=r"W\[1\] holds NaN or infinite values"):
        spectral_project_(Ws, BOUND, certify=False, state=state)
    assert torch.equal(Ws[0], before)
    Ws[1][3, 4] = kept[3, 4]
    assert torch.equal(Ws[1], kept)
    for _ in range(40):
        spectral_project_(Ws, BOUND, certify=False, state=state)


def test_no_step_of_a_module_with_a_projection_waits(monkeypatch):
    """W_hr by the kernel, W_hh by products, the forget gate by its rows."""
    monkeypatch.setenv("STABLE_RNN_BACKEND", "auto" if GPU else "cuda")
    module = StableLSTM(5, 8, 2, proj_size=3).to(DEVICE)
    module.project_(certify=False)
    for call in range(2, 24):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
        with nullcontext() if call == 20 else no_waiting(GPU):  # in call 20 what was sent in call 16 is read
            module.project_(certify=False)
    weights = dict(module.named_parameters())
    assert all(norm(w.detach()) < 1.02 for name, w in weights.items() if "weight_hr" in name)
    assert module.certificate().rate < 1.05


def test_states_are_copied_and_pickled_without_what_is_under_way():
    W, state = torch.randn(20, 20, device=DEVICE), SpectralState()
    while state.sent is None:
        spectral_project_(W, BOUND, certify=False, state=state)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert other.sent is None and other.calls == state.calls
        spectral_project_(W.clone(), BOUND, certify=False, state=other)


def test_certified_inside_waits_once(looks):
    Ws = [
        with_spectrum(torch.linspace(0.9, 0.1, min(s)), *s).float().to(DEVICE)
        for s in ((20, 20), (20, 20), (33, 9), (1, 1), (0, 4))
    ]
    before = [W.clone() for W in Ws]
    norms = spectral_project_(Ws, BOUND)
    assert looks == {"look": 1, "alone": 0}
    assert all(torch.equal(a, b) for a, b in zip(Ws, before))
    for W, bound in zip(Ws, norms.tolist()):
        assert norm(W) <= bound <= BOUND


@pytest.mark.parametrize("method", ["clip", "scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_certified_with_few_outside_waits_twice(looks, dtype, method):
    Ws = [with_spectrum(spectrum("a block", 30, BOUND), 30, 40).to(DEVICE, dtype) for _ in range(2)]
    Ws.append(with_spectrum(torch.linspace(0.9, 0.1, 30), 40, 30).to(DEVICE, dtype))
    before, state = [W.clone() for W in Ws], SpectralState()
    spectral_project_(Ws, BOUND, certify=False, state=state)  # as in training: the block knows the directions
    for W, start in zip(Ws, before):
        W.copy_(start)
    norms = spectral_project_(Ws, BOUND, method, state=state)
    assert looks == {"look": 2, "alone": 0}
    assert torch.equal(Ws[2], before[2])
    for W, start, bound in zip(Ws[:2], before, norms.tolist()):
        assert inside(W, BOUND) and norm(W) <= bound <= BOUND and norm(W) >= 0.98 * BOUND
        want, eps = projected(start, BOUND, method), torch.finfo(dtype).eps
        # The target lies one eps and 2^-20 inside; each entry is rounded, and float32 sums before.
        assert (W.double() - want).norm() <= (1.5 * eps + 2e-6) * want.norm() + 3e-4 * (start.double() - want).norm()


@pytest.mark.parametrize("method", ["clip", "scale"])
@pytest.mark.parametrize("kind", KINDS)
def test_certified_hard_spectra(kind, method, looks):
    """All that the step cannot do is done one by one; matrices of one shape are proven together."""
    shapes = ((16, 17), (33, 33), (33, 33), (64, 50))
    Ws = [with_spectrum(spectrum(kind, min(shape), BOUND), *shape).float().to(DEVICE) for shape in shapes]
    before = [W.clone() for W in Ws]
    norms = spectral_project_(Ws, BOUND, method)
    assert looks["look"] <= 2
    for W, start, bound in zip(Ws, before, norms.tolist()):
        assert inside(W, BOUND) and norm(W) <= bound <= BOUND and norm(W) >= 0.98 * BOUND
        want = projected(start, BOUND, method)
        assert (W.double() - want).norm() <= 2e-6 * want.norm() + 3e-4 * (start.double() - want).norm()


def test_certified_checks_before_it_writes():
    good, bad = torch.randn(8, 8, device=DEVICE) * 5, torch.randn(8, 8, device=DEVICE)
    bad[1, 2] = math.nan
    before, state = good.clone(), SpectralState()
    with pytest.raises(ValueError, match=r"W\[1\] holds NaN"):
        spectral_project_([good, bad], BOUND, state=state)
    assert torch.equal(good, before) and state.calls == 0


def test_certified_in_float64_has_no_kernel(looks, monkeypatch):
    monkeypatch.setenv("STABLE_RNN_BACKEND", "auto")
    W = torch.randn(12, 12, device=DEVICE, dtype=torch.float64)
    spectral_project_([W], BOUND)
    assert looks == {"look": 1, "alone": 1} and inside(W, BOUND)


def test_which_backend_runs_on_a_gpu(monkeypatch):
    """cuda, then triton, then the reference with the reasons of both; a backend that is asked for runs or says why not."""
    from stable_rnn.ops.spectral import reference, registration, triton

    choose = registration.PROJECTION.choose

    monkeypatch.setenv("STABLE_RNN_BACKEND", "auto")
    W = SimpleNamespace(device=torch.device("cuda"))
    for able, want in (((True, True), cuda), ((False, True), triton), ((False, False), None)):
        for backend, yes in zip((cuda, triton), able):
            monkeypatch.setattr(
                backend, "can_run", lambda *_, yes=yes, name=backend.__name__: (yes, "" if yes else f"not {name[-4:]}")
            )
        found, reason = registration.PROJECTION.find("auto", W.device, [W], [W])
        assert registration.kernel([W], [W]) is found
        assert found is want and (found is not None or reason == "not cuda; not iton")
    with pytest.warns(RuntimeWarning, match="slow reference projection: not cuda; not iton"):
        assert choose("auto", W.device, [W], [W]) is reference
    for name in ("cuda", "triton"):
        monkeypatch.setenv("STABLE_RNN_BACKEND", name)
        with pytest.raises(ValueError, match=f"backend '{name}' cannot run this projection: not {name[-4:]}"):
            choose(name, W.device, [W], [W])
    monkeypatch.setenv("STABLE_RNN_BACKEND", "reference")
    assert registration.kernel([W], [W]) is None and choose("reference", W.device, [W], [W]) is reference
