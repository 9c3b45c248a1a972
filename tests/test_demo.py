"""The demo in small, its parts, and what it refuses."""

import errno
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import stable_rnn
from stable_rnn import Chunked, Recurrent, Scanned, StableLSTM, Verified, Windowed
from stable_rnn._errors import UserError
from stable_rnn.cli import main
from stable_rnn.demo import compare, data, parse_plan, picture, progress, report, train

TEXT = "it was the best of times, it was the worst of times;\n" * 400


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_small_demo_writes_a_picture_and_numbers(text, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "stable_rnn.cli",
        "demo",
        "--text",
        str(text),
        "--steps",
        "3",
        "--hidden",
        "8",
        "--length",
        "300",
        "--threads",
        "1",
        "--out",
        str(out),
        "--plan",
        "windowed:4",
        "--plan",
        "verified",
        "--plan",
        "chunked:64,16",
        "--plan",
        "scanned",
    ]
    run = subprocess.run(
        command,
        cwd=Path(stable_rnn.__file__).parent.parent,
        env=os.environ | {"COLUMNS": "300"},
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert sorted(file.name for file in out.iterdir()) == ["demo.json", "demo.png"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")

    lines = run.stdout.splitlines()  # no terminal: a line for each part
    assert (
        all(
            f"train {name}: 3 steps" in lines
            and f"run {name}: {30 if name == 'Cascade()' else 25} turns" in lines
            and f"windows of {name}: 9 windows" in lines
            for name in train.LAYERS
        )
        and "speed of Cascade(): 150 turns" in lines
    )

    found = json.loads((out / "demo.json").read_text())
    assert found["cut"] == [] and "Cut short" not in run.stdout
    assert found["environment"]["threads"] == 1 and found["options"]["length"] == 300
    for name, model in found["models"].items():
        assert name in run.stdout and 0 < model["bits_per_character"] < 10
        ways = {way["way"]: way for way in model["ways"]}
        scanned = ["Scanned()"] * (name == "Cascade()")
        assert list(ways)[2:] == ["Windowed(4)", "Verified()", "Chunked(64, 16)", *scanned]
        assert all(
            0 < way["seconds"]["low"] <= way["seconds"]["median"] <= way["seconds"]["high"] for way in ways.values()
        )
        assert ways["Verified()"]["passes"] >= 1 and ways["Windowed(4)"]["passes"] is None
        for point in [*model["windows"], *ways.values()]:
            if point["bound_float32"] is not None and point["error"] is not None:
                assert point["error"] <= point["bound_float32"], (name, point)
    assert list(found["models"]) == ["nn.LSTM", "ForgetCap(0.9)", "Certified()", "Cascade()"]
    for name in ("Certified()", "Cascade()"):
        certified = found["models"][name]
        assert certified["certificate"]["stable"] and certified["windows"][-1]["bound"] is not None
    assert {way["way"]: way for way in found["models"]["Cascade()"]["ways"]}["Scanned()"]["error"] < 1e-5
    assert all(len(seconds) == len(found["speed"]["lengths"]) for seconds in found["speed"]["seconds"].values())


def small(text, out, *more):
    return [
        "demo",
        "--text",
        str(text),
        "--steps",
        "3",
        "--hidden",
        "8",
        "--length",
        "300",
        "--threads",
        "1",
        "--out",
        str(out),
        *more,
    ]


def test_a_budget_that_is_too_small_ends_and_invents_nothing(text, tmp_path, capsys, recwarn):
    text = text.rename(text.with_name("$\\wrong{$.txt"))  # no formula for the picture
    assert main(small(text, tmp_path / "out", "--budget", "1e-9")) == 0
    out, err = capsys.readouterr()
    assert (
        "Nan" not in out
        and "1 of 3 steps of training, time was up" in out
        and "not run, time was up" in out
        and err == ""
    )
    found = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert len(found["cut"]) == 13 and found["cut"][:2] == ["train nn.LSTM: 1 of 3 steps", "run nn.LSTM: 0 of 30 turns"]
    assert all(cut in out for cut in found["cut"])
    for model in found["models"].values():
        assert model["steps"] == 1 and model["bits_per_character"] > 0
        assert all(way[name] is None for way in model["ways"] for name in ("seconds", "error", "bits"))
        assert all(point["error"] is None for point in model["windows"])
    assert all(s is None for seconds in found["speed"]["seconds"].values() for s in seconds)
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert not [w for w in recwarn if issubclass(w.category, (UserWarning, RuntimeWarning))]


def test_time_that_is_left_goes_to_the_parts_that_follow(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    screen = Console(file=io.StringIO(), width=200)
    with progress.Schedule(screen, 140.0, models=1) as schedule:  # 8 + 2 + 1 + 3 shares of 10 s
        training = schedule.part("train", "x", 4, "steps")
        for _ in range(4):
            assert training.room()
            now[0] += 7.0
            training.advance("loss 2")
        running = schedule.part("run", "x", 2, "turns")  # 112 s are left
        assert running.room(112 / 3 - 0.1) and not running.room(112 / 3 + 0.1)
        now[0] = 139.0
        assert not running.room()
        late = schedule.part("windows of", "x", 9, "windows")
        assert late.room() and late.room(0.2) and not late.room(0.3)
        now[0] = 200.0
        assert not schedule.part("speed of", "x", 5, "turns").room()
    assert schedule.cut == ["run x: 0 of 2 turns", "windows of x: 0 of 9 windows", "speed of x: 0 of 5 turns"]
    lines = screen.file.getvalue().splitlines()
    assert lines[:3] == ["train x: 4 steps", "  2 of 4 steps, 14 s, loss 2", "  4 of 4 steps, 28 s, loss 2"]


@pytest.mark.parametrize(("many", "turns"), [(0.001, [1, 4] * 5), (1.0, [1, 4] + [1] * 4)])
def test_a_hopeless_number_of_threads_gets_one_turn(monkeypatch, many, turns):
    ran = []
    monkeypatch.setattr(compare, "timed", lambda count, run: ran.append(count) or (0.002 if count == 1 else many))
    monkeypatch.setattr(compare, "worthwhile", lambda run: [1, 4])
    part = progress.Schedule(Console(file=io.StringIO()), 60.0, models=1).part("run", "x", 5, "turns")
    assert compare.in_turns([compare.Way("nn.LSTM", lambda x: x, None)], torch.zeros(3), part) == [
        compare.Time(*[min(0.002, many)] * 3)
    ]
    assert ran == turns and part.done == 5


def test_threads_that_wait_for_each_other_are_found_out_by_something_short(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for many, found, runs in ((0.001, [1, 4], 10), (0.005, [1, 4], 10), (0.007, [1], 6)):
        ran = []
        monkeypatch.setattr(compare, "timed", lambda count, run: ran.append(count) or (0.002 if count == 1 else many))  # noqa: B023
        assert compare.worthwhile(lambda: None) == found and len(ran) == runs


@pytest.mark.parametrize("name", ["demo.png", "demo.json"])
def test_a_disk_that_is_full_is_named_by_the_file_and_leaves_no_half(text, tmp_path, capsys, monkeypatch, name):
    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a failed write() names no file

    whole = report.whole
    for module in (report, picture):
        monkeypatch.setattr(module, "whole", lambda path, write: whole(path, full if path.name == name else write))
    assert main(small(text, tmp_path, "--budget", "1e-9")) == 1
    assert capsys.readouterr().err == f"stable-rnn demo: {tmp_path / name}: No space left on device\n"
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "demo.json"} - {name}


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        ("recurrent", Recurrent()),
        ("windowed:32", Windowed(32)),
        ("chunked:256,0", Chunked(256, 0)),
        ("verified", Verified()),
        ("verified:0", Verified(tol=0.0)),
        ("verified:1e-5", Verified(tol=1e-5)),
    ],
)
def test_plans_are_read(given, plan):
    assert parse_plan(given) == plan


@pytest.mark.parametrize("spread", [(1.0, 1.0, 1.0), (2.0, 1.0, 4.0)])
def test_the_spread_over_rounds_is_drawn_around_the_median(spread):
    axes = picture.pyplot.figure().subplots()
    found = compare.Speed(
        "x", [1000, 4000, 8000], {"nn.LSTM": [compare.Time(*spread)] * 2 + [None], "late": [None] * 3}
    )
    picture.draw_speed(axes, found)
    median, low, high = (torch.tensor([1.0, 4.0]) / seconds for seconds in spread)  # thousand characters a second
    (bars,) = axes.containers[0].lines[2]
    assert list(axes.containers[0].lines[0].get_ydata()) == median.tolist()
    assert torch.tensor([[y for _, y in bar] for bar in bars.get_segments()]).equal(
        torch.stack([high, low], 1).double()
    )
    picture.pyplot.close()


def test_passes_of_verified_runs_are_told():
    row = compare.Row
    assert report.passes([row("nn.LSTM"), row("Verified()", passes=2), row("Verified(tol=0)", passes=3)]) == "2"
    assert (
        report.passes([row("Verified()", passes=8, fell_back=True)]) == "fell back" and report.passes([row("x")]) == "-"
    )


def test_a_cascade_alone_is_scanned():
    plain, cascade = train.LAYERS["Certified()"](3, 8), train.LAYERS["Cascade()"](3, 8)
    names = [[way.name for way in compare.ways(layer, [Verified(), Scanned()])] for layer in (plain, cascade)]
    assert names[1] == [*names[0], "Scanned()"] and names[0][-1] == "Verified()"


@pytest.mark.parametrize(
    "given",
    [
        "",
        "fast",
        "windowed",
        "windowed:0",
        "windowed:x",
        "windowed:1,2",
        "chunked:8",
        "chunked:0,1",
        "chunked:8,-1",
        "recurrent:1",
        "verified:-1",
        "verified:nan",
        "verified:1,2",
    ],
)
def test_wrong_plans_are_named(given):
    with pytest.raises(UserError, match=f"--plan {given}: .*allowed are"):
        parse_plan(given)


@pytest.mark.parametrize(
    ("steps", "plan"), [(48, Chunked(8, 5)), (48, Chunked(16, 0)), (49, Chunked(7, 9)), (30, Chunked(40, 3))]
)
def test_overlapping_chunks_are_the_chunked_plan(steps, plan):
    plain, x = nn.LSTM(3, 6).requires_grad_(False), torch.randn(steps, 1, 3)
    exact = StableLSTM(3, 6, stability=None, backend="reference")
    exact.load_state_dict(plain.state_dict())
    exact.double().requires_grad_(False)
    error = (compare.overlapping(plain, x, plan) - compare.under(exact, x.double(), plan)).abs().max()
    eager = (plain(x)[0] - compare.under(exact, x.double(), Recurrent())).abs().max()
    assert (
        error <= 2 * eager + 4 * torch.finfo(torch.float32).eps
    )  # outputs are within 1: each is rounded in a few places


def test_a_partial_last_chunk_warms_up_longer():
    plain, x = nn.LSTM(3, 6).requires_grad_(False), torch.randn(50, 1, 3)
    y, last = compare.overlapping(plain, x, Chunked(8, 5)), plain(x[37:])[0]  # 13 steps, as the other chunks
    assert y.shape == (50, 1, 6)
    assert (y[48:] - last[11:]).abs().max() <= 4 * torch.finfo(torch.float32).eps


def refused(capsys, *argv):
    assert main(["demo", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, (out, err)
    return err


def test_bad_input_is_refused_with_one_line(capsys, text, tmp_path):
    assert "No such file" in refused(capsys, "--text", tmp_path / "missing.txt")
    assert "Is a directory" in refused(capsys, "--text", tmp_path)
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 100)
    assert "not a UTF-8 text" in refused(capsys, "--text", tmp_path / "binary.txt")
    (tmp_path / "short.txt").write_text("too short")
    assert "too few" in refused(capsys, "--text", tmp_path / "short.txt")
    assert "too few for --length 16384" in refused(capsys, "--text", text)
    assert "no such folder" in refused(capsys, "--data", tmp_path / "missing")
    assert "test.txt" in refused(capsys, "--data", tmp_path)
    assert "not both" in refused(capsys, "--data", tmp_path, "--text", text)
    assert "no such plan" in refused(capsys, "--plan", "fast")
    assert "--out" in refused(capsys, "--text", text, "--length", 300, "--out", text / "below")


def test_a_folder_or_its_parent_can_be_named(tmp_path):
    for name, letters in (("ptb", "ab"), ("wikitext-2", "xyz")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / ("train.txt" if name == "ptb" else "valid.txt")).write_text(letters * 6000)
        (folder / "test.txt").write_text(letters * 10 + "?")
    corpus = data.load(None, str(tmp_path), 16)
    assert corpus.symbols == 3 and "train.txt" in corpus.name
    assert corpus.held_out.tolist() == [1, 2] * 10 + [0]  # 0: a character that the training text has not
    assert data.load(None, str(tmp_path / "wikitext-2"), 16).symbols == 4


def test_the_manual_is_text_enough():
    corpus = data.load(None, None, 16384)
    assert 60 < corpus.symbols < 200 and len(corpus.train) > 300_000
    assert int(corpus.train.max()) < corpus.symbols and int(corpus.train.min()) >= 0
