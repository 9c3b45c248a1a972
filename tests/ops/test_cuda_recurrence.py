"""The CUDA recurrence kernels' own source: in the block executor in two schedules and, where there is one, on a GPU. Every output of
params.h against plain float64 loops, for every way in which the work can be divided."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lane_loop as loop
import pytest
import torch
from executor import build
from lane_loop import CELLS, Case
from tiled import GATES, L2, REGISTERS, SHARED, Limits, Machine, Variant, units

from stable_rnn import _native

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")

FORWARD, BACKWARD = False, True
EXECUTOR, DESCENDING = Machine("executor"), Machine("descending", descending=True)
GPU = [Machine("gpu", "cuda")] if torch.cuda.is_available() else []
KINDS = {
    "float32": dict(),
    "tf32": dict(tf32=True),
    "bfloat16": dict(dtype=torch.bfloat16),
    "float16": dict(dtype=torch.float16),
}
H100, A100, SMALL = Limits(90, 132, 232448, 16), Limits(80, 108, 166912, 1), Limits(120, 36, 101376, 8)

VARIANTS = [
    Variant(),
    Variant(octets=2, lane_groups=2),
    Variant(octets=4, place=L2),
    Variant(octets=8),
    Variant(place=REGISTERS),
    Variant(2, teams=1),
    Variant(2, place=REGISTERS),
    Variant(2, octets=4, teams=3),
    Variant(2, grid=True, octets=2, place=L2),
    Variant(2, grid=True, place=REGISTERS, teams=1),
    Variant(4, octets=2),
    Variant(4, grid=True, lane_groups=2, teams=3),
    Variant(16, lane_groups=2, place=L2),
    Variant(16, grid=True),
]
LARGE = [v for v in VARIANTS if v.blocks > 2]
SOME = [Variant(), Variant(2, teams=1), Variant(2, grid=True, octets=2, place=L2)]


@pytest.fixture(params=[EXECUTOR, *GPU], ids=lambda machine: machine.name)
def machine(request):
    return request.param


def exists(machine, variant, backward, case):
    """Whether a kernel is compiled for this, and the device can run it: see `most_warps` and `Search` in csrc/cuda."""
    half = case.dtype.itemsize == 2
    small = half and not case.gru  # a GRU's three gates take more registers
    if variant.octets == 4 and case.gru and (backward or not half):
        return False
    if variant.place == REGISTERS and not small or variant.octets == 8 and (backward or not small):
        return False
    unit = units(case.gates, backward)
    if -(-case.hidden // (variant.blocks * unit)) * unit * (variant.blocks - 1) >= case.hidden:
        return False  # a block without units
    tiling = machine.tiling(variant, backward, case)
    most = machine.library.allowed_warps(
        backward, loop.CELLS.index(case.cell), variant.octets, variant.place == REGISTERS
    )
    limits = machine.limits
    return tiling.warps <= most and tiling.shared_bytes <= limits.shared_bytes and tiling.cluster <= limits.max_cluster


def assert_like(found, exact, eager, case, terms):
    """Every tensor of `found`: NaN exactly where the oracle is; else at most twice eager's error plus rounding terms: one unit of the
    storage type; and for each of a lane's steps the float32 rounding of a sum of `terms` products (growing like a random walk) and what
    its inputs were rounded by, a unit of a 16-bit type, or 2^-11 relative each for the two factors of TF32. The weights have variance
    1 / hidden and rounding errors have random signs, so a sum errs by sqrt(terms / hidden) times that, relative to the state."""
    assert found.keys() == exact.keys()
    steps = min(case.stride + case.warmup, case.steps)
    inputs = 2.0**-10 if case.tf32 else torch.finfo(case.dtype).eps if case.dtype.itemsize == 2 else 0.0
    for name, value in found.items():
        want, plain = exact[name], eager[name]
        assert value.shape == want.shape, name
        written = ~want.isnan()
        assert torch.equal(~value.isnan(), written), f"{name}: the wrong elements were written"
        if not written.any():
            continue
        scale = max(1.0, float(want[written].abs().max()))
        sums = torch.finfo(torch.float32).eps * (steps * (terms + 8)) ** 0.5
        rounding = torch.finfo(value.dtype).eps + sums + inputs * steps * (terms / case.hidden) ** 0.5
        allowed = 2 * float((plain.double() - want)[written].abs().max()) + scale * rounding
        error = float((value.double() - want)[written].abs().max())
        assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"


def check_forward(machine, case, how, made=None):
    made = made or case.draw()
    found = machine.forward(case, made, how)
    assert_like(found, loop.loop_forward(case, made), loop.loop_forward(case, made, torch.float32), case, case.hidden)
    return made, found


def check_backward(machine, case, how, made, saved):
    found = machine.backward(case, made, saved, how)
    exact, eager = (loop.loop_backward(case, made, saved, kind) for kind in (torch.float64, torch.float32))
    assert_like(found, exact, eager, case, case.gates * case.hidden)


def check(machine, case, how):
    """Forward, and backward over what the plain forward saved."""
    made, saved = check_forward(machine, case, how)
    if case.select is not None:  # a selection saves its own rows only
        saved = machine.forward(
            replace(case, select=None), {k: v for k, v in made.items() if not k.endswith("_init")}, how
        )
    check_backward(machine, case, how, made, saved)


def equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name].nan_to_num(nan=77.0), two[name].nan_to_num(nan=77.0)), name


def hidden_of(variant):
    return {1: 40, 2: 40, 4: 63, 16: 250}[variant.blocks]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant(machine, variant, kind, cell):
    """Against the loops; several tiles a team, and lanes that end in between."""
    hidden = hidden_of(variant)
    lanes = 2 * 8 * variant.octets * variant.lane_groups * variant.teams
    case = Case(
        cell,
        min(lanes, 37) // 2 + 1,
        2,
        hidden,
        stride=2,
        warmup=1,
        cap=0.8 if cell in loop.CAPPED else 1.0,
        **KINDS[kind],
    )
    case = replace(case, lengths=(case.steps, max(case.steps - 3, 0)))
    made = saved = None
    if exists(machine, variant, FORWARD, case):
        made, saved = check_forward(machine, case, variant)
    if exists(machine, variant, BACKWARD, case):
        made = made or case.draw()
        check_backward(machine, case, variant, made, saved or machine.forward(case, made, machine.limits))
    # in 16 bits every variant has a kernel, but a GRU's
    assert saved or made or case.dtype.itemsize == 4 or case.gru or machine.device != "cpu"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [33, 250])
def test_all_variants_are_bitwise_one(machine, cell, kind, hidden):
    """However the work is divided, whatever lanes are beside it, and in either schedule of the executor."""
    case = Case(cell, 6, 3, hidden, stride=2, warmup=1, lengths=(6, 2, 5), **KINDS[kind])
    made = case.draw()
    saved = machine.forward(case, made, machine.limits)
    back = machine.backward(case, made, saved, machine.limits)
    tried = 0
    for variant in [*VARIANTS, Variant(4), Variant(4, place=L2)]:
        for where in [machine] if machine.device != "cpu" else [EXECUTOR, DESCENDING]:
            if exists(machine, variant, FORWARD, case):
                equal(where.forward(case, made, variant), saved)
                tried += 1
            if exists(machine, variant, BACKWARD, case):
                equal(where.backward(case, made, saved, variant), back)
                tried += 1
    assert tried >= (8 if hidden == 33 else 4)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_one_lane_among_many(machine, cell, kind):
    case = Case(cell, 70, 1, 33, stride=1, warmup=2, **KINDS[kind])
    made = case.draw()
    saved = machine.forward(case, made, machine.limits)
    back = machine.backward(case, made, saved, machine.limits)
    for lanes in ((0,), (1,), (37,), (69,), (3, 4, 5, 40, 41, 42, 43, 60, 61)):
        some = loop.with_lanes(case, lanes)
        for variant in SOME:
            found = machine.forward(some, made, variant)
            assert not found["y"][list(lanes)].isnan().any()
            for part, everything in ((found, saved), (machine.backward(some, made, saved, variant), back)):
                for name, value in part.items():
                    written = ~value.isnan()
                    assert torch.equal(value[written], everything[name][written]), name


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [1, 2, 31, 33, 63, 64, 127, 200, 256])
def test_sizes(machine, cell, hidden):
    for kind in ("float32", "float16"):
        for steps, batch in ((1, 1), (3, 2)):
            check(machine, Case(cell, steps, batch, hidden, stride=steps, warmup=0, **KINDS[kind]), machine.limits)
    other = machine.limits if machine.device != "cpu" else A100 if hidden > 64 else SMALL
    check(machine, Case(cell, 7, 1, hidden, stride=2, warmup=2, dtype=torch.bfloat16), other)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("stride, warmup", [(9, 0), (100, 3), (1, 0), (1, 3), (1, 20), (4, 2), (3, 0), (4, 9)])
@pytest.mark.parametrize(
    "layout, lengths",
    [
        ("padded", None),
        ("reverse", None),
        ("padded", (5, 0, 9)),
        ("reverse", (5, 0, 9)),
        ("packed", (9, 4, 2)),
        ("packed_reverse", (4, 0, 9)),
    ],
)
def test_lanes_and_layouts(machine, cell, stride, warmup, layout, lengths):
    variant = SOME[(stride + warmup) % 3]
    check(machine, Case(cell, 9, 3, 17, stride, warmup, layout=layout, lengths=lengths), variant)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("variant", SOME, ids=str)
def test_selected_lanes_with_given_states(machine, cell, variant):
    case = Case(cell, 9, 3, 17, stride=2, warmup=1, lengths=(9, 3, 7))
    for kind in ("float32", "bfloat16"):
        for init in (False, True):
            check(machine, replace(loop.with_lanes(case, (0, 2, 7, 10, 12)), init=init, **KINDS[kind]), variant)


@pytest.mark.parametrize("cell", loop.CAPPED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [0.3, 0.55])
def test_cap_holds_and_stops_the_gradient(machine, cap, kind, cell):
    case = Case(cell, 9, 2, 21, stride=4, warmup=3, cap=cap, **KINDS[kind])
    made, saved = check_forward(machine, case, machine.limits)
    forget = saved["saved"].chunk(4, 1)[1]
    assert forget.max() == torch.tensor(cap).to(case.dtype) and forget.min() < cap  # both branches are tested
    check_backward(machine, case, machine.limits, made, saved)
    held = forget >= torch.tensor(cap).to(case.dtype)
    assert (machine.backward(case, made, saved, machine.limits)["dz"].chunk(case.gates, 1)[1][held] == 0).all()


@pytest.mark.parametrize("cell", CELLS)
def test_absent_inputs_are_zeros_and_absent_outputs_stay_away(machine, cell):
    case = Case(cell, 5, 2, 20, stride=3, warmup=1, lengths=(5, 0), device=machine.device)
    zeros = {
        k: torch.zeros_like(v) if k in ("h0", "c0", "dh_n", "dc_n") and v is not None else v
        for k, v in case.draw().items()
    }
    without = {k: None if k in ("h0", "c0", "dh_n", "dc_n") else v for k, v in zeros.items()}
    saved = machine.forward(case, zeros, machine.limits)
    equal(machine.forward(case, without, machine.limits), saved)
    back = machine.backward(case, zeros, saved, machine.limits)
    equal(machine.backward(case, without, saved, machine.limits), back)

    for names in (("y",), ("h_n",), tuple(k for k in saved if k not in ("y", "decay")), ("decay",) * case.forgets):
        equal(machine.forward(case, zeros, machine.limits, names), {k: saved[k] for k in names})
    for names in (("dz",), ("dh0",), tuple(k for k in back if k not in ("dz", "decay")), ("decay",) * case.forgets):
        equal(machine.backward(case, zeros, saved, machine.limits, names), {k: back[k] for k in names})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_ends_of_rows_that_share_their_times(machine, cell, kind):
    case = Case(cell, 5, 21, 33, stride=5, warmup=0, layout="shared", init=True, **KINDS[kind])
    for variant in SOME:
        forward, backward = loop.ends_alone(
            case,
            lambda case, made, only=None, how=variant: machine.forward(case, made, how, only),
            lambda case, made, saved, only, how=variant: machine.backward(case, made, saved, how, only),
        )
        assert_like(*forward, case, case.hidden)
        assert_like(*backward, case, case.gates * case.hidden)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("steps, batch, hidden", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)])
def test_empty(machine, cell, steps, batch, hidden):
    for stride, warmup in ((1, 2), (4, 0)):
        case = Case(cell, steps, batch, hidden, stride, warmup)
        if hidden == 0:
            made = case.draw()
            assert machine.forward(case, made, machine.limits)["y"].numel() == 0
        else:
            check(machine, case, machine.limits)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_pass_through(machine, cell, kind):
    """And stay in their lane: padded units and ended lanes are not touched by them."""
    case = Case(cell, 6, 2, 20, stride=6, warmup=0, **KINDS[kind])
    made = case.draw()
    made["xp"][4] = loop.NAN  # row 0, time 2
    for variant in SOME:
        y = machine.forward(case, made, variant)["y"].view(6, 2, 20)
        assert not y[:2].isnan().any() and not y[:, 1].isnan().any() and y[2:, 0].isnan().all()
    windows = Case(
        cell, 6, 2, 20, stride=1, warmup=2, **KINDS[kind]
    )  # from zeros, which times infinity are NaN: as in a plain product
    made = windows.draw()
    made["w_hh"][3, 5] = float("inf")
    found, exact = machine.forward(windows, made, machine.limits), loop.loop_forward(windows, made)
    assert exact["y"][:, 3].isnan().any() and torch.equal(found["y"].isnan(), exact["y"].isnan())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", SOME, ids=str)
def test_infinity_stays_infinity(machine, kind, variant):
    """With positive weights nothing is infinity minus infinity; a padded unit (zero times infinity) must not make it NaN."""
    for cell in ("rnn_relu", "rnn_tanh"):
        case = Case(cell, 5, 2, 20, stride=5, warmup=0, **KINDS[kind])
        made = case.draw()
        made |= {k: (made[k].abs() + 0.01) / 8 for k in ("w_hh", "xp", "h0")}
        saved = machine.forward(case, made, variant)
        far = dict(made, xp=made["xp"].clone(), dy=made["dy"].clone())
        far["xp"][2, 3] = far["dy"][6, 3] = float("inf")  # row 0, times 1 and 3
        if cell == "rnn_relu":
            found = machine.forward(case, far, variant)["y"].view(5, 2, 20)
            assert not found.isnan().any() and found[2:, 0].isinf().all() and found[:, 1].isfinite().all()
        assert saved["y"].max() < 1 or cell == "rnn_relu"
        found = machine.backward(case, far, saved, variant)
        assert not found["dz"].isnan().any() and found["dh0"][0].isinf().all() and found["dh0"][1].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_saturated_gates(machine, kind):
    """Pre-activations far outside the range of exp: the limits, not NaN or infinity."""
    for cell in ("lstm", "gru", "rnn_tanh"):
        for big in (30.0, 90.0, 1e4, 6e4 if kind == "float16" else 3e38):
            case = Case(cell, 2, 1, 16, stride=2, warmup=0, **KINDS[kind])
            made = case.draw()
            made["xp"] = (big * torch.sign(made["xp"].float())).to(case.dtype)
            check_forward(machine, case, machine.limits, made)


@pytest.mark.skipif(_native.lib is None, reason=f"compiled module: {_native.reason}")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [5, 33, 130])
def test_float32_forward_is_bitwise_the_cpu_kernel(machine, cell, hidden):
    """One cell.h, one order of sums. (Backward, an LSTM's sums are four partial ones.)"""
    if _native.lib.cpu_features()["isa"] == "plain":
        pytest.skip("this CPU has no fma")
    case = Case(cell, 9, 3, hidden, stride=4, warmup=2, lengths=(9, 0, 5), cap=0.9 if cell in loop.CAPPED else 1.0)
    made = case.draw()
    found, saved = machine.forward(case, made, machine.limits), loop.run_forward(case, made)
    equal(found, saved)
    if cell != "lstm":
        equal(machine.backward(case, made, saved, machine.limits), loop.run_backward(case, made, saved))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_rerun_from_the_predecessors_end_is_the_sequential_run(machine, cell, kind):
    whole = Case(cell, 30, 1, 24, stride=30, warmup=0, **KINDS[kind])
    made = whole.draw()
    expected = machine.forward(whole, made, machine.limits)
    lanes = replace(whole, stride=10, select=(0, 1, 2))
    found = machine.forward(lanes, made, machine.limits)
    for j in (1, 2):
        state = dict(
            h_init=found["h_end"][j - 1].clone()[None],
            c_init=found["c_end"][j - 1].clone()[None] if whole.lstm else None,
        )
        again = machine.forward(replace(lanes, select=(j,), init=True), made | state, machine.limits)
        found["h_end"][j], found["y"][10 * j : 10 * j + 10] = again["h_end"][j], again["y"][10 * j : 10 * j + 10]
        if whole.lstm:
            found["c_end"][j] = again["c_end"][j]
    assert torch.equal(found["y"], expected["y"])


# --- plans


@pytest.mark.parametrize("limits", [H100, A100, SMALL], ids=["h100", "a100", "small"])
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("cell", [0, 2, 3])
def test_plans_fit_the_device(limits, kind, cell):
    for backward in (FORWARD, BACKWARD):
        for hidden in (1, 8, 33, 64, 128, 200, 256, 500, 512, 768, 1024):
            for entries in (0, 1, 7, 16, 256, 4000, 10**9):
                tiling = EXECUTOR.automatic(limits, backward, cell, kind, hidden, entries)
                if tiling.message:
                    assert backward and cell >= 2 and kind in (0, 3) and hidden > 512 and b"too large" in tiling.message
                    continue
                assert (tiling.blocks - 1) * tiling.units < hidden <= tiling.blocks * tiling.units
                assert tiling.cluster in (1, tiling.blocks) and tiling.cluster <= limits.max_cluster
                assert tiling.shared_bytes <= limits.shared_bytes and tiling.lanes % 8 == 0
                assert 1 <= tiling.teams <= max(1, -(-entries // tiling.lanes))
                grid = tiling.blocks > 1 and tiling.cluster == 1
                assert not grid or tiling.teams * tiling.blocks <= limits.sms  # all run at the same time
                weights = GATES[cell] * hidden**2 * (2 if kind in (1, 2) else 4)
                assert weights <= tiling.workspace_bytes < 3 * weights + (1 << 24)


def test_plans_of_known_shapes():
    def tiling(*shape, limits=H100):
        return EXECUTOR.automatic(limits, FORWARD, 2, 1, *shape)

    latency = tiling(256, 1)  # a cluster with the weights in registers
    assert (latency.cluster, latency.units, latency.lanes, latency.place) == (4, 64, 8, REGISTERS)
    windows = tiling(256, 16384)  # one cluster in each part of the chip, many lanes each
    assert (windows.cluster, windows.lanes, windows.place, windows.teams) == (4, 64, SHARED, 32)
    chunks = tiling(256, 256)  # tiles so small that every SM has work
    assert chunks.teams * chunks.blocks >= 120
    large = tiling(768, 16)  # beyond a cluster
    assert large.cluster == 1 and large.blocks > 16
    assert tiling(256, 1, limits=A100).cluster == 1


def test_errors_say_what_is_wrong():
    good = Case("lstm", 3, 1, 4, stride=1, warmup=0)
    made = good.draw()
    for bad, word in ((dict(cap=0.0), "cap"), (dict(cap=2.0), "cap"), (dict(warmup=-1), "warmup")):
        with pytest.raises(RuntimeError, match=word):
            EXECUTOR.forward(replace(good, **bad), made, Variant())
    projected = replace(good, out=2)
    with pytest.raises(RuntimeError, match="proj_size"):
        EXECUTOR.forward(projected, projected.draw(), H100)
    for arguments, word in (
        ((7, 0, 8, 1), "cell"),
        ((2, 9, 8, 1), "dtype"),
        ((2, 0, -1, 1), "hidden"),
        ((2, 0, 10**6, 1), "too large"),
        ((2, 0, 8, 1, 4), "proj_size"),
    ):
        assert word in EXECUTOR.automatic(H100, FORWARD, *arguments).message.decode()
    assert b"8.0" in EXECUTOR.automatic(Limits(75, 40, 65536, 1), FORWARD, 2, 0, 8, 1).message


def test_entry_points_of_the_module():
    """Plans by the device's limits, the workspace by the tiling; a smaller one is refused."""
    module = build.module()
    case = Case("lstm", 5, 3, 20, stride=2, warmup=1, dtype=torch.bfloat16)
    made = case.draw()
    space = torch.empty(1 << 16)
    start = space[-space.data_ptr() % 256 // 4 :].data_ptr()

    def run(size):
        return loop.run_forward(
            case,
            made,
            lambda *fields, **outputs: module.recurrence_forward_cuda(
                *fields, **outputs, device=0, stream=0, workspace=start, workspace_bytes=size
            ),
        )

    for limits in (build.LIMITS, (80, 108, 166912, 1)):
        with build.limits(module, *limits):
            assert module.cuda_limits(0) == list(limits)
            tiling = module.recurrence_tiling_cuda(FORWARD, 2, 1, 20, 20, len(case.ids), limits)
            assert tiling["message"] is None and tiling["workspace_bytes"] < space.nbytes - 256
            equal(run(tiling["workspace_bytes"]), EXECUTOR.forward(case, made, Variant()))
            with pytest.raises(RuntimeError, match="workspace"):
                run(tiling["workspace_bytes"] - 1)


SANITIZED = """
import sys
sys.path[:0] = {path}
from dataclasses import replace
import torch
from lane_loop import Case
from tiled import L2, REGISTERS, Machine, Variant
torch.set_num_threads(1)
machine = Machine("asan", asan=True)
for cell in ("rnn_tanh", "lstm", "gru"):
    for kind in (dict(), dict(tf32=True), dict(dtype=torch.bfloat16), dict(dtype=torch.float16)):
        for variant in (Variant(), Variant(octets=2, lane_groups=2, place=L2), Variant(2), Variant(2, grid=True, octets=4)):
            if "dtype" in kind and cell != "gru":
                variant = replace(variant, place=REGISTERS) if variant.octets == 1 else variant
            machine.descending = not machine.descending
            variant = replace(variant, transactions="dtype" in kind)  # of clusters
            case = Case(cell, 7, 3, 33, stride=2, warmup=1, lengths=(7, 0, 4), layout="packed", resets=0.4, **kind)
            made = case.draw()
            machine.backward(case, made, machine.forward(case, made, variant), variant)
            if "dtype" in kind and variant.octets == 4:
                machine.forward(case, made, replace(variant, blocks=1, grid=False, wgmma=True))
"""


@pytest.mark.check
def test_address_sanitizer():
    if not build.sanitizer():
        pytest.skip(f"{build.CXX} has no AddressSanitizer library")
    Machine("asan", asan=True).build()
    path = [str(build.ROOT), str(build.ROOT / "tests"), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED.format(path=path)],
        env=build.sanitized_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "Sanitizer" not in done.stderr, done.stderr
