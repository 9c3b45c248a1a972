"""Rows in JSON Lines: what is added stays, an interrupted writer costs a line at most, and the committed results are in that form."""

import json
import warnings
from pathlib import Path

import pytest

from benchmarks import jsonl
from stable_rnn._errors import UserError

RESULTS = Path(jsonl.__file__).parent / "results"


def test_rows_and_what_they_share(tmp_path):
    file = tmp_path / "new" / "a.jsonl"
    log = jsonl.Log(file, {"what": "x", "rates": {"a": 1}})
    assert not file.exists()
    log.add({"n": 1}, {"n": 2}, rates={"b": 2})
    log.add({"n": 3}, what="y", list=[1])
    about, rows = jsonl.read(file)
    assert about == log.about == {"what": "y", "rates": {"a": 1, "b": 2}, "list": [1]}
    assert rows == log.rows == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert [list(json.loads(line)) for line in file.read_text().splitlines()] == [
        ["about"],
        ["n"],
        ["n"],
        ["about"],
        ["n"],
        ["about"],
    ]


def test_numbers_that_json_lacks_become_null(tmp_path):
    log = jsonl.Log(tmp_path / "a.jsonl")
    log.add({"a": [float("nan"), float("inf"), 1.5], "b": (1,)})
    assert jsonl.read(tmp_path / "a.jsonl")[1] == log.rows == [{"a": [None, None, 1.5], "b": [1]}]
    jsonl.write(tmp_path / "b.jsonl", {"c": float("-inf")}, log.rows)
    assert jsonl.read(tmp_path / "b.jsonl") == ({"c": None}, log.rows)


ROWS = [{"n": 10}, {"text": "é\n"}, {"n": [1, {"a": None}]}]


@pytest.mark.parametrize("blocks", [False, True])
def test_a_file_cut_at_any_byte_is_read_and_goes_on(tmp_path, blocks):
    """Every whole line is kept, the cut one is named, and what is added next stands on a line of its own."""
    file = tmp_path / "a.jsonl"
    log = jsonl.Log(file)
    for row in ROWS:
        log.add(row, **{"done": row} if blocks else {})
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    for cut in range(len(content) + 1):
        file.write_bytes(content[:cut])
        kept = sum(cut >= len(b"".join(lines[:n])) - 1 for n in range(1, len(lines) + 1))  # a line may lack its end
        torn = cut not in (sum(map(len, lines[:n])) - end for n in range(len(lines) + 1) for end in (0, 1))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            log = jsonl.Log(file, resume=True, blocks=blocks)
        assert [f"{file}, line {kept + 1}: cut short by an interrupted run, left out"] * torn == [
            str(w.message) for w in said
        ]
        rows = kept // 2 if blocks else kept
        assert log.rows == ROWS[:rows]
        log.add({"n": "next"})
        assert jsonl.read(file)[1] == [*ROWS[:rows], {"n": "next"}]


def test_without_resume_the_first_rows_replace_the_file(tmp_path):
    file = tmp_path / "a.jsonl"
    jsonl.write(file, {"what": "old"}, ROWS)
    before = file.read_bytes()
    log = jsonl.Log(file, {"what": "new"})
    assert file.read_bytes() == before and log.rows == []  # a run that ends before its first row loses nothing
    log.add({"n": 1})
    assert jsonl.read(file) == ({"what": "new"}, [{"n": 1}])


def test_going_on_says_what_is_shared_once(tmp_path):
    for n in range(3):
        jsonl.Log(tmp_path / "a.jsonl", {"torch": "2"}, resume=True).add({"n": n})
    assert (tmp_path / "a.jsonl").read_text().count("about") == 1


@pytest.mark.parametrize("bad", ["{\n", "[1]\n", "\n", "nonsense\n", '{"about": 1}\n'])
def test_a_line_that_is_no_row_is_named(tmp_path, bad):
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\n' + bad + '{"n": 2}\n')
    with pytest.raises(UserError, match="a.jsonl, line 2: not a row"):
        jsonl.read(file)
    with pytest.raises(UserError, match="a.jsonl, line 2: not a row"):
        jsonl.Log(file, resume=True)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/a.jsonl: "):
        jsonl.Log(tmp_path / "file" / "a.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: Is a directory"):
        jsonl.Log(tmp_path / "folder")


def test_without_a_file_rows_are_kept_in_memory():
    log = jsonl.Log(None, {"what": "x"})
    log.add({"n": 1})
    assert log.rows == [{"n": 1}] and log.about == {"what": "x"}


@pytest.mark.parametrize("file", sorted(RESULTS.rglob("*.jsonl")), ids=lambda file: str(file.relative_to(RESULTS)))
def test_committed_results_are_whole(file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, rows = jsonl.read(file)
    assert rows and file.read_bytes().endswith(b"}\n")
