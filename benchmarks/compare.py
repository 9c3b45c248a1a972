"""A commit against the working tree, in turns: `python -m benchmarks.compare REF [--only PATTERN] [--rounds N] [--out FILE.jsonl]`.

Two processes, one with each tree's stable_rnn, take turns A B B A, so that a machine's drift meets both alike. A ratio is REF / here of one
round (above 1: the working tree is faster); HEAD in a clean tree shows how much of it is noise. REF is built once, in build/compare/COMMIT;
the working tree runs what `make build` left in it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from stable_rnn._errors import UserError
from stable_rnn.cli import Parser, positive

from . import jsonl
from .compare_cases import CASES
from .speed.results import environment

ROOT = Path(__file__).resolve().parents[1]
TAIL = 15  # lines shown of a build that fails


# ---- the other tree


def commit(ref: str) -> str:
    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", ref + "^{commit}")
    if found.returncode:
        raise UserError(
            f"{ref!r} is no commit of {ROOT}" + (f" ({said})" if (said := found.stderr.decode().strip()) else "")
        )
    return found.stdout.decode().strip()


def git(*arguments: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    except OSError as error:
        raise UserError(f"git does not run: {error.strerror}") from error


def tree(sha: str) -> Path:
    """The commit's files with its compiled module. They are exported, not a git worktree: nothing to register, nothing to prune."""
    kept = ROOT / "build" / "compare" / sha
    if not kept.is_dir():
        print(f"building {sha[:10]}, a minute or two; kept in {kept.relative_to(ROOT)}", flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as work:
            fresh = Path(work) / "tree"
            with tarfile.open(fileobj=io.BytesIO(git("archive", sha).stdout)) as files:
                files.extractall(fresh, filter="data")
            build(fresh)
            if not kept.is_dir():  # another run may have been first
                fresh.rename(kept)
    return kept


def build(folder: Path) -> None:
    """As `make build` does, but from nothing and into the folder's own package."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = (shutil.which(tool, path=places) for tool in ("cmake", "ninja"))
    try:
        import pybind11
    except ImportError:
        pybind11 = None
    if not (cmake and ninja and pybind11):
        raise UserError("building needs cmake, ninja and pybind11: pip install -e '.[dev]'")
    objects = folder / "build"
    for command in (
        [
            cmake,
            "-S",
            folder,
            "-B",
            objects,
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'stable_rnn'}",
            "-DSTABLE_RNN_CUDA=OFF",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        [cmake, "--build", objects],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode:
            raise UserError("the build failed; it ended with\n" + "\n".join(done.stdout.splitlines()[-TAIL:]))
    shutil.rmtree(objects)


def module_is_older(root: Path) -> bool:
    """Whether a source of the compiled module was written after it, or there is none."""
    sources = [root / "CMakeLists.txt", *(file for file in (root / "csrc").rglob("*") if file.is_file())]
    built = [file.stat().st_mtime for file in (root / "stable_rnn").glob("_C*.so")]
    return not built or max(built) < max(file.stat().st_mtime for file in sources)


# ---- turns


class Ended(Exception):
    """A worker is gone."""


class Worker:
    """A process that runs the cases with the stable_rnn of one tree."""

    def __init__(self, tree: Path, threads: int = 0) -> None:
        self.tree, self.threads = tree, threads
        self.start()

    def start(self) -> None:
        more = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        script = Path(__file__).with_name("compare_cases.py")
        self.process = subprocess.Popen(
            [sys.executable, script, str(self.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | more | {"PYTHONPATH": str(self.tree)},
        )
        try:
            self.imported = self.answer()["file"]
        except Ended as error:
            raise UserError(f"{self.tree}: its stable_rnn does not start ({error}); what it said is above") from error
        if not Path(self.imported).resolve().is_relative_to(self.tree.resolve()):
            raise UserError(f"{self.tree}: {self.imported} was imported in the place of its own stable_rnn")

    def ask(self, **what) -> dict:
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # the answer says that it ended
        return self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise Ended(f"the process ended, exit status {self.process.wait()}")
        return json.loads(line)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def turns(rounds: int) -> list[tuple[str, str]]:
    """Who measures when: A B, B A, A B, ... What drifts evenly meets both alike."""
    return [("ref", "here") if n % 2 == 0 else ("here", "ref") for n in range(rounds)]


def run_case(name: str, workers: Mapping[str, Worker], rounds: int, seconds: float) -> dict:
    """The row of a case: its ratios, or a note why there are none."""
    missing, guesses = {}, []
    for side, worker in workers.items():
        try:
            found = worker.ask(make=name)
            missing |= {side: found["absent"]} if "absent" in found else {}
            guesses.append(found.get("seconds", 0.0))
        except Ended as error:
            missing[side] = str(error)
            worker.start()
    if missing:
        return {"case": name, "note": "; ".join(f"not in {side}: {reason}" for side, reason in missing.items())}
    calls = max(1, round(seconds / (2 * rounds) / max(*guesses, 1e-7)))
    times: dict[str, list[float]] = {side: [] for side in workers}
    for order in turns(rounds):
        for side in order:
            try:
                times[side].append(workers[side].ask(calls=calls)["seconds"])
            except Ended as error:
                workers[side].start()
                return {"case": name, "note": f"{side}: {error}"}
    return {"case": name, "calls": calls, **summary(times["ref"], times["here"])}


def summary(ref: Sequence[float], here: Sequence[float]) -> dict:
    """Medians, and the ratio of each round: a round's two turns are neighbours in time."""
    ratios = [a / b for a, b in zip(ref, here, strict=True)]
    quarter, middle, three = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "ref_ms": statistics.median(ref) * 1e3,
        "here_ms": statistics.median(here) * 1e3,
        "ratio": middle,
        "quartiles": [quarter, three],
        "range": [min(ratios), max(ratios)],
        "fastest": min(ref) / min(here),
        "ratios": ratios,
    }


