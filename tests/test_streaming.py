"""Streams: pushes of any sizes equal the whole pass, for every plan; saved ones go on elsewhere, and slots come and go."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from stable_rnn import (
    Cascade,
    Chunked,
    ForgetCap,
    Recurrent,
    Scanned,
    StableGRU,
    StableLSTM,
    StableRNN,
    Verified,
    Windowed,
    _native,
    streaming,
)

pytestmark = pytest.mark.filterwarnings("ignore:stable_rnn runs its slow reference recurrence")
compiled = pytest.mark.skipif(_native.lib is None, reason=f"compiled module: {_native.reason}")
MODULES = [StableRNN, StableLSTM, StableGRU]
LANES = [Windowed(1), Windowed(4), Chunked(5, 3), Chunked(3, 7), Chunked(4, 0), Chunked(50, 3)]
PLANS = [Recurrent(), Verified(chunk=4, warmup=2), *LANES, [Chunked(5, 2), Recurrent()], [Verified(), Windowed(5)]]
T, B, I, H = 17, 3, 4, 6
SIZES = [[1] * T, [3] * 5 + [2], [T], [7, 1, 8, 1]]


def made(cls, plan, layers=2, dtype=torch.float64, **options):
    return cls(I, H, layers, stability=None, plan=plan, dtype=dtype, **options).eval()


def states(module, batch=B):
    widths = [module.proj_size or H] + [H] * isinstance(module, StableLSTM)
    given = [torch.randn(module.num_layers, batch, w, dtype=module.weight_hh_l0.dtype) for w in widths]
    return tuple(given) if len(given) > 1 else given[0]


def pushed(stream, x, sizes):
    time = int(stream.module.batch_first)
    return torch.cat([stream.push(piece) for piece in x.split(sizes, time)], time)


def same(left, right):
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("cls", MODULES)
def test_pushes_of_any_sizes(cls, plan):
    m = made(cls, plan)
    x, hx = torch.randn(T, B, I, dtype=torch.float64), states(m)
    with torch.no_grad():
        whole = m(x, hx)[0]
        for sizes in SIZES:
            same(pushed(m.stream(hx=hx), x, sizes), whole)
        same(pushed(m.stream(), x, SIZES[3]), m(x)[0])
        m.batch_first = True
        same(pushed(m.stream(hx=hx), x.transpose(0, 1), SIZES[3]), whole.transpose(0, 1))


def test_lanes_longer_than_any_stream():
    for plan in (Windowed(2**70), Chunked(2**70, 2**70)):
        m, x = made(StableRNN, plan, layers=1, bias=False), torch.randn(T, B, I, dtype=torch.float64)
        with torch.no_grad():
            same(pushed(m.stream(), x, SIZES[3]), m(x)[0])


def test_a_projected_and_a_clamped_lstm():
    for plan, options in itertools.product(LANES[1:4], (dict(proj_size=3), dict(stability=ForgetCap(0.6)))):
        m = StableLSTM(I, H, 2, plan=plan, dtype=torch.float64, **{"stability": None, **options}).eval()
        x, hx = torch.randn(T, B, I, dtype=torch.float64), states(m)
        with torch.no_grad():
            same(pushed(m.stream(hx=hx), x, SIZES[3]), m(x, hx)[0])


def test_a_cascade():
    m = StableLSTM(I, H, stability=Cascade(2), plan=Scanned(), dtype=torch.float64).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    with torch.no_grad():
        same(pushed(m.stream(), x, SIZES[3]), m(x)[0])


@pytest.mark.parametrize("plain", [nn.RNN, nn.LSTM, nn.GRU])
def test_against_torch(plain):
    """In float32, with an error from float64 of the size of torch's own."""
    theirs = plain(I, H, 2).eval()
    ours = dict(zip((nn.RNN, nn.LSTM, nn.GRU), MODULES))[plain](I, H, 2, stability=None).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(x.double())[0]
        error = (theirs(x)[0] - exact).abs().max()
        for sizes in SIZES:
            assert (pushed(ours.stream(), x, sizes) - exact).abs().max() <= 4 * error


