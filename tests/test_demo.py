"""The demo in small, its parts, and what it refuses."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import stable_rnn
from stable_rnn import Chunked, Recurrent, StableLSTM, Verified, Windowed
from stable_rnn._errors import UserError
from stable_rnn.cli import main
from stable_rnn.demo import compare, data, parse_plan

TEXT = "it was the best of times, it was the worst of times;\n" * 400


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_small_demo_writes_a_picture_and_numbers(text, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "stable_rnn.cli", "demo", "--text", str(text), "--steps", "3", "--hidden", "8", "--length", "300",
               "--threads", "1", "--out", str(out), "--plan", "windowed:4", "--plan", "verified", "--plan", "chunked:64,16"]
    run = subprocess.run(command, cwd=Path(stable_rnn.__file__).parent.parent, env=os.environ | {"COLUMNS": "300"}, text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert sorted(file.name for file in out.iterdir()) == ["demo.json", "demo.png"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")

    found = json.loads((out / "demo.json").read_text())
    assert found["environment"]["threads"] == 1 and found["options"]["length"] == 300
    for name, model in found["models"].items():
        assert name in run.stdout and 0 < model["bits_per_character"] < 10
        ways = {way["way"]: way for way in model["ways"]}
        assert list(ways)[2:] == ["Windowed(4)", "Verified()", "Chunked(64, 16)"]
        assert all(way["seconds"] > 0 for way in ways.values())
        for point in [*model["windows"], *ways.values()]:
            if point["bound_float32"] is not None and point["error"] is not None:
                assert point["error"] <= point["bound_float32"], (name, point)
    certified = found["models"]["Certified()"]
    assert certified["certificate"]["stable"] and certified["windows"][-1]["bound"] is not None
    assert all(len(seconds) == len(found["speed"]["lengths"]) for seconds in found["speed"]["seconds"].values())


@pytest.mark.parametrize(("given", "plan"), [
    ("recurrent", Recurrent()), ("windowed:32", Windowed(32)), ("chunked:256,0", Chunked(256, 0)),
    ("verified", Verified()), ("verified:0", Verified(tol=0.0)), ("verified:1e-5", Verified(tol=1e-5)),
])
def test_plans_are_read(given, plan):
    assert parse_plan(given) == plan


@pytest.mark.parametrize("given", ["", "fast", "windowed", "windowed:0", "windowed:x", "windowed:1,2", "chunked:8", "chunked:0,1",
                                   "chunked:8,-1", "recurrent:1", "verified:-1", "verified:nan", "verified:1,2"])
def test_wrong_plans_are_named(given):
    with pytest.raises(UserError, match=f"--plan {given}: .*allowed are"):
        parse_plan(given)


@pytest.mark.parametrize(("steps", "plan"), [(48, Chunked(8, 5)), (48, Chunked(16, 0)), (49, Chunked(7, 9)), (30, Chunked(40, 3))])
def test_overlapping_chunks_are_the_chunked_plan(steps, plan):
    plain, x = nn.LSTM(3, 6).requires_grad_(False), torch.randn(steps, 1, 3)
    exact = StableLSTM(3, 6, stability=None, backend="reference")
    exact.load_state_dict(plain.state_dict())
    exact.double().requires_grad_(False)
    error = (compare.overlapping(plain, x, plan) - compare.under(exact, x.double(), plan)).abs().max()
    eager = (plain(x)[0] - compare.under(exact, x.double(), Recurrent())).abs().max()
    assert error <= 2 * eager + 4 * torch.finfo(torch.float32).eps  # outputs are within 1: each is rounded in a few places


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
