"""What more threads cost where there are no more cores: everything on one core, beside busy programs. Linux.

    python -m benchmarks.shared_cores [--neighbours 1] [--threads 2,4] [--seconds 4]

Prints the median time with so many threads over that with one thread, both in turns beside the same neighbours.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable

NEIGHBOUR = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--neighbours", type=int, default=1, help="busy programs on the same core")
    parser.add_argument("--threads", default="2,4")
    parser.add_argument("--seconds", type=float, default=4, help="for each row")
    options = parser.parse_args()
    os.sched_setaffinity(
        0, {min(os.sched_getaffinity(0))}
    )  # before torch's OpenMP counts the cores; children inherit it
    busy = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(options.neighbours)]
    try:
        measure([int(n) for n in options.threads.split(",")], options.seconds)
    finally:
        for process in busy:
            process.kill()


def measure(threads: list[int], seconds: float) -> None:
    import torch

    from benchmarks.timing import race

    def with_threads(count: int, run: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            torch.set_num_threads(count)
            run()

        return call

    print("| case |", " | ".join(f"{count} threads / 1" for count in threads), "|")
    print("|---" * (len(threads) + 1) + "|")
    for name, run in workloads().items():
        found = race({str(count): with_threads(count, run) for count in (1, *threads)}, seconds)
        print(
            f"| {name} |",
            " | ".join(f"{found[str(count)].median / found['1'].median:.2f}" for count in threads),
            "|",
            flush=True,
        )


def workloads() -> dict[str, Callable[[], object]]:
    import torch

    from stable_rnn import Chunked, StableLSTM, StableRNN, Windowed
    from stable_rnn.functional import SpectralState, spectral_project_

    torch.manual_seed(0)
    x, short = torch.randn(4096, 1, 256), torch.randn(1024, 1, 256)
    lstm, rnn, wide = StableLSTM(256, 256), StableRNN(256, 256), StableLSTM(256, 1024)
    chunked, windowed = StableLSTM(256, 256, plan=Chunked(256, 32)), StableLSTM(256, 128, plan=Windowed(16))
    plain, matrix, state = torch.nn.LSTM(256, 256), torch.randn(1024, 1024) / 32, SpectralState()

    def forward(net: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
        return torch.no_grad()(lambda: net(x))

    def train(net: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
        return lambda: net(x)[0].sum().backward()

    return {
        "LSTM forward, B=1 H=256 T=4096": forward(lstm, x),
        "RNN forward, B=1 H=256 T=4096": forward(rnn, x),
        "LSTM forward+backward, B=1 H=256 T=1024": train(lstm, short),
        "LSTM `Chunked(256, 32)` forward, T=4096": forward(chunked, x),
        "LSTM `Windowed(16)` forward+backward, H=128 T=1024": train(windowed, short),
        "LSTM step by step (T=1), B=1 H=1024": forward(wide, x[:1]),
        "uncertified spectral projection, 1024 x 1024": lambda: spectral_project_(
            matrix, 2.1, certify=False, state=state
        ),
        "nn.LSTM forward, B=1 H=256 T=4096 (torch's own)": forward(plain, x),
    }


if __name__ == "__main__":
    main()
