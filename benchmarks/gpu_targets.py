"""The targets of the GPU kernels, each against its baseline in the same run: `python -m benchmarks.gpu_targets [--out DIR]`.

Every row is checked against float64 as in benchmarks.speed; a wrong one gets no ratio. Both GPU backends take part side by side. Writes
gpu_targets.jsonl, row by row, and gpu_targets.md. `--rehearse` runs all of it in tiny sizes on the CPU, to test this file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from stable_rnn import StableLSTM
from stable_rnn._errors import UserError
from stable_rnn.cli import Parser, positive

from .gpu_costs import costs
from .gpu_long import chrono, scans, trained
from .gpu_steps import exchange, products, projections, resets, training
from .gpu_table import Table, markdown
from .jsonl import Log
from .speed import contestants, results
from .speed.cases import PASSES
from .timing import race

# ---- the recurrence


def sweet_spot(table: Table, cell: str = "lstm") -> None:
    """cuDNN's best shape: at least level, or given to it."""
    for passes in PASSES:
        case = table.case(passes=passes, cell=cell, T=1024, B=16, H=768)
        found = table.run(case, ["recurrent"], ["nn"], ["auto", *table.kernels])
        for backend in ("auto", *table.kernels):
            least = 1.0 if backend == "auto" else None
            table.versus(table.name(case, backend), found.ours("Recurrent", backend), found.best("nn"), least)


def beside_it(table: Table, cell: str = "lstm") -> None:
    """Batch 1, odd sizes, bfloat16: where cuDNN has no persistent kernel."""
    for dtype, sizes in (
        ("float16", dict(T=1024, B=1, H=512)),
        ("float16", dict(T=1024, B=16, H=200)),
        ("bfloat16", dict(T=1024, B=16, H=768)),
    ):
        for passes in PASSES:
            case = table.case(dtype, passes, cell, **sizes)
            found = table.run(case, ["recurrent"], ["nn"])
            for backend in table.kernels:
                least = 2.0 if backend == table.kernels[0] else None
                table.versus(table.name(case, backend), found.ours("Recurrent", backend), found.best("nn"), least)


def step_time(table: Table) -> None:
    """Of the plain recurrence."""
    for sizes, most in ((dict(T=4096, B=1, H=256), 1.5), (dict(T=4096, B=16, H=512), 2.5)):
        case = table.case(**sizes)
        found = table.run(case, ["recurrent"], [])
        for backend in table.kernels:
            table.value(
                table.name(case, backend, "time of a step,"),
                found.ours("Recurrent", backend),
                lambda row: row["seconds"]["median"] / row["T"] * 1e6,
                "us",
                most if backend == table.kernels[0] else None,
                True,
            )


def windows(table: Table, cell: str = "lstm") -> None:
    """Every window of 32 inputs by itself."""
    for size, share, least in ((256, 0.40, 2.5), (512, 0.30, 1.3)):
        case = table.case("bfloat16", cell=cell, T=16384, H=size)
        found = table.run(case, ["windowed"], ["shifted", "unfold"])
        first = found.ours("Windowed", table.kernels[0])
        for backend in table.kernels:
            ours, aims = found.ours("Windowed", backend), backend == table.kernels[0]
            what = f"Windowed({case.k})"
            table.value(
                table.name(case, backend, what + ", share of the GEMM rate,"),
                ours,
                lambda row: row["rate_share"],
                "",
                share if aims else None,
                False,
            )
            table.versus(table.name(case, backend, what), ours, found.best("shifted"), least if aims else None)
            if not aims:
                table.versus(table.name(case, backend, what), ours, first, 1 / 1.5)


