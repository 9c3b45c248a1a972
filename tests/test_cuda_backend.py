"""Modules and plans on the `cuda` backend: on a GPU where there is one, else with the kernels in the block executor on CPU tensors."""

import pytest
import torch
from backend_runs import PLANS, PROBES, assert_captured, assert_close, made
from executor import build
from torch.nn.utils.rnn import pack_padded_sequence

import stable_rnn
from stable_rnn import (
    Chunked,
    ForgetCap,
    Recurrent,
    Scanned,
    StableGRU,
    StableLSTM,
    StableRNN,
    Verified,
    Windowed,
)
from stable_rnn.ops import cuda_device
from stable_rnn.ops.recurrence import cuda

GPU = torch.cuda.is_available() and cuda_device.lib is not None
pytestmark = pytest.mark.skipif(not GPU and bool(build.missing()), reason=build.missing() or "-")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["gpu" if GPU else "executor"])
def device(monkeypatch):
    if GPU:
        yield "cuda"
        return
    build.on_cpu_tensors(monkeypatch)
    cuda._tiling.cache_clear()
    yield "cpu"
    cuda_device.limits.cache_clear()
    cuda._tiling.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", [*PLANS, PROBES], ids=str)
@pytest.mark.parametrize("cls", [StableRNN, StableLSTM, StableGRU])
def test_plans(cls, plan, dtype, device):
    m = made(cls, dtype, device, plan=plan)
    assert_close("cuda", m, torch.randn(17, 3, 7).to(device, dtype))


@pytest.mark.sanitizer
@pytest.mark.parametrize("plan", [*PLANS, PROBES], ids=str)
def test_layers_directions_and_lengths(plan, device):
    m = made(StableLSTM, torch.float32, device, num_layers=2, bidirectional=True, plan=plan)
    assert_close("cuda", m, torch.randn(9, 4, 7, device=device), lengths=torch.tensor([9, 0, 4, 1], device=device))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_packed_is_each_sequence_alone(plan, device):
    m = made(StableLSTM, torch.float32, device, plan=plan, backend="cuda", bidirectional=True).eval()
    x, sizes = torch.randn(9, 3, 7, device=device), [9, 5, 2]
    with torch.no_grad():
        y, _ = m(pack_padded_sequence(x, sizes))
        padded, _ = torch.nn.utils.rnn.pad_packed_sequence(y)
        for b, size in enumerate(sizes):
            alone, _ = m(x[:size, b : b + 1])
            # the library's input projection may round another way for another number of rows: a few units of what it sums
            torch.testing.assert_close(padded[:size, b], alone[:, 0], rtol=0, atol=16 * torch.finfo(torch.float32).eps)


@pytest.mark.sanitizer
@pytest.mark.parametrize("cls", [StableLSTM, StableGRU])
@pytest.mark.parametrize("plan", [Recurrent(), Windowed(4), Verified(chunk=6, warmup=2), Scanned()], ids=str)
def test_resets(plan, cls, device):
    m = made(cls, torch.float32, device, num_layers=2, bidirectional=True, plan=plan)
    resets = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) < 0.3
    x, lengths = torch.randn(9, 4, 7, device=device), torch.tensor([9, 0, 4, 1], device=device)
    assert_close("cuda", m, x, lengths=lengths, resets=resets.to(device))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("plan", [Recurrent(), Windowed(4), Scanned()], ids=str)
@pytest.mark.parametrize("cls", [StableRNN, StableLSTM, StableGRU])
def test_nobody_waits_for_the_number_of_pieces(cls, plan, device):
    m = made(cls, torch.float32, device, plan=plan, backend="cuda")
    x, resets = torch.randn(9, 4, 7, device=device), torch.rand(9, 4, device=device) < 0.3
    m(x, resets=resets)[0].sum().backward()  # finds out what it then remembers
    torch.cuda.set_sync_debug_mode("error")
    try:
        m(x, resets=resets)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_clamped_forget_gate(device):
    m = made(StableLSTM, torch.float32, device, plan=Chunked(4, 8))
    m.stability = ForgetCap(0.6)
    assert_close("cuda", m, torch.randn(13, 2, 7, device=device))


def test_tf32_follows_torchs_switch(device, monkeypatch):
    m = made(StableLSTM, torch.float32, device, backend="cuda", hidden=40)
    x = torch.randn(6, 2, 7, device=device)
    with torch.no_grad():
        plain = m(x)[0]
        monkeypatch.setattr(cuda, "tf32_allowed", lambda: True)
        rounded = m(x)[0]
    error = (plain - rounded).abs().max()
    assert (
        2**-18 < error < 2**-7
    )  # products of 11 bits: the sums of 40 are off by about 2^-11, and plain float32 by 2^-22


def test_empty_shapes(device):
    for shape in ((4, 0, 7), (1, 1, 7)):
        m = made(StableLSTM, torch.float32, device, backend="cuda")
        y, (h, c) = m(torch.zeros(shape, device=device))
        assert y.shape == (*shape[:2], 12) and h.shape == c.shape == (1, shape[1], 12)


def test_what_it_does_not_take_is_named(device):
    m = StableLSTM(7, 12, proj_size=5, stability=None, backend="cuda", plan=Windowed(3)).to(device)
    with pytest.raises(ValueError, match="cannot run this problem: .*proj_size"):
        m(torch.zeros(4, 2, 7, device=device))
    with pytest.raises(ValueError, match="float64"):
        made(StableLSTM, torch.float64, device, backend="cuda")(
            torch.zeros(4, 2, 7, dtype=torch.float64, device=device)
        )


def test_the_same_bits_each_time_and_for_any_number_of_lanes(device):
    m = made(StableLSTM, torch.bfloat16, device, backend="cuda", plan=Chunked(4, 4))
    xp = torch.randn(64, 1, 7).to(device, torch.bfloat16)
    with torch.no_grad():
        many, again = m(xp)[0], m(xp)[0]
        assert torch.equal(many, again)
        m.plan = Recurrent()
        assert torch.equal(m(xp[:4])[0], many[:4])


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("plan", [*PLANS[:3], PLANS[4]], ids=str)
def test_cuda_graph_capture(plan, device):
    assert_captured(made(StableLSTM, torch.float16, device, backend="cuda", plan=plan))


def test_the_table_of_backends_says_why(monkeypatch):
    monkeypatch.setattr(cuda_device, "lib", None)
    row = next(b for b in stable_rnn.backends() if b.name == "cuda")
    assert not row.available and ("no CUDA kernels" in row.reason or "missing" in row.reason)
