"""The script that fits the cost models' constants to a measurement: on rows made from known constants, and on rows that are none."""

import json
import math
import random
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from executor import build

from stable_rnn import _native
from stable_rnn.cells import CELLS
from stable_rnn.ops import cuda_device
from stable_rnn.ops.kernel_args import DTYPES, TF32
from stable_rnn.ops.recurrence import cuda, policy

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the suite belongs to the repository, not to the package
from benchmarks import fit_costs, gpu_costs, gpu_table, jsonl  # noqa: E402
from benchmarks.speed.cases import DTYPES as NAMES  # noqa: E402
from benchmarks.timing import Time  # noqa: E402

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")
CLOCK = 1.7e9


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    build.on_cpu_tensors(monkeypatch)
    cuda._tiling.cache_clear()
    yield
    cuda_device.limits.cache_clear()
    cuda._tiling.cache_clear()


def shapes():
    """What `gpu_costs.costs` measures, without times."""
    found = []
    for cell, dtype, hidden, lanes in gpu_costs.SHAPES:
        for backward in (False, True):
            code = TF32 if dtype == "tf32" else DTYPES[NAMES[dtype]]
            tiling = cuda.tiling(build.LIMITS, backward, cell, code, hidden, lanes)
            assert tiling["message"] is None
            shape = dict(backward=backward, cell=cell, dtype=dtype, hidden=hidden, lanes=lanes, steps=[64, 128])
            device = dict(code=code, limits=list(build.LIMITS), clock=CLOCK, interface=_native.INTERFACE)
            found.append(shape | device | {"tiling": tiling})
    return found


def timed(rows, model, costs, noise=0.0):
    """The rows with the model's seconds, of T and of 2 T, with launches in both."""
    draw = random.Random(1)
    steps = [seconds * math.exp(draw.gauss(0, noise)) for seconds in model(costs)]
    return [row | {"seconds": [1e-5 + 64 * step, 1e-5 + 128 * step]} for row, step in zip(rows, steps)]


def moved(start, seed=0):
    draw = random.Random(seed)
    return [value * math.exp(draw.uniform(-0.6, 0.6)) for value in start.values()]


def fitted(start, model, rows):
    return fit_costs.fit(start, model, [fit_costs.seconds_of(row) for row in rows])


def test_the_model_is_the_one_that_tilings_come_from():
    now = list(cuda_device.lib.step_costs_cuda().values())
    rows = shapes()
    for row, seconds in zip(rows, fit_costs.step_model(rows)(now)):
        assert seconds * CLOCK == pytest.approx(row["tiling"]["clocks"], rel=1e-12)  # one formula; float64


@pytest.mark.parametrize("seed", [0, 2])
def test_known_constants_are_found(seed):
    rows, start = shapes(), cuda_device.lib.step_costs_cuda()
    model, true = fit_costs.step_model(rows), moved(start, seed)
    found = fitted(start, model, timed(rows, model, true))
    assert found.names == list(start) and None not in found.factor
    assert found.after == pytest.approx(true, rel=1e-3)  # drawn a little towards the start

    noisy = timed(rows, model, true, noise=0.05)
    found = fitted(start, model, noisy)
    assert fit_costs.error_of(model, found.after, [fit_costs.seconds_of(row) for row in noisy]) < 1.06
    for value, want, factor in zip(found.after, true, found.factor):
        assert factor is not None and abs(math.log(value / want)) < 3 * math.log(factor)


def test_the_choices_constants_are_found():
    rows = [row for row in shapes() if not row["backward"]]
    model, start = fit_costs.policy_model(rows), fit_costs.policy_start()
    true = moved(start, 3)
    assert fitted(start, model, timed(rows, model, true)).after == pytest.approx(true, rel=1e-3)  # as above


def test_the_choices_model_is_the_policys():
    """Whose costs are in steps of one lane."""
    rows = [row for row in shapes() if not row["backward"]]
    for row, seconds in zip(rows, fit_costs.policy_model(rows)(list(fit_costs.policy_start().values()))):
        weights = CELLS[row["cell"]].gates * row["hidden"] ** 2
        costs = policy.Costs(policy.Problem(row["cell"], 100, 1), 1, weights, "cuda")
        step = policy.DEVICES["cuda"].step + weights / policy.DEVICES["cuda"].rate
        assert seconds == pytest.approx(costs.run(row["lanes"], 1) * step, rel=1e-12)  # one formula