@compiled
@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("plan", [Recurrent(), Windowed(4), Chunked(5, 3), Chunked(3, 7)], ids=str)
def test_bitwise(cls, plan):
    """On the cpu backend, where the input projection is: here it is exact, whatever order it is summed in."""
    m = cls(I, 40, 2, bias=False, stability=None, plan=plan, backend="cpu").eval()
    with torch.no_grad():
        for name, w in m.named_parameters():
            if "weight_ih" in name:  # of each sum a single term, without rounding
                w.zero_().scatter_(1, torch.randint(w.shape[1], (len(w), 1)), 0.5)
        x = torch.randn(T, 9, I)
        whole = m(x)[0]
        for sizes in SIZES:
            assert torch.equal(pushed(m.stream(), x, sizes), whole)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_slots(plan):
    """Streams that come and go, at times of their own, are each what it would be alone."""
    m = made(StableLSTM, plan)
    stream, slots = m.stream(batch_size=5), torch.Generator().manual_seed(1)
    inputs, outputs, done = [[] for _ in range(5)], [[] for _ in range(5)], []
    with torch.no_grad():
        for turn in range(40):
            chosen = torch.randperm(5, generator=slots)[: 1 + turn % 4]
            x = torch.randn(1 + turn % 3, len(chosen), I, dtype=torch.float64)
            y = stream.push(x, slots=chosen if turn % 2 else chosen.tolist())
            for n, slot in enumerate(chosen.tolist()):
                inputs[slot].append(x[:, n]), outputs[slot].append(y[:, n])
            if turn % 9 == 8:
                done += [(inputs[s], outputs[s]) for s in (0, turn % 5) if inputs[s]][: 1 + (turn % 5 > 0)]
                stream.reset(sorted({0, turn % 5}))
                for slot in {0, turn % 5}:
                    inputs[slot], outputs[slot] = [], []
        assert len(done) > 4
        for x, y in done + [pair for pair in zip(inputs, outputs) if pair[0]]:
            same(torch.cat(y), m(torch.cat(x))[0])
        x = torch.randn(4, 5, I, dtype=torch.float64)
        before = [torch.cat(x) if x else torch.empty(0, I, dtype=torch.float64) for x in inputs]
        y = stream.push(x)  # all of them
        for slot in range(5):
            same(y[:, slot], m(torch.cat([before[slot], x[:, slot]]))[0][-4:])


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("cls", MODULES)
def test_save_and_go_on(cls, plan):
    """In another process's module, from a file; and the saved state stays what it was."""
    m = made(cls, plan)
    x, file = torch.randn(T, B, I, dtype=torch.float64), io.BytesIO()
    with torch.no_grad():
        stream = m.stream(hx=states(m))
        stream.push(x[:9])
        torch.save(stream.state, file)
        kept, rest = stream.state, stream.push(x[9:])
        stream.reset([0, 2])
        file.seek(0)
        for saved in (kept, torch.load(file, weights_only=True)):
            same(copy.deepcopy(m).stream(state=saved).push(x[9:]), rest)
        stream.state = kept
        same(stream.push(x[9:]), rest), same(m.stream(state=kept).push(x[9:]), rest)
        stream.state = None
        assert stream.batch_size is None and stream.state is None
        same(stream.push(x[:, :2]), m(x[:, :2])[0])


def test_reset():
    for plan in (Recurrent(), Chunked(5, 3)):
        m = made(StableLSTM, plan)
        x, hx = torch.randn(T, B, I, dtype=torch.float64), states(m)
        stream = m.stream()
        stream.reset()  # nothing has begun
        with torch.no_grad():
            stream.push(x.fill_(torch.nan))  # what it saw is gone
            x.normal_()
            stream.reset(hx=hx)
            same(stream.push(x), m(x, hx)[0])
            stream.reset([1], hx=tuple(h[:, :1] for h in hx))
            y = stream.push(x)[:, 1:2]
            same(y, m(x[:, 1:2], tuple(h[:, :1].contiguous() for h in hx))[0])
            stream.reset()
            same(stream.push(x), m(x)[0])