def chunks(table: Table, cell: str = "lstm") -> None:
    """The long sequence; the warm-up of 32 forgets enough in practice, `Verified` checks it. The targets are the best chunk's."""
    for passes in PASSES:
        best: dict[tuple[str, str, str], dict] = {}
        for chunk in (64, 128, 256):
            case = table.case(passes=passes, cell=cell, T=65536, H=256, C=chunk)
            found = table.run(case, ["chunked", "verified"], ["nn", "overlap"])
            for backend, plan, over in product(table.kernels, ("Chunked", "Verified"), ("nn", "overlap")):
                name = table.name(case, backend, f"{plan} {case.chunk}+{case.k}")
                row = table.versus(name, found.ours(plan, backend), found.best(over), None)
                if row.get("ratio") and row["ratio"] > best.get((plan, backend, over), {"ratio": 0.0})["ratio"]:
                    best[plan, backend, over] = row
        for (plan, backend, over), row in best.items():
            least = (
                _least(plan, passes, over)
                if backend == table.kernels[0]
                else 100.0
                if (plan, passes, over) == _TRITONS
                else None
            )
            if least is not None:
                table.again(row, f"best chunk: {row['case']}", least)


_TRITONS = ("Chunked", PASSES[0], "nn")  # what the Triton kernels have a target for


def _least(plan: str, passes: str, over: str) -> float | None:
    if over == "nn":
        return 300.0 if passes == PASSES[0] else 100.0
    return 1.5 if passes == PASSES[0] else None


def gru(table: Table) -> None:
    """The GRU, by the figures of the LSTM."""
    for part in (sweet_spot, beside_it, windows, chunks):
        part(table, "gru")


def others(table: Table) -> None:
    """FlashRNN with one head, and haste, on shapes of theirs. FlashRNN's fused backend compiles for minutes at first: last of all."""
    for size in (64, 128):
        for passes in PASSES:
            case = table.case("bfloat16", passes, T=1024, B=16, H=size)
            found = table.run(case, ["recurrent"], ["flashrnn_triton"])
            for backend in table.kernels:
                table.versus(table.name(case, backend), found.ours("Recurrent", backend), found.best("FlashRNN"), 1.0)
    for dtype, size, baseline, name in (
        ("float32", 768, "haste", "haste"),
        ("float16", 768, "haste", "haste"),
        ("bfloat16", 256, "flashrnn", "FlashRNN"),
        ("bfloat16", 768, "flashrnn", "FlashRNN"),
    ):
        for passes in PASSES:
            case = table.case(dtype, passes, T=1024, B=16, H=size)
            found = table.run(case, ["recurrent"], [baseline], table.kernels[:1])
            table.versus(
                table.name(case, table.kernels[0]), found.ours("Recurrent", table.kernels[0]), found.best(name), 1.0
            )


# ---- what cases do not say


