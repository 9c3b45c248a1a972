"""`python -m benchmarks.speed` in small: what it writes, that it notices wrong results, what it refuses."""

import argparse
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the suite belongs to the repository, not to the package

from benchmarks import baselines, jsonl, timing  # noqa: E402
from benchmarks.speed import cases, contestants, measure, models, pictures, results, truth  # noqa: E402
from benchmarks.speed.__main__ import main  # noqa: E402
from stable_rnn import Chunked, Recurrent, Verified, Windowed  # noqa: E402

SMALL = [
    "--T",
    "32,64",
    "--B",
    "2",
    "--H",
    "8",
    "--k",
    "4,8",
    "--seconds",
    "0.02",
    "--longest",
    "5",
    "--devices",
    "cpu",
]
EVERYONE = contestants.Field(cases.PLANS, tuple(contestants.BASELINES))
LIMITS = measure.Limits(0.02, 20.0, 2**32)


def small(**changes):
    return cases.Case(
        **dict(
            sweeps=("T",),
            cell="lstm",
            dtype="float32",
            device="cpu",
            model="certified",
            passes="forward",
            T=48,
            B=2,
            H=8,
            k=5,
        )
        | changes
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "gemm_rate", lambda *_: baselines.product_rate(8, 8, (8,), seconds=0.01))
        assert main([*SMALL, "--cells", "lstm,rnn_tanh", "--dtypes", "float32", "--out", str(out)]) == 0
    return out, *jsonl.read(out / "speed.jsonl")


def test_the_file_has_what_a_reader_needs(written):
    _, about, rows = written
    assert about["finished"] and not about["not_run"]
    assert about["environment"].keys() >= {
        "commit",
        "date",
        "torch",
        "python",
        "processor",
        "cores",
        "threads",
        "backends",
        "load",
    }
    assert set(about["gemm_rates"]) == {"cpu float32"} and min(about["gemm_rates"].values()) > 0
    seen = {(r["cell"], r["dtype"], r["passes"], r["computes"]) for r in rows}
    assert len(seen) == 2 * 2 * 3
    for row in rows:
        assert row["wrong"] is None, row
        assert row["seconds"]["median"] > 0 and row["flops"] > 0 and row["rate_share"] > 0
        assert row["error_of_function"] <= row["tolerance"]
        assert (row["gradient_error"] is None) == (row["passes"] == "forward")
        if row["seconds"]["rounds"] > 1:
            assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        if row["ours"]:
            assert row["speedup"]["ratio"] > 0 and not row["speedup"]["over"].startswith(("Recurrent", "Windowed"))
        if row["computes"] != "recurrent":
            assert row["error"] <= row["bound_with_rounding"] and row["bound"] <= row["bound_with_rounding"]
        if Path("/proc/self/clear_refs").exists():
            assert row["peak_bytes"] >= 0


def test_absent_baselines_are_listed_with_the_reason(written):
    _, about, rows = written
    cases = len({tuple(row[name] for name in results.CASE) for row in rows if row["cell"] == "lstm"})
    first = about["absent"]["flashrnn: GPU only"]
    assert first["cases"] == cases and first["first"].startswith("lstm float32 cpu forward")


def test_table_and_pictures(written):
    out, _, rows = written
    assert sorted(file.name for file in out.iterdir()) == [
        "error.svg",
        "speed.jsonl",
        "speed.md",
        "speedup.svg",
        "time.svg",
    ]
    table = (out / "speed.md").read_text()
    assert "| nn.LSTM |" in table and "Windowed(4) [cpu]" in table and "| flashrnn |" in table
    shown = ElementTree.parse(out / "time.svg").getroot().itertext()  # text that stays text
    assert {"nn", "shifted GEMMs", "Chunked [cpu]", "lstm float32 cpu forward", "ms"} <= {
        text.strip() for text in shown
    }


