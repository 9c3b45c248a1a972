"""`resets=`: a sequence that begins anew inside gives what its pieces give when each is run apart, by torch's modules in float64; under
every plan, and under every transform of torch's."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap

from stable_rnn import (
    Cascade,
    Chunked,
    Recurrent,
    Scanned,
    StableGRU,
    StableLSTM,
    StableRNN,
    Verified,
    Windowed,
    _native,
    functional,
)
from stable_rnn.ops.recurrence import policy

T, B, I, H = 11, 5, 3, 4
PAIRS = {
    "tanh": (StableRNN, nn.RNN, {}),
    "relu": (StableRNN, nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (StableLSTM, nn.LSTM, {}),
    "projected": (StableLSTM, nn.LSTM, {"proj_size": 3}),
    "gru": (StableGRU, nn.GRU, {}),
}
OPTIONS = {
    "plain": {},
    "stack": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
BACKENDS = ["reference"] + ["cpu"] * bool(_native.lib)
PLANS = [Recurrent(), Windowed(3), Chunked(4, 2), Verified(tol=0.0, chunk=4, warmup=2)]
LENGTHS = torch.tensor([T, 6, 0, 1, 9])
traced = pytest.mark.skipif(torch.__version__ < (2, 6), reason="Dynamo of torch 2.5 traces no NamedTuple._replace")


def masks():
    """(T, B): no reset, all, the first alone, and others; past a length too."""
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[:, 1] = mask[0, 2] = mask[[2, 3, 8], 0] = mask[[1, 5, 9], 4] = True
    return mask


def made(kind, dtype=torch.float64, **options):
    """Our module and torch's with the same weights."""
    cls, plain, own = PAIRS[kind]
    backend, plan = options.pop("backend", "auto"), options.pop("plan", Recurrent())
    ours = cls(I, H, **own, **options, stability=None, plan=plan, backend=backend).to(dtype)
    theirs = plain(I, H, **own, **options).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def states(hx):
    return list(hx) if isinstance(hx, tuple) else [hx]


def arguments(module, dtype=torch.float64):
    """Input and initial states, leaves."""
    x = torch.randn(B, T, I) if module.batch_first else torch.randn(T, B, I)
    count = module.num_layers * (1 + module.bidirectional)
    hx = [torch.randn(count, B, module.proj_size or H)] + [torch.randn(count, B, H)] * (module.mode == "LSTM")
    return [t.to(dtype).requires_grad_() for t in (x, *hx)]


def call(module, x, hx, **named):
    y, hidden = module(x, tuple(hx) if len(hx) > 1 else hx[0], **named)
    return [y, *states(hidden)]


def apart(module, x, hx, resets, lengths=None):
    """The outputs and final states of `module`, run over each piece alone, for resets (T, B)."""
    time = 1 if module.batch_first else 0
    x = x.transpose(0, time)
    forward = torch.arange(len(hx[0])) % (1 + module.bidirectional) == 0  # layers and directions
    ys, ends = [], []
    for b in range(B):
        length = T if lengths is None else int(lengths[b])
        starts = [t for t in range(length) if t == 0 or resets[t, b]]
        own, outputs, found = [h[:, b : b + 1] for h in hx], [], []
        for start, end in zip(starts, [*starts[1:], length]):
            keep = [forward & bool(start == 0 and not resets[0, b]), ~forward & (end == length)]
            begin = [torch.where((keep[0] | keep[1])[:, None, None], h, 0) for h in own]
            y, *last = call(module, x[start:end, b : b + 1].transpose(0, time), begin)
            outputs.append(y.transpose(0, time)), found.append(last)
        width = (module.proj_size or H) * (1 + module.bidirectional)
        ys.append(torch.cat([*outputs, x.new_zeros(T - length, 1, width)]))
        pairs = zip(found[-1], found[0]) if found else zip(own, own)
        ends.append([torch.where(forward[:, None, None], a, b) for a, b in pairs])
    return [torch.cat(ys, 1).transpose(0, time), *(torch.cat(parts, 1) for parts in zip(*ends))]