HEAD = f"{'case':58s} {'REF, ms':>10s} {'here, ms':>10s}  REF / here: median of rounds (quartiles) lowest … highest; fastest turns"


def line(row: dict) -> str:
    if "ratio" not in row:
        return f"{row['case']:58s} {row['note']}"
    low, high = row["range"]
    verdict = "  faster in every round" if low > 1 else "  slower in every round" if high < 1 else ""
    return (
        f"{row['case']:58s} {row['ref_ms']:10.4f} {row['here_ms']:10.4f}  {row['ratio']:.3f} "
        f"({row['quartiles'][0]:.3f} {row['quartiles'][1]:.3f}) {low:.3f} … {high:.3f}; {row['fastest']:.3f}{verdict}"
    )


# ---- command line


def pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def least_two(text: str) -> int:
    if (rounds := positive(int)(text)) < 2:
        raise argparse.ArgumentTypeError("must be 2 or more: one ratio has no spread")
    return rounds


def parser() -> Parser:
    top = Parser(prog="benchmarks.compare", description=__doc__.split(":")[0])
    top.add_argument("ref", metavar="REF", help="a commit, branch or tag")
    top.add_argument("--only", type=pattern, metavar="PATTERN", help="cases that this regular expression is found in")
    top.add_argument(
        "--rounds", type=least_two, default=10, metavar="N", help="turns of each tree in a case (default %(default)s)"
    )
    top.add_argument(
        "--seconds",
        type=positive(float),
        default=2.0,
        metavar="S",
        help="for all turns of a case (default %(default)s)",
    )
    top.add_argument(
        "--threads",
        type=positive(int),
        default=0,
        metavar="N",
        help="for torch and the kernels (default: torch's choice)",
    )
    top.add_argument("--out", type=Path, metavar="FILE", help="the rows, in JSON Lines")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        run(options)
    except UserError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    sha = commit(options.ref)
    names = [name for name in CASES if not options.only or options.only.search(name)]
    if not names:
        raise UserError(f"--only {options.only.pattern}: no case has it; there are {', '.join(CASES)}")
    log = jsonl.Log(
        options.out,
        {
            "what": "benchmarks.compare",
            "ref": options.ref,
            "commit": sha,
            "rounds": options.rounds,
            "seconds": options.seconds,
            "threads": options.threads,
            "environment": environment(["cpu"]),
        },
    )
    if module_is_older(ROOT):
        print(
            "note: sources in csrc are newer than the working tree's compiled module; `make build` compiles them",
            file=sys.stderr,
        )
    workers: dict[str, Worker] = {}
    try:
        for side, place in (("ref", tree(sha)), ("here", ROOT)):
            workers[side] = Worker(place, options.threads)
            print(f"{side:4s} {workers[side].imported}", flush=True)
        print(HEAD)
        for name in names:
            log.add(run_case(name, workers, options.rounds, options.seconds))
            print(line(log.rows[-1]), flush=True)
    finally:
        for worker in workers.values():
            worker.stop()


if __name__ == "__main__":
    sys.exit(main())
