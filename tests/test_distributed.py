"""Time shared between ranks: gloo processes on the CPU, which compute what one process does of the whole. Each rank has the whole too."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import needs_gloo, on_ranks
from torch import nn

from stable_rnn import Cascade, Chunked, ForgetCap, Recurrent, Scanned, StableGRU, StableLSTM, StableRNN, Verified, Windowed
from stable_rnn.distributed import sequence_parallel

pytestmark = needs_gloo
B, I, H = 3, 4, 6  # noqa: E741
BOTH = dict(num_layers=2, bidirectional=True)
SIZES = {2: [(7, 12)], 4: [(5, 5, 5, 5), (1, 9, 3, 6)]}
LENGTHS = (19, 0, 8)


def remembering(module):
    """A forget gate (an update gate) near 1: starts are seen at the end of all."""
    gates = module.weight_hh_l0.shape[0] // H
    with torch.no_grad():
        for name, bias in module.named_parameters():
            if name.startswith("bias_ih"):
                bias.view(gates, H)[1] += 3
    return module


# module, the plan of the whole where it is another, the largest difference in float64
CASES = {
    "windows": (lambda p: StableLSTM(I, H, **BOTH, plan=p), Windowed(4), None),
    "windows longer than a rank's times": (lambda p: StableGRU(I, H, **BOTH, plan=p), Windowed(14), None),
    "windows over all": (lambda p: StableRNN(I, H, plan=p), Windowed(10**30), None),
    "windows, projected": (lambda p: StableLSTM(I, H, **BOTH, proj_size=2, plan=p), Windowed(6), None),
    "chunks": (lambda p: StableLSTM(I, H, **BOTH, plan=p), Chunked(4, 3), None),
    "chunks without warm-up": (lambda p: StableGRU(I, H, **BOTH, plan=p), Chunked(5, 0), None),
    "short chunks": (lambda p: StableRNN(I, H, **BOTH, plan=p), Chunked(2, 5), None),
    "chunks of one step": (lambda p: StableLSTM(I, H, stability=ForgetCap(0.7), plan=p), Chunked(1, 3), None),
    "chunks over all": (lambda p: StableLSTM(I, H, **BOTH, plan=p), Chunked(64, 8), None),
    "scans, LSTM": (lambda p: StableLSTM(I, H, **BOTH, stability=Cascade(3, 0.9), plan=p), Scanned(), None),
    "scans, GRU": (lambda p: StableGRU(I, H, **BOTH, stability=Cascade(3, 0.9), plan=p), Scanned(), None),
    "scans, RNN": (lambda p: StableRNN(I, H, **BOTH, stability=Cascade(3), plan=p), Scanned(), None),
    "scans of a plain cascade": (lambda p: _cascade(StableLSTM(I, H, stability=None, plan=p)), Scanned(), None),
    "checked, LSTM": (lambda p: remembering(StableLSTM(I, H, **BOTH, stability=None, plan=p)), Verified(0), Recurrent()),
    "checked, GRU": (lambda p: remembering(StableGRU(I, H, **BOTH, stability=None, plan=p)), Verified(0), Recurrent()),
    "checked, RNN": (lambda p: StableRNN(I, H, **BOTH, stability=None, plan=p), Verified(0), Recurrent()),
    "checked, projected": (
        lambda p: remembering(StableLSTM(I, H, **BOTH, proj_size=2, stability=None, plan=p)),
        Verified(0, chunk=2, warmup=1),
        Recurrent(),
    ),
    "checked, uncorrected": (
        lambda p: remembering(StableLSTM(I, H, stability=None, plan=p)),
        Verified(0, correct="none"),
        Recurrent(),
    ),
    "a plan each": (
        lambda p: StableLSTM(I, H, **BOTH, stability=Cascade(3), plan=p),
        {0: Windowed(3), (1, 0): Scanned(), (1, 1): Chunked(3, 2)},
        None,
    ),
}


def _cascade(module):
    with torch.no_grad():
        module.weight_hh_l0.mul_(torch.ones(4, H, H).tril(-1).view(4 * H, H))
    return module


def results(module, x, hx, lengths, dy, dh, dc, share):
    """Outputs and gradients of one call, and the loss of the parts that `share` names."""
    module.zero_grad()
    leaves = [t.clone().requires_grad_() for t in (x, *hx)]
    states = tuple(leaves[1:]) if len(hx) == 2 else leaves[1]
    y, hidden = module(leaves[0], states, lengths=lengths)
    hidden = hidden if isinstance(hidden, tuple) else (hidden,)
    parts = [(y, dy), (hidden[0], dh), (hidden[-1], dc)]
    sum((parts[n][0] * parts[n][1]).sum() for n in share).backward()
    names = ["y", "h_n", "c_n", "dx", "dh0", "dc0"]
    found = dict(zip(names, [y, hidden[0], hidden[-1], *(t.grad for t in leaves)]))
    found |= {"d" + name: p.grad for name, p in module.named_parameters()}
    return {name: torch.zeros_like(x[:0]) if t is None else t.detach() for name, t in found.items()}


def differences(case, sizes, lengths, dtype=torch.float64, batch_first=False):
    """The largest difference of every output and gradient between the ranks' and the whole's, relative to the largest of the whole."""
    make, plan, of_whole = CASES[case]
    torch.manual_seed(0)
    ours, rank, total = make(plan).to(dtype), dist.get_rank(), sum(sizes)
    whole = make(of_whole or plan).to(dtype)
    whole.load_state_dict(ours.state_dict())
    ours.batch_first = whole.batch_first = batch_first
    states, ways = ours.num_layers * (1 + ours.bidirectional), 1 + ours.bidirectional
    out = getattr(ours, "proj_size", 0) or H
    count = 2 if isinstance(ours, StableLSTM) else 1
    hx = [torch.randn(states, B, n, dtype=dtype) for n in (out, H)[:count]]
    dh, dc = (torch.randn(states, B, n, dtype=dtype) for n in (out, H if count == 2 else out))
    x, dy = torch.randn(total, B, I, dtype=dtype), torch.randn(total, B, ways * out, dtype=dtype)
    lengths = torch.tensor(lengths) if lengths else None
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    turned = (lambda t: t.transpose(0, 1).contiguous()) if batch_first else lambda t: t
    truth = results(whole, turned(x), hx, lengths, turned(dy), dh, dc, (0, 1, 2))
    sequence_parallel(ours, dist.group.WORLD)
    # the gradient of h_n comes from the first rank alone, that of c_n from the last
    share = [0] + [1] * (rank == 0) + [2] * (rank == len(sizes) - 1)
    found = results(ours, turned(x[mine]), hx, lengths, turned(dy[mine]), dh, dc, share)
    worst = {}
    for name, wanted in truth.items():
        wanted, got = (turned(wanted)[mine], turned(found[name])) if name in ("y", "dx") else (wanted, found[name])
        if name[0] == "d" and name != "dx":
            dist.all_reduce(got)
        assert got.shape == wanted.shape, name
        size = float(truth[name].abs().max()) if truth[name].numel() else 0.0
        if wanted.numel() and size:
            worst[name] = float((got - wanted).abs().max()) / size
    return worst


def _all_cases(rank):
    found = {}
    for sizes in SIZES[dist.get_world_size()]:
        for case in CASES:
            for lengths in (None, LENGTHS):
                found[case, sizes, lengths] = differences(case, sizes, lengths)
    return found


def _float32(rank):
    sizes = SIZES[dist.get_world_size()][-1]
    return {case: differences(case, sizes, LENGTHS, torch.float32, batch_first=True) for case in CASES}


def close(each, bound):
    for found in each:
        for case, worst in found.items():
            assert worst and all(error <= bound for error in worst.values()), (case, worst)


def test_two_ranks_compute_what_one_does(two):
    close(two["_all_cases"], 1e-12)


@pytest.mark.check
def test_four_ranks_compute_what_one_does(four):
    close(four["_all_cases"], 1e-12)


def test_kernels_in_float32(two):
    close(two["_float32"], 20 * torch.finfo(torch.float32).eps)


@pytest.fixture(scope="module")
def two():
    return on_ranks(2, _all_cases, _float32)


@pytest.fixture(scope="module")
def four():
    return on_ranks(4, _all_cases, _float32)
