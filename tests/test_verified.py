"""`Verified` on networks made to be easy or hard for it: passes are counted, results held against the plain recurrence."""

import copy
import pickle

import pytest
import torch
from executor import build
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from stable_rnn import Recurrent, StableGRU, StableLSTM, StableRNN, Verified, _native
from stable_rnn.ops.recurrence import policy

BACKENDS = ["reference"] + ["cpu"] * (_native.lib is not None)
compiled = pytest.mark.skipif(
    not _native.lib, reason="bitwise promises are the compiled kernels'; library GEMMs make none"
)
FREE = policy.Device(1e-3, 1e12, ((float("inf"), 64.0, 0.0),), 0.0, 0.0, 32, False)  # lanes that cost next to nothing


def made(hidden=12, inputs=3, cls=StableLSTM, **options):
    torch.manual_seed(0)
    return cls(inputs, hidden, stability=None, **options)


def chrono(hidden=16, span=300, **options):
    """Forget gates for memories of up to `span` steps (Tallec & Ollivier 2018)."""
    m = made(hidden, **options)
    with torch.no_grad():
        for name, b in m.named_parameters():
            if name.startswith("bias_ih"):
                i, f, _, _ = b.chunk(4)
                f.copy_(torch.log(1 + span * torch.rand(hidden)))
                i.copy_(-f)
            if name.startswith("bias_hh"):
                b.zero_()
    return m


def rotating(pairs=3, angle=0.02, **options):
    """Pairs of slow cells that turn into each other by way of h: what a lane hands on is no multiple of what it got."""
    m, hidden = made(2 * pairs, **options), 2 * pairs
    with torch.no_grad():
        for w in m.parameters():
            w.zero_()
        b, w_hh, w_ih = (
            m.bias_ih_l0.view(4, -1),
            m.weight_hh_l0.view(4, hidden, hidden),
            m.weight_ih_l0.view(4, hidden, 3),
        )
        b[0], b[1], b[3] = -3.9, 8, 6
        for j in range(pairs):
            turn = angle * (1 + 0.3 * j) / torch.sigmoid(b[0, 0])
            w_hh[2, 2 * j, 2 * j + 1], w_hh[2, 2 * j + 1, 2 * j] = turn, -turn
        w_ih[:3] = 0.3 * torch.randn(3, hidden, 3)
    return m


def flat(outputs):
    y, state = outputs
    return [y.data if hasattr(y, "batch_sizes") else y, *(state if isinstance(state, tuple) else (state,))]


