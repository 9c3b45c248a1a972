"""Keep a model provably stable while it trains: python examples/train_certified.py [updates]"""

import sys

import torch
from torch import nn

from stable_rnn import Certified, StableRNN, project_after_step

updates = int(sys.argv[1]) if len(sys.argv) > 1 else 300
torch.manual_seed(0)
rnn, head = StableRNN(2, 64, stability=Certified(rate=0.95)), nn.Linear(64, 1)
optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=3e-3)
project_after_step(optimizer, rnn)

for number in range(updates):
    x = torch.rand(200, 16, 2) * 2 - 1
    wanted = (x[..., :1] * x[..., 1:]).roll(3, 0)  # the product of two inputs, three steps ago
    loss = (head(rnn(x)[0]) - wanted)[3:].square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if number % (updates // 4 or 1) == 0:
        print(f"update {number}: loss {loss.item():.4f}, norm {torch.linalg.matrix_norm(rnn.weight_hh_l0, 2):.4f}")

rnn.project_()  # the projection with a proof
proof = rnn.certificate()
print(proof)
assert proof.rate <= 0.95
