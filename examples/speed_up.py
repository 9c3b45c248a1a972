"""Speed up a trained nn.LSTM in five lines, and check it: python examples/speed_up.py [length]"""

import sys
import time

import torch
from torch import nn

from stable_rnn import Verified, stabilize

length = int(sys.argv[1]) if len(sys.argv) > 1 else 16384
torch.manual_seed(0)
model = nn.Sequential(nn.LSTM(32, 128, batch_first=True)).eval()  # yours, with its trained weights
x = torch.randn(1, length, 32)


def timed(run):
    times = []
    for _ in range(4):
        start = time.perf_counter()
        y = run(x)[0]
        times.append(time.perf_counter() - start)
    return y, min(times)


with torch.inference_mode():
    before, slow = timed(model)

    stabilize(model)  # in place: same weights, same results
    model[0].plan = Verified()  # in chunks, their borders checked; where they disagree for long, as before
    after, fast = timed(model)
    print(f"{slow * 1e3:.1f} ms, now {fast * 1e3:.1f} ms: {slow / fast:.2g} times as fast as nn.LSTM")
    print(f"largest difference {(after - before).abs().max():.1e}; {model[0].last_report}")

assert torch.allclose(after, before, atol=1e-5)
