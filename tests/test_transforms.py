"""What torch does with a module: autocast, compile, functional transforms, double backward, frozen weights."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap

from stable_rnn import (
    Chunked,
    Recurrent,
    StableGRU,
    StableGRUCell,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    Verified,
    Windowed,
    _native,
)
from stable_rnn.common import autocast_dtype

PLANS = [Recurrent(), Windowed(3), Chunked(4, 2), Verified(chunk=4, warmup=2)]
BACKENDS = ["reference"] + (["cpu"] if _native.lib else [])


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.check), *BACKENDS[1:]])
@pytest.mark.parametrize("cls", [pytest.param(StableRNN, marks=pytest.mark.check), StableLSTM, StableGRU])
def test_compile(cls, backend, plan):
    """One whole graph, the same numbers, forward and backward, and no new graph for another T."""
    m = cls(4, 6, num_layers=2, bidirectional=True, plan=plan, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (9, 13):
        x = torch.randn(steps, 2, 4)
        found = []
        for f in (m, compiled):
            m.zero_grad()
            y = f(x)[0]
            y.sum().backward()
            found.append([y, *(w.grad.clone() for w in m.parameters())])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], m(x)[0])


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_compile_does_not_specialize_on_time(plan):
    m = StableLSTM(4, 6, plan=plan, backend=BACKENDS[-1])
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(m, fullgraph=True, backend=counter)
    for steps, batch in ((9, 2), (33, 5), (500, 3)):
        x = torch.randn(steps, batch, 4)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        compiled(x)[0].sum().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("cls", [StableRNN, StableLSTM, StableGRU])
def test_export(cls, plan):
    """An exported program runs for any T and B, and has no node more for a longer example."""
    m = cls(4, 6, num_layers=2, bidirectional=True, plan=plan).eval()
    free, nodes = {0: torch.export.Dim("T", max=4096), 1: torch.export.Dim("B", max=64)}, []
    for steps in (9, 90):
        program = torch.export.export(m, (torch.randn(steps, 3, 4),), dynamic_shapes=(free,))
        nodes.append(len(program.graph.nodes))
        x = torch.randn(21, 5, 4)
        torch.testing.assert_close(program.module()(x), m(x))
    assert nodes[0] == nodes[1]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("cls", [StableRNN, StableLSTM, StableGRU])
def test_per_sample_gradients(cls, plan):
    m = cls(3, 4, plan=plan, dtype=torch.float64, backend="reference")
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in m.named_parameters()}

    def loss(parameters, sample):
        return functional_call(m, parameters, (sample,))[0].square().sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(5):
        m.zero_grad()
        m(x[i])[0].square().sum().backward()
        for name, w in m.named_parameters():
            torch.testing.assert_close(per_sample[name][i], w.grad)


@pytest.mark.parametrize("cls", [StableLSTM, StableGRU])
def test_forward_mode(cls):
    m = cls(3, 4, dtype=torch.float64)
    x, v = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(6, 2, 3, dtype=torch.float64)
    _, tangent = jvp(lambda x: m(x)[0], (x,), (v,))
    step = 1e-6
    with torch.no_grad():
        numeric = (m(x + step * v)[0] - m(x - step * v)[0]) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [StableLSTM, StableGRU])
def test_double_backward(cls, backend, plan):
    """The gradient of a gradient penalty, against float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        m = cls(3, 4, num_layers=2, plan=plan, backend=backend if dtype == torch.float32 else "reference").to(dtype)
        x = torch.randn(9, 2, 3).to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(m(x)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), list(m.parameters())))
    for a, b in zip(*found, strict=True):
        scale = float(b.abs().max())
        assert float((a.double() - b).abs().max()) <= 100 * torch.finfo(torch.float32).eps * max(scale, 1)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [StableRNN, StableLSTM, StableGRU])
def test_many_gradients_at_once(cls, backend, plan):
    """`is_grads_batched`, which vectorized Jacobians use, of a size that weight gradients by the kernel would pay for."""
    m, x = cls(40, 40, plan=plan, backend=backend), torch.randn(12, 4, 40, requires_grad=True)
    y = m(x)[0]
    several, inputs = torch.randn(3, *y.shape), [x, *m.parameters()]
    expected = [torch.autograd.grad(y, inputs, one, retain_graph=True) for one in several]
    before = m.last_report if isinstance(plan, Verified) else None
    for kept in (True, False):
        found = torch.autograd.grad(y, inputs, several, is_grads_batched=True, retain_graph=kept)
        for at_once, each in zip(found, zip(*expected)):
            torch.testing.assert_close(
                at_once, torch.stack(each), rtol=1e-5, atol=1e-5
            )  # float32: sums over T in another order
    if before is not None:
        assert m.last_report == before


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_frozen_weights_and_eval_gradients(plan):
    m = StableLSTM(3, 4, plan=plan).eval()
    for w in m.parameters():
        w.requires_grad_(False)
    x = torch.randn(6, 2, 3, requires_grad=True)
    h = torch.zeros(1, 2, 4, requires_grad=True)
    c = torch.zeros(1, 2, 4, requires_grad=True)
    m(x, (h, c))[0].sum().backward()
    assert x.grad.any() and h.grad.any() and c.grad.any()
    m.weight_hh_l0.requires_grad_(True)
    m(x)[0].sum().backward()
    assert m.weight_hh_l0.grad.any() and m.weight_ih_l0.grad is None