def test_one_sequence_without_a_batch():
    for plan, batch_first in itertools.product((Recurrent(), Windowed(4)), (False, True)):
        m = made(StableLSTM, plan, batch_first=batch_first)
        x, hx = torch.randn(T, I, dtype=torch.float64), tuple(h[:, 0] for h in states(m))
        with torch.no_grad():
            stream = m.stream(hx=hx)
            same(torch.cat([stream.push(piece) for piece in x.split(5)]), m(x, hx)[0])
            assert stream.batch_size == 1
            with pytest.raises(ValueError, match=r"a batch of 1; the number of slots is 2"):
                m.stream(2).push(x, slots=[0, 1])


@pytest.mark.parametrize("plan", [Recurrent(), Windowed(4), Chunked(5, 3)], ids=str)
def test_gradients_go_through_a_push(plan):
    """And stop at its border."""
    m = made(StableGRU, plan)
    x = torch.randn(T, B, I, dtype=torch.float64).requires_grad_()
    stream = m.stream()
    ours = torch.autograd.grad(stream.push(x).square().sum(), [x, *m.parameters()])
    if isinstance(
        plan, Chunked
    ):  # the derivative of the chunks as they are, which the plan's own backward pass only comes near to
        assert all(g.isfinite().all() for g in ours)
    else:
        for left, right in zip(ours, torch.autograd.grad(m(x)[0].square().sum(), [x, *m.parameters()]), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)
    (slope,) = torch.autograd.grad(stream.push(x[:4]).sum(), [x])
    assert slope[:4].abs().sum() > 0 and not stream.state["h"].requires_grad


