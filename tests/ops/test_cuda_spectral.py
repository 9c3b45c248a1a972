"""The CUDA spectral step's own source: in the block executor, in two schedules and for teams and layouts of every kind, and, where there is
one, on a GPU. Against the exact projection in float64, the reference and the CPU kernel."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from executor import build
from spectra import norm, projected, with_spectrum

from stable_rnn import _native
from stable_rnn.ops import cuda_device
from stable_rnn.ops.spectral import cuda, native, reference

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")

GPU = torch.cuda.is_available() and cuda_device.lib is not None
SHAPES = ((1, 1), (2, 2), (1, 9), (9, 1), (5, 3), (31, 33), (63, 127), (200, 16), (16, 200), (130, 150), (0, 4), (4, 0))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 2.0**-24  # unit roundoff of float32


class Machine:
    """Where the kernel runs: the GPU, or the executor with a schedule and the limits of some device."""

    def __init__(self, device: str = "cpu", descending: bool = False, limits: tuple[int, ...] = build.LIMITS):
        self.device, self.descending, self.limits = device, descending, limits

    def step(self, matrices, blocks, bounds, fresh=2, scale=False, iterations=8, seed=7):
        """In place, as `reference.spectral_step`; returns norms and near on the CPU."""
        with ExitStack() as stack:
            if self.device == "cpu":
                stack.enter_context(build.schedule(cuda_device.lib, self.descending))
                stack.enter_context(build.limits(cuda_device.lib, *self.limits))
                cuda_device.limits.cache_clear()
            assert cuda.can_run(matrices, blocks) == (True, "")
            return tuple(t.cpu() for t in cuda.spectral_step(matrices, blocks, bounds, fresh, scale, iterations, seed))


def poisoned_empty(*shape, empty=torch.empty, **options):
    made = empty(*shape, **options)
    return made.fill_(255) if made.dtype == torch.uint8 else made


@pytest.fixture(autouse=True)
def on_cpu_tensors(monkeypatch):
    """The backend runs the executor's module on CPU tensors where there is no GPU. Workspaces hold NaN."""
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    if not GPU:
        build.on_cpu_tensors(monkeypatch)
    yield
    cuda_device.limits.cache_clear()


@pytest.fixture(params=["gpu"] if GPU else ["ascending", "descending"])
def machine(request):
    return Machine("cuda") if GPU else Machine(descending=request.param == "descending")


# (limits of a device, a shape) by what they lead to. Where shared memory is small, W comes in tiles: first X and the sums of W^T Y lie in
# shared memory beside them, then less and less does; the last one has room for a tile of 16 rows alone.
PLANS = {
    "one block": ((80, 1, 232448, 1), (96, 80)),
    "cluster of 2": ((90, 132, 232448, 2), (96, 80)),
    "cluster of 16": ((90, 132, 232448, 16), (300, 40)),
    "grid of 6 blocks": ((80, 6, 166912, 1), (190, 180)),
    "grid beyond a cluster": ((90, 20, 232448, 2), (260, 300)),
    **{f"tiles in {size} KB": ((80, 1, size * 1024, 1), (100, 110)) for size in (100, 70, 50, 42, 36)},
    "tiles of a cluster": ((90, 132, 64 * 1024, 4), (200, 200)),
    "tiles of a grid": ((80, 4, 52 * 1024, 1), (190, 300)),
}


@pytest.fixture(params=PLANS)
def planned(request):
    """(a way to run, a shape for which it does so)"""
    if GPU:
        pytest.skip("a GPU has its own limits")
    limits, shape = PLANS[request.param]
    return limits, shape


