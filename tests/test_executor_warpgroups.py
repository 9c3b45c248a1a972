"""wgmma, the product of a warpgroup (`csrc/cuda/device.cuh`), in the executor and, where there is one, on a GPU of its architecture."""

import pytest
import torch
from executor import build
from test_executor import SCHEDULES, Place, a_16bit, c_any, empty, executor, fragments

__all__ = ["executor"]  # the fixture
pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")
HOPPER = ["gpu"] if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) else []


@pytest.fixture(params=SCHEDULES + HOPPER)
def place(request):
    return Place(request.param)


def rows_of(warp, where):
    """A fragment's element of a warp, as one of the whole matrix."""
    return lambda group, thread, i: ((at := where(group, thread, i))[0] + 16 * warp, at[1])


def sums(place, mode, dtype=torch.bfloat16, chunks=3, threads=128, seed=0):
    """What the registers hold, of (64, k) x (k, 32), and the same in float64, as [128, 4, 4]; and the size of the terms."""
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, 16 * chunks, generator=draw).to(dtype) for n in (64, 32))
    c = torch.randn(64, 32, generator=draw)

    def registers(matrix):
        octets = [[fragments(o, rows_of(w, c_any), 4) for o in matrix.split(8, 1)] for w in range(4)]
        return torch.cat([torch.stack(o, 1) for o in octets])

    given = [torch.stack([fragments(m, rows_of(w, a_16bit), 8) for m in a.split(16, 1)], 1) for w in range(4)]
    out = place.run(
        "warpgroups",
        1,
        threads,
        shared=32 * 16 * chunks * 2 + 64,
        given=torch.cat(given).contiguous().view(torch.int32),
        more=b.view(torch.int16),
        init=registers(c),
        out=empty(128, 4, 4),
        count=chunks,
        mode=mode,
    )
    a, b, c = a.double(), b.double().T, c.double()
    return out.double(), registers(c + a @ b), registers(c.abs() + a.abs() @ b.abs())


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("dtype, mode", [(torch.bfloat16, 1), (torch.float16, 2)])
def test_the_product_of_a_warpgroup(place, dtype, mode, chunks):
    """PTX ISA, "wgmma.mma_async": fragments of a and d, and the canonical layout of b without swizzling, K-major."""
    found, exact, size = sums(place, mode, dtype, chunks)
    assert (found - exact).abs().le(size * (16 * chunks + 1) * 2**-23).all()


def test_chunks_are_added_in_order(executor):
    """Each sum is rounded towards zero after each chunk of 16."""
    one = torch.zeros(64, 48)
    one[:, 0], one[:, 16], one[:, 32] = 2.0**-24, 1.0, 2.0**-24
    for order, want in (((0, 1, 2), 1.0), ((1, 0, 2), 1.0), ((0, 2, 1), 1 + 2.0**-23)):
        a = torch.cat([one.split(16, 1)[i] for i in order], 1).bfloat16()
        given = torch.cat(
            [torch.stack([fragments(m, rows_of(w, a_16bit), 8) for m in a.split(16, 1)], 1) for w in range(4)]
        )
        out = executor.run(
            "warpgroups",
            1,
            128,
            shared=32 * 48 * 2,
            given=given.contiguous().view(torch.int32),
            more=torch.ones(32, 48).bfloat16().view(torch.int16),
            init=torch.zeros(128, 4, 4),
            out=empty(128, 4, 4),
            count=3,
            mode=1,
        )
        assert out.eq(want).all()


@pytest.mark.parametrize(
    "mode, message",
    [
        (3, "wgmma without a wgmma_fence since the last wait"),
        (5, "wgmma of shared memory that no proxy_fence has made known"),
        (7, "wgmma_matrix of 16 bytes at an address that is not a multiple of that"),
        (8, "wgmma from outside its block's 3136 bytes of shared memory"),
        (9, "the warps of a warpgroup differ in their wgmma"),
        (11, "wgmma: its sums were written before wgmma_wait"),
        (14, "ends while its wgmma is under way"),
    ],
)
def test_faults_are_named(executor, mode, message):
    with pytest.raises(RuntimeError, match=message):
        sums(executor, mode)


@pytest.mark.parametrize("mode", [6, 10, 12, 13])
def test_faults_show_in_the_sums(executor, mode):
    """A fence before the stores, operands that are written and sums that are read too early."""
    found, exact, size = sums(executor, mode)
    wrong = ~(found - exact).abs().le(size * 2**-10)
    assert wrong.float().mean() > 0.25


def test_half_a_warpgroup(executor):
    with pytest.raises(RuntimeError, match="a block that is not made of warpgroups"):
        sums(executor, 1, threads=64)
