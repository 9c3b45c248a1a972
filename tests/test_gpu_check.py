"""The check on a GPU, as far as it goes without one."""

import argparse
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the suite belongs to the repository, not to the package
from benchmarks import gpu_report, gpu_steps, gpu_table, gpu_targets, jsonl, timing  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_says_that_there_is_no_gpu():
    python = os.environ | {"PYTHON": sys.executable}
    run = subprocess.run(["bash", ROOT / "benchmarks/gpu_check.sh"], env=python, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert (
        run.stderr.startswith("gpu_check: no GPU (")
        and f"torch {torch.__version__}" in run.stderr
        and run.stderr.count("\n") == 1
    )


STUB = """#!/bin/bash
# for a python that sees a GPU: says what it is to run; the report is written; a run of SLOW measures one row and goes on
case "$*" in
  *benchmarks.gpu_report*) exec "$REAL" "$@" ;;
  *${SLOW:-nothing}*)
    while [ "$1" != --out ]; do shift; done
    mkdir -p "$2" && echo '{"case": "measured"}' >"$2/gpu_targets.jsonl"
    echo $$ >>"$(dirname "$OUT")/slow"
    echo SLOW
    exec sleep 100 ;;
  *benchmarks*) echo "RUN $*" ;;
esac
"""


@pytest.fixture
def stubbed(tmp_path):
    """Calls of the script with stubs for what needs a GPU; they write to tmp_path / out."""
    for name in ("python", "nvidia-smi", "compute-sanitizer", "nvcc"):
        (tmp_path / name).write_text(STUB if name == "python" else "#!/bin/bash\necho 9.0\n")
        (tmp_path / name).chmod(0o755)
    stubs = {"PYTHON": str(tmp_path / "python"), "REAL": sys.executable, "OUT": str(tmp_path / "out")}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def start(**more):
        return subprocess.Popen(
            ["bash", ROOT / "benchmarks/gpu_check.sh", "abc"],
            env=os.environ | stubs | path | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finished(process):
    out, err = process.communicate()
    return process.returncode, out, err


def test_all_stages(stubbed, tmp_path):
    """Every part of the targets is in one of them, and measurements have their time whatever comes before: with ten seconds each for what
    does not end when it is told to, the stages up to the last of them take TOTAL."""
    code, out, err = finished(stubbed())
    assert code == 0, out + err
    measured = []
    for line in out.splitlines():
        if line.startswith("RUN -m benchmarks.gpu_targets"):
            words = line.replace("--only ", "--only=").split()
            named = {how: [w.split("=")[1] for w in words if w.startswith(how)] for how in ("--only", "--skip")}
            measured += [
                n for n in gpu_targets.PARTS if n in (named["--only"] or gpu_targets.PARTS) and n not in named["--skip"]
            ]
    assert sorted(measured) == sorted(gpu_targets.PARTS)
    limits = dict(re.findall(r"^== (\S+) \(at most (\d+) s", out, re.M))
    names = list(limits)
    until = names[: names.index("costs") + 1]
    assert until == ["versions", "build", "loads", "targets", "long", "costs"]
    assert sum(int(limits[name]) + 10 for name in until) <= 540
    assert names[len(until) :] == [
        "cuda-tests",
        "triton-tests",
        "memcheck",
        "racecheck",
        "transactions",
        "wgmma",
        "speed",
        "others",
    ]
    (report,) = (tmp_path / "out").glob("*.md")
    assert "| long | passed |" in report.read_text() and not list((tmp_path / "out").glob("unfinished*"))


def test_only_the_stages_that_are_asked_for(stubbed, tmp_path):
    """Their report has a name of its own, which never replaces that of all stages."""
    code, out, err = finished(stubbed(STAGES="memcheck costs"))
    assert code == 0, out + err
    assert re.findall(r"^== (\S+) \(", out, re.M) == ["costs", "memcheck"]
    (report,) = (tmp_path / "out").glob("*.md")
    assert report.stem.endswith("-costs-memcheck")
    assert "| targets | not asked for | 0 |" in report.read_text() and "| memcheck | passed |" in report.read_text()

    code, out, err = finished(stubbed(STAGES="memcheck test"))
    assert code == 2 and out == "" and err.startswith("gpu_check: STAGES: 'test' is none of versions build loads")


def test_a_stage_beyond_its_time_and_those_without_any(stubbed, tmp_path):
    """The first is stopped, its rows are kept, the last get nothing."""
    code, out, err = finished(stubbed(SLOW="benchmarks.gpu_targets", STAGES="targets cuda-tests speed", TOTAL="5"))
    assert code == 1, out + err
    (file,) = (tmp_path / "out").glob("*.jsonl")
    about, rows = jsonl.read(file)
    assert {
        row["name"]: row["status"] for row in rows if row["part"] == "stages" and row["status"] != "not asked for"
    } == {
        "targets": "stopped after 5 s",
        "cuda-tests": "no time left",
        "speed": "no time left",
    }
    assert [row["case"] for row in rows if row["part"] == "targets"] == ["measured"]


def test_rows_outlive_a_script_that_is_killed(stubbed, tmp_path):
    process = stubbed(SLOW="benchmarks.gpu_targets", STAGES="targets", TOTAL="60")
    try:
        for line in process.stdout:
            if line.startswith("SLOW"):
                break
        process.kill()
        process.wait()
        (work,) = (tmp_path / "out").glob("unfinished-*")
        assert gpu_report.main(work, tmp_path / "later", "abc") == 0
    finally:
        for number in (tmp_path / "slow").read_text().split():
            os.kill(int(number), signal.SIGKILL)
        process.stdout.close()
        process.stderr.close()
    (file,) = (tmp_path / "later").glob("*.jsonl")
    assert [row["case"] for row in jsonl.read(file)[1] if row["part"] == "targets"] == ["measured"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_targets_say_that_there_is_no_gpu(tmp_path, capsys):
    assert gpu_targets.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "benchmarks.gpu_targets: no GPU: torch finds no usable one here\n"


def test_gpu_targets_rehearsed(tmp_path, monkeypatch):
    def breaks(table):
        raise RuntimeError("a launch failed")

    monkeypatch.setitem(gpu_targets.PARTS, "others", breaks)
    monkeypatch.setenv("STABLE_RNN_PRETRAINED", str(tmp_path / "no packages"))
    names = ["windows", "stacks", "projections", "scans", "chrono", "training", "resets", "trained", "costs"]
    names += ["exchange", "products", "others"]
    parts = [word for name in names for word in ("--only", name)]
    assert (
        gpu_targets.main(["--rehearse", *parts, "--seconds", "0.01", "--out", str(tmp_path)]) == 1
    )  # a part broke, the others ran
    about, rows = jsonl.read(tmp_path / "gpu_targets.jsonl")
    assert about["finished"] and about["rehearsal"] and [row["case"] for row in rows if row["wrong"]] == ["others"]
    absent = [
        row["case"] for row in rows if row["note"].startswith("not measured") and "below the noise" not in row["note"]
    ]
    noisy = [row for row in rows if "below the noise" in row["note"]]
    assert all(row.get("ratio") is None and row.get("value") is None and row["met"] is None for row in noisy)
    waits = [case for case in absent if case.endswith("waits for the device in a call")]
    assert len(waits) == 5 and set(absent) - set(waits) == {"trained LSTMs"}
    measured = [row for row in rows if not row["wrong"] and row["case"] not in absent and row not in noisy]
    assert len(measured) + len(noisy) >= 34 and all((row.get("ratio") or row.get("value")) > 0 for row in measured)
    for row in measured:
        assert row["met"] is (None if row["target"] is None else met(row))
        assert row.get("tolerance") is None or row["error"] <= row["tolerance"]
    assert "A rehearsal" in (tmp_path / "gpu_targets.md").read_text()
    steps = [row["costs"] for row in rows if row.get("costs")]
    assert [row["backward"] for row in steps] == [False, True] and not any("tiling" in row for row in steps)


def met(row):
    return row["value"] <= row["target"] if row.get("most") else (row.get("ratio") or row["value"]) >= row["target"]


def test_a_wrong_row_of_the_targets_gets_no_ratio():
    table = gpu_table.Table(argparse.Namespace(rehearse=True, seconds=0.01), jsonl.Log(None))
    right = {"name": "a", "seconds": {"median": 1.0}, "wrong": None, "error_of_function": 0.0, "tolerance": 1.0}
    assert table.versus("x", right, right | {"name": "b", "seconds": {"median": 3.0}}, 2.0)["met"] is True
    for ours, theirs in ((right | {"wrong": "output error"}, right), (right, right | {"wrong": "output error"})):
        row = table.versus("x", ours, theirs, 0.0)
        assert row["ratio"] is None and row["met"] is None and "output error" in row["wrong"]
    assert table.versus("x", None, right, 1.0)["note"] == "not measured: no contestant"


def test_a_part_within_the_noise_has_no_figure(monkeypatch):
    """A step that seems to take less time than none: its row says so, and has no ratio."""
    monkeypatch.setattr(
        gpu_steps, "race", lambda runs, *_, **__: {name: timing.Time(1e-4, 1e-4, 1e-4) for name in runs}
    )
    table = gpu_table.Table(argparse.Namespace(rehearse=True, seconds=0.01), log := jsonl.Log(None))
    for part in (gpu_steps.projections, gpu_steps.training):
        part(table)
    rows = [row for row in log.rows if not row["case"].endswith("in a call")]
    assert len(rows) == 3 * 4 + 2
    for row in rows:
        assert row.get("ratio") is None and row.get("value") is None and row["met"] is None
        assert row["note"] == "not measured: below the noise, 100.0 us with it and 100.0 us without"


def test_report_of_the_check(tmp_path):
    (tmp_path / "stages.tsv").write_text(
        "build\t0\t12\t170\ntests\t124\t100\t100\nspeed\tskipped\t0\t0\nloads\t3\t1\t30\n"
    )
    (tmp_path / "tests.log").write_text("x" * 5000 + "the end")
    jsonl.Log(tmp_path / "targets" / "gpu_targets.jsonl").add({"case": "a"}, {"case": "b"}, finished=True)
    jsonl.Log(tmp_path / "long" / "gpu_targets.jsonl").add({"case": "c"})
    out = tmp_path / "out"
    assert gpu_report.main(tmp_path, out, "abc") == 0
    (file,) = out.glob("*.jsonl")
    about, rows = jsonl.read(file)
    stages = [row for row in rows if row["part"] == "stages"]
    assert [s["status"] for s in stages] == ["passed", "stopped after 100 s", "no time left", "failed, exit status 3"]
    assert about["environment"]["commit"] == "abc" and about["targets"] == {"finished": True} and "speed" not in about
    cases = {part: [row["case"] for row in rows if row["part"] == part] for part in ("targets", "long", "others")}
    assert cases == {"targets": ["a", "b"], "long": ["c"], "others": []}
    assert stages[1]["log_tail"].endswith("the end") and len(stages[1]["log_tail"]) == gpu_report.TAIL
    assert "| tests | stopped after 100 s | 100 |" in file.with_suffix(".md").read_text()
