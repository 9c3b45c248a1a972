"""Train on one long time series, in chunks that run side by side: python examples/long_series.py [length] [updates]"""

import sys
import time

import torch
from torch import nn

from stable_rnn import Chunked, ForgetCap, Recurrent, StableLSTM, use_plan

length, updates = [int(n) for n in sys.argv[1:]] or [16384, 40]
torch.manual_seed(0)
x = torch.randn(length, 1, 1)
wanted = torch.zeros_like(x)
for t in range(1, length):  # a leaky sum: what the model has to find out
    wanted[t] = 0.8 * wanted[t - 1] + 0.4 * torch.tanh(x[t])

lstm, head = StableLSTM(1, 64, stability=ForgetCap(0.9)), nn.Linear(64, 1)
optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=1e-2)


def update(plan):
    with use_plan(lstm, plan):
        loss = (head(lstm(x)[0]) - wanted).square().mean()
    optimizer.zero_grad()
    loss.backward()  # chunks backwards too, over their borders: the full gradient, nearly
    optimizer.step()
    return loss.item()


for name, plan in {"one step after the other": Recurrent(), "in chunks": Chunked(512, 64)}.items():
    start = time.perf_counter()
    losses = [update(plan) for _ in range(updates)]
    print(
        f"{name}: {(time.perf_counter() - start) / updates * 1e3:.0f} ms an update, loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    )
assert losses[-1] < wanted.square().mean()