def results(m, x, plan, **call):
    """Outputs, and gradients of the weights, under a plan."""
    m.plan = plan
    outputs = flat(m(x, **call))
    loss = sum((t.double() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in outputs)
    return [t.detach() for t in (*outputs, *torch.autograd.grad(loss, list(m.parameters())))]


def assert_agrees(found, expected, tol=2e-5):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tol * b.abs().max().clamp_min(1)


# ---- passes


@pytest.mark.parametrize(
    "backend, steps", [("reference", 1024)] + [("cpu", 1024), ("cpu", 8192)] * (_native.lib is not None)
)
def test_decay_brings_slow_cells_to_agree(backend, steps):
    """Without it correct states travel one chunk a pass; with it the number of passes does not depend on the length."""
    m, x = chrono(32, backend=backend), torch.randn(steps, 2, 3)
    expected = results(m, x, Recurrent())
    assert_agrees(results(m, x, Verified(chunk=128, correct="none")), expected, 0 if backend == "cpu" else 1e-6)
    assert m.last_report.fallback and m.last_report.backward.fallback
    assert_agrees(
        results(m, x, Verified(chunk=128, correct="decay")), expected, 5e-5
    )  # jumps of tol, kept for up to 300 steps
    report = m.last_report
    assert not report.fallback and 2 <= report.passes <= 8 and report.layers[0].correct == "decay"
    assert not report.backward.fallback and 2 <= report.backward.passes <= 8
    assert report.largest_jump <= m.plan.numbers(x)["tol"] and len(report.layers[0].jumps) == report.passes


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gru_is_corrected_on_h_itself(backend):
    m, x = made(16, cls=StableGRU, backend=backend), torch.randn(1024, 2, 3)
    with torch.no_grad():
        z = m.bias_ih_l0.chunk(3)[1]
        z.copy_(torch.log(1 + 200 * torch.rand_like(z)))
    expected = results(m, x, Recurrent())
    assert_agrees(results(m, x, Verified(chunk=64, correct="none")), expected, 0 if backend == "cpu" else 1e-6)
    assert m.last_report.fallback and m.last_report.backward.fallback
    for correct, forward, backward in (("decay", 9, 10), ("probes", 5, 3)):
        assert_agrees(results(m, x, Verified(chunk=64, correct=correct)), expected)
        report = m.last_report
        assert not report.fallback and 2 <= report.passes <= forward
        assert not report.backward.fallback and 2 <= report.backward.passes <= backward


@pytest.mark.parametrize("backend", BACKENDS)
def test_probes_see_what_goes_through_h(backend):
    m, x = rotating(backend=backend), 0.1 * torch.randn(1024, 2, 3)
    expected = results(m, x, Recurrent())
    assert_agrees(results(m, x, Verified(chunk=64, correct="decay")), expected, 0 if backend == "cpu" else 1e-6)
    assert m.last_report.fallback and m.last_report.backward.fallback
    assert_agrees(
        results(m, x, Verified(chunk=64, correct="probes")), expected, 1e-4
    )  # states of up to 16 turns of rounding
    report = m.last_report
    assert not report.fallback and report.passes <= 7 and report.layers[0].lanes_rerun > 6 * report.layers[0].lanes
    assert not report.backward.fallback and report.backward.passes <= 3  # adjoints are linear: one correction is exact


def test_auto_takes_probes_where_decay_stalls(monkeypatch):
    monkeypatch.setitem(policy.DEVICES, "cpu", FREE._replace(probes=True, lanes=((float("inf"), 1e6, 0.0),)))
    m, x = rotating(), 0.1 * torch.randn(1024, 2, 3)
    m(x)
    plain = results(m, x, Recurrent())
    assert_agrees(results(m, x, Verified(chunk=64)), plain, 1e-4)
    report = m.last_report
    assert not report.fallback and report.layers[0].correct == report.backward.layers[0].correct == "probes"
    monkeypatch.setitem(policy.DEVICES, "cpu", FREE)  # never probes
    results(m, x, Verified(chunk=64, max_passes=9))
    assert m.last_report.fallback and m.last_report.layers[0].correct == "decay"


@pytest.mark.parametrize("correct", ["decay", "probes"])
@pytest.mark.parametrize(
    "case", ["bidirectional", "batch_first", "lengths", "packed", "proj_size", "bfloat16", "float64", "clamp"]
)
def test_corrections_in_every_layout(case, correct):
    options = {name: True for name in ("bidirectional", "batch_first") if case == name}
    m = chrono(span=60, backend="auto", **options, **({"proj_size": 7} if case == "proj_size" else {}))
    m = m.to({"bfloat16": torch.bfloat16, "float64": torch.float64}.get(case, torch.float32))
    x, call = torch.randn(480 if case == "float64" else 240, 3, 3, dtype=m.weight_hh_l0.dtype), {}
    if case == "lengths":
        call = {"lengths": torch.tensor([240, 101, 0])}
    if case == "packed":
        x = pack_sequence([x[:n, b] for b, n in enumerate((90, 240, 33))], enforce_sorted=False)
    if case == "batch_first":
        x = x.transpose(0, 1)
    if case == "clamp":
        from stable_rnn import ForgetCap

        m.stability = ForgetCap(0.97)
    expected = results(m, x, Recurrent(), **call)
    found = results(m, x, Verified(chunk=24, warmup=8, correct=correct, max_passes=20), **call)
    assert_agrees(found, expected, {"bfloat16": 0.1, "float64": 1e-12}.get(case, 5e-5))
    assert not m.last_report.fallback and not m.last_report.backward.fallback, m.last_report
    assert len(m.last_report.layers) == 1 + m.bidirectional


def test_an_rnn_gets_no_correction():
    m, x = made(cls=StableRNN), torch.randn(300, 2, 3)
    expected = results(m, x, Recurrent())
    assert_agrees(results(m, x, Verified(chunk=50, warmup=4, correct="probes")), expected)
    assert not m.last_report.fallback and m.last_report.layers[0].correct == "none"


@pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")
@pytest.mark.parametrize("correct", ["decay", "probes"])
def test_cuda_kernels_in_the_block_executor(correct, monkeypatch):
    build.on_cpu_tensors(monkeypatch)
    m, x = chrono(8, span=20, backend="cuda"), torch.randn(60, 2, 3)
    expected = results(m, x, Recurrent())
    assert_agrees(results(m, x, Verified(chunk=6, warmup=2, correct=correct)), expected, 5e-5)
    report = m.last_report
    assert not report.fallback and report.passes > 1 and report.layers[0].correct == correct
    assert not report.backward.fallback and report.backward.passes > 1


# ---- the guarantee


@compiled
@pytest.mark.parametrize("correct", ["none", "decay", "probes"])
@pytest.mark.parametrize("net", [chrono, rotating, made])
def test_zero_tolerance_is_the_plain_run_whatever_corrects(net, correct):
    m, x = net(backend="cpu"), 0.1 * torch.randn(200, 2, 3)
    expected = results(m, x, Recurrent())
    for found, want in zip(results(m, x, Verified(tol=0, chunk=20, warmup=3, correct=correct)), expected, strict=True):
        assert torch.equal(found, want)
    assert m.last_report.largest_jump == 0


@compiled
@pytest.mark.parametrize(
    "plan",
    [Verified(), Verified(chunk=40, warmup=4, correct="decay"), Verified(chunk=40, warmup=4, correct="probes")],
    ids=str,
)
def test_bits_repeat(plan, monkeypatch):
    """From call to call, from copy to copy, and over the number of threads."""
    monkeypatch.setitem(policy.DEVICES, "cpu", FREE)
    m, x = made(24, backend="cpu"), torch.randn(1600, 2, 3)
    first = results(m, x, plan)
    threads = torch.get_num_threads()
    try:
        for count, again in ((threads, m), (threads, copy.deepcopy(m)), (threads + 2, m)):
            torch.set_num_threads(count)
            found = results(again, x, plan)
            same = 3 if count != threads else len(first)  # products over all times are the library's
            assert all(torch.equal(a, b) for a, b in zip(found[:same], first[:same], strict=True))
    finally:
        torch.set_num_threads(threads)
    assert not m.last_report.fallback


def test_jumps_that_no_output_shows():
    """Two cells that only add up, saturated: h is 1 whatever they hold. Judged by outputs that agrees at once."""
    m = made(8)
    with torch.no_grad():
        m.weight_hh_l0.mul_(0.3)
        i, f, g, _ = m.bias_ih_l0.view(4, 8)
        i[:2], f[:2], g[:2] = 2, 25, 1
    x = 0.5 * torch.randn(1000, 2, 3)
    m.plan = Recurrent()
    expected = m(x)[0]
    m.plan = Verified(chunk=100, correct="none")
    m(x)
    assert m.last_report.fallback
    m.plan = Verified(chunk=100, correct="none", tol_on="output")
    y = m(x)[0]
    report = m.last_report
    assert not report.fallback and report.passes <= 3 and report.largest_jump > 0.1 and report.forward_bound is None
    assert (y - expected).abs().max() <= 2e-6


# ---- the choice


def switching(**options):
    """A network whose third input tells how long it remembers."""
    m = made(12, **options)
    with torch.no_grad():
        m.weight_ih_l0[12:24, 2] = 12
        m.weight_ih_l0[:12, 2] = -6  # so that what it remembers stays small
    return m


@pytest.mark.parametrize("reverse", [False, True])
def test_lanes_in_stretches(monkeypatch, reverse):
    """Where a sequence begins to remember, lanes end and the plain recurrence goes on."""
    monkeypatch.setitem(policy.DEVICES, "cpu", FREE._replace(lanes=((float("inf"), 4.0, 0.2),)))
    m, x = switching(), torch.randn(9000, 1, 3)
    x[:, :, 2] = 0
    expected = results(m, x, Recurrent())
    assert_agrees(results(m, x, Verified(correct="none")), expected)
    layer = m.last_report.layers[0]
    assert layer.plain_from is None and layer.lanes > 8 and layer.passes == 1 and layer.predicted < 0.5
    times = slice(None, 2800) if reverse else slice(6200, None)  # between the places where the trial looks
    x[times, :, 2] = 1
    expected = results(m, x, Recurrent())
    assert_agrees(results(m, x, Verified(correct="none")), expected)
    report = m.last_report.backward if reverse else m.last_report
    assert report.layers[0].plain_from not in (None, 0) and report.fallback and not report.layers[0].fallback
    assert "after" in str(report.layers[0]) and report.layers[0].why


@pytest.mark.parametrize("weight", [1.0, 30.0])
def test_a_hopeless_layer_is_the_plain_run_and_is_remembered(monkeypatch, weight):
    monkeypatch.setitem(policy.DEVICES, "cpu", FREE._replace(lanes=((float("inf"), 4.0, 0.2),)))
    m, x = chrono(span=100000), torch.randn(3000, 2, 3)
    with torch.no_grad():
        m.weight_hh_l0.mul_(weight)
    expected = results(m, x, Recurrent())
    for why in ("remembers|budget|might", "fell back in a call before"):
        assert_agrees(results(m, x, Verified()), expected, 0)
        layers = m.last_report.layers + m.last_report.backward.layers
        assert all(layer.fallback and layer.plain_from == 0 for layer in layers)
        assert all(any(part in layer.why for part in why.split("|")) for layer in layers), layers
    again = pickle.loads(pickle.dumps(m))
    again(x)
    assert "before" not in again.last_report.layers[0].why  # a copy finds out by itself
    with torch.no_grad():
        m.weight_hh_l0.mul_(1)
    m(x)
    assert "before" not in m.last_report.layers[0].why  # its weights have been written to
    m(x)
    assert "before" in m.last_report.layers[0].why


def test_short_sequences_run_plainly():
    m, x = made(), torch.randn(30, 2, 3)
    assert_agrees(results(m, x, Verified()), results(m, x, Recurrent()), 0)
    m.plan = Verified()
    m(x)
    assert m.last_report.layers[0].chunk == 0 and "cheaper" in str(m.last_report) and m.last_report.passes == 1


# ---- what is not finite, and what is wild


@pytest.mark.parametrize("correct", ["none", "decay", "probes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("place", ["input", "weight", "state"])
def test_no_nan_of_our_own(place, value, correct):
    m, x = chrono(span=50), torch.randn(240, 2, 3)
    hx = [torch.zeros(1, 2, 16), torch.zeros(1, 2, 16)]
    if place == "input":
        x[100, 1, 0] = value
    elif place == "state":
        hx[1][0, 0, 3] = value
    else:
        with torch.no_grad():
            m.weight_hh_l0[20, 5] = value
    with torch.no_grad():
        expected = flat(m(x, tuple(hx)))
        m.plan = Verified(chunk=20, warmup=4, correct=correct)
        found = flat(m(x, tuple(hx)))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        good = b.isfinite()
        assert not good.any() or (a - b)[good].abs().max() <= 1e-4 * b[good].abs().max().clamp_min(1)


@pytest.mark.parametrize("correct", ["none", "decay", "probes"])
@pytest.mark.parametrize("cls", [StableRNN, StableLSTM])
def test_chaos_falls_back_soon(cls, correct):
    """Bitwise to the plain run, before the passes are a quarter as deep."""
    m, x = made(cls=cls), torch.randn(600, 2, 3)
    with torch.no_grad():
        m.weight_hh_l0.mul_(30)
    expected = results(m, x, Recurrent())
    found = results(m, x, Verified(chunk=20, correct=correct))
    states = 3 if cls is StableLSTM else 2
    assert_agrees(found[:states], expected[:states], 0)
    assert m.last_report.fallback and 20 * m.last_report.passes <= 150
    back = m.last_report.backward  # saturated states hand no adjoint on
    assert_agrees(found[states:], expected[states:], 0 if back.fallback else 1e-4)
    assert 20 * back.passes <= 150


# ---- reports, and plans per layer


def test_a_compiled_graph_reports_too():
    m, x = chrono(span=50, num_layers=2, plan=[Verified(chunk=40), Recurrent()]), torch.randn(200, 2, 3)
    torch._dynamo.reset()
    y = torch.compile(m, fullgraph=True, backend="aot_eager")(x)[0]
    report = m.last_report
    y.sum().backward()
    assert [layer.layer for layer in report.layers] == [0] and report.layers[0].chunk == 40 and report.passes > 1
    torch.testing.assert_close(y, m(x)[0])
    assert str(m.last_report) == str(report)


def test_a_report_says_it_in_words():
    m = chrono(span=20, bidirectional=True, plan={(0, 0): Verified(chunk=40), (0, 1): Verified(chunk=20, warmup=7)})
    m(torch.randn(400, 2, 3))[0].sum().backward()
    lines = str(m.last_report).splitlines()
    assert len(lines) == 4 and lines[0].startswith("layer 0: 20 lanes of 40 steps, warm-up 32")
    assert lines[1].startswith("layer 0, reverse: 40 lanes of 20 steps, warm-up 7") and lines[3].startswith(
        "backward, layer 0, reverse"
    )
    assert "(decay), jumps" in lines[0]


def test_fallbacks_of_one_layer_leave_the_others_alone():
    m, x = made(num_layers=2, plan=Verified(chunk=30, warmup=25)), torch.randn(300, 2, 3)
    with torch.no_grad():
        m.weight_hh_l1.mul_(30)
    m(x)
    assert [layer.fallback for layer in m.last_report.layers] == [False, True] and m.last_report.fallback


def test_nn_lstm_agrees():
    plain = nn.LSTM(3, 12)
    m, x = made(plan=Verified(chunk=32)), torch.randn(300, 2, 3)
    m.load_state_dict(plain.state_dict())
    torch.testing.assert_close(m(x)[0], plain(x)[0], rtol=0, atol=1e-5)
