"""Modules and plans on the `triton` backend, interpreted or on a GPU."""

import pytest
import torch
from backend_runs import PLANS, PROBES, assert_captured, assert_close, made
from lane_cases import DEVICE
from torch._dynamo.testing import CompileCounterWithBackend

from stable_rnn import (
    Certified,
    ForgetCap,
    Recurrent,
    StableGRU,
    StableLSTM,
    StableRNN,
    Verified,
    Windowed,
    project_after_step,
)

HIDDEN = [12, 40] if DEVICE == "cpu" else [12, 40, 200]


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("plan", [*PLANS, PROBES], ids=str)
@pytest.mark.parametrize("cls", [StableRNN, StableLSTM, StableGRU])
def test_plans(cls, plan, hidden):
    m = made(cls, torch.float32, DEVICE, hidden=hidden, plan=plan)
    assert_close("triton", m, torch.randn(11, 2, 7, device=DEVICE))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_layers_directions_lengths_and_a_clamp(plan):
    m = made(StableLSTM, torch.float32, DEVICE, num_layers=2, bidirectional=True, plan=plan)
    m.stability = ForgetCap(0.6)
    assert_close("triton", m, torch.randn(7, 3, 7, device=DEVICE), lengths=torch.tensor([7, 0, 4], device=DEVICE))


@pytest.mark.parametrize("cls", [StableLSTM, StableGRU])
@pytest.mark.parametrize("plan", [Recurrent(), Windowed(4), Verified(chunk=6, warmup=2)], ids=str)
def test_resets(plan, cls):
    """As the reference runs pieces; but chunks would begin in rows, where it lets them begin in pieces."""
    m = made(cls, torch.float32, DEVICE, bidirectional=True, plan=plan)
    x, resets = torch.randn(7, 3, 7, device=DEVICE), torch.rand(7, 3, device=DEVICE) < 0.25
    assert_close("triton", m, x, resets=resets, lengths=torch.tensor([7, 0, 4], device=DEVICE))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_compile(plan):
    """One whole graph, the same numbers, and no new graph for another T or B."""
    m = made(StableLSTM, torch.float32, DEVICE, backend="triton", plan=plan)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(m, fullgraph=True, backend=counter)
    for steps, batch in ((6, 2), (9, 3)):
        x = torch.randn(steps, batch, 7, device=DEVICE)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        gradients = []
        for f in (m, compiled):
            m.zero_grad()
            y = f(x)[0]
            y.sum().backward()
            gradients.append([y, *(w.grad.clone() for w in m.parameters())])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_training_keeps_the_certificate():
    m = made(StableRNN, torch.float32, DEVICE, backend="triton")
    m.stability = Certified(0.5)
    m.project_()
    optimizer = torch.optim.SGD(m.parameters(), lr=1.0)
    project_after_step(optimizer, m)
    for _ in range(3):
        optimizer.zero_grad()
        m(torch.randn(5, 2, 7, device=DEVICE))[0].sum().backward()
        optimizer.step()
    m.project_()
    assert m.certificate().rate <= 0.5


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("plan", [*PLANS[:3], PLANS[4]], ids=str)
def test_cuda_graph_capture(plan, hidden):
    assert_captured(made(StableLSTM, torch.float16, DEVICE, hidden=hidden, backend="triton", plan=plan))