def test_a_constant_that_no_row_depends_on_stays():
    rows = [row for row in shapes() if row["tiling"]["blocks"] == 1]
    model, start = fit_costs.step_model(rows), cuda_device.lib.step_costs_cuda()
    found = fitted(start, model, timed(rows, model, moved(start)))
    for name in ("cluster", "cluster_block", "sent", "grid"):
        i = found.names.index(name)
        assert found.factor[i] is None and found.after[i] == found.before[i] == start[name]
    assert found.factor[found.names.index("block")] is not None
    assert "grid " in str(found) and "kept" in str(found) and {"sent", "grid"} <= set(found.kept)


# ---- rows and files


@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16"])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_measured_is_what_the_fit_reads(cell, dtype, monkeypatch):
    """The part of the targets with the CUDA kernels, in the block executor."""
    monkeypatch.setattr(gpu_costs, "native", cuda)
    monkeypatch.setattr(gpu_costs, "STEPS", 8)
    monkeypatch.setattr(cuda_device, "clock", lambda index: CLOCK)
    monkeypatch.setattr(gpu_costs, "race", lambda runs, *_, **__: {t: Time(1e-6 * int(t), 0, 0) for t in runs})
    table = gpu_table.Table(Namespace(rehearse=True, seconds=0.01), jsonl.Log(None))
    for backward in (False, True):
        gpu_costs.measure(table, "step", backward, cell, dtype, 20, 3)
        gpu_costs.tf32(dtype == "tf32")
        row = table.log.rows[-1]
        found = row["costs"] | gpu_costs.tiling_of(backward, cell, dtype, 20, 3)
        gpu_costs.tf32(False)
        assert (
            row["wrong"] is None
            and row["value"] == pytest.approx(1)
            and fit_costs.seconds_of(found) == pytest.approx(1e-6)
        )
        assert found["steps"] == [8, 16] and (found["code"] == TF32) == (dtype == "tf32")
        now = list(cuda_device.lib.step_costs_cuda().values())
        assert fit_costs.step_model([found])(now) == [pytest.approx(found["tiling"]["clocks"] / CLOCK)]


