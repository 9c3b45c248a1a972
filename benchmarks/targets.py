"""Measures the CPU targets against torch in one run: `python -m benchmarks.targets [--out FILE.jsonl] [--seconds S] [--part NAME] ...`.

Float32 but for `bfloat16`, input projection included on both sides. Every ratio is baseline / ours (above 1: ours is faster),
of medians. The table goes to FILE.md, beside the rows.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn

from stable_rnn import (
    Chunked,
    ForgetCap,
    StableGRU,
    StableGRUCell,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    Verified,
    Windowed,
    use_plan,
)
from stable_rnn._errors import UserError

from .baselines import overlap_chunks, product_rate, shifted_products
from .jsonl import Log
from .speed.results import environment
from .targets_table import write
from .timing import race

STABLE = {nn.LSTM: StableLSTM, nn.GRU: StableGRU, nn.RNN: StableRNN}


def pair(plain: type, size: int, **options):
    a = plain(size, size, **options)
    b = STABLE[plain](size, size, stability=None, **options)
    b.load_state_dict(a.state_dict())
    return a, b


def training(m: nn.Module, x: torch.Tensor):
    def run() -> None:
        m.zero_grad()
        m(x)[0].sum().backward()

    return run


class Table:
    """Rows as they are measured: printed, and written."""

    def __init__(self, seconds: float, log: Log, only: str) -> None:
        self.seconds, self.log, self.only = seconds, log, only

    def add(self, case: str, baseline: str, ours, theirs, target: float | None) -> None:
        if self.only not in case:
            return
        times = race({"ours": ours, "theirs": theirs}, self.seconds)
        ratio = times["theirs"].median / times["ours"].median
        ours, theirs = ([t * 1e3 for t in times[who]] for who in ("ours", "theirs"))
        self.note(
            dict(
                case=case,
                baseline=baseline,
                ours_ms=ours[0],
                baseline_ms=theirs[0],
                ratio=ratio,
                target=target,
                ours_range_ms=ours[1:],
                baseline_range_ms=theirs[1:],
            )
        )

    def note(self, row: dict) -> None:
        if self.only not in row["case"]:
            return
        self.log.add(row)
        aim = (
            ""
            if row["target"] is None
            else f"(target {row['target']:g}: {'met' if row['ratio'] >= row['target'] else 'missed'})"
        )
        times = f"{row['ours_ms']:10.3f} ms {row['baseline_ms']:10.3f} ms" if "ours_ms" in row else " " * 27
        print(f"{row['case']:58s} {times}  {row['ratio']:6.2f}  {aim} over {row['baseline']}", flush=True)


def recurrent(table: Table) -> None:
    for plain in STABLE:
        for batch in (1, 8, 64):
            for size in (64, 128, 256, 512):
                a, b = pair(plain, size)
                x = torch.randn(max(32, min(2048, 2**19 // (batch * size))), batch, size)
                name = f"{plain.__name__} Recurrent B={batch} H={size} T={x.shape[0]}"
                target = {nn.RNN: 1.5, nn.GRU: 1.3}.get(plain, 1.0) if batch == 1 else 1.0
                with torch.no_grad():
                    table.add(name + " forward", f"nn.{plain.__name__}", lambda: b(x), lambda: a(x), target)  # noqa: B023
                if size in (128, 256):
                    table.add(name + " forward+backward", f"nn.{plain.__name__}", training(b, x), training(a, x), 1.0)


def long_sequence(table: Table) -> None:
    for plain in (nn.LSTM, nn.GRU):
        name = plain.__name__
        a, b = pair(plain, 256)
        x, chunks = torch.randn(8192, 1, 256), Chunked(256, 32)
        run, stock, target = partial(b, x), partial(a, x), 2.0 if plain is nn.LSTM else None
        with torch.no_grad():
            for plan, aim in ((chunks, target), (Verified(), None)):
                with use_plan(b, plan):
                    table.add(f"{name} {plan} B=1 T=8192 H=256", f"nn.{name}", run, stock, aim)
            with use_plan(b, chunks):
                over = f"overlap chunks, one batch through nn.{name}"
                table.add(f"{name} Chunked(256, 32) B=1 T=8192 H=256", over, run, overlap_chunks(a, x, 256, 32), 1.2)
        with use_plan(b, chunks):
            case = f"{name} Chunked(256, 32) B=1 T=8192 H=256 fwd+bwd"
            table.add(case, f"nn.{name}", training(b, x), training(a, x), None)


def windows(table: Table) -> None:
    for size in (128, 256) if table.only in "LSTM Windowed(32)" else ():
        a, b = pair(nn.LSTM, size)
        x, k = torch.randn(8192, 1, size), 32
        rate = product_rate(size, 4 * size)
        with torch.no_grad(), use_plan(b, Windowed(k)):
            table.add(
                f"LSTM Windowed(32) B=1 T=8192 H={size}",
                "k shifted GEMMs, eager gates",
                lambda: b(x),  # noqa: B023
                shifted_products(a, x, k),
                1.3,
            )
            seconds = race({"": lambda: b(x)}, table.seconds)[""].median  # noqa: B023
        flops = (
            2 * 4 * size * size * 8192 * k
        )  # the input projection, and k - 1 products: the first step starts from zero
        table.note(
            dict(
                case=f"LSTM Windowed(32) H={size}: {flops / seconds / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s",
                baseline="torch's best float32 product",
                ratio=flops / seconds / rate,
                target=0.75 if size == 256 else None,
            )
        )


def single_step(table: Table) -> None:
    for plain, ours in ((nn.LSTMCell, StableLSTMCell), (nn.GRUCell, StableGRUCell)):
        name = plain.__name__
        for size in (64, 256):
            a, b = plain(size, size), ours(size, size, stability=None)
            b.load_state_dict(a.state_dict())
            x, h, c = torch.randn(3, 1, size)
            hx = (h, c) if plain is nn.LSTMCell else h
            with torch.no_grad():
                case = f"one {name.removesuffix('Cell')} step B=1 H={size}"
                table.add(case, f"nn.{name}", partial(b, x, hx), partial(a, x, hx), 1.0)


def training_steps(table: Table) -> None:
    """A loop of 50 steps, forward and backward, as people write it."""
    for plain, cell, cap in (
        (nn.LSTMCell, StableLSTMCell, None),
        (nn.LSTMCell, StableLSTMCell, ForgetCap(0.9)),
        (nn.RNNCell, StableRNNCell, None),
        (nn.GRUCell, StableGRUCell, None),
    ):
        a, b = plain(64, 64), cell(64, 64, stability=cap)
        b.load_state_dict(a.state_dict(), strict=True)
        x = torch.randn(50, 16, 64)

        def loop(m: nn.Module, x=x):
            def run() -> None:
                m.zero_grad()
                state = None
                for row in x:
                    state = m(row, state)
                (state[0] if isinstance(state, tuple) else state).sum().backward()

            return run

        name = f"{plain.__name__} {cap or ''} 50 steps B=16 H=64 forward+backward".replace("  ", " ")
        table.add(name, f"nn.{plain.__name__}", loop(b), loop(a), 0.83)


def short_calls(table: Table) -> None:
    """A few steps at a time: what a call costs."""
    for plain in (nn.RNN, nn.LSTM):
        for steps in (1, 4, 8):
            for batch, size in ((1, 64), (16, 64), (1, 256), (16, 256)):
                a, b = pair(plain, size)
                x = torch.randn(steps, batch, size)
                name, over = f"{plain.__name__} Recurrent B={batch} H={size} T={steps}", f"nn.{plain.__name__}"
                with torch.no_grad():
                    table.add(name + " forward", over, lambda: b(x), lambda: a(x), 0.91)  # noqa: B023
                table.add(name + " forward+backward", over, training(b, x), training(a, x), 0.91)


def trained(table: Table) -> None:
    """An LSTM's training, for some batches."""
    for batch in (4, 16, 64, 256):
        a, b = pair(nn.LSTM, 256)
        x = torch.randn(256, batch, 256)
        name = f"LSTM Recurrent B={batch} H=256 T=256 forward+backward"
        table.add(name, "nn.LSTM", training(b, x), training(a, x), 1.0)


