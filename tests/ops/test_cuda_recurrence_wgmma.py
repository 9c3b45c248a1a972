"""Products by wgmma, which the environment may choose for many lanes: against the loops, and bitwise among themselves."""

from dataclasses import replace

import pytest
import torch
from executor import build
from lane_loop import CELLS, Case, with_lanes
from test_cuda_recurrence import DESCENDING, EXECUTOR, H100, check_forward, equal
from tiled import L2, REGISTERS, Limits, Machine, Variant

from stable_rnn import StableLSTM
from stable_rnn.ops import cuda_device
from stable_rnn.ops.recurrence import cuda

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
RANDOM = Machine("random")

W = Variant(octets=4, wgmma=True)
VARIANTS = [
    W,
    replace(W, octets=8),
    replace(W, lane_groups=2, place=L2, teams=1),
    replace(W, blocks=2, teams=3),
    replace(W, blocks=2, octets=8, place=L2),
    replace(W, blocks=2, grid=True),
    replace(W, blocks=2, grid=True, octets=8, place=L2, teams=1),
    replace(W, blocks=4, lane_groups=2, teams=1),
    replace(W, blocks=4, grid=True, octets=8),
]
KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(params=[EXECUTOR, *([Machine("gpu", "cuda")] if HOPPER else [])], ids=lambda machine: machine.name)
def machine(request):
    return request.param


def exists(variant, case):
    """Whether units fill the blocks, and registers and warps suffice."""
    unit = 8 if case.gates % 2 == 0 else 16
    groups = -(-case.hidden // (variant.blocks * unit))
    groups = -(-groups // 4) * 4
    whole = (variant.blocks - 1) * groups * unit < case.hidden
    return whole and groups * variant.lane_groups <= 8 and not (variant.octets == 8 and case.gru)


def hidden_of(variant, case):
    """A size whose last warps have no units, and whose last chunk of k is not whole."""
    unit = 8 if case.gates % 2 == 0 else 16
    return (variant.blocks - 1) * 4 * unit + 2 * unit + 1


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant(machine, variant, kind, cell):
    """Several tiles a team, lanes that end in between, rows without time, resets."""
    lanes = 2 * 8 * variant.octets * variant.lane_groups * variant.teams
    case = Case(cell, min(lanes, 45) // 2 + 1, 2, 33, stride=2, warmup=1, resets=0.2, dtype=KINDS[kind])
    case = replace(case, hidden=hidden_of(variant, case), lengths=(case.steps, max(case.steps - 3, 0)))
    if not exists(variant, case):
        assert case.gru and variant.octets == 8
        return
    check_forward(machine, case, variant)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [33, 120])
def test_all_variants_are_bitwise_one(machine, kind, cell, hidden):
    """However the work is divided, and in either schedule of the executor."""
    case = Case(cell, 43, 3, hidden, stride=2, warmup=1, lengths=(43, 0, 20), resets=0.2, dtype=KINDS[kind])
    made, saved, tried = case.draw(), None, 0
    for variant in VARIANTS:
        for where in (EXECUTOR, DESCENDING) if machine.device == "cpu" else (machine,):
            if exists(variant, case):
                saved = saved or where.forward(case, made, variant)
                equal(where.forward(case, made, variant), saved)
                tried += 1
    assert tried >= (4 if machine.device == "cpu" else 2)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.octets == 4], ids=str)
def test_random_schedules(variant, cell):
    case = Case(cell, 70, 2, 33, stride=2, warmup=1, lengths=(70, 31), resets=0.1, dtype=torch.bfloat16)
    case = replace(case, hidden=hidden_of(variant, case))
    made = case.draw()
    want = EXECUTOR.forward(case, made, variant)
    for seed in range(2, 6):
        RANDOM.descending = seed
        equal(RANDOM.forward(case, made, variant), want)


