"""Links of the Markdown files lead somewhere, and the site builds with every warning an error."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import targets_table

ROOT = Path(__file__).parent.parent
HIDDEN = {"site", "build", "dist", "demo-out"}
FILES = [
    file
    for file in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") and part != ".github" or part in HIDDEN for part in file.relative_to(ROOT).parts)
]
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`\n]+`", re.M | re.S)


def anchors(text):
    """Of the headings, as GitHub and the site make them where a title has no odd characters."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", text), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links(file):
    faults = []
    for link in LINK.findall(CODE.sub("", file.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        goal = file.parent / path if path else file
        if not goal.exists():
            faults.append(f"{link}: there is no such file")
        elif anchor and "--8<--" not in goal.read_text() and anchor not in anchors(goal.read_text(encoding="utf-8")):
            faults.append(f"{link}: no heading has this anchor")
    assert not faults


def test_readme_fits_one_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_table_of_the_cpu_targets_is_that_of_its_rows():
    rows = ROOT / "benchmarks/results/cpu.jsonl"
    assert rows.with_suffix(".md").read_text(encoding="utf-8") == targets_table.markdown(rows)


def test_site(tmp_path):
    made = subprocess.run(["make", ".venv-docs/installed"], cwd=ROOT, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mkdocs cannot be installed here: {made.stderr.strip().splitlines()[-1]}")
    built = subprocess.run(
        [".venv-docs/bin/mkdocs", "build", "--strict", "-d", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert built.returncode == 0, built.stdout
    for page in (
        "index",
        "api",
        "guide/plans",
        "maths/stability",
        "measurements/index",
        "measurements/cpu-rows",
        "changelog",
    ):
        text = (tmp_path / f"{page}.html").read_text(encoding="utf-8")
        assert "--8&lt;--" not in text and "--8<--" not in text
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in public_names():
        assert f'id="stable_rnn.{name}"' in reference, f"docs/api.md leaves out {name}"


def public_names():
    import stable_rnn

    return stable_rnn.__all__
