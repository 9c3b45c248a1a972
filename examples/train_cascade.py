"""Train a cascade: it forgets whatever its weights are, needs no projection while it trains, and runs all times at once, exactly."""

import argparse

import torch
from torch import nn

from stable_rnn import Cascade, Recurrent, Scanned, StableLSTM, use_plan

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4096)
parser.add_argument("--updates", type=int, default=30)
options = parser.parse_args()
torch.manual_seed(0)

lstm = StableLSTM(8, 64, stability=Cascade(groups=8, forget=0.8), plan=Scanned())
readout = nn.Linear(64, 8)
optimizer = torch.optim.Adam([*lstm.parameters(), *readout.parameters()], lr=3e-3)
x = torch.randn(options.steps, 1, 8)
target = torch.cat([torch.zeros(3, 1, 8), x[:-3]])  # the input of three steps ago

for _ in range(options.updates):
    loss = (readout(lstm(x)[0]) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"after {options.updates} updates: loss {loss.item():.3f}")

certificate = lstm.certificate()
print(f"rate {certificate.rate:.3f}; outputs within 1e-3 from the last {certificate.window(1e-3)} inputs alone")
with torch.no_grad(), use_plan(lstm, Recurrent()):
    plain = lstm(x)[0]
print(f"largest difference to the plain recurrence: {(lstm(x)[0] - plain).abs().max().item():.1e}")