@pytest.mark.parametrize("cell", CELLS)
def test_one_lane_among_many(machine, cell):
    case = Case(cell, 70, 1, 33, stride=1, warmup=2, dtype=torch.bfloat16)
    made = case.draw()
    saved = machine.forward(case, made, W)
    for lanes in ((0,), (37,), (69,), (3, 4, 5, 40, 41, 42, 43, 60, 61)):
        some = with_lanes(case, lanes)
        for variant in (W, VARIANTS[5]):
            if not exists(variant, case):
                continue
            found = machine.forward(some, made, variant)
            assert not found["y"][list(lanes)].isnan().any()
            for name, value in found.items():
                written = ~value.isnan()
                assert torch.equal(value[written], saved[name][written]), name


@pytest.mark.parametrize("cell", CELLS)
def test_only_the_ends_of_rows_that_share_their_times(machine, cell):
    case = Case(cell, 5, 41, 33, stride=5, warmup=0, layout="shared", init=True, dtype=torch.float16)
    made = case.draw()
    names = ("h_n", "c_n") if case.lstm else ("h_n",)
    whole = machine.forward(case, made, W)
    for variant in (W, replace(W, lane_groups=2, place=L2)):
        if exists(variant, case):
            equal(machine.forward(case, made, variant, names), {name: whole[name] for name in names})


def test_nan_stays_in_its_lane(machine):
    """Columns beside it, padded units and ended lanes are not touched."""
    case = Case("lstm", 6, 40, 33, stride=6, warmup=0, dtype=torch.bfloat16)
    made = case.draw()
    made["xp"][2 * 40 + 17] = float("nan")  # row 17, time 2
    for variant in (W, replace(W, octets=8), VARIANTS[3]):
        y = machine.forward(case, made, variant)["y"].view(6, 40, 33)
        assert y[2:, 17].isnan().all() and not y[:2].isnan().any()
        assert not y[:, torch.arange(40) != 17].isnan().any()


def test_xp_from_any_address(machine):
    case = Case("lstm", 40, 2, 40, stride=1, warmup=1, lengths=(40, 23), dtype=torch.bfloat16)
    made = case.draw()
    want = machine.forward(case, made, W)
    space = torch.full((made["xp"].numel() + 16,), float("nan"), dtype=case.dtype, device=machine.device)
    start = -space.data_ptr() % 16 // 2
    for offset in (0, 1):
        xp = space[start + offset :][: made["xp"].numel()].view_as(made["xp"]).copy_(made["xp"])
        for variant in (W, replace(W, octets=8)):
            equal(machine.forward(case, made | {"xp": xp}, variant), want)


# --- what is asked for


def tiling(backward=False, cell=2, dtype=1, hidden=256, entries=4096, limits=build.LIMITS):
    return build.module().recurrence_tiling_cuda(backward, cell, dtype, hidden, hidden, entries, limits)


def test_the_environment_chooses(monkeypatch):
    """Many lanes of 16 bits, forward, on sm_90: wgmma. Nothing else changes."""
    monkeypatch.delenv("STABLE_RNN_EXCHANGE", raising=False)
    shapes = [dict(), dict(hidden=512), dict(dtype=2), dict(cell=0, hidden=1024), dict(cell=3)]
    others = [
        *(dict(entries=1), dict(backward=True), dict(dtype=0), dict(dtype=3), dict(hidden=8)),
        *(dict(limits=(arch, 132, 232448, 16)) for arch in (80, 100, 120)),
    ]
    monkeypatch.delenv("STABLE_RNN_PRODUCT", raising=False)
    plain = [tiling(**shape) for shape in shapes + others]
    assert not any(found["product"] for found in plain)
    for name in ("", "mma"):
        monkeypatch.setenv("STABLE_RNN_PRODUCT", name)
        assert [tiling(**shape) for shape in shapes + others] == plain
    monkeypatch.setenv("STABLE_RNN_PRODUCT", "wgmma")
    assert [tiling(**shape) for shape in others] == plain[len(shapes) :]
    for shape in shapes:
        found = tiling(**shape)
        assert found["product"] == 1 and found["units"] % (32 if shape.get("cell", 2) == 2 else 64) == 0
        assert found["lanes"] >= 32 and found["exchange"] == 0 and found["place"] != REGISTERS
        assert "by wgmma" in cuda.describe(found)
    monkeypatch.setenv("STABLE_RNN_EXCHANGE", "transactions")
    assert "does not go together with STABLE_RNN_EXCHANGE=transactions" in tiling()["message"]
    for wrong in ("wgmm", "1", "MMA"):
        monkeypatch.setenv("STABLE_RNN_PRODUCT", wrong)
        assert "STABLE_RNN_PRODUCT must be mma or wgmma" in tiling()["message"]


