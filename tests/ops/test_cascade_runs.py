"""Scanned runs of the op: every backend against the oracle's loop over steps, and the groups found in weights."""

import gc

import pytest
import torch
from executor import build
from test_recurrence import BACKENDS, CELLS, LAYOUTS, assert_close, draw, loop, rows_of, run

from stable_rnn import _native
from stable_rnn.ops.recurrence import cascade
from stable_rnn.ops.recurrence.function import layer
from stable_rnn.ops.recurrence.problem import SCANNED, Problem

GROUPS = {1: [(0, 1)], 7: [(0, 7), (0, 2, 3, 7), tuple(range(8))], 37: [(0, 4, 37), (0, 16, 32, 37)], 70: [(0, 1, 70)]}


def cascaded(w_hh, groups):
    """W_hh without what a cascade of these groups does not have."""
    if not groups[-1]:
        return w_hh
    first = torch.tensor([max(g for g in groups if g <= unit) for unit in range(groups[-1])])
    mask = torch.arange(groups[-1]) < first[:, None]
    return w_hh * mask.repeat(len(w_hh) // groups[-1], 1)


@pytest.fixture
def poison():
    """Memory that nobody has written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(cell, layout, backend, dtype, groups, steps=9, lengths=(9, 0, 4), cap=1.0):
    rows, base, given, step, n = rows_of(layout, steps, list(lengths))
    made, grads = draw(cell, n, len(lengths), groups[-1], groups[-1], dtype)
    made["w_hh"] = cascaded(made["w_hh"], groups)
    exact = [{k: None if v is None else v.double() for k, v in d.items()} for d in (made, grads)]
    states, gradients = loop(cell, *exact, rows, (0, 0), steps, cap)
    eager_states, eager_gradients = loop(cell, made, grads, rows, (0, 0), steps, cap)
    outputs, found = run(cell, made, grads, base, given, Problem(cell, steps, step, SCANNED, cap=cap, backend=backend))
    for a, b, c in zip(outputs, states, eager_states, strict=False):
        assert_close(a, b, c, dtype)
    if cell == "rnn_relu" and dtype == torch.bfloat16:
        return  # rounding h flips units at the kink, whose derivative jumps by 1
    for name, value in found.items():
        assert_close(value, gradients[name], eager_gradients[name], dtype)


@pytest.mark.parametrize("backend,dtype", BACKENDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_layouts(cell, layout, backend, dtype, poison):
    for groups in GROUPS[7]:
        check(cell, layout, backend, dtype, groups)
    check(cell, layout, backend, dtype, (0, 3, 7), cap=0.6)


@pytest.mark.parametrize("backend,dtype", BACKENDS, ids=str)
@pytest.mark.parametrize("hidden", GROUPS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_sizes(cell, hidden, backend, dtype, poison):
    for groups in GROUPS[hidden]:
        check(cell, "padded", backend, dtype, groups, steps=14, lengths=(14, 14))


@pytest.mark.parametrize("backend,dtype", BACKENDS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell, backend, dtype, poison):
    for groups in [(0, 2, 5), (0, 0)]:
        check(cell, "padded", backend, dtype, groups, steps=5, lengths=())
        check(cell, "end_to_end", backend, dtype, groups, steps=0, lengths=(0, 0))
        check(cell, "lengths", backend, dtype, groups, steps=3, lengths=(0, 0))


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell):
    groups, steps, batch = (0, 1, 3), 3, 2
    made, _ = draw(cell, steps * batch, batch, 3, 3, torch.float64)
    names = [k for k, v in made.items() if v is not None]
    p = Problem(cell, steps, batch, SCANNED, cap=0.6, backend="reference")

    def function(*leaves):
        t = dict(zip(names, leaves, strict=True))
        weights = None, None, cascaded(t["w_hh"], groups), None, t.get("hidden_bias")
        y, h_n, c_n, _ = layer(t["xp"], *weights, t["h0"], t.get("c0"), None, None, None, p)
        return (y, h_n, c_n) if cell == "lstm" else (y, h_n)

    leaves = [made[k].requires_grad_() for k in names]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("cell", CELLS)
def test_long_sequences_lose_no_accuracy(cell):
    """float64: rounding of a step does not grow with the rounds of a scan."""
    steps, groups = 700, (0, 3, 6, 9, 12)
    made, grads = draw(cell, steps, 1, 12, 12, torch.float64)
    made["w_hh"] = cascaded(made["w_hh"], groups)
    scanned, plain = (
        run(cell, made, grads, None, None, Problem(cell, steps, 1, stride, backend="reference"))
        for stride in (SCANNED, 0)
    )
    for a, b in zip((*scanned[0], *scanned[1].values()), (*plain[0], *plain[1].values()), strict=True):
        # float64: two orders of rounding
        assert (a - b).abs().max() <= 1e-13 * b.abs().max().clamp_min(1)


def own_bits(cell, dtype, groups, lengths, layout, threads=1):
    """Whether a scanned run on the CPU gives the bits of the plain one, gradients too."""
    steps = max(lengths)
    _, base, given, step, n = rows_of(layout, steps, list(lengths))
    made, grads = draw(cell, n, len(lengths), groups[-1], groups[-1], dtype)
    made["w_hh"] = cascaded(made["w_hh"], groups)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scanned, plain = (
            run(cell, made, grads, base, given, Problem(cell, steps, step, stride, cap=0.8, backend="cpu"))
            for stride in (SCANNED, 0)
        )
    finally:
        torch.set_num_threads(before)
    for a, b in zip((*scanned[0], *scanned[1].values()), (*plain[0], *plain[1].values()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not _native.lib, reason="compiled module not built")
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512", "avx512bf16", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_the_cpu_gives_the_bits_of_the_plain_recurrence(cell, dtype, isa):
    """For any groups, number of threads and sequences; several blocks of times, the last one short."""
    mine = _native.lib.cpu_features()["isa"]
    try:
        _native.lib.set_isa(isa)
    except ValueError:
        pytest.skip(f"this machine has no {isa}")
    try:
        for threads in (1, 2, 3):
            own_bits(cell, dtype, (0, 5, 16, 33, 70), (203,), "padded", threads)
            own_bits(cell, dtype, (0, 32, 48, 64), (100, 41, 0), "reverse_lengths", threads)
        own_bits(cell, dtype, (0, 2, 3, 20), (9,) * 13, "end_to_end", 3)
        own_bits(cell, dtype, (0, 1), (9, 3), "padded")
    finally:
        _native.lib.set_isa(mine)


@pytest.mark.skipif(not _native.lib, reason="compiled module not built")
def test_threads_may_leave():
    """A team that shrinks between two blocks goes on with the stages of who left."""
    try:
        for turn in (1, 3):
            _native.lib.leave_at(turn)
            own_bits("lstm", torch.float32, (0, 16, 32, 48, 64), (400,), "padded", 4)
    finally:
        _native.lib.leave_at(-1)


@pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cuda(cell, dtype, monkeypatch, poison):
    """In the block executor: time in one part and in several chunks of parts, units that fill a block and that do not."""
    build.on_cpu_tensors(monkeypatch)
    for layout in LAYOUTS:
        check(cell, layout, "cuda", dtype, (0, 2, 3, 7), cap=0.6)
    check(cell, "reverse_lengths", "cuda", dtype, (0, 33, 36), steps=300, lengths=(300, 0, 129))
    check(cell, "padded", "cuda", dtype, (0, 1), steps=20, lengths=(20,))
    for layout in ("padded", "lengths"):
        check(cell, layout, "cuda", dtype, (0, 2, 5), steps=3, lengths=(0, 0) if layout == "lengths" else ())


@pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")
def test_what_the_cuda_scans_refuse():
    from stable_rnn.ops.recurrence import fields

    scan = build.module().scan_forward_cuda
    given = {**dict.fromkeys(fields.SCAN, 0), **dict(hidden=4, unit=2, units=2, cap=1.0, steps=3, batch=2, step=2)}
    where = dict(device=0, stream=0, workspace=0, workspace_bytes=0)
    for bad, word in (
        (dict(cell=9), "cell"),
        (dict(cap=2.0), "cap"),
        (dict(dtype=3), "dtype"),
        (dict(unit=3), "units"),
    ):
        with pytest.raises(RuntimeError, match=word):
            scan(**given | bad, **where)
    with pytest.raises(RuntimeError, match="workspace"):
        scan(**given, **where)


# ---- groups


def test_groups_are_as_few_as_zeros_allow():
    w = torch.zeros(6, 6)
    assert cascade.groups(w, 1) == (0, 6)
    w[3, 2] = -1.0
    assert cascade.groups(w, 1) == (0, 3, 6)
    w[4, 3] = float("nan")
    assert cascade.groups(w, 1) == (0, 3, 4, 6)
    w[5, 0] = 1e-40
    assert cascade.groups(w, 1) == (0, 3, 4, 6)
    assert cascade.groups(torch.cat([torch.zeros(6, 6), w]), 2) == (0, 3, 4, 6)  # over all gates
    assert cascade.groups(torch.full((4, 1), -0.0), 4) == (0, 1)
    assert cascade.groups(torch.randn(5, 5).tril(-1).bfloat16(), 1) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("backend", ["reference", *["cpu"] * bool(_native.lib)])
def test_the_first_entry_that_no_cascade_has_is_named(backend):
    w = torch.zeros(16, 4)
    w[4 + 3, 3], w[8 + 1, 2] = 0.5, 0.12
    p = Problem("lstm", 3, 2, SCANNED, backend=backend)
    given = (torch.randn(6, 16), None, None, w, None, None, torch.zeros(2, 4), torch.zeros(2, 4), *(None,) * 3, p)
    with pytest.raises(ValueError, match=r"weight_hh\[7, 3\] = 0.5: unit 3 reads itself"):
        layer(*given)
    w[7, 3] = 0
    with pytest.raises(ValueError, match=r"weight_hh\[9, 2\] = 0.12: unit 1 reads unit 2"):
        layer(*given)
    w[9, 2] = 0
    layer(*given)


def test_groups_of_a_weight_are_remembered_until_it_changes(monkeypatch):
    asked = []
    find = cascade.find
    monkeypatch.setattr(cascade, "find", lambda *a: asked.append(1) or find(*a))
    monkeypatch.setattr(cascade, "_found", {})
    w = torch.nn.Parameter(torch.zeros(4, 4))
    for _ in range(3):
        assert cascade.remembered(w, 1) == cascade.remembered(w.detach(), 1) == (0, 4)
    assert len(asked) == 1
    with torch.no_grad():
        w[2, 1] = 1.0
    assert cascade.remembered(w, 1) == (0, 2, 4) and len(asked) == 2
    assert cascade.remembered(w.detach().view(2, 2, 4).flatten(0, 1), 1) == (0, 2, 4) and len(asked) == 2
    assert len(cascade._found) == 1
    del w
    gc.collect()
    for unit in range(3):  # memory that another weight had
        w = torch.zeros(4, 4)
        w[3, unit] = 1.0
        assert cascade.remembered(w, 1) == (0, 3, 4)
        del w
    assert len(cascade._found) <= 2


def test_one_weight_may_be_read_as_several():
    """The same memory, with another shape or as another part of it, has groups of its own."""
    w = torch.zeros(8, 4)
    w[5, 0] = 1.0
    assert cascade.remembered(w[:4], 1) == (0, 4) and cascade.remembered(w[4:], 1) == (0, 1, 4)
    assert cascade.remembered(w, 2) == (0, 1, 4)