@pytest.mark.parametrize("cls,plain", [(StableRNN, nn.RNN), (StableLSTM, nn.LSTM), (StableGRU, nn.GRU)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(cls, plain, backend):
    m = cls(8, 16, backend=backend)
    theirs = plain(8, 16)
    theirs.load_state_dict(m.state_dict())
    x = torch.randn(7, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, other = m(x)[0], theirs(x)[0]
        y.float().sum().backward()
    exact = theirs(x)[0]
    assert y.dtype == other.dtype == (torch.float32 if cls is StableGRU else torch.bfloat16)
    eager = float((other.float() - exact).abs().max())
    assert float((y.float() - exact).abs().max()) <= 2 * eager + torch.finfo(torch.bfloat16).eps
    assert m.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_autocast_is_seen_on_every_device(device):
    with FakeTensorMode():  # needs no such device
        x = torch.empty(3, device=device)
    assert autocast_dtype(x) is None
    torch.set_autocast_enabled(device, True)
    try:
        assert autocast_dtype(x) is torch.get_autocast_dtype(device)
        assert autocast_dtype(x.double() if device != "mps" else x.int()) is None
    finally:
        torch.set_autocast_enabled(device, False)


def test_a_grus_autocast_follows_the_state():
    """As in nn.GRU: outputs have the state's dtype, or the input's, where that is the wider."""
    m, theirs = StableGRU(4, 6, stability=None), nn.GRU(4, 6)
    theirs.load_state_dict(m.state_dict())
    for kind in (torch.bfloat16, torch.float16):
        for x in (torch.float32, torch.bfloat16):
            for h in (None, torch.float32, torch.bfloat16):
                given, hx = torch.ones(5, 2, 4, dtype=x), None if h is None else torch.zeros(1, 2, 6, dtype=h)
                with torch.autocast("cpu", kind):
                    assert [t.dtype for t in m(given, hx)] == [t.dtype for t in theirs(given, hx)]
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    with torch.autocast("cpu", torch.bfloat16):
        y, h_n = m(packed)
    torch.testing.assert_close(y.data, m(packed)[0].data)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_of_a_gru_go_back_under_autocast(backend):
    """Where the forward pass had left it."""
    m, x, grads = StableGRU(4, 6, plan=Windowed(3), backend=backend), torch.randn(7, 2, 4), []
    for inside in (False, True):
        m.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = m(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                y.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters()]))
    torch.testing.assert_close(
        *grads, rtol=0.02, atol=0.02
    )  # bfloat16 has 8 bits, 0.004, and several roundings in a row


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    """Schema, fake kernels and dynamic shapes of the registered ops."""
    n, batch, hidden = 12, 2, 4
    xp, w = torch.randn(n, 4 * hidden), torch.randn(4 * hidden, hidden)
    h, c = torch.randn(batch, hidden), torch.randn(batch, hidden)
    for numbers in [(0, 0, -1.0), (1, 2, -1.0), (3, 2, 1e-6)]:
        p = ("lstm", 6, batch, *numbers, 4, "auto", False, 0.9, backend)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.stable_rnn.recurrence, (xp, w, None, None, h, c, None, None, None, *p, True), test_utils=tests
        )
        out = torch.ops.stable_rnn.recurrence(xp, w, None, None, h, c, None, None, None, *p, True)
        torch.library.opcheck(
            torch.ops.stable_rnn.recurrence_backward,
            (torch.randn(n, hidden), h, c, out[0], out[3], out[4], w, None, None, c, None, None, None, *p),
            test_utils=tests,
        )
    if backend == "cpu":  # these checks cannot look into torch.func.vjp, by which the reference differentiates windows
        torch.library.opcheck(
            torch.ops.stable_rnn.windowed_backward,
            (
                torch.randn(n, hidden),
                h,
                c,
                xp,
                w,
                None,
                None,
                h,
                c,
                None,
                None,
                None,
                "lstm",
                6,
                batch,
                1,
                2,
                -1.0,
                1,
                "auto",
                False,
                0.9,
                backend,
            ),
            test_utils=tests,
        )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("cls", [StableRNN, StableLSTM, StableGRU])
def test_traces_are_right_or_refused(cls, gradient):
    """A plain recurrence is recorded as torch's own, for every T and B; nothing else can be."""
    with torch.set_grad_enabled(gradient):
        m = cls(4, 6, num_layers=2, bidirectional=True, batch_first=True).eval()
        traced, x = torch.jit.trace(m, torch.randn(3, 9, 4)), torch.randn(5, 21, 4)
        torch.testing.assert_close(traced(x)[0], m(x)[0])
        for plan in PLANS[1:]:
            with pytest.raises(RuntimeError, match=r"module\.to_torch\(\)"):
                torch.jit.trace(cls(4, 6, plan=plan), torch.randn(9, 3, 4))
        for backend in ("cpu", "reference"):
            with pytest.raises(RuntimeError, match=r"module\.to_torch\(\)"):
                torch.jit.trace(cls(4, 6, backend=backend), torch.randn(9, 3, 4))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("cls", [StableRNNCell, StableLSTMCell, StableGRUCell])
def test_traces_of_cells_are_refused(cls, gradient):
    for dtype in (torch.float32, torch.float64):
        with torch.set_grad_enabled(gradient), pytest.raises(RuntimeError, match=r"module\.to_torch\(\)"):
            torch.jit.trace(cls(4, 6, dtype=dtype), torch.randn(3, 4, dtype=dtype))
