"""The primitives of `csrc/cuda/device.cuh`: each against its meaning, in the block executor (two schedules) and, where there is one, on a
GPU. What a device leaves undefined must show in the executor."""

import ctypes
import shutil

import pytest
import torch
from executor import build

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")

SCHEDULES = ["ascending", "descending"]
GPU = ["gpu"] if torch.cuda.is_available() and shutil.which("nvcc") else []
NAN_BITS = -1  # the poison of shared memory, read as an integer


class Place:
    """Runs the kernels of `executor/kernels.cu` under a schedule, or on the GPU."""

    def __init__(self, name: str):
        self.gpu = name == "gpu"
        self.descending = name == "descending"
        self.library = build.gpu_primitives() if self.gpu else build.primitives()
        self.device = "cuda" if self.gpu else "cpu"

    def run(
        self,
        kernel,
        blocks,
        threads,
        *,
        out,
        cluster=1,
        shared=0,
        cooperative=False,
        given=None,
        more=None,
        init=None,
        flags=None,
        count=0,
        mode=0,
    ):
        """Fills `out`; raises RuntimeError with the launch's message."""
        tensors = [None if t is None else t.to(self.device).contiguous() for t in (given, more, init, out, flags)]
        with build.schedule(self.library, self.descending):
            message = run_kernel(
                self.library, kernel, blocks, threads, cluster, shared, cooperative, tensors, count, mode
            )
        if message:
            raise RuntimeError(message.decode())
        return out.copy_(tensors[3])


def run_kernel(library, kernel, blocks, threads, cluster, shared, cooperative, tensors, count, mode):
    library.run_kernel.restype = ctypes.c_char_p
    addresses = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    return library.run_kernel(
        kernel.encode(),
        blocks,
        threads,
        cluster,
        ctypes.c_int64(shared),
        int(cooperative),
        None,
        *addresses,
        count,
        mode,
    )


@pytest.fixture(params=SCHEDULES + GPU)
def place(request):
    return Place(request.param)


@pytest.fixture(params=SCHEDULES)
def executor(request):
    return Place(request.param)


def empty(*shape, dtype=torch.float32):
    return (
        torch.full(shape, float("nan"), dtype=dtype) if dtype.is_floating_point else torch.full(shape, -7, dtype=dtype)
    )


def test_threads_know_where_they_are(place):
    out = place.run("where", 6, 64, cluster=2, out=empty(6, 64, 6, dtype=torch.int32))
    for block in range(6):
        for thread in range(64):
            assert out[block, thread].tolist() == [thread, 64, block, 6, block % 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shuffle(place, dtype):
    values, source = torch.randn(2, 3, 32, dtype=dtype), torch.randint(32, (2, 3, 32), dtype=torch.int32)
    out = place.run(
        "shuffles", 2, 96, given=values, more=source, out=empty(2, 3, 32, dtype=dtype), mode=int(dtype == torch.float64)
    )
    assert torch.equal(out, values.gather(2, source.long()))


@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16, 31])
def test_shuffle_xor(place, mask):
    values = torch.randn(32)
    out = place.run(
        "shuffles", 1, 32, given=values, more=torch.zeros(32, dtype=torch.int32), out=empty(32), count=mask, mode=2
    )
    assert torch.equal(out, values[torch.arange(32) ^ mask])


# PTX ISA, "Matrix Fragments for mma.m16n8k16" with 16-bit types, and "mma.m16n8k8" with .tf32: (row, column) of element i of a lane.
def a_16bit(group, thread, i):
    return group if 0 <= i < 2 or 4 <= i < 6 else group + 8, thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8


def b_16bit(group, thread, i):
    return thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8, group


def a_tf32(group, thread, i):
    return group if i in (0, 2) else group + 8, thread if i in (0, 1) else thread + 4


def b_tf32(group, thread, i):
    return thread if i == 0 else thread + 4, group


def c_any(group, thread, i):
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def fragments(matrix, where, count):
    """[32, count]: each lane's elements of a matrix."""
    return torch.stack(
        [torch.stack([matrix[where(lane >> 2, lane % 4, i)] for i in range(count)]) for lane in range(32)]
    )