def test_pieces(monkeypatch):
    """A long push takes bounded memory, and gives what one piece gives, gradients too."""
    m = made(StableLSTM, [Windowed(6), Chunked(5, 3)])
    x = torch.randn(T, B, I, dtype=torch.float64).requires_grad_()
    found, rows, layer = [], [], streaming.layer
    monkeypatch.setattr(streaming, "layer", lambda x, *rest: (rows.append(len(x)), layer(x, *rest))[1])
    for values in (1 << 23, 4 * H * B * 20, 1):
        monkeypatch.setattr(streaming, "_VALUES", values)
        rows.clear()
        y = m.stream().push(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])))
        assert max(rows) <= max(values // (4 * H), 9 * B)
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("plan", [Recurrent(), Chunked(5, 3)], ids=str)
def test_inference_mode_may_begin_and_end(plan):
    m = made(StableLSTM, plan)
    x = torch.randn(T, 2, I, dtype=torch.float64)
    with torch.inference_mode():
        stream = m.stream(2)
        pieces = [stream.push(x[:6])]
    saved = stream.state
    pieces.append(torch.cat([stream.push(x[6:9, s : s + 1], slots=[s]) for s in (0, 1)], 1))
    pieces.append(stream.push(x[9:12]))
    pieces[-1].sum().backward()
    with torch.inference_mode():
        pieces.append(stream.push(x[12:]))
        same(torch.cat(pieces), m(x)[0])
    again = m.stream(state=saved)
    again.push(x[6:]).sum().backward()
    assert not any(t.is_inference() for t in saved["inputs"] + [saved["h"]])


@pytest.mark.parametrize("cls", MODULES)
def test_autocast(cls):
    """Between pushes nothing is rounded that the whole pass does not round."""
    for plan in (Recurrent(), Windowed(4), Chunked(5, 3)):
        m = made(cls, plan, dtype=torch.float32)
        x, stream = torch.randn(T, B, I), m.stream(B)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = torch.cat([stream.push(piece, slots=[0, 1, 2]) for piece in x.split(6)])
            whole = m(x)[0]
        assert y.dtype == (torch.float32 if cls is StableGRU else torch.bfloat16)
        torch.testing.assert_close(y.float(), whole.float(), rtol=0.04, atol=0.04)
        assert stream.state["h"].dtype == torch.float32


def test_dropout_is_of_each_push():
    for plan in (Recurrent(), Chunked(5, 3)):
        m = made(StableLSTM, plan, dropout=0.5)
        x, stream = torch.randn(T, B, I, dtype=torch.float64), m.train().stream()
        torch.manual_seed(3)
        y = stream.push(x)
        torch.manual_seed(3)
        same(y, m(x)[0])
        assert not torch.equal(m.stream().push(x), y)


def test_a_push_that_raises_changes_nothing():
    for plan in (Recurrent(), Windowed(4)):
        m = made(StableLSTM, plan)
        x, stream = torch.randn(T, B, I, dtype=torch.float64), m.stream()
        with torch.no_grad():
            stream.push(x[:5])
            for bad in (x[5:].float(), x[5:, :, :2], x[5:5]):
                with pytest.raises((RuntimeError, ValueError)):
                    stream.push(bad)
            same(stream.push(x[5:]), m(x)[0][5:])


def error(make, match, kind=ValueError):
    with pytest.raises(kind, match=match):
        make()


def test_what_does_not_fit():
    m, x = made(StableLSTM, Chunked(5, 3)), torch.randn(2, B, I, dtype=torch.float64)
    both = StableLSTM(I, H, bidirectional=True)
    error(lambda: both.stream(), "bidirectional")
    for size in (0, -1, 2.0, True):
        error(lambda size=size: m.stream(size), "batch_size must be None or an int of at least 1")
    h, c = states(m)
    for hx in (h, (h,), (h, c[:1]), (h, c.float()), (h, None), 3):
        error(lambda hx=hx: m.stream(hx=hx), "hx: expected")
    error(lambda: m.stream(B + 1, hx=(h, c)), "hx: expected")
    stream = m.stream(B)
    error(lambda: stream.push(x[:, :2]), r"has a batch of 2; the stream's batch_size is 3")
    error(lambda: stream.push(x, slots=[0, 1]), r"has a batch of 3; the number of slots is 2")
    error(lambda: stream.push([1.0]), "must be a Tensor, got list", TypeError)
    error(lambda: stream.push(x[None]), "must have 3 dimensions")
    for slots in ([0, 0], [3], [-1], []):
        error(lambda slots=slots: stream.push(x[:, : len(slots)], slots=slots), "slots must be")
    for slots in ([0.0], 1, [True], "one", {0}):
        error(lambda slots=slots: stream.reset(slots), "slots must be a list or tensor of integers")
    error(lambda: m.stream().push(x, slots=[0, 1, 2]), r"slots are for module.stream\(batch_size=N\)")
    m.plan = Windowed(3)
    error(lambda: stream.push(x), r"made under the plan Chunked\(chunk=5, warmup=3\), the module now has Windowed")


def test_hooks_run_or_are_refused():
    """A hook may be what computes the weights."""
    m, x, seen = made(StableLSTM, Recurrent()), torch.randn(2, B, I, dtype=torch.float64), []
    for register in (m.register_forward_hook, m.register_forward_pre_hook):
        m.plan = Recurrent()
        handle = register(lambda *_: seen.append(1))
        m.stream().push(x)
        m.plan = Windowed(3)
        error(lambda: m.stream().push(x), r"forward hooks, which a push under Windowed\(k=3\) would not run")
        handle.remove()
        m.stream().push(x)
    assert seen == [1, 1]


def test_states_that_do_not_fit():
    m = made(StableLSTM, Chunked(5, 3))
    stream = m.stream(B)
    saved = stream.state
    error(lambda: m.stream(B, state=saved), "pass it alone")
    error(lambda: m.stream(state={"h": saved["h"]}), "must be what a stream's state was")
    error(lambda: m.stream(state=saved["h"]), "must be what a stream's state was")
    for other in (
        made(StableGRU, m.plan),
        made(StableLSTM, Chunked(5, 4)),
        made(StableLSTM, m.plan, proj_size=2),
        made(StableLSTM, m.plan, layers=1),
        made(StableLSTM, m.plan, dtype=torch.float32),
    ):
        error(lambda other=other: other.stream(state=saved), r"state: it is of LSTM\(4, 6.*the stream is of")
    for name, wrong in (
        ("position", saved["position"].float()),
        ("c", saved["c"][:, :1]),
        ("start_h", saved["h"][..., 1:]),
    ):
        error(
            lambda name=name, wrong=wrong: m.stream(state=saved | {name: wrong}), r"state: a tensor is \(.*; expected"
        )
    assert repr(stream) == f"Stream({saved['of']}, batch_size=3)"