def trained_windows(table: Table) -> None:
    for plain in (nn.RNN, nn.LSTM):
        a, b = pair(plain, 256)
        x, k = torch.randn(1024, 1, 256), 32
        shifted = shifted_products(a, x, k)

        def theirs(a=a, shifted=shifted) -> None:
            a.zero_grad()
            shifted().sum().backward()

        with use_plan(b, Windowed(k)):
            name = f"{plain.__name__} Windowed(32) B=1 T=1024 H=256 forward+backward"
            table.add(name, "k shifted GEMMs, eager gates", training(b, x), theirs, 1.3)


def bfloat16(table: Table) -> None:
    """Tensors of bfloat16, float32 under autocast, and float32 whose state weights torch's switch rounds."""
    a, b = pair(nn.LSTM, 128)
    x = torch.randn(200, 16, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        table.add("LSTM Recurrent B=16 T=200 H=128 autocast", "nn.LSTM", lambda: b(x), lambda: a(x), 1.0)
    a, b, x = a.bfloat16(), b.bfloat16(), x.bfloat16()
    with torch.no_grad():
        table.add("LSTM Recurrent B=16 T=200 H=128 bfloat16", "nn.LSTM", lambda: b(x), lambda: a(x), 1.0)
    a, b = (m.bfloat16() for m in pair(nn.LSTM, 256))
    x = torch.randn(8192, 1, 256).bfloat16()
    with torch.no_grad(), use_plan(b, Chunked(256, 32)):
        table.add(
            "LSTM Chunked(256, 32) B=1 T=8192 H=256 bfloat16",
            "overlap chunks, one batch through nn.LSTM",
            lambda: b(x),
            overlap_chunks(a, x, 256, 32),
            1.2,
        )
    before = torch.get_float32_matmul_precision()
    for size, steps in ((512, 2048), (512, 4096), (1024, 2048)):
        a, b = pair(nn.LSTM, size)
        x, name = torch.randn(steps, 1, size), f"LSTM Recurrent B=1 T={steps} H={size} float32"
        with torch.no_grad():
            table.add(name, "nn.LSTM", lambda: b(x), lambda: a(x), None)  # noqa: B023
            torch.set_float32_matmul_precision("medium")
            case = f"{name}, weights rounded to bfloat16"
            table.add(case, "nn.LSTM", lambda: b(x), lambda: a(x), 2.0)  # noqa: B023
            torch.set_float32_matmul_precision(before)


def saved_bytes(table: Table) -> None:
    for plain in STABLE:
        found = []
        for m in pair(plain, 256):
            kept: dict[int, int] = {}

            def pack(t: torch.Tensor, kept=kept) -> torch.Tensor:
                if not isinstance(t, nn.Parameter):
                    kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                m(torch.randn(512, 4, 256))
            found.append(sum(kept.values()))
        theirs, ours = (size / 2**20 for size in found)
        table.note(
            dict(
                case=f"{plain.__name__} B=4 T=512 H=256: {ours:.1f} MiB saved for backward, torch {theirs:.1f}",
                baseline="bytes that torch saves",
                ratio=theirs / ours,
                target=1.0,
            )
        )


PARTS = (
    recurrent,
    trained,
    long_sequence,
    windows,
    trained_windows,
    short_calls,
    bfloat16,
    single_step,
    training_steps,
    saved_bytes,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=[part.__name__ for part in PARTS], action="append", help="these alone")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each comparison")
    parser.add_argument("--only", default="", metavar="WORD", help="cases that have it in their name, such as GRU")
    options = parser.parse_args()
    try:
        log = Log(options.out, {"what": "benchmarks.targets", "environment": environment(["cpu"])})
    except UserError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    table = Table(options.seconds, log, options.only)
    for part in PARTS:
        if not options.part or part.__name__ in options.part:
            part(table)
    if options.out:
        write(options.out)


if __name__ == "__main__":
    main()