def blocks_of(limits, shape):
    """The size of a team, from the workspace of a matrix: for each block its summands of W^T Y and of two Gram matrices."""
    need = cuda._workspace([torch.zeros(shape)], [torch.zeros(shape[1], 16)], limits)
    pitch = -(-shape[1] // 32) * 32
    return round((need - 64 * (pitch + shape[0])) / (64 * pitch + 4096))


def block(W, k=16):
    return torch.randn(W.shape[1], min(k, *W.shape), device="cpu").to(W.device)


def gapped(m, n):
    """Few singular values outside 0.9, the others far inside: eight iterations converge to rounding."""
    few = min(5, m, n)
    return with_spectrum(torch.cat([torch.linspace(2, 1.2, few), torch.linspace(0.4, 0, min(m, n) - few)]), m, n)


def assert_close(W, found, plain, b, scale):
    """At most twice the reference's error, and the rounding of float32 sums over a side, which grows like a random walk, and of storage.

    The products' own rounding is less than that of the sums: three parts in TF32 leave out 2^-22 of each, at random."""
    m, n = W.shape
    want = projected(W, b, "scale" if scale else "clip")
    rounding = EPS * max(m, n) ** 0.5 * W.double().norm() + torch.finfo(W.dtype).eps / 2 * want.norm()
    assert (found.double() - want).norm() <= 2 * (plain.double() - want).norm() + rounding, (m, n)


def assert_orthonormal(X, few):
    """But for columns dropped (zero) where W maps the block to fewer dimensions."""
    gram = X.double().T @ X.double()
    assert (gram - gram.diagonal().round().diag()).abs().max() <= EPS * 8 * len(X) ** 0.5
    assert gram.diagonal()[:few].min() > 0.9


@pytest.mark.parametrize(
    "dtype, scale, size",
    [
        (torch.float32, False, 1.0),
        (torch.float32, True, 1.0),
        (torch.float32, False, 1e30),
        (torch.float32, True, 1e-30),
        (torch.bfloat16, False, 1.0),
        (torch.bfloat16, True, 1e30),
        (torch.float16, False, 1.0),
        (torch.float16, True, 2.0**14),
    ],
)
def test_no_worse_than_the_reference(machine, dtype, scale, size):
    Ws = [
        (gapped(*shape) if all(shape) else torch.zeros(shape)).mul(size).to(machine.device, dtype) for shape in SHAPES
    ]
    bounds = [0.9 * size] * len(Ws)
    found, plain, like_cpu = ([W.clone() for W in Ws] for _ in range(3))
    blocks = [block(W) for W in Ws]
    starts = [X.clone().cpu() for X in blocks]
    norms, near = machine.step(found, blocks, bounds, scale=scale)
    reference.spectral_step(plain, [block(W) for W in Ws], bounds, 2, scale, 8, 7)
    for W, V, R, X, b, shape in zip(Ws, found, plain, blocks, bounds, SHAPES):
        if all(shape):
            assert_close(W, V, R, b, scale)
            assert_orthonormal(X, min(5, *shape))
    assert near.tolist() == [min(5, *shape) for shape in SHAPES]
    assert torch.allclose(
        norms, torch.tensor([b * all(shape) for b, shape in zip(bounds, SHAPES)], dtype=torch.float64), rtol=1e-12
    )
    # the CPU kernel starts from the same random vectors and ends in the same place
    if dtype != torch.float16 and _native.lib is not None:
        like_cpu = [W.cpu() for W in like_cpu]
        native.spectral_step(like_cpu, starts, bounds, 2, scale, 8, 7)
        for V, C, X, S, shape in zip(found, like_cpu, blocks, starts, SHAPES):
            if all(shape):
                assert (V.cpu().double() - C.double()).norm() <= (
                    EPS * 8 * max(shape) ** 0.5 + torch.finfo(dtype).eps
                ) * C.double().norm()
                few = min(5, *shape)
                overlap = X[:, :few].cpu().double().T @ S[:, :few].double()
                assert (overlap.abs() - torch.eye(few)).abs().max() <= 1e-5  # spectrum: 0.2 apart


@pytest.mark.parametrize("dtype, scale", [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
def test_teams_and_layouts(planned, dtype, scale):
    limits, shape = planned
    W = gapped(*shape).to(dtype)
    plain = W.clone()
    reference.spectral_step([plain], [block(W)], [0.9], 2, scale, 8, 7)
    X, results = block(W), []
    for descending in (False, True):
        machine = Machine(descending=descending, limits=limits)
        V, Y = W.clone(), X.clone()
        norms, near = machine.step([V], [Y], [0.9], scale=scale)
        results.append((V, Y, norms, near))
    V, Y, norms, near = results[0]
    assert_close(W, V, plain, 0.9, scale)
    assert_orthonormal(Y, 5)
    assert norms.tolist() == [pytest.approx(0.9, rel=1e-12)] and near.tolist() == [5]
    assert all(torch.equal(a, b) for a, b in zip(*results))  # bitwise, whatever the order of threads and blocks


def test_plans_lead_where_their_names_say(planned, request):
    limits, shape = planned
    name = request.node.callspec.params["planned"]
    blocks = blocks_of(limits, shape)
    if "cluster of" in name:
        assert blocks == int(name.split()[-1])
    elif name == "one block" or "KB" in name:
        assert blocks == 1
    elif name == "tiles of a cluster":
        assert blocks == 4
    else:
        assert blocks == {"grid of 6 blocks": 6, "grid beyond a cluster": 9, "tiles of a grid": 4}[name]


def test_the_smallest_layout():
    """Less shared memory than a tile of 16 rows needs is too little, and the reason says so."""
    if GPU:
        pytest.skip("a GPU has its own limits")
    W, needed = gapped(100, 110).float(), 36 * 1024
    while cuda._workspace([W], [block(W)], (80, 1, needed, 1)) >= 0:
        needed -= 64
    assert needed > 28 * 1024
    with build.limits(cuda_device.lib, 80, 1, needed, 1):
        cuda_device.limits.cache_clear()
        able, reason = cuda.can_run([W], [block(W)])
        assert not able and "110 columns" in reason
        with pytest.raises(RuntimeError, match="too many columns"):
            machine_step_unchecked(W)
    found, plain = W.clone(), W.clone()
    Machine(limits=(80, 1, needed + 64, 1)).step([found], [block(W)], [0.9])
    reference.spectral_step([plain], [block(W)], [0.9], 2, False, 8, 7)
    assert_close(W, found, plain, 0.9, False)


def machine_step_unchecked(W):
    table, limit = native.table([W], [block(W)]), torch.tensor([1.0], dtype=torch.float64)
    out = torch.empty(1, dtype=torch.float64), torch.empty(1, dtype=torch.int64)
    places = (t.data_ptr() for t in (table, limit, *out))
    cuda_device.lib.spectral_step_cuda(0, False, 2, 2, 0, 1, *places, 0, 0, 0, 0)


def test_a_workspace_too_small_is_refused():
    if GPU:
        pytest.skip("the addresses are the CPU's")
    with pytest.raises(RuntimeError, match="workspace"):
        machine_step_unchecked(torch.randn(20, 20))


def test_estimates_from_below(machine):
    for shape in SHAPES[:-2]:
        W = gapped(*shape).float().to(machine.device)
        before = W.clone()
        norms, near = machine.step([W], [block(W)], [5.0], seed=0)
        assert float(norms) == pytest.approx(norm(W), rel=1e-5) and int(near) == 0
        assert torch.equal(W, before)


def test_many_matrices_are_as_each_alone(machine):
    """More than fit into one launch, of mixed dtypes. All of them small enough for one block, so that the team is the same."""
    sizes = torch.Generator().manual_seed(1)
    Ws = [
        torch.randn(*torch.randint(1, 30, (2,), generator=sizes).tolist()).to(machine.device, DTYPES[i % 3])
        for i in range(50)
    ]
    blocks, bounds = [block(W) for W in Ws], [0.5 + i / 10 for i in range(50)]
    alone = [(W.clone(), X.clone()) for W, X in zip(Ws, blocks)]
    norms, near = machine.step(Ws, blocks, bounds, iterations=2)
    for i, (W, X) in enumerate(alone):
        estimate, count = machine.step([W], [X], bounds[i : i + 1], iterations=2, seed=7 + i)
        assert torch.equal(W, Ws[i]) and torch.equal(X, blocks[i])
        assert torch.equal(estimate, norms[i : i + 1]) and torch.equal(count, near[i : i + 1])
    assert machine.step([], [], [])[0].shape == (0,)


def test_a_grid_of_several_teams():
    """Each has its own flags and workspace; the one whose matrix is not finite ends early."""
    if GPU:
        pytest.skip("a GPU has its own limits")
    Ws = [
        gapped(190, 180).float(),
        torch.full((190, 180), float("nan")),
        gapped(190, 180).float(),
        gapped(100, 20).float(),
    ]
    limits = (80, 11, 166912, 1)
    assert cuda._workspace(Ws, [block(W) for W in Ws], limits) > 4 * 2 * 64 * 192
    sound = [W for W in Ws if W.isfinite().all()]
    for descending in (False, True):
        found, plain, blocks = [W.clone() for W in Ws], [W.clone() for W in sound], [block(W) for W in Ws]
        norms, _ = Machine(limits=limits, descending=descending).step(found, blocks, [0.9] * 4)
        assert norms.isnan().tolist() == [False, True, False, False]
        reference.spectral_step(plain, [block(W) for W in plain], [0.9] * 3, 2, False, 8, 7)
        for W, V, R in zip(sound, [V for V in found if V.isfinite().all()], plain):
            assert_close(W, V, R, 0.9, False)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignments(machine, dtype):
    """Rows that begin anywhere; columns apart go through a copy. Nothing beside the view is written."""
    for take in (
        lambda t: t[3:43, 5:38],
        lambda t: t[:40, :32],
        lambda t: t[1::2, 1:34],
        lambda t: t.T[2:40, 4:44],
        lambda t: t[:, ::3],
    ):
        big = (torch.randn(90, 101) * 0.3).to(machine.device, dtype)
        view, outside = take(big), big.clone()
        dense = view.contiguous()
        X = block(view)
        Y = X.clone()
        machine.step([view], [X], [1.0])
        machine.step([dense], [Y], [1.0])
        assert torch.equal(view, dense) and torch.equal(X, Y) and not torch.equal(view, take(outside))
        view.copy_(take(outside))
        assert torch.equal(big, outside)


@pytest.mark.sanitizer
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_is_left_alone(machine, bad):
    for where in ((0, 0), (69, 39), (33, 38)):
        Ws = [torch.randn(50, 30) * 9, torch.randn(70, 40) * 9]
        Ws[1][where] = bad
        Ws = [W.to(machine.device) for W in Ws]
        blocks = [block(W) for W in Ws]
        kept, alone = [x.clone() for x in (Ws[1], blocks[1])], [x.clone() for x in (Ws[0], blocks[0])]
        norms, near = machine.step(Ws, blocks, [1.0, 1.0], iterations=2)
        machine.step(alone[:1], alone[1:], [1.0], iterations=2)
        assert norms.isnan().tolist() == [False, True] and near.tolist()[1] == 0
        assert (
            GPU or torch.equal(Ws[0], alone[0]) and torch.equal(blocks[0], alone[1])
        )  # both teams are of 2 blocks in the executor
        assert all(torch.equal(a.nan_to_num(7, 8, 9), b.nan_to_num(7, 8, 9)) for a, b in zip(kept, (Ws[1], blocks[1])))


def test_dependent_columns(machine):
    """A block that the matrix maps to fewer dimensions than it has vectors."""
    for rank in (0, 1, 3):
        W = with_spectrum(torch.tensor([3.0] * rank + [0.0] * (40 - rank)), 40, 50).float().to(machine.device)
        want = projected(W, 1.0, "clip")
        X = block(W)
        for seed in range(3):
            machine.step([W], [X], [1.0], iterations=2, seed=seed)
        assert torch.isfinite(X).all() and (W.double() - want).norm() <= EPS * 50 * 3 * rank


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e-6, 1e6, 1e20, 1e36])
def test_any_size_of_weights(machine, size):
    """The smallest are denormal: what they have left of digits is the tolerance."""
    W = (gapped(24, 20) * size).float().to(machine.device)
    want = projected(W, 0.9 * size, "clip")
    norms, near = machine.step([W], [block(W)], [0.9 * size])
    assert (W.double() - want).norm() <= max(1e-6 * float(want.norm()), 20 * 2.0**-149)
    assert near.tolist() == [5] or size < 1e-40
    assert float(norms) == pytest.approx(0.9 * size, rel=1e-12)


@pytest.mark.parametrize("iterations", [2, 8])
def test_graded_spectra(machine, iterations):
    """Singular values far above the bound and near it together: columns of the block that are nearly parallel at first."""
    for largest in (1e2, 1e3):
        W = with_spectrum(torch.tensor([largest, 3.0, 2.0, 1.5, 0.5] + [0.1] * 25), 40, 30).float().to(machine.device)
        found, plain, want = W.clone(), W.clone(), projected(W, 1.0, "clip")
        machine.step([found], [block(W)], [1.0], iterations=iterations)
        reference.spectral_step([plain], [block(W)], [1.0], 2, False, iterations, 7)
        assert (found - want).norm() <= 2 * (plain - want).norm() + EPS * 40**0.5 * largest


@pytest.mark.parametrize("start", ["flat", "uniform"])
def test_a_training_loop_stays_close(machine, start):
    """Warm steps from call to call: the norm stays within the sum of the last updates, and repeats bitwise."""
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        W = torch.linalg.qr(torch.randn(40, 40)).Q if start == "flat" else (torch.rand(40, 40) * 2 - 1) * 1.5 / 40**0.5
        W, X = W.contiguous().to(machine.device), block(W).to(machine.device)
        machine.step([W], [X], [0.99], seed=0)
        for call in range(12):
            W += 2e-3 * torch.randn(40, 40).to(W) / (2 * 40**0.5)
            machine.step([W], [X], [0.99], iterations=2, seed=call + 1)
        results.append(W)
        assert norm(W) <= (1.0 if start == "flat" else 0.99) + 12 * 2e-3 * 1.1
    assert torch.equal(*results)


def test_can_run_says_why_not(monkeypatch):
    device = "cuda" if GPU else "cpu"
    W, X = torch.randn(20, 20, device=device), torch.randn(20, 16, device=device)
    assert cuda.can_run([W], [X]) == (True, "")
    many = torch.randn(20, 17, device=device)
    for matrix, vectors, words in (
        (W.double(), X, "float64"),
        (W, X.double(), "float32 blocks"),
        (W, many, "16 vectors"),
        (W.to("meta"), X, "on meta"),
        (W, X.mT.contiguous().mT, "contiguous"),
    ):
        able, reason = cuda.can_run([W, matrix], [X, vectors])
        assert not able and words in reason

    def no_driver(index):
        raise RuntimeError("no driver")

    monkeypatch.setattr(cuda_device, "lib", SimpleNamespace(cuda_limits=no_driver))
    cuda_device.limits.cache_clear()
    assert cuda.can_run([W], [X]) == (False, "no driver")
    monkeypatch.setattr(cuda_device, "lib", None)
    assert cuda.can_run([W], [X])[1].startswith("the compiled module")


SANITIZED = """
import ctypes, sys
sys.path[:0] = {path}
import torch
from executor import build
from stable_rnn.ops.spectral import native
torch.set_num_threads(1)
library = ctypes.CDLL({library!r})
library.entry_step.restype = ctypes.c_char_p
library.entry_workspace.restype = ctypes.c_int64
wide = ctypes.c_int64
for number, limits in enumerate({limits}):
    for dtype in (torch.float32, torch.bfloat16):
        with build.limits(library, *limits), build.schedule(library, number % 2 == 1):
            Ws = [torch.randn(*shape).to(dtype) for shape in ((70, 45), (1, 1), (5, 3), (33, 130), (190, 175))]
            blocks = [torch.randn(W.shape[1], min(16, *W.shape)) for W in Ws]
            table, bounds = native.table(Ws, blocks), torch.full((5,), 0.5, dtype=torch.float64)
            norms, near = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
            work = torch.empty(library.entry_workspace(wide(5), wide(table.data_ptr())), dtype=torch.uint8)
            for scale in (0, 1):
                places = [wide(t.data_ptr()) for t in (table, bounds, norms, near, work)]
                message = library.entry_step(scale, 1, wide(2), wide(0), wide(5), *places, wide(work.nbytes))
                assert not message, message
                assert 0 < norms.min() and norms.max() == 0.5, norms
"""


@pytest.mark.check
def test_address_sanitizer():
    if not build.sanitizer():
        pytest.skip(f"{build.CXX} has no AddressSanitizer library")
    here = Path(__file__).parent
    library = build._link(
        "spectral.so", [build.ROOT / "csrc/cuda/spectral.cu", here / "spectral_entry.cpp", *build.EXECUTOR], True
    )
    limits = [build.LIMITS, (80, 10, 166912, 1), (80, 1, 64 * 1024, 1), (90, 132, 64 * 1024, 2)]
    code = SANITIZED.format(path=[str(build.ROOT), str(build.ROOT / "tests")], library=str(library), limits=limits)
    done = subprocess.run(
        [sys.executable, "-c", code], env=build.sanitized_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "Sanitizer" not in done.stderr, done.stderr