def file_of(path, rows, **about):
    """As `gpu_targets` writes it."""
    facts = {"commit": "c" * 40, "gpu": {"name": "GPU X"}}
    head = {"finished": True, "rehearsal": False, "environment": facts} | about
    lines = [{"about": head}] + [{"case": "a", "value": 1.0, "wrong": None, "costs": row} for row in rows]
    lines.append({"case": "a target", "value": 1.0, "wrong": None})
    lines += [
        {"case": "b", "value": v, "wrong": wrong, "costs": rows[0]}
        for v, wrong in ((1.0, "NaN"), (-1e-9, None), (None, None))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def measured():
    rows, start = shapes(), cuda_device.lib.step_costs_cuda()
    model = fit_costs.step_model(rows)
    return timed(rows, model, moved(start))


def test_from_a_file_into_the_header(measured, tmp_path, monkeypatch, capsys):
    header = tmp_path / "step_costs.h"
    header.write_text(fit_costs.HEADER.read_text())
    before = header.read_text()
    monkeypatch.setattr(fit_costs, "HEADER", header)
    monkeypatch.setattr(fit_costs, "ROOT", tmp_path)
    path = file_of(tmp_path / "rows.jsonl", measured)
    assert fit_costs.main([str(path), "--commit", "c" * 40]) == 0
    out = capsys.readouterr().out
    assert header.read_text() == before and "double grid = " in out and '    "cuda": Device(' in out
    assert "98 rows of GPU X" in out and out.count(" lanes, backward") == 49
    device = eval(out[out.index("Device(") :].splitlines()[0].rstrip(","), {"Device": policy.Device, "inf": math.inf})
    assert device.source.startswith("fitted to 49 rows of GPU X") and device.source.endswith("; not fitted: host, mend")
    assert device.host == policy.DEVICES["cuda"].host

    assert fit_costs.main([str(path), "--commit", "c" * 40, "--write"]) == 0
    text = header.read_text()
    start = cuda_device.lib.step_costs_cuda()
    for name, value in zip(start, moved(start)):
        assert f"double {name} = {value:.4g};" in text
    assert '"fitted to 98 rows of GPU X, half of them within 0%"' in text and "guessed" not in text


def test_the_report_of_the_check_is_read_too(measured, tmp_path):
    facts = {"rehearsal": False, "environment": {}}
    path = file_of(tmp_path / "a.jsonl", measured, costs=facts)
    assert len(fit_costs.rows_of(path, "c" * 40)[0]) == 98


def test_a_source_names_what_is_not_fitted(measured, tmp_path, monkeypatch, capsys):
    """No guess may look measured."""
    header = tmp_path / "step_costs.h"
    header.write_text(fit_costs.HEADER.read_text())
    monkeypatch.setattr(fit_costs, "HEADER", header)
    monkeypatch.setattr(fit_costs, "ROOT", tmp_path)
    rows = [row for row in measured if not (row["tiling"]["blocks"] > 1 and row["tiling"]["cluster"] == 1)]
    path = file_of(tmp_path / "rows.jsonl", rows)
    assert fit_costs.main([str(path), "--commit", "c" * 40, "--write"]) == 0
    source = next(line for line in header.read_text().splitlines() if "within" in line)
    assert (
        "; not fitted: " in source
        and "grid" in source.split("not fitted")[1]
        and "double grid = 2750;" in header.read_text()
    )


@pytest.mark.parametrize(
    "about, change, reason",
    [
        ({"rehearsal": True}, {}, "a rehearsal on the CPU measures no GPU"),
        ({"costs": {"rehearsal": True}}, {}, "a rehearsal on the CPU measures no GPU"),
        ({"environment": {"commit": "c" * 40}}, {}, "names no GPU"),
        ({"environment": {"commit": "b" * 40, "gpu": {"name": "X"}}}, {}, "measured at commit bbb"),
        ({}, {"interface": _native.INTERFACE - 1}, f"rows of interface {_native.INTERFACE - 1}"),
        ({}, {"tiling": {"blocks": 1}}, "without the device's clock or its tiling"),
        ({}, {"clock": None}, "without the device's clock"),
        ({"environment": None}, {}, "not as benchmarks.gpu_targets writes it: TypeError"),
        ({"environment": {"commit": "c" * 40, "gpu": {}}}, {}, "not as benchmarks.gpu_targets writes it: KeyError"),
        ({}, {"tiling": None}, "not as benchmarks.gpu_targets writes it: AttributeError"),
        ({}, {"tiling": dict.fromkeys(fit_costs.TILING, 3)}, "no such tiling"),
        ({}, {"cell": "mgu"}, "KeyError: 'mgu'"),
        ({}, {"hidden": "wide"}, "not as benchmarks.gpu_targets writes it: TypeError"),
        ({}, {"seconds": [1e-5]}, "not as benchmarks.gpu_targets writes it: IndexError"),
        ({}, {"seconds": [2e-5, 1e-5]}, "a step that takes no time"),
        ({}, {"seconds": [1e-5, math.nan]}, "a step that takes no time"),
        ({}, {"steps": [64, 64]}, "not as benchmarks.gpu_targets writes it: ZeroDivisionError"),
        ({}, None, "too few"),
    ],
)
def test_what_is_no_measurement_of_these_kernels_is_refused(about, change, reason, measured, tmp_path, capsys):
    rows = measured[:20] if change is None else [measured[0] | change, *measured[1:]]
    path = file_of(tmp_path / "rows.jsonl", rows, **about)
    before = fit_costs.HEADER.read_text()
    assert fit_costs.main([str(path), "--commit", "c" * 40, "--write"]) == 2
    out, err = capsys.readouterr()
    assert reason in err and err.count("\n") == 1 and fit_costs.HEADER.read_text() == before


def test_without_the_kernels(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda_device, "lib", None)
    assert fit_costs.main([str(tmp_path / "rows.jsonl")]) == 2
    assert "part of the CUDA kernels" in capsys.readouterr().err