def with_gradients(found, leaves):
    """`found`, and the gradients of a sum of them, in float64."""
    loss = sum((t.double() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in found)
    return [t.detach().double() for t in (*found, *torch.autograd.grad(loss, leaves))]


def mask_of(module):
    return masks().T if module.batch_first else masks()


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", PAIRS)
def test_pieces_apart_by_torch(kind, options, lengths):
    ours, theirs = made(kind, **OPTIONS[options])
    x, *hx = arguments(ours)
    found = with_gradients(call(ours, x, hx, resets=mask_of(ours), lengths=lengths), [x, *hx, *ours.parameters()])
    expected = with_gradients(apart(theirs, x, hx, masks(), lengths), [x, *hx, *theirs.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)  # float64: sums in another order


@pytest.mark.skipif(not _native.lib, reason="the compiled module is missing")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PAIRS)
def test_kernels_err_no_more_than_torch(kind, dtype, options):
    ours, theirs = made(kind, dtype, backend="cpu", **OPTIONS[options])
    x, *hx = arguments(ours, dtype)
    found = with_gradients(call(ours, x, hx, resets=mask_of(ours)), [x, *hx, *ours.parameters()])
    eager = with_gradients(apart(theirs, x, hx, masks()), [x, *hx, *theirs.parameters()])
    x, *hx = (t.detach().double().requires_grad_() for t in (x, *hx))
    theirs = copy.deepcopy(theirs).double()
    exact = with_gradients(apart(theirs, x, hx, masks()), [x, *hx, *theirs.parameters()])
    size = max(1.0, *(float(c.abs().max()) for c in exact))  # of addends; sums over all times may cancel
    for a, b, c in zip(found, eager, exact, strict=True):
        limit = 2 * (b - c).abs().max() + 4 * torch.finfo(dtype).eps * size
        assert (a - c).abs().max() <= limit


@pytest.mark.parametrize("plan", [*PLANS, Verified(), Scanned()], ids=str)
@pytest.mark.parametrize("backend, dtype", [("reference", torch.float64), ("cpu", torch.float32)][: len(BACKENDS)])
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_plans_run_pieces_as_they_run_them_alone(kind, backend, dtype, plan):
    ours, _ = made(kind, dtype, backend=backend, num_layers=2, bidirectional=True)
    if plan == Scanned():
        ours.stability = Cascade(3)
        ours.project_().stability = None
    ours.plan = plan
    x, *hx = arguments(ours, dtype)
    found = with_gradients(call(ours, x, hx, resets=masks(), lengths=LENGTHS), [x, *hx, *ours.parameters()])
    expected = with_gradients(apart(ours, x, hx, masks(), LENGTHS), [x, *hx, *ours.parameters()])
    for a, b in zip(found, expected, strict=True):
        # sums over all times, and projections, in another order; then recurrences of a dozen steps
        assert (a - b).abs().max() <= 64 * torch.finfo(dtype).eps * b.abs().max().clamp_min(1)


@pytest.mark.parametrize("plan", [*PLANS, Scanned()], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_before_a_reset_does_not_reach_over_it(backend, plan):
    """Not even a NaN, in either direction of time; and values there change no bit."""
    ours, _ = made("lstm", torch.float32, backend=backend)
    if plan == Scanned():
        ours.stability = Cascade(3)
        ours.project_().stability = None
    ours.plan = plan
    resets = torch.zeros(T, 2, dtype=torch.bool)
    resets[6] = True
    x, h = torch.randn(T, 2, I), torch.full((1, 2, H), torch.nan)
    dirty = x.clone()
    dirty[:6] = torch.nan
    found = []
    for given, first in ((x, torch.zeros(1, 2, H)), (dirty, h)):
        given = given.requires_grad_()
        y, (h_n, c_n) = ours(given, (first, first), resets=resets)
        dx = torch.autograd.grad(y[6:].sum() + (h_n + c_n).sum(), given)[0]
        found.append((y[6:], h_n, c_n, dx[6:]))
    for a, b in zip(*found):
        assert torch.equal(a, b) and a.isfinite().all()
    clean = x.detach().clone().requires_grad_()
    y, _ = ours(clean, resets=resets)
    (dx,) = torch.autograd.grad(y[:6].sum() + torch.nan * y[6:].sum(), clean)
    assert dx[:6].isfinite().all() and dx[:6].any() and dx[6:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_masks_without_resets_and_past_lengths_change_no_bit(backend, plan):
    for kind in ("tanh", "lstm", "gru"):
        ours, _ = made(kind, torch.float32, backend=backend, plan=plan, bidirectional=True)
        x, *hx = arguments(ours, torch.float32)
        leaves = [x, *hx, *ours.parameters()]
        past = torch.arange(T)[:, None] >= LENGTHS
        plain = with_gradients(call(ours, x, hx, lengths=LENGTHS), leaves)
        found = with_gradients(call(ours, x, hx, lengths=LENGTHS, resets=past), leaves)
        assert all(map(torch.equal, found, plain))
        plain = with_gradients(call(ours, x, hx), leaves)
        found = with_gradients(call(ours, x, hx, resets=torch.zeros_like(past)), leaves)
        assert all(map(torch.equal, found, plain))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_one_step(kind, backend):
    """Streams of environments, some of which begin anew."""
    for options in OPTIONS.values():
        ours, _ = made(kind, torch.float32, backend=backend, **options)
        x, *hx = (t.detach() for t in arguments(ours, torch.float32))
        time = 1 if ours.batch_first else 0
        x, resets = x.narrow(time, 0, 1), torch.tensor([True, False, True, False, False])
        forward = torch.arange(len(hx[0])) % (1 + ours.bidirectional) == 0
        begin = [h.masked_fill(forward[:, None, None] & resets[:, None], 0) for h in hx]
        hx[0][0, 0] = torch.nan  # of one that does
        for gradient in (False, True):
            with torch.set_grad_enabled(gradient):
                found = call(ours, x, hx, resets=resets.unsqueeze(time))
                for a, b in zip(found, call(ours, x, begin), strict=True):
                    torch.testing.assert_close(a, b)


def test_unbatched_input():
    for options in OPTIONS.values():
        ours, theirs = made("gru", **options)
        x, h = torch.randn(T, I, dtype=torch.float64), torch.randn(len(ours.all_weights), H, dtype=torch.float64)
        resets = masks()[:, 0]
        y, h_n = ours(x, h, resets=resets)
        batch = 0 if ours.batch_first else 1
        z, g_n = ours(x.unsqueeze(batch), h.unsqueeze(1), resets=resets.unsqueeze(batch))
        torch.testing.assert_close(y, z.squeeze(batch)), torch.testing.assert_close(h_n, g_n.squeeze(1))
        assert not torch.equal(y, ours(x, h)[0])


def test_a_stream_in_parts_is_the_whole_stream():
    """Final states go on into the next part, whose mask goes on as well."""
    ours, _ = made("lstm", num_layers=2)
    x, *hx = arguments(ours)
    whole, mask = call(ours, x, hx, resets=masks()), masks()
    first = call(ours, x[:4], hx, resets=mask[:4])
    second = call(ours, x[4:], first[1:], resets=mask[4:])
    for a, b in zip([torch.cat([first[0], second[0]]), *second[1:]], whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- what torch does with it


@pytest.mark.parametrize("plan", [Recurrent(), Windowed(3), Chunked(4, T), Verified(tol=0.0, chunk=4)], ids=str)
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_double_backward(kind, plan):
    """The gradient of a gradient penalty."""
    ours, theirs = made(kind, num_layers=2, bidirectional=True, plan=plan)
    if plan == Windowed(3):
        theirs = ours
    x, *hx = arguments(ours)
    found = []
    for run, module in (
        (lambda: call(ours, x, hx, resets=masks()), ours),
        (lambda: apart(theirs, x, hx, masks()), theirs),
    ):
        loss = sum(t.square().sum() for t in run())
        first = torch.autograd.grad(loss, [x, *hx], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *hx, *module.parameters()])
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_forward_mode(kind):
    ours, theirs = made(kind, bidirectional=True)
    x, *hx = (t.detach() for t in arguments(ours))
    for plan in (Recurrent(), Windowed(3), Verified()):
        ours.plan, other = plan, ours if plan == Windowed(3) else theirs
        tangents = tuple(torch.randn_like(t) for t in (x, *hx))
        found = jvp(lambda x, *hx: call(ours, x, hx, resets=masks()), (x, *hx), tangents)
        expected = jvp(lambda x, *hx: apart(other, x, hx, masks()), (x, *hx), tangents)  # noqa: B023
        for some, others in zip(found, expected, strict=True):
            for a, b in zip(some, others, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(backend, plan, shared):
    """Samples with a mask each, or with one for all."""
    ours, _ = made("lstm", torch.float32, backend=backend, plan=plan, bidirectional=True)
    x, mask = torch.randn(3, T, B, I), torch.stack([masks(), masks().flip(0), masks().flip(1)])
    run = lambda x, mask: ours(x, resets=mask)[0]  # noqa: E731
    found = vmap(run, (0, None if shared else 0))(x, mask[0] if shared else mask)
    for i in range(3):
        torch.testing.assert_close(found[i], run(x[i], mask[0 if shared else i]))


@pytest.mark.parametrize("plan", [Recurrent(), Windowed(3), Verified(tol=0.0, chunk=4)], ids=str)
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_per_sample_gradients(kind, plan):
    ours, _ = made(kind, plan=plan, backend="reference")
    x, mask = torch.randn(3, T, B, I, dtype=torch.float64), torch.stack([masks(), masks().flip(0), masks().flip(1)])
    parameters = {name: w.detach() for name, w in ours.named_parameters()}

    def loss(parameters, x, mask):
        return functional_call(ours, parameters, (x,), {"resets": mask})[0].square().sum()

    found = vmap(grad(loss), (None, 0, 0))(parameters, x, mask)
    for i in range(3):
        expected = torch.autograd.grad(ours(x[i], resets=mask[i])[0].square().sum(), list(ours.parameters()))
        for name, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], value)


@traced
@pytest.mark.parametrize("plan", [*PLANS[:2], Verified()], ids=str)
def test_compile(plan):
    """One graph, for any T, B and mask, with gradients."""
    ours, _ = made("lstm", torch.float32, backend=BACKENDS[-1], plan=plan, num_layers=2, bidirectional=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for steps, batch in ((9, 2), (33, 5), (70, 3)):
        x, resets = torch.randn(steps, batch, I), torch.rand(steps, batch) < 0.2
        for t in (x, resets):
            torch._dynamo.mark_dynamic(t, 0), torch._dynamo.mark_dynamic(t, 1)
        found = []
        for run in (compiled, ours):
            y = run(x, resets=resets)[0]
            found.append([y, *torch.autograd.grad(y.square().sum(), list(ours.parameters()))])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@traced
@pytest.mark.parametrize("cls", [StableRNN, StableLSTM, StableGRU])
def test_export(cls):
    """A program for any B, T and mask."""
    ours = cls(I, H, num_layers=2, bidirectional=True, batch_first=True).eval()
    free = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", max=4096)}
    example, mask = torch.randn(3, 9, I), torch.zeros(3, 9, dtype=torch.bool)
    shapes = {"input": free, "resets": free}
    program = torch.export.export(ours, (example,), {"resets": mask}, dynamic_shapes=shapes)
    x, resets = torch.randn(5, 21, I), torch.rand(5, 21) < 0.2
    torch.testing.assert_close(program.module()(x, resets=resets), ours(x, resets=resets))


@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_autocast(kind):
    ours, theirs = made(kind, torch.float32)
    x, *hx = (t.detach() for t in arguments(ours, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        found, eager = call(ours, x, hx, resets=masks()), apart(theirs, x, hx, masks())
    for a, b, c in zip(found, eager, apart(theirs, x, hx, masks()), strict=True):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 2 * torch.finfo(torch.bfloat16).eps


# ---- what is refused


@pytest.mark.parametrize(
    "resets, error, text",
    [
        ([True] * T, TypeError, r"resets must be a Tensor of shape \(11, 5\), got list"),
        (torch.zeros(T, B), TypeError, r"resets must hold booleans \(torch.bool\), got torch.float32"),
        (torch.zeros(B, T, dtype=torch.bool), ValueError, r"resets must have shape \(11, 5\).*got \(5, 11\)"),
        (torch.zeros(T, B, 1, dtype=torch.bool), ValueError, r"resets must have shape \(11, 5\).*got \(11, 5, 1\)"),
        (torch.zeros(T, B, dtype=torch.bool, device="meta"), ValueError, "input's device cpu, got meta"),
    ],
)
def test_masks_that_are_none(resets, error, text):
    lstm = StableLSTM(I, H)
    weights = [lstm.weight_ih_l0, lstm.weight_hh_l0]
    for run in (lstm, StableRNN(I, H), StableGRU(I, H), lambda x, **named: functional.lstm(x, *weights, **named)):
        with pytest.raises(error, match=text):
            run(torch.randn(T, B, I), resets=resets)


def test_calls_that_take_none():
    lstm, x = StableLSTM(I, H, stability=None), torch.randn(T, B, I)
    with pytest.raises(ValueError, match="resets: a PackedSequence has no such mask"):
        lstm(nn.utils.rnn.pack_padded_sequence(x, [T] * B), resets=masks())
    lstm.backend = "torch"
    with pytest.raises(ValueError, match="backend 'torch' cannot run this call: it takes no resets"):
        lstm(x, resets=masks())
    with pytest.raises(ValueError, match=r"resets must have shape \(11,\).*got \(11, 1\)"):
        StableLSTM(I, H)(x[:, 0], resets=masks()[:, :1])


# ---- functions, and what Verified remembers


@pytest.mark.parametrize("batch_first", [False, True])
def test_functions_are_the_modules(batch_first):
    for kind, run in (("tanh", functional.rnn), ("lstm", functional.lstm), ("gru", functional.gru)):
        ours, _ = made(kind, batch_first=batch_first, bidirectional=True, plan=Chunked(4, 2))
        x, *hx = (t.detach() for t in arguments(ours))
        named = dict(resets=mask_of(ours), lengths=LENGTHS)
        y, *hidden = call(ours, x, hx, **named)
        for d, weights in enumerate(ours.all_weights):
            given = [*weights, None] if kind == "lstm" else weights
            z, last = run(
                x, *given, *(h[d] for h in hx), **named, reverse=d == 1, batch_first=batch_first, plan=ours.plan
            )
            for a, b in zip((z, *states(last)), (y.chunk(2, 2)[d], *(h[d] for h in hidden)), strict=True):
                assert torch.equal(a, b)


def test_a_fallback_is_remembered_for_other_masks(monkeypatch):
    """Pieces are others at every call; what was asked for is the same. Without resets it is something else."""
    monkeypatch.setitem(
        policy.DEVICES, "cpu", policy.Device(1e-3, 1e12, ((float("inf"), 4.0, 0.2),), 0.0, 0.0, 32, False)
    )
    ours, _ = made("lstm", torch.float32, plan=Verified())
    with torch.no_grad():
        ours.bias_hh_l0[H : 2 * H] = 20  # forgets nothing
    x, whys = torch.randn(8000, 1, I), []
    for place in (700, 1500, 3000, None):
        resets = None if place is None else torch.arange(8000)[:, None] % 4500 == place
        ours(x, resets=resets)[0].sum().backward()
        whys.append([side.layers[0].why for side in (ours.last_report, ours.last_report.backward)])
    for side in zip(*whys):
        assert ["before" in why for why in side] == [False, True, True, False], side
        assert all(side)  # the plain recurrence, each time