def test_the_wish_is_heard_at_each_call(monkeypatch):
    """Also where the answer is kept: the workspace is that of the tiling that runs."""
    build.on_cpu_tensors(monkeypatch)
    shape = (build.LIMITS, False, "lstm", 1, 256, 4096)
    for name, product in (("mma", 0), ("wgmma", 1), ("mma", 0)):
        monkeypatch.setenv("STABLE_RNN_PRODUCT", name)
        assert cuda.tiling(*shape)["product"] == product


def test_a_module_by_either_product(monkeypatch):
    """From the environment to the kernel: y of many lanes has other bits, and no larger error than mma's beyond a rounding."""
    build.on_cpu_tensors(monkeypatch)
    torch.manual_seed(0)
    m = StableLSTM(8, 64, stability=None, backend="cuda").half()
    x = 3 * torch.randn(30, 70, 8).half()
    exact = StableLSTM(8, 64, stability=None, backend="reference").double()
    exact.load_state_dict(m.state_dict())
    with torch.no_grad(), build.limits(build.module(), 90, 1, 232448, 1):
        cuda_device.limits.cache_clear()
        want, found = exact(x.double())[0], {}
        for name in ("mma", "wgmma"):
            monkeypatch.setenv("STABLE_RNN_PRODUCT", name)
            assert cuda.tiling((90, 1, 232448, 1), False, "lstm", 2, 64, 70)["product"] == (name == "wgmma")
            found[name] = m(x)[0]
    cuda_device.limits.cache_clear()
    errors = {name: float((y.double() - want).abs().max()) for name, y in found.items()}
    assert not torch.equal(*found.values())  # both ran
    assert errors["wgmma"] <= errors["mma"] + torch.finfo(torch.float16).eps


@pytest.mark.parametrize("hidden", [64, 256])
def test_tilings_of_many_lanes_run(monkeypatch, hidden):
    """What the search finds is what the kernels take, and its bits are those of the variants."""
    monkeypatch.setenv("STABLE_RNN_PRODUCT", "wgmma")
    case = Case("lstm", 66 if hidden == 64 else 33, 1, hidden, stride=1, warmup=1, dtype=torch.bfloat16)
    limits = Limits(90, 2, 232448, 2) if hidden == 64 else Limits(90, 8, 232448, 8)
    found = EXECUTOR.automatic(limits, False, 2, 1, hidden, len(case.ids))
    assert found.product == 1
    made = case.draw()
    equal(EXECUTOR.forward(case, made, limits), EXECUTOR.forward(case, made, replace(W, blocks=hidden // 64)))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(octets=2), "16-bit types with 32 or 64 lanes a warp"),
        (dict(place=REGISTERS), "16-bit types with 32 or 64 lanes a warp"),
        (dict(blocks=2, transactions=True), "does not go together with transactions"),
    ],
)
def test_what_wgmma_does_not_take(change, message):
    case = Case("lstm", 5, 1, 40, stride=5, warmup=0, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=message):
        EXECUTOR.forward(case, case.draw(), replace(W, **change))
    case = replace(case, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="16-bit types"):
        EXECUTOR.forward(case, case.draw(), W)


def test_backward_does_not_take_it():
    case = Case("lstm", 5, 1, 40, stride=5, warmup=0, dtype=torch.bfloat16)
    made = case.draw()
    with pytest.raises(RuntimeError, match="forward passes"):
        EXECUTOR.backward(case, made, EXECUTOR.forward(case, made, H100), W)
