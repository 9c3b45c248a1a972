"""Examples, the README and the guide's pages run, as they stand: small, each in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIZES = {
    "speed_up": ["600"],
    "streaming": ["200"],
    "long_series": ["400", "3"],
    "train_certified": ["10"],
    "rl_resets": ["3"],
    "train_cascade": ["--steps", "300", "--updates", "2"],
    "sequence_parallel": ["100", "2"],
}
LAUNCHERS = {"sequence_parallel": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}


def run(*arguments, **variables):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables
    own = "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning"  # of torch.export, by itself
    command = [sys.executable, "-W", "error", "-W", own, *map(str, arguments)]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert done.stdout.strip()


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.stem)
def test_example(file):
    assert len(file.read_text().splitlines()) <= 40
    run(*LAUNCHERS.get(file.stem, []), file, *SIZES.get(file.stem, []))


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/guide").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    if page.stem == "examples":  # the files above
        assert not blocks
        return
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks) + "\nprint('ran to its end')\n")
    run(script)


NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_was_executed_in_order(file):
    text = file.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert len(text) < 300_000


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_runs(file):
    code = [
        "".join(cell["source"])
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    run("-c", "\n".join(code), MPLBACKEND="agg", OMP_NUM_THREADS="2")
