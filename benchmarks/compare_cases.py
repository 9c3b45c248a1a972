"""What `benchmarks.compare` measures, and the process that measures it with the stable_rnn of one tree: PYTHONPATH says which.

Run as a script, it first writes where its stable_rnn lies, then answers each line of standard input with one line of JSON: {"make": CASE}
with the seconds of a call, or why the tree has no such case; {"calls": N} with the seconds of a call in a turn of N."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import nn


def made(cell: str, size: int, **options) -> nn.Module:
    """The weights are torch's, so that both trees have the same."""
    import stable_rnn

    torch.manual_seed(0)
    plain = getattr(nn, cell)(size, size)
    ours = getattr(stable_rnn, "Stable" + cell)(size, size, stability=None, **options)
    ours.load_state_dict(plain.state_dict())
    return ours


def forward(cell: str, size: int, steps: int, batch: int, plan: str = "") -> Callable[[], object]:
    m, x = made(cell, size, **planned(plan)), torch.randn(steps, batch, size)
    return torch.no_grad()(lambda: m(x))


def training(cell: str, size: int, steps: int, batch: int, plan: str = "") -> Callable[[], object]:
    m, x = made(cell, size, **planned(plan)), torch.randn(steps, batch, size)

    def run() -> None:
        m.zero_grad()
        m(x)[0].sum().backward()

    return run


def planned(plan: str) -> dict:
    """`plan` is text, such as "Chunked(256, 32)": a tree that lacks it lacks the case."""
    import stable_rnn

    return {"plan": eval(plan, vars(stable_rnn).copy())} if plan else {}


def step(cell: str, size: int) -> Callable[[], object]:
    m, x, h = made(cell, size), torch.randn(1, size), torch.randn(1, size)
    state = (h, torch.randn(1, size)) if cell == "LSTMCell" else h
    return torch.no_grad()(lambda: m(x, state))


def projection(size: int) -> Callable[[], object]:
    """Of a training step: a few singular values are just over the bound."""
    import stable_rnn

    torch.manual_seed(0)
    m = stable_rnn.StableLSTM(size, size, stability=stable_rnn.Certified())
    weights = list(m.parameters())
    start = [w.detach() + 1e-3 / size**0.5 * torch.randn_like(w) for w in weights]

    def run() -> None:
        torch._foreach_copy_(weights, start)
        m.project_(certify=False)

    return torch.no_grad()(run)


def construction(size: int) -> Callable[[], object]:
    """torch's initialization, brought into the default set."""
    import stable_rnn

    return lambda: stable_rnn.StableLSTM(size, size)


CASES: dict[str, Callable[[], Callable[[], object]]] = {}
for _cell in ("LSTM", "RNN"):
    for _batch in (1, 8):
        for _size in (64, 256, 512):
            _steps = max(32, min(1024, 2**18 // (_batch * _size)))
            CASES[f"{_cell} Recurrent B={_batch} T={_steps} H={_size} forward"] = partial(
                forward, _cell, _size, _steps, _batch
            )
        CASES[f"{_cell} Recurrent B={_batch} T=256 H=256 forward+backward"] = partial(training, _cell, 256, 256, _batch)
    for _plan, _steps, _size in (
        ("Chunked(256, 32)", 4096, 256),
        ("Verified()", 4096, 256),
        ("Windowed(32)", 1024, 128),
    ):
        CASES[f"{_cell} {_plan} B=1 T={_steps} H={_size} forward"] = partial(forward, _cell, _size, _steps, 1, _plan)
    CASES[f"{_cell} Chunked(256, 32) B=1 T=1024 H=256 forward+backward"] = partial(
        training, _cell, 256, 1024, 1, "Chunked(256, 32)"
    )
    for _size in (64, 256):
        CASES[f"{_cell}Cell step B=1 H={_size}"] = partial(step, _cell + "Cell", _size)
for _size in (256, 512):
    CASES[f"LSTM construction H={_size}, default set"] = partial(construction, _size)
CASES["LSTM projection H=256"] = partial(projection, 256)


def main(threads: int) -> None:
    from timing import clock  # a script's imports begin in its own folder

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a tree prints is no answer
    import stable_rnn

    if threads:
        torch.set_num_threads(threads)

    def answer(**found) -> None:
        print(json.dumps(found), file=answers, flush=True)

    answer(file=stable_rnn.__file__, threads=torch.get_num_threads())
    run = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "calls" in asked:
            answer(seconds=clock(run, asked["calls"]))
            continue
        run = None  # the last case gives its memory back
        try:
            run = CASES[asked["make"]]()
            run()
            answer(seconds=clock(run))
        except Exception as error:  # an older tree may lack anything
            answer(absent=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160])


if __name__ == "__main__":
    main(int(sys.argv[1]))