@pytest.mark.parametrize("dtype, code", [(torch.bfloat16, 1), (torch.float16, 2), (torch.float32, 3)])
def test_mma(place, dtype, code):
    tf32 = dtype == torch.float32
    k = 8 if tf32 else 16
    a, b, c = torch.randn(16, k).to(dtype), torch.randn(k, 8).to(dtype), torch.randn(16, 8)
    if tf32:
        a, b = keep_10_bits(a), keep_10_bits(b)
    registers = [
        fragments(a, a_tf32 if tf32 else a_16bit, k * 16 // 32),
        fragments(b, b_tf32 if tf32 else b_16bit, k * 8 // 32),
    ]
    registers = [r.contiguous().view(torch.int32) for r in registers]
    assert [tuple(r.shape) for r in registers] == [(32, 4), (32, 2)]
    out = place.run(
        "products",
        1,
        32,
        given=registers[0],
        more=registers[1],
        init=fragments(c, c_any, 4),
        out=empty(32, 4),
        count=1,
        mode=code,
    ).double()
    terms = [
        fragments(m, c_any, 4)
        for m in (c.double() + a.double() @ b.double(), c.double().abs() + a.double().abs() @ b.double().abs())
    ]
    exact, size = terms
    if place.gpu:  # truncated when added: less than an ulp of the largest partial sum for each of the terms
        assert (out - exact).abs().le(size * (k + 1) * 2**-23).all()
    else:  # truncated once: less than an ulp, and never away from zero
        assert (out - exact).abs().le(exact.abs() * 2**-23).all() and out.abs().le(exact.abs()).all()


def test_mma_reads_ten_bits_of_tf32(place):
    """What to_tf32 would have rounded up is cut off where it was forgotten."""
    one_and = torch.full((32, 4), 1 + 2**-11 + 2**-12).view(torch.int32)
    ones, zeros = torch.ones(32, 2).view(torch.int32), torch.zeros(32, 4)
    out = place.run("products", 1, 32, given=one_and, more=ones, init=zeros, out=empty(32, 4), count=1, mode=3)
    assert out.eq(8).all()


def transposed(place, mode=0):
    matrices = torch.randint(-1 << 15, 1 << 15, (4, 8, 8)).short()
    out = place.run("transposed", 1, 32, shared=512, given=matrices, out=empty(32, 4, dtype=torch.int32), mode=mode)
    return matrices, out.view(torch.int16).view(32, 4, 2)


def test_load_transposed(place):
    """PTX ISA, "ldmatrix" with .trans: a lane gets what a row of the transposed matrix has in columns 2t and 2t + 1."""
    matrices, found = transposed(place)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        assert torch.equal(found[lane], matrices.transpose(1, 2)[:, group, 2 * thread : 2 * thread + 2])


@pytest.mark.parametrize(
    "mode, message",
    [
        (1, "load_transposed of 16 bytes at an address that is not a multiple of that"),
        (2, "load_transposed from outside its block's 512 bytes of shared memory"),
        (3, "the kernel hangs, its threads are: block 0: 1 ended, 31 in load_transposed"),
    ],
)
def test_wrong_transposed_loads_are_named(executor, mode, message):
    with pytest.raises(RuntimeError, match=message):
        transposed(executor, mode)


def keep_10_bits(x):
    """To the nearest float with 10 bits of mantissa, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def awkward_floats():
    """Every exponent and sign, with mantissas at, just below and just above the ties of 7 and 10 bits; infinities and zeros."""
    mantissas = torch.tensor(
        [
            0,
            1,
            0xFFF,
            0x1000,
            0x1001,
            0x2FFF,
            0x3000,
            0x3001,
            0x7FFF,
            0x8000,
            0x8001,
            0x17FFF,
            0x18000,
            0x7FE000,
            0x7FEFFF,
            0x7FF000,
            0x7F8000,
            0x7FFFFF,
            *torch.randint(1 << 23, (100,)).tolist(),
        ]
    )
    bits = (torch.arange(255)[:, None] << 23 | mantissas).flatten()
    bits = torch.cat([bits, torch.tensor([0x7F800000])])
    return torch.cat([bits, bits | 1 << 31]).to(torch.uint32).view(torch.float32)


@pytest.mark.parametrize("dtype, mode", [(torch.bfloat16, 1), (torch.float16, 2)])
def test_storage_types_round_as_torch_does(place, dtype, mode):
    x = awkward_floats()
    out = place.run("conversions", 2, 64, given=x, out=empty(2, len(x)), count=len(x), mode=mode)
    want = x.to(dtype)
    assert torch.equal(out[0].view(torch.int32), want.view(torch.int16).int() & 0xFFFF)
    assert torch.equal(out[1].view(torch.int32), want.float().view(torch.int32))


@pytest.mark.parametrize("mode, bits", [(1, 0x7FFF), (2, 0x7FFF), (3, 0x7FFFFFFF)])
def test_conversions_keep_nan(place, mode, bits):
    out = place.run(
        "conversions", 1, 32, given=torch.tensor([float("nan"), -float("nan")]), out=empty(2, 2), count=2, mode=mode
    )
    assert out[0].view(torch.int32).tolist() == [bits, bits]


def test_to_tf32_rounds_ties_away(place):
    x = awkward_floats()
    out = place.run("conversions", 2, 64, given=x, out=empty(2, len(x)), count=len(x), mode=3)
    finite = x.abs().lt(3.4e38)
    assert torch.equal(out[0][finite], keep_10_bits(x[finite]))
    assert torch.equal(out[0][x.isinf()], x[x.isinf()])


def neighbours(place, mode=0, threads=128, steps=3):
    out = place.run(
        "neighbours",
        1,
        threads,
        shared=4 * threads,
        out=empty(steps, threads, dtype=torch.int32),
        count=steps,
        mode=mode,
    )
    return torch.equal(out, (1000 * torch.arange(steps)[:, None] + torch.arange(threads).roll(-32)).int())


def test_block_sync(place):
    assert neighbours(place)


@pytest.mark.parametrize("mode", [1, 2])
def test_a_missing_block_sync_shows_in_a_schedule(mode):
    assert not all(neighbours(Place(schedule), mode) for schedule in SCHEDULES)


@pytest.mark.parametrize("mode, sound", [(3, [False, True]), (4, [True, False])])
def test_each_schedule_shows_what_the_other_hides(mode, sound):
    """Threads that read, without a barrier, from the warp above or below."""
    threads = torch.arange(128)
    want = (threads + 32).where(threads < 96, threads) if mode == 3 else (threads - 32).where(threads >= 32, threads)
    for schedule, right in zip(SCHEDULES, sound):
        out = Place(schedule).run(
            "neighbours", 1, 128, shared=512, out=empty(128, dtype=torch.int32), count=1, mode=mode
        )
        assert torch.equal(out, want.int()) == right


def test_copy_async_lands_by_copy_wait(place):
    n = 32
    given = torch.randn(5 * n)
    out = place.run("copies", 1, n, shared=20 * n, given=given, out=empty(9, n))
    assert torch.equal(out[2], given[:n]) and torch.equal(out[4:].flatten(), given)


def test_copies_read_before_copy_wait_are_nan(executor):
    n = 32
    given = torch.randn(5 * n)
    out = executor.run("copies", 1, n, shared=20 * n, given=given, out=empty(9, n), mode=5)
    assert out[[0, 1, 3]].isnan().all() and torch.equal(out[2], given[:n]) and torch.equal(out[4:].flatten(), given)


@pytest.mark.parametrize(
    "mode, message",
    [
        (1, "copy_async of 8 bytes at an address that is not a multiple of that"),
        (2, "copy_async to outside its block's 640 bytes of shared memory"),
        (3, "copy_async: its source was written before copy_wait"),
        (4, "copy_async: its destination was written before copy_wait"),
    ],
)
def test_wrong_copies_are_named(executor, mode, message):
    with pytest.raises(RuntimeError, match=f"block 0, thread [0-9]+: {message}"):
        executor.run("copies", 1, 32, shared=640, given=torch.randn(160), out=empty(9, 32), mode=mode)


def exchange(place, mode=0, blocks=8, cluster=4):
    return place.run(
        "cluster_exchange",
        blocks,
        64,
        cluster=cluster,
        shared=4 * cluster,
        out=empty(blocks, cluster, dtype=torch.int32),
        mode=mode,
    )


def peers(blocks=8, cluster=4):
    return torch.stack([10 * (torch.arange(cluster) + block // cluster * cluster) for block in range(blocks)]).int()


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_cluster_exchange(place, cluster):
    assert torch.equal(exchange(place, cluster=cluster), peers(cluster=cluster))


def test_shared_memory_of_blocks_that_have_not_begun_or_have_ended(executor):
    early, late = exchange(executor, mode=1), exchange(executor, mode=2)
    assert early.eq(NAN_BITS).any() and early[early != NAN_BITS].eq(peers()[early != NAN_BITS]).all()
    assert late.eq(NAN_BITS).any()


@pytest.mark.parametrize(
    "mode, message",
    [
        (3, "cluster_arrive twice without cluster_wait"),
        (4, "cluster_wait without cluster_arrive"),
        (5, "cluster_map of an address outside its block's 16 bytes of shared memory"),
    ],
)
def test_wrong_cluster_calls_are_named(executor, mode, message):
    with pytest.raises(RuntimeError, match=message):
        exchange(executor, mode)


def pass_token(place, cooperative=True, mode=0, blocks=5, rounds=7):
    flags = torch.zeros(blocks, dtype=torch.int32)
    flags[0] = 1
    out = torch.zeros(1, dtype=torch.int32)
    return place.run("token", blocks, 64, cooperative=cooperative, out=out, flags=flags, count=rounds, mode=mode).item()


def test_flags_order_the_blocks_of_a_cooperative_grid(place):
    assert pass_token(place) == 35


def test_a_wait_that_never_ends_is_named(executor):
    with pytest.raises(
        RuntimeError,
        match="the kernel hangs, its threads are: block 0: 63 in block_sync, 1 in flag_wait; block 1: .*; and "
        "1 more blocks",
    ):
        pass_token(executor, mode=1)
    with pytest.raises(RuntimeError, match="the kernel hangs"):
        pass_token(executor, cooperative=False)  # blocks of an ordinary grid need not run at the same time
    if executor.descending:  # nor in order
        with pytest.raises(RuntimeError, match="the kernel hangs"):
            pass_token(executor, cooperative=False, rounds=1)
    assert pass_token(executor) == 35  # the next launch is sound


def test_loads_and_stores_through_l2(place):
    given = torch.randn(7 * 64)
    assert torch.equal(place.run("through_l2", 1, 64, given=given, out=empty(7 * 64)), given)


def test_misaligned_vectors_are_named(executor):
    with pytest.raises(RuntimeError, match="load_l2 of 8 bytes at an address that is not a multiple of that"):
        executor.run("through_l2", 1, 64, given=torch.randn(7 * 64 + 1), out=empty(7 * 64), mode=1)


@pytest.mark.parametrize(
    "mode, message",
    [
        (0, "the kernel hangs, its threads are: block [0-2]: 1 ended, 63 in block_sync"),
        (1, "is at shuffle(_xor)?, but other lanes of its warp are at shuffle"),
        (2, "its block wrote past its 256 bytes of shared memory"),
        (6, "store_l2 of shared memory that was never written"),
    ],
)
def test_faults_are_named(executor, mode, message):
    with pytest.raises(RuntimeError, match=message):
        executor.run("faults", 3, 64, shared=256, out=empty(64), mode=mode)


def test_a_vector_of_which_a_part_was_never_written_is_named(executor):
    with pytest.raises(RuntimeError, match="store_l2 of shared memory that was never written"):
        executor.run("faults", 1, 32, shared=512, out=empty(128), mode=7)


def test_shared_memory_begins_as_nan(executor):
    assert executor.run("faults", 3, 64, shared=256, out=torch.zeros(64), mode=3).isnan().all()


@pytest.mark.parametrize(
    "grid, message",
    [
        (dict(blocks=0, threads=32), "invalid configuration argument"),
        (dict(blocks=1, threads=1056), "invalid configuration argument"),
        (dict(blocks=3, threads=32, cluster=2), "invalid configuration argument"),
        (dict(blocks=1, threads=33), "not a multiple of 32"),
        (dict(blocks=1, threads=32, shared=1025), "invalid argument"),
        (dict(blocks=8, threads=32, cluster=8), "cluster target block count not available"),
        (dict(blocks=5, threads=32, cooperative=True), "too many blocks in cooperative launch"),
    ],
)
def test_grids_that_the_device_refuses(executor, grid, message):
    with (
        build.limits(executor.library, arch=90, sms=4, shared_bytes=1024, max_cluster=4),
        pytest.raises(RuntimeError, match=message),
    ):
        executor.run("where", out=empty(1), **grid)


def test_clusters_need_their_architecture(executor):
    with build.limits(executor.library, arch=80, sms=4, shared_bytes=1024, max_cluster=4):
        with pytest.raises(RuntimeError, match="invalid argument"):
            executor.run("where", 2, 32, cluster=2, out=empty(1))


def recurrence(place, blocks, threads, mode, w, x):
    hidden = blocks * threads
    flags = torch.zeros(blocks, dtype=torch.int32)
    return place.run(
        "recurrence",
        blocks,
        threads,
        cluster=1 if mode else blocks,
        cooperative=bool(mode),
        shared=8 * hidden,
        given=w,
        more=x,
        flags=flags,
        out=empty(len(x), hidden),
        count=len(x),
        mode=mode,
    )


def test_a_recurrence_is_the_same_in_any_team(place):
    """Split over 1, 2, 4 and 8 blocks, in a cluster and through L2: the same bits, and each step is right to its rounding."""
    hidden, steps = 256, 12
    w, x = torch.randn(hidden, hidden) / hidden**0.5, torch.randn(steps, hidden)
    runs = [recurrence(place, blocks, hidden // blocks, mode, w, x) for mode in (0, 1) for blocks in (1, 2, 4, 8)]
    assert all(torch.equal(runs[0], other) for other in runs[1:])
    before = torch.cat([torch.zeros(1, hidden), runs[0][:-1]]).double()
    z, size = before @ w.double().T + x, before.abs() @ w.double().abs().T + x.abs()
    # one rounding for each term of the sum, relative to sums of at most `size`; three after it, whose function does not amplify
    assert (runs[0] - z / (1 + z.abs())).abs().le((hidden + 3) * 2**-24 * size).all()
