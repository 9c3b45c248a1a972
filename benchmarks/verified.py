"""`Verified()` against the plain recurrence and torch: `python -m benchmarks.verified [--T N] [--H N ...] [--rounds N] [--out FILE.jsonl]`.

LSTMs of one layer, B = 1, float32, input projection included, turn about; ratios of medians. `first`: the call in which the module finds
out what pays (its weights were written to before it); `later`: the next one, which knows. Networks: `short` is torch's initialization,
`middle` has forget biases of 2.5 more, `long` those for memories of up to 1000 steps (chrono), `chaos` recurrent weights 30 times as large.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from stable_rnn import Recurrent, StableLSTM, Verified

from .jsonl import Log
from .speed.results import environment
from .timing import clock


def short(m: nn.LSTM) -> None:
    pass


def middle(m: nn.LSTM) -> None:
    m.bias_ih_l0.chunk(4)[1].add_(2.5)


def long(m: nn.LSTM) -> None:
    i, f, _, _ = m.bias_ih_l0.chunk(4)
    m.bias_hh_l0.zero_()
    f.copy_(torch.log(1 + 1000 * torch.rand_like(f)))
    i.copy_(-f)


def chaos(m: nn.LSTM) -> None:
    m.weight_hh_l0.mul_(30)


NETWORKS: list[Callable[[nn.LSTM], None]] = [short, middle, long, chaos]


def measured(network: Callable[[nn.LSTM], None], size: int, steps: int, training: bool, rounds: int) -> dict:
    """A row: ratios of medians, and what the module reports."""
    torch.manual_seed(0)
    plain, ours, x = nn.LSTM(size, size), StableLSTM(size, size, stability=None), torch.randn(steps, 1, size)
    with torch.no_grad():
        network(plain)
    ours.load_state_dict(plain.state_dict())

    def call(m: nn.Module) -> Callable[[], None]:
        def run() -> None:
            m.zero_grad()
            with torch.set_grad_enabled(training):
                y, _ = m(x)
            if training:
                y.sum().backward()

        return run

    times: dict[str, list[float]] = {"nn": [], "recurrent": [], "first": [], "later": []}
    for _ in range(rounds + 1):
        times["nn"].append(clock(call(plain)))
        ours.plan = Recurrent()
        times["recurrent"].append(clock(call(ours)))
        ours.plan = Verified()
        with torch.no_grad():
            ours.weight_hh_l0.mul_(1)
        times["first"].append(clock(call(ours)))
        report = str(ours.last_report)
        times["later"].append(clock(call(ours)))
    of = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first round warms up
    ratios = {f"first over {name}": of["first"] / of[name] for name in ("recurrent", "nn")}
    ratios |= {f"later over {name}": of["later"] / of[name] for name in ("recurrent", "nn")}
    what = "forward+backward" if training else "forward"
    return dict(
        network=network.__name__,
        H=size,
        T=steps,
        what=what,
        ms={k: 1e3 * t for k, t in of.items()},
        **ratios,
        report=report,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verified", description=__doc__.splitlines()[0])
    parser.add_argument("--T", type=int, default=8192)
    parser.add_argument("--H", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    log = Log(options.out, environment(["cpu"]))
    print("network   H    what              time over Recurrent(): first, later   over nn.LSTM: first, later")
    for size in options.H:
        for network in NETWORKS:
            for training in (False, True):
                row = measured(network, size, options.T, training, options.rounds)
                log.add(row)
                numbers = [row[f"{call} over {whom}"] for whom in ("recurrent", "nn") for call in ("first", "later")]
                print(f"{row['network']:9} {size:<4} {row['what']:17} " + " ".join(f"{n:9.2f}" for n in numbers))
                print("".join(f"    {line}\n" for line in row["report"].splitlines()), end="", flush=True)


if __name__ == "__main__":
    main()