def stacks(table: Table) -> None:
    """Mixed lengths, packed; two layers in both directions. Gradients of these are tested elsewhere, here they are timed."""
    size, steps, batch = (8, 24, 3) if table.tiny else (512, 1024, 16)
    kind = torch.float32 if table.tiny else torch.float16
    lengths = torch.linspace(steps // 8, steps, batch).long().flip(0)
    x = (torch.rand(steps, batch, size, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(table.device, kind)
    for what, options, packed, least in (
        (f"packed, lengths {steps // 8} to {steps},", {}, True, 5.0),
        ("2 layers, bidirectional,", dict(num_layers=2, bidirectional=True), False, 2.0),
    ):
        plain = nn.LSTM(size, size, **options).to(table.device, kind)
        given = pack_padded_sequence(x, lengths) if packed else x
        double = PackedSequence(given.data.double(), given.batch_sizes) if packed else x.double()
        with torch.no_grad():
            exact = outputs(like(plain, nn.LSTM(size, size, **options).to(table.device, torch.float64)), double)
            reference = StableLSTM(size, size, **options, stability=None, backend="reference").to(table.device, kind)
            eager = outputs(like(plain, reference), given)
        # twice the error of the reference, which is eager torch in this dtype, and the rounding of one result
        allowed = 2 * float((eager.double() - exact).abs().max()) + torch.finfo(kind).eps
        for backend in table.kernels:
            ours = StableLSTM(size, size, **options, stability=None, backend=backend).to(table.device, kind)
            for passes in PASSES:
                name = f"LSTM {str(kind).removeprefix('torch.')} {what} B{batch} T{steps} H{size} {passes} [{backend}]"
                try:
                    rows = [
                        timed(who, m, given, exact, allowed, passes)
                        for who, m in (("ours", like(plain, ours)), ("nn.LSTM", plain))
                    ]
                except Exception as error:
                    table.note(name, note=contestants.in_a_line(error))
                    continue
                times = race({row["name"]: row["run"] for row in rows}, table.limits.seconds, device=table.device)
                for row in rows:
                    row["seconds"] = times[row["name"]]._asdict()
                table.versus(name, *rows, least if backend == table.kernels[0] else None)


def like(plain: nn.LSTM, m: nn.LSTM) -> nn.LSTM:
    m.load_state_dict(plain.state_dict())
    return m


def outputs(m: nn.LSTM, x: torch.Tensor | PackedSequence) -> torch.Tensor:
    y = m(x)[0]
    return y.data if isinstance(y, PackedSequence) else y


def timed(
    name: str, m: nn.LSTM, x: torch.Tensor | PackedSequence, exact: torch.Tensor, allowed: float, passes: str
) -> dict:
    backward = passes != PASSES[0]
    m.train(backward)

    def run() -> torch.Tensor:
        m.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward):
            y = outputs(m, x)
            if backward:
                y.sum().backward()
        return y

    error = float((run().detach().double() - exact).abs().max())
    wrong = None if error <= allowed else f"output error {error:.2g} > {allowed:.2g}"
    return {"name": name, "run": run, "error_of_function": error, "tolerance": allowed, "wrong": wrong}


# What takes longest comes late: a run that is stopped keeps what it has.
PARTS = {
    part.__name__: part
    for part in (
        *(sweet_spot, windows, step_time, projections, beside_it, stacks, chunks),
        *(scans, chrono, training, resets, trained, gru, costs, exchange, products, others),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    made = Parser(prog="benchmarks.gpu_targets", description=__doc__.split("\n")[0])
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    made.add_argument(
        "--seconds", type=positive(float), default=1.0, metavar="S", help="for the turns of one comparison"
    )
    made.add_argument(
        "--minutes", type=positive(float), default=60.0, metavar="M", help="start no part after this long"
    )
    made.add_argument("--only", choices=PARTS, action="append", help="a part of the table; may be given again")
    made.add_argument("--skip", choices=PARTS, action="append", default=[])
    made.add_argument("--commit", help="for the rows, where git cannot tell")
    made.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    made.add_argument("--list", action="store_true", help="say what the parts are, and end")
    options = made.parse_args(argv)
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:12} {(part.__doc__ or '').strip().splitlines()[0]}")
        return 0
    try:
        return run(options)
    except UserError as error:
        print(f"benchmarks.gpu_targets: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("no GPU: torch finds no usable one here")
    log = Log(
        options.out / "gpu_targets.jsonl",
        {
            "what": "benchmarks.gpu_targets",
            "finished": False,
            "rehearsal": options.rehearse,
            "environment": results.environment([] if options.rehearse else ["cuda"], options.commit),
        },
    )
    begin = time.perf_counter()
    torch.manual_seed(0)
    table, not_run = Table(options, log), []
    for name, part in PARTS.items():
        if name in (options.only or PARTS) and name not in options.skip:
            if time.perf_counter() - begin > 60 * options.minutes:
                not_run.append(name)
                continue
            try:
                part(table)
            except Exception as error:  # one part that breaks must not take the others with it
                table.note(name, wrong=contestants.in_a_line(error))
            finally:  # also where the run is interrupted
                log.add(took_seconds=time.perf_counter() - begin, gemm_rates=table.rates)
                (options.out / "gpu_targets.md").write_text(markdown(log.about, log.rows))
    log.add(finished=not not_run, parts_not_run=not_run)
    (options.out / "gpu_targets.md").write_text(markdown(log.about, log.rows))
    missed = sum(row["met"] is False for row in log.rows)
    wrong = sum(bool(row["wrong"]) for row in log.rows)
    met = sum(row["met"] is True for row in log.rows)
    print(
        f"{met} targets met, {missed} missed, {wrong} rows wrong; wrote {options.out}/gpu_targets.jsonl, gpu_targets.md"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
