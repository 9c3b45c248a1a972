"""Fits the constants of both cost models to what `benchmarks.gpu_targets` measured on a GPU in its part `costs`:
`python -m benchmarks.fit_costs ROWS.jsonl [--write]`.

The models: `StepCosts` of csrc/include/stable_rnn/step_costs.h, by which the CUDA kernels are tiled and `stable-rnn doctor` predicts times;
and the `cuda` entry of `DEVICES` in stable_rnn/ops/recurrence/policy.py, by which `Verified` chooses. ROWS is gpu_targets.jsonl, or the
file that gpu_check.sh writes. It prints each constant, each row's residual, and what to put into the two files; `--write` puts it into
the header. The model itself is the compiled one: a build with CUDA is needed, a GPU is not.

Least squares of log(predicted / measured) over the logarithms of the constants, so that these stay positive and every row counts by its
relative error (Levenberg-Marquardt, numeric derivatives). Each constant is drawn a little towards its value of now, as if that were
known to a factor of SPREAD; one that the rows tell hardly anything of stays where it is.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stable_rnn import _native
from stable_rnn._errors import UserError
from stable_rnn.cells import CELLS
from stable_rnn.cli import Parser
from stable_rnn.ops import cuda_device
from stable_rnn.ops.recurrence import policy

from . import jsonl
from .speed import contestants

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc/include/stable_rnn/step_costs.h"
SPREAD = 4.0
TILING = ("blocks", "cluster", "lanes", "units", "warps", "place")  # of `CudaTiling`, what the model reads
TOLD = 2.0  # a constant that is known to this factor is fitted

Model = Callable[[Sequence[float]], list[float]]  # constants -> seconds of each row


class Fit(NamedTuple):
    names: list[str]
    before: list[float]
    after: list[float]
    factor: list[float | None]  # to which a constant is known; None: it stays as it was

    @property
    def kept(self) -> list[str]:
        return [name for name, factor in zip(self.names, self.factor) if factor is None]

    def __str__(self) -> str:
        known = ["kept: the rows hardly depend on it" if f is None else f"to a factor of {f:.2f}" for f in self.factor]
        lines = zip(self.names, self.before, self.after, known)
        return "\n".join(f"  {name:14} {old:10.4g} -> {new:10.4g}   {how}" for name, old, new, how in lines)


# ---- rows


def rows_of(path: Path, commit: str) -> tuple[list[dict], str]:
    """The measured steps of a file, and the GPU's name. UserError where they are of no GPU, of another commit or of other kernels, and for
    what `benchmarks.gpu_targets` would not have written."""
    about, rows = jsonl.read(path)
    try:
        return steps_of(about, rows, commit)
    except (UserError, LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        other = f"not as benchmarks.gpu_targets writes it: {contestants.in_a_line(error)}"
        raise UserError(f"{path}: {error if isinstance(error, UserError) else other}") from error


def steps_of(about: dict, rows: list[dict], commit: str) -> tuple[list[dict], str]:
    """As `rows_of`, of what stands in the file."""
    parts = [about, *(found for found in about.values() if isinstance(found, dict) and "rehearsal" in found)]
    if any(part.get("rehearsal") for part in parts):
        raise UserError("a rehearsal on the CPU measures no GPU")
    facts = about.get("environment", {})
    if "gpu" not in facts:
        raise UserError("its environment names no GPU")
    if facts.get("commit") != commit:
        raise UserError(f"measured at commit {facts.get('commit')}, not {commit} (--commit names another)")
    found = [row["costs"] for row in rows if row.get("costs") and not row["wrong"] and (row["value"] or 0) > 0]
    now = list(cuda_device.lib.step_costs_cuda().values())
    for row in found:
        if row.get("interface") != _native.INTERFACE:
            raise UserError(f"rows of interface {row.get('interface')}, this tree's is {_native.INTERFACE}")
        if not row.get("clock") or set(TILING) - row["tiling"].keys():
            raise UserError(f"a row without the device's clock or its tiling: {row}")
        if not all(0 < seconds < math.inf for seconds in (seconds_of(row), *step_model([row])(now))):
            raise UserError(f"a step that takes no time: {row}")
        shape_of(row)
    return found, re.sub(r"[^\w .-]", " ", facts["gpu"]["name"])  # it goes into a string of C++


def shape_of(row: dict) -> str:
    """In words."""
    way = "backward" if row["backward"] else "forward"
    return f"{row['cell']} {row['dtype']} H{row['hidden']}, {row['lanes']} lanes, {way}"


def seconds_of(row: dict) -> float:
    """Of a step."""
    return (row["seconds"][1] - row["seconds"][0]) / (row["steps"][1] - row["steps"][0])


# ---- models


def step_model(rows: list[dict]) -> Model:
    """By csrc/cuda/recurrence_tiling.cu."""
    return lambda costs: [
        cuda_device.lib.step_clocks_cuda(
            *(row["backward"], CELLS[row["cell"]].code, row["code"], row["hidden"], row["lanes"]),
            *(row["tiling"], row["limits"], costs),
        )
        / row["clock"]
        for row in rows
    ]


def policy_start() -> dict[str, float]:
    """The constants of `policy.DEVICES["cuda"]` that rows tell of."""
    device = policy.DEVICES["cuda"]
    gains = {f"gain {i}": gain for i, (_, gain, _) in enumerate(device.lanes)}
    return {"step": device.step, "rate": device.rate} | gains


def policy_model(rows: list[dict]) -> Model:
    """By `policy.Costs`, with weights that no lanes share (`more` is 0)."""
    bounds = [bound for bound, _, _ in policy.DEVICES["cuda"].lanes]

    def seconds(row: dict, costs: Sequence[float]) -> float:
        step, rate, *gains = costs
        weights = CELLS[row["cell"]].gates * row["hidden"] ** 2
        gain = next(gain for bound, gain in zip(bounds, gains) if weights < bound)
        return (step + weights / rate) * max(1.0, row["lanes"] / gain)

    return lambda costs: [seconds(row, costs) for row in rows]


# ---- least squares


def fit(start: dict[str, float], model: Model, measured: Sequence[float]) -> Fit:
    """UserError where there are fewer rows than twice the constants."""
    names, begin, want = list(start), list(start.values()), torch.tensor(measured, dtype=torch.float64).log()
    if len(want) < 2 * len(names):
        raise UserError(
            f"{len(want)} measured rows are too few for {len(names)} constants: {2 * len(names)} are needed"
        )

    def residuals(theta: Tensor) -> Tensor:
        found = model([value * math.exp(t) for value, t in zip(begin, theta.tolist())])
        return torch.tensor(found, dtype=torch.float64).log() - want

    free = list(range(len(names)))
    while free:  # without the constant that the rows tell least of, while there is one
        theta, spread = settle(residuals, len(names), free)
        if spread.max() < math.log(TOLD):
            break
        free.pop(int(spread.argmax()))
    else:
        raise UserError("the rows tell nothing of any constant")
    known = dict(zip(free, spread.exp().tolist()))
    after = [value * math.exp(t) for value, t in zip(begin, theta.tolist())]
    return Fit(names, begin, after, [known.get(i) for i in range(len(names))])


def settle(residuals: Callable[[Tensor], Tensor], count: int, free: list[int]) -> tuple[Tensor, Tensor]:
    """The logarithms of the constants over their start, (count,), and how well they are known, (free,). The rows' noise weighs them against
    SPREAD, and follows from the fit."""
    noise = 0.1
    for _ in range(3):
        prior = (noise / math.log(SPREAD)) ** 2
        theta, slopes = descend(residuals, count, free, prior)
        left = residuals(theta)
        noise = max(float(left.square().sum() / max(len(left) - len(free), 1)) ** 0.5, 1e-6)
    square = slopes.T @ slopes + (noise / math.log(SPREAD)) ** 2 * torch.eye(len(free), dtype=torch.float64)
    return theta, noise * torch.linalg.inv(square).diagonal().sqrt()


def descend(residuals: Callable[[Tensor], Tensor], count: int, free: list[int], prior: float) -> tuple[Tensor, Tensor]:
    """The logarithms of the constants over their start, (count,), least in the sum of squares with `prior` times their own; and the slopes
    of the residuals there, (rows, free)."""
    theta, damping = torch.zeros(count, dtype=torch.float64), 1e-2

    def cost(r: Tensor, theta: Tensor) -> float:
        return float(r.square().sum() + prior * theta.square().sum())

    now = residuals(theta)
    for _ in range(200):
        slopes = torch.stack([(residuals(theta + 1e-5 * unit(count, i)) - now) / 1e-5 for i in free], 1)
        square = slopes.T @ slopes + prior * torch.eye(len(free), dtype=torch.float64)
        downhill = -(slopes.T @ now + prior * theta[free])
        while damping < 1e8:
            step = torch.linalg.solve(square + damping * square.diagonal().diag(), downhill)
            tried = theta.clone()
            tried[free] += step.clamp(-1, 1)
            there = residuals(tried)
            if cost(there, tried) < cost(now, theta):
                break
            damping *= 4
        else:
            return theta, slopes
        theta, now, damping = tried, there, max(damping / 10, 1e-9)
        if float(step.abs().max()) < 1e-7:
            break
    return theta, slopes


def unit(count: int, i: int) -> Tensor:
    return torch.eye(count, dtype=torch.float64)[i]


# ---- what is said


def error_of(model: Model, costs: Sequence[float], measured: Sequence[float]) -> float:
    """The middle of |predicted / measured - 1|, as a factor."""
    return math.exp(sorted(abs(math.log(p / m)) for p, m in zip(model(costs), measured))[len(measured) // 2])


def header_with(text: str, costs: dict[str, float], source: str) -> str:
    """step_costs.h with these values, and where they come from."""
    for name, value in costs.items():
        text, count = re.subn(rf"(double {name} = )[^;]+;", rf"\g<1>{value:.4g};", text)
        assert count == 1, name
    text, count = re.subn(r'(step_costs_source =\s*)"[^"]*"', lambda m: f'{m[1]}"{source}"', text)
    assert count == 1
    return text


def entry(costs: Sequence[float], source: str) -> str:
    """The line of policy.DEVICES; what no row tells of stays."""
    device, (step, rate, *gains) = policy.DEVICES["cuda"], costs
    lanes = ", ".join(
        f"({'inf' if math.isinf(bound) else format(bound, '.3g')}, {gain:.4g}, {more})"
        for (bound, _, more), gain in zip(device.lanes, gains)
    )
    rest = f"{device.host}, {device.mend}, {device.most}, {device.probes}"
    return f'    "cuda": Device({step:.4g}, {rate:.4g}, ({lanes}), {rest}, "{source}"),'


def main(argv: Sequence[str] | None = None) -> int:
    made = Parser(prog="benchmarks.fit_costs", description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    made.add_argument("--commit", help="that the rows have to be of; this tree's HEAD if not given")
    made.add_argument("--write", action="store_true", help=f"put the values into {HEADER.relative_to(ROOT)}")
    options = made.parse_args(argv)
    try:
        return run(options)
    except (UserError, OSError, ValueError) as error:
        print(f"benchmarks.fit_costs: {error}", file=sys.stderr)
        return 2


def run(options: Namespace) -> int:
    if cuda_device.lib is None:
        raise UserError(f"the model is part of the CUDA kernels: {cuda_device.missing()}")
    rows, gpu = rows_of(options.rows, options.commit or head())
    forward = [row for row in rows if not row["backward"]]
    steps, said = fitted("StepCosts", cuda_device.lib.step_costs_cuda(), step_model, rows, gpu)
    chosen, chosen_said = fitted("cuda in policy.DEVICES", policy_start(), policy_model, forward, gpu, "host", "mend")
    print("measured us   predicted   ratio")
    for row, predicted in zip(rows, step_model(rows)(steps.after)):
        time = seconds_of(row)
        print(f"{time * 1e6:11.3f} {predicted * 1e6:11.3f} {predicted / time:7.2f}   {shape_of(row)}")
    print(f"\nstable_rnn/ops/recurrence/policy.py:\n{entry(chosen.after, chosen_said)}")
    print(f"\n{HEADER.relative_to(ROOT)}:")
    text = header_with(HEADER.read_text(), dict(zip(steps.names, steps.after)), said)
    if options.write:
        HEADER.write_text(text)
        print("written")
    else:
        print(*(line for line in text.splitlines() if re.match(r"  double|.*step_costs_source", line)), sep="\n")
    return 0


def fitted(
    what: str, start: dict[str, float], model: Callable[[list[dict]], Model], rows: list[dict], gpu: str, *others: str
) -> tuple[Fit, str]:
    """A model's constants, and where they come from in words; both are printed. `others`: constants that no rows are of."""
    measured = [seconds_of(row) for row in rows]
    found = fit(start, model(rows), measured)
    before, after = (error_of(model(rows), costs, measured) for costs in (found.before, found.after))
    said = f"fitted to {len(rows)} rows of {gpu}, half of them within {after - 1:.0%}"
    if found.kept or others:
        said += f"; not fitted: {', '.join([*found.kept, *others])}"
    print(f"{what}: {said} (before: {before - 1:.0%})\n{found}\n")
    return found, said


def head() -> str:
    """The commit of this tree."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
