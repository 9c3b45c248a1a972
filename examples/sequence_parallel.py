"""One long series, of which each process holds a stretch of time: torchrun --nproc-per-node 2 examples/sequence_parallel.py"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stable_rnn import Cascade, Scanned, StableLSTM
from stable_rnn.distributed import sequence_parallel

steps, updates = [int(n) for n in sys.argv[1:]] or [4096, 20]
dist.init_process_group("gloo")  # "nccl" on GPUs
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same weights and the same series everywhere, for this example
lstm, head = StableLSTM(1, 32, stability=Cascade(4, 0.8), plan=Scanned()), nn.Linear(32, 1)
series = torch.randn(ranks * steps, 1, 1)
wanted = torch.cat([torch.zeros(2, 1, 1), series[:-2]])  # what came two steps ago: across borders between ranks too
alone = head(lstm(series)[0]).detach()

sequence_parallel(lstm, dist.group.WORLD)  # or one dimension of a mesh: mesh["time"]
mine = slice(rank * steps, (rank + 1) * steps)
together = head(lstm(series[mine])[0])
print(f"rank {rank}: largest difference to one process {(together - alone[mine]).abs().max().item():.1e}")
assert torch.allclose(together, alone[mine], atol=1e-5)

heads = DistributedDataParallel(nn.ModuleList([lstm, head]))  # which takes the mean of the ranks' gradients
optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
for _ in range(updates):
    loss = (head(lstm(series[mine])[0]) - wanted[mine]).square().mean()  # over this rank's times
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"rank {rank}: loss {loss.item():.3f} after {updates} updates")
dist.destroy_process_group()
