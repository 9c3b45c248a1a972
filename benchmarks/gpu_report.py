"""One file of rows and one table of what `benchmarks/gpu_check.sh` did: `python -m benchmarks.gpu_report WORK OUT COMMIT`.

WORK holds stages.tsv (name, exit status, seconds, limit), NAME.log for each stage, and what the stages wrote: targets/, others/, speed/.
The files are named after the device, and after the stages where these were not all asked for.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import torch

from . import jsonl
from .speed import results

UNASKED = "not asked for"
TAIL = 4000  # characters of a stage's log
PARTS = {name: f"{name}/gpu_targets.jsonl" for name in ("targets", "long", "costs", "others")} | {
    "speed": "speed/speed.jsonl"
}


def main(work: Path, out: Path, commit: str) -> int:
    gpu = torch.cuda.is_available()
    facts = results.environment(["cuda"] if gpu else [], commit)
    stages = [stage(work, *line.split("\t")) for line in (work / "stages.tsv").read_text().splitlines()]
    device = facts["gpu"]["name"] if gpu else "rehearsal"
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    if any(s["status"] == UNASKED for s in stages):
        name = "-".join([name, *(s["name"] for s in stages if s["status"] != UNASKED)])
    log = jsonl.Log(out / f"{name}.jsonl", {"what": "benchmarks/gpu_check.sh", "environment": facts})
    log.add(*({"part": "stages", **found} for found in stages))
    for part, path in PARTS.items():
        if (work / path).is_file():
            about, rows = jsonl.read(work / path)
            log.add(*({"part": part, **row} for row in rows), **{part: about})
    tables = [
        (work / path).read_text()
        for path in (Path(part).with_suffix(".md") for part in PARTS.values())
        if (work / path).is_file()
    ]
    lines = [f"# {device}, commit {commit}", "", "| stage | how it went | seconds |", "|---|---|---|"]
    lines += [f"| {s['name']} | {s['status']} | {s['seconds']} |" for s in stages]
    (out / f"{name}.md").write_text("\n\n".join(["\n".join(lines), *tables]))
    for picture in (work / "speed").glob("*.svg"):
        shutil.copyfile(picture, out / f"{name}-{picture.name}")
    print(f"wrote {out / name}.jsonl and .md")
    return 0


def stage(work: Path, name: str, code: str, seconds: str, limit: str) -> dict:
    log = work / f"{name}.log"
    status = {
        "0": "passed",
        "124": f"stopped after {limit} s",
        "137": f"killed after {limit} s",
        "skipped": "no time left",
        "unasked": UNASKED,
    }.get(code)
    text = log.read_text(errors="replace") if log.is_file() else ""
    return {
        "name": name,
        "status": status or f"failed, exit status {code}",
        "seconds": int(seconds),
        "log_tail": text[-TAIL:],
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