def test_a_picture_drawn_again_is_the_same_file(written, tmp_path):
    _, _, rows = written
    rows = [row for row in rows if row["cell"] == "lstm" and row["passes"] == "forward"]
    (tmp_path / "again").mkdir()
    names = pictures.draw(tmp_path, rows, "here")
    assert pictures.draw(tmp_path / "again", rows, "here") == names == ["time.svg", "speedup.svg", "error.svg"]
    assert all((tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_every_number_of_the_sweeps_is_visited_once():
    grid = cases.Grid((64, 256), (1, 4), (16, 32), (4, 8), base=(("T", 100), ("B", 1), ("H", 30), ("k", 5)), T_of_B=64)
    made = cases.cases(
        {"cpu": grid}, list(cases.SWEEPS), ["lstm"], {"cpu": ["float32"]}, ["certified", "border"], list(cases.PASSES)
    )
    assert len(made) == len({(c.T, c.B, c.H, c.k, c.passes, c.model) for c in made})
    for sweep in cases.SWEEPS:
        visited = [c for c in made if sweep in c.sweeps and c.model == "certified" and c.passes == "forward"]
        assert sorted(getattr(c, sweep) for c in visited) == sorted(getattr(grid, sweep))
    assert {c.k for c in made if c.model == "border"} == {4, 8} and {c.passes for c in made if c.model == "border"} == {
        "forward"
    }


@pytest.mark.parametrize(
    "plan, steps",
    [
        (Recurrent(), 10),
        (Verified(), 10),
        (Windowed(3), 1 + 2 + 3 * 8),
        (Windowed(99), 55),
        (Chunked(4, 2), 14),
        (Chunked(2, 3), 10 + 2 + 3 * 3),
    ],
)
def test_operations_count_the_lanes_steps(plan, steps):
    case = small(T=10, B=3, H=2)
    assert cases.operations(case, plan) == 3 * 2 * 8 * 2 * (10 + steps)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch", [1, 3])
def test_baselines_compute_their_functions(kind, batch):
    m, x = kind(5, 7).double(), torch.randn(24, batch, 5).double()
    for k in (1, 5, 24, 30):
        want = torch.stack([m(x[max(0, t - k + 1) : t + 1])[0][-1] for t in range(24)])
        # float64: the same steps, products of other shapes
        for run in (baselines.unfolded_windows(m, x, k), baselines.shifted_products(m, x, k)):
            torch.testing.assert_close(run(), want, rtol=0, atol=1e-14)
    for chunk, warmup in ((8, 0), (8, 3), (8, 8), (24, 5), (12, 12)):
        want = torch.cat([m(x[max(0, s - warmup) : s + chunk])[0][-chunk:] for s in range(0, 24, chunk)])
        torch.testing.assert_close(baselines.overlap_chunks(m, x, chunk, warmup)(), want, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="T=24 must be a multiple of chunk=7"):
        baselines.overlap_chunks(m, x, 7, 2)


# ---- wrong results

OFF = {
    "one unit too large": lambda y: y * (1 + 1e-4),
    "an old output": lambda y: torch.cat([y[:1], y[:-1]]),
    "one NaN": lambda y: torch.where(torch.arange(y.numel()).view_as(y) == 7, torch.nan, y),
}


@pytest.mark.parametrize("how", OFF)
@pytest.mark.parametrize("passes", cases.PASSES)
def test_wrong_outputs_are_marked_and_get_no_speed_up(monkeypatch, how, passes):
    """One of ours and a baseline, both of them faster than anybody else could be."""
    honest, theirs = contestants.ours, contestants.shifted

    def broken(case, plain, x, plan, backend):
        made = honest(case, plain, x, plan, backend)
        if isinstance(plan, Windowed):
            run = made.run
            made.run = lambda: OFF[how](run())
        return made

    def wrong_baseline(case, plain, x):
        made = theirs(case, plain, x)
        run = made[0].run
        made[0].run = lambda: OFF[how](run())
        return made

    monkeypatch.setattr(contestants, "ours", broken)
    monkeypatch.setitem(contestants.BASELINES, "shifted", wrong_baseline)
    rows, _ = measure.run_case(small(passes=passes), EVERYONE, 1e10, LIMITS)
    wrong = {row["name"] for row in rows if row["wrong"]}
    assert wrong == {row["name"] for row in rows if row["name"].startswith(("Windowed", "shifted"))} and len(wrong) >= 3
    for row in rows:
        if row["wrong"]:
            assert row["speedup"] is None and row["speedup_over_torch"] is None and row["seconds"]["median"] > 0
        assert row["speedup"] is None or row["speedup"]["over"] != "shifted GEMMs"
    assert "WRONG" in results.line(next(row for row in rows if row["wrong"]))


def test_a_wrong_gradient_is_marked(monkeypatch):
    def forgets_the_past(case, plain, x):
        def run():
            y, c, h = [], None, None
            for t in range(case.T):  # the right outputs, but no gradient goes back in time
                out, (h, c) = plain(x[t : t + 1], None if h is None else (h.detach(), c.detach()))
                y.append(out)
            return torch.cat(y)

        return [contestants.Contestant("no time", Recurrent(), run, plain, answer="recurrent")]

    monkeypatch.setitem(contestants.BASELINES, "nn", forgets_the_past)
    rows, _ = measure.run_case(small(passes="forward+backward"), EVERYONE, 1e10, LIMITS)
    assert [row["name"] for row in rows if row["wrong"]] == ["no time"]
    assert rows[0]["wrong"].startswith("gradient error")


@pytest.mark.parametrize("k", [4, 6])
def test_a_window_of_another_length_is_marked(monkeypatch, k):
    monkeypatch.setitem(
        contestants.BASELINES,
        "unfold",
        lambda case, plain, x: [
            contestants.Contestant(
                "off by one", case.plan("windowed"), baselines.unfolded_windows(plain, x, k), plain, answer="windowed"
            )
        ],
    )
    rows, _ = measure.run_case(small(k=5), EVERYONE, 1e10, LIMITS)
    assert [row["name"] for row in rows if row["wrong"]] == ["off by one"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "cell, model",
    [("lstm", "certified"), ("lstm", "border"), ("rnn_tanh", "plain"), ("rnn_relu", "certified"), ("gru", "border")],
)
def test_sound_contestants_are_right(cell, model, dtype):
    for shape in (dict(T=1, B=1, H=1, k=1), dict(T=33, B=3, H=5, k=40)):
        rows, _ = measure.run_case(
            small(cell=cell, model=model, dtype=dtype, passes="forward+backward", **shape),
            EVERYONE,
            1e10,
            measure.Limits(1e-4, 20.0, 2**32),
        )
        assert len(rows) > 8 and not [row for row in rows if row["wrong"]]


def test_the_truth_of_windows_is_the_plain_loop():
    case = small(passes="forward+backward", T=20, k=6)
    plain = models.plain_module("lstm", 8, "plain", torch.float32, "cpu", 0)
    x = torch.rand(20, 2, 8)
    found = truth.Truth(case, plain, x)
    m, x64 = plain.double(), x.double().requires_grad_()
    y = torch.stack([m(x64[max(0, t - 5) : t + 1])[0][-1] for t in range(20)])
    want = torch.autograd.grad(y, (x64, m.weight_hh_l0), found.upstream.double())
    torch.testing.assert_close(found.windowed.y, y[found.windowed.times].detach(), rtol=0, atol=1e-14)
    for ours, theirs in zip(found.windowed.gradients.values(), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


# ---- who cannot take part


def test_what_fails_or_is_too_large_is_absent_with_the_reason(monkeypatch):
    def broken(case, plain, x):
        raise RuntimeError("no such kernel\nand a long story")

    def late(case, plain, x):
        return [contestants.Contestant("late", Recurrent(), lambda: 1 / 0, plain, answer="recurrent")]

    def large(case, plain, x):
        return [
            contestants.Contestant("large", Recurrent(), lambda: plain(x)[0], plain, answer="recurrent", bytes=2**40)
        ]

    for name, make in (("unfold", broken), ("shifted", late), ("overlap", large)):
        monkeypatch.setitem(contestants.BASELINES, name, make)
    rows, absent = measure.run_case(small(), EVERYONE, 1e10, LIMITS)
    why = {who.name: who.reason for who in absent}
    assert why["unfold"] == "RuntimeError: no such kernel" and why["late"].startswith("ZeroDivisionError")
    assert why["large"] == "would need 1024.0 GiB, the limit is 4.0 GiB"
    assert {row["name"] for row in rows} >= {"nn.LSTM", "Windowed(5) [cpu]"}
    _, absent = measure.run_case(small(T=512), EVERYONE, 1e10, measure.Limits(0.02, 1e-3, 2**32))
    assert any("s or more a call, the limit is 0.001 s" in who.reason for who in absent)


def test_a_package_that_does_not_import_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashrnn", None)
    x = torch.zeros(4, 1, 8)
    with pytest.raises(contestants.Unavailable, match="does not import: ModuleNotFoundError"):
        contestants.flashrnn(small(device="cuda"), nn.LSTM(8, 8), x, "cuda_fused")


def test_a_run_that_is_cut_short_says_so(tmp_path):
    assert main([*SMALL, "--cells", "lstm", "--dtypes", "float32", "--minutes", "0.00001", "--out", str(tmp_path)]) == 0
    about, _ = jsonl.read(tmp_path / "speed.jsonl")
    assert (
        not about["finished"] and len(about["not_run"]) >= 5 and "Not finished" in (tmp_path / "speed.md").read_text()
    )


def test_a_run_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "gemm_rate", lambda *_: 1e10)
    monkeypatch.setattr(pictures, "draw", lambda *_: [])
    given = [
        *SMALL,
        "--cells",
        "lstm",
        "--dtypes",
        "float32",
        "--passes",
        "forward",
        "--commit",
        "abc",
        "--out",
        str(tmp_path),
    ]
    file = tmp_path / "speed.jsonl"
    assert main([*given, "--minutes", "0.00001"]) == 0
    assert main([*given, "--resume", "--sweeps", "T"]) == 0
    some, kept = jsonl.read(file)
    assert kept and not some["finished"] and some["not_run"]
    assert main([*given, "--resume"]) == 0
    about, rows = jsonl.read(file)
    assert about["finished"] and rows[: len(kept)] == kept
    found = [tuple(row[name] for name in results.CASE) for row in rows]
    assert len(set(found)) == len(
        [case for case, after in zip(found, [*found[1:], None]) if case != after]
    )  # each in one piece
    capsys.readouterr()
    before = file.read_bytes()
    assert main([*given, "--resume", "--commit", "abd"]) == 2 and "commit abc" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_case_that_was_cut_short_is_measured_again(tmp_path, monkeypatch):
    """A run that was killed within the second case's rows, at the worst: within a line."""
    monkeypatch.setattr(measure, "gemm_rate", lambda *_: 1e10)
    monkeypatch.setattr(pictures, "draw", lambda *_: [])
    given = [
        *SMALL,
        "--cells",
        "lstm",
        "--dtypes",
        "float32",
        "--passes",
        "forward",
        "--sweeps",
        "T",
        "--out",
        str(tmp_path),
    ]
    file = tmp_path / "speed.jsonl"
    assert main(given) == 0
    _, whole = jsonl.read(file)
    lines = file.read_bytes().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if b"about" not in line)
    file.write_bytes(b"".join(lines[:last]) + lines[last][:50])
    with pytest.warns(UserWarning, match=f"speed.jsonl, line {last + 1}: cut short"):
        assert main([*given, "--resume"]) == 0
    _, again = jsonl.read(file)
    first = [row for row in whole if row["T"] == 32]
    assert again[: len(first)] == first
    assert [row["name"] for row in again] == [row["name"] for row in whole] and len(first) < len(whole)


def test_the_ways_of_a_gpu(monkeypatch):
    """Events, peak memory and the facts, with stand-ins for the device: that they are asked for as torch names them."""
    asked = []

    class Event(torch.cuda.Event):
        def __new__(cls, enable_timing):
            assert enable_timing
            return object.__new__(cls)

        def __init__(self, enable_timing):
            pass

        def record(self):
            asked.append("record")

        def synchronize(self):
            asked.append("wait")

        def elapsed_time(self, other):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name, value in dict(
        synchronize=None,
        reset_peak_memory_stats=None,
        memory_allocated=100,
        max_memory_allocated=350,
        mem_get_info=(1000, 2000),
    ).items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: asked.append(name) or value)
    assert timing.clock(lambda: asked.append("run"), 3, "cuda") == pytest.approx(2e-3)
    assert asked == ["synchronize", "record", "run", "run", "run", "record", "wait"]
    asked.clear()
    assert measure.peak_bytes(lambda: asked.append("run"), "cuda") == 250
    assert asked.index("reset_peak_memory_stats") < asked.index("run") < asked.index("max_memory_allocated")
    assert measure.memory_limit("cuda") == 800
    card = argparse.Namespace(name="a card", major=9, minor=0, multi_processor_count=132, total_memory=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    facts = results.environment(["cuda"], "abc")
    assert facts["gpu"]["name"] == "a card" and facts["gpu"]["capability"] == "9.0" and facts["commit"] == "abc"


@pytest.mark.parametrize(
    "given, message",
    [
        (["--cells", "qrnn"], "'qrnn' is none of lstm, gru, rnn_tanh, rnn_relu"),
        (["--plans", "windowed,fast"], "'fast' is none of"),
        (["--dtypes", "int8"], "'int8' is none of"),
        (["--backends", "mps"], "'mps' is none of"),
        (["--T", "64,x"], "must be whole numbers with commas between them"),
        (["--k", "0"], "must be above 0"),
        (["--seconds", "-1"], "must be above 0"),
        (["--quicker"], "unrecognized arguments"),
        (["--devices", "cpu", "--dtypes", "tf32"], "a GPU's"),
    ],
)
def test_bad_input_is_one_line(given, message, tmp_path, capsys):
    try:
        code = main([*given, "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr().err
    assert code == 2 and message in captured and captured.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*SMALL, "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(capsys):
    assert main(["--devices", "cuda"]) == 2
    assert capsys.readouterr().err == "benchmarks.speed: --devices cuda: torch finds no usable GPU here\n"
