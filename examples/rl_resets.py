"""Reinforcement learning with a memory: a rollout is one call, whatever episodes begin in it: python examples/rl_resets.py [updates]"""

import sys

import torch
from torch.distributions import Categorical
from torch.nn.functional import one_hot

from stable_rnn import StableGRU

updates, steps, envs, kinds = int(sys.argv[1]) if len(sys.argv) > 1 else 100, 64, 32, 4
torch.manual_seed(0)
policy, head = StableGRU(kinds, 32), torch.nn.Linear(32, kinds)
optimizer = torch.optim.Adam([*policy.parameters(), *head.parameters()], lr=1e-2)
cue, h = torch.zeros(envs, dtype=torch.long), torch.zeros(1, envs, 32)

for _ in range(updates):
    # an episode shows a number at its first step only, and pays for each action that names it
    starts, cues, acted, before = torch.rand(steps, envs) < 0.05, [], [], h
    for start in starts:
        cue = torch.where(start, torch.randint(kinds, (envs,)), cue)
        cues.append(cue)
    seen = one_hot(torch.stack(cues), kinds) * starts[..., None] + 0.1 * torch.randn(steps, envs, kinds)
    with torch.no_grad():  # acting: one step at a time
        for x, start in zip(seen, starts):
            y, h = policy(x[None], h, resets=start[None])
            acted.append(y)
        action = Categorical(logits=head(torch.cat(acted))).sample()
    reward = (action == torch.stack(cues)).float()
    outputs, _ = policy(seen, before, resets=starts)  # learning: the same in one call
    assert torch.allclose(outputs, torch.cat(acted), atol=1e-5)
    log_prob = Categorical(logits=head(outputs)).log_prob(action)
    optimizer.zero_grad()
    (-log_prob * (reward - reward.mean())).mean().backward()
    optimizer.step()
print(f"reward of a step: {reward.mean():.2f}; by chance {1 / kinds:.2f}")
