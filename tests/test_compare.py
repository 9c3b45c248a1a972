"""`python -m benchmarks.compare`: the order of turns, the ratios, what a tree lacks, what is refused. Real builds take too long here."""

import os
import statistics
import subprocess
from pathlib import Path

import pytest

from benchmarks import compare
from stable_rnn._errors import UserError

pytestmark = pytest.mark.check
STEP = "RNNCell step B=1 H=64"


class Clock:
    """A worker whose machine slows down from turn to turn."""

    now = 0.0

    def __init__(self, side, seconds, asked):
        self.side, self.seconds, self.asked = side, seconds, asked

    def ask(self, **what):
        self.asked.append((self.side, what))
        if "calls" in what:
            Clock.now += 1
        return {"seconds": self.seconds * (1 + Clock.now)}


def test_turns_alternate_and_a_drift_meets_both():
    assert compare.turns(3) == [("ref", "here"), ("here", "ref"), ("ref", "here")]
    asked, Clock.now = [], 100.0
    row = compare.run_case("x", {"ref": Clock("ref", 1e-3, asked), "here": Clock("here", 1e-3, asked)}, 8, 2.0)
    measured = [side for side, what in asked if "calls" in what]
    assert (
        measured == ["ref", "here", "here", "ref"] * 4
        and len({what["calls"] for _, what in asked if "calls" in what}) == 1
    )
    low, high = row["range"]
    assert (
        low < 1 < high and abs(row["ratio"] - 1) < 1e-3 < high - 1
    )  # a round is off by a step of the drift, their median is not


def test_ratios_and_their_spread():
    row = compare.summary([2.0, 3.0, 4.0, 6.0, 5.0], [1.0, 2.0, 2.0, 2.0, 5.0])
    assert row["ratios"] == [2.0, 1.5, 2.0, 3.0, 1.0] and row["ratio"] == 2.0 and row["fastest"] == 2.0
    assert row["range"] == [1.0, 3.0] and row["quartiles"] == [1.5, 2.0]
    assert row["ref_ms"] == 4000.0 and row["here_ms"] == 2000.0


@pytest.mark.parametrize(
    "here, said", [([1.0, 2.0], "faster in every round"), ([4.0, 5.0], "slower in every round"), ([1.0, 5.0], None)]
)
def test_a_line_says_what_every_round_says(here, said):
    shown = compare.line({"case": "x"} | compare.summary([2.0, 3.0], here))
    assert ("in every round" in shown) is (said is not None) and (said or "") in shown
    assert f"{statistics.median([2.0 / here[0], 3.0 / here[1]]):.3f} (" in shown


@pytest.fixture
def bare(tmp_path):
    """A tree whose stable_rnn is younger than nothing: it has the steps of an RNN cell alone, and one that ends the process."""
    (tmp_path / "stable_rnn").mkdir()
    (tmp_path / "stable_rnn" / "__init__.py").write_text(
        "import os\nfrom torch import nn\nprint('a word of its own')\n"
        "def StableRNNCell(inputs, hidden, stability): return nn.RNNCell(inputs, hidden)\n"
        "def StableLSTMCell(inputs, hidden, stability): os._exit(5)\n"
    )
    return tmp_path


def test_two_trees_in_two_processes(bare):
    workers = {"ref": compare.Worker(bare, 1), "here": compare.Worker(compare.ROOT, 1)}
    try:
        assert Path(workers["ref"].imported) == bare / "stable_rnn" / "__init__.py"
        assert Path(workers["here"].imported) == compare.ROOT / "stable_rnn" / "__init__.py"
        row = compare.run_case(STEP, workers, 2, 1e-3)
        assert len(row["ratios"]) == 2 and min(row["ratios"]) > 0 and row["ref_ms"] > 0
        missing = compare.run_case("LSTM Verified() B=1 T=4096 H=256 forward", workers, 2, 1e-3)["note"]
        assert missing.startswith("not in ref: ") and "Verified" in missing and "here" not in missing
        assert (
            compare.run_case("LSTMCell step B=1 H=64", workers, 2, 1e-3)["note"]
            == "not in ref: the process ended, exit status 5"
        )
        assert compare.run_case(STEP, workers, 2, 1e-3)["ratio"] > 0  # with another process
    finally:
        for worker in workers.values():
            worker.stop()


def test_a_tree_that_does_not_start_is_named(bare):
    (bare / "stable_rnn" / "__init__.py").write_text("raise ImportError('no such thing')")
    with pytest.raises(UserError, match="its stable_rnn does not start .*exit status 1"):
        compare.Worker(bare)


def test_another_package_in_the_place_of_the_trees_own_is_refused(tmp_path):
    with pytest.raises(UserError, match="was imported in the place of its own"):
        compare.Worker(tmp_path)


def test_every_case_runs():
    for name, make in compare.CASES.items():
        if "H=64" in name or "projection" in name:
            make()()


@pytest.mark.parametrize(
    "given, said",
    [
        (["no-such-ref"], "'no-such-ref' is no commit of"),
        (["--", "--version"], "'--version' is no commit of"),
        (["HEAD", "--only", "["], "is no regular expression"),
        (["HEAD", "--only", "gru"], "no case has it"),
        (["HEAD", "--rounds", "1"], "must be 2 or more"),
        (["HEAD", "--seconds", "0"], "must be above 0"),
        ([], "required"),
    ],
)
def test_bad_input_is_one_line(given, said, capsys, monkeypatch):
    if "HEAD" in given:  # also where the sources have no history
        monkeypatch.setattr(compare, "commit", lambda ref: "0" * 40)
    try:
        code = compare.main(given)
    except SystemExit as stop:
        code = stop.code
    found = capsys.readouterr().err
    assert code == 2 and said in found and found.count("\n") == 1


FAILS = """\
cmake_minimum_required(VERSION 3.18)
project(x NONE)
message(FATAL_ERROR "no such compiler")
"""


def test_a_build_that_fails_shows_its_end(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(FAILS)
    with pytest.raises(UserError, match="(?s)the build failed; it ended with.*no such compiler"):
        compare.build(tmp_path)


def test_a_commit_that_does_not_build_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "CMakeLists.txt").write_text(FAILS)
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "-m", "fails"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    sha = compare.commit("HEAD")
    with pytest.raises(UserError, match="the build failed"):
        compare.tree(sha)
    assert list((tmp_path / "build" / "compare").iterdir()) == []
    monkeypatch.setattr(compare, "build", lambda folder: (folder / "built").touch())
    kept = compare.tree(sha)
    assert kept == tmp_path / "build" / "compare" / sha and (kept / "built").exists()
    monkeypatch.setattr(compare, "build", lambda folder: pytest.fail("built twice"))
    assert compare.tree(sha) == kept


def test_a_module_older_than_its_sources_is_noticed(tmp_path):
    for name in ("CMakeLists.txt", "csrc/cpu/a.cpp", "stable_rnn/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000, 1000))
    assert compare.module_is_older(tmp_path)  # there is none
    module = tmp_path / "stable_rnn" / "_C.so"
    module.touch()
    assert not compare.module_is_older(tmp_path)
    os.utime(module, (999, 999))
    assert compare.module_is_older(tmp_path)
