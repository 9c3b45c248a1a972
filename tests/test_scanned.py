"""Modules under the plan `Scanned()`: whatever a module can do, it gives what it gives under `Recurrent()`."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_sequence

from stable_rnn import (
    Cascade,
    Recurrent,
    Scanned,
    StableGRU,
    StableLSTM,
    StableRNN,
    _native,
    functional,
    stabilize,
    use_plan,
)

MODULES = [StableRNN, StableLSTM, StableGRU]
BACKENDS = [("reference", torch.float64)] + [("cpu", torch.float32)] * bool(_native.lib)
every_module = pytest.mark.parametrize("cls", MODULES)
every_backend = pytest.mark.parametrize("backend,dtype", BACKENDS, ids=str)


def made(cls, backend="reference", dtype=torch.float64, **options):
    return cls(4, 6, stability=Cascade(3), plan=Scanned(), backend=backend, dtype=dtype, **options)


def states(found):
    y, hidden = found
    return [getattr(y, "data", y), *(hidden if isinstance(hidden, tuple) else (hidden,))]


def assert_same(found, expected):
    """The CPU's own bits, but for torch's sums in another order where torch adds up gradients."""
    for a, b in zip(found, expected, strict=True):
        tolerance = 1e-12 if a.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def both(m, call):
    """Outputs and gradients of `call(m)` under both plans."""
    found = []
    for plan in (Scanned(), Recurrent()):
        with use_plan(m, plan):
            torch.manual_seed(7)
            outputs = states(call(m))
            loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outputs)
            found.append([*outputs, *torch.autograd.grad(loss, list(m.parameters()))])
    return found


OPTIONS = [
    dict(num_layers=2, bidirectional=True),
    dict(bias=False, batch_first=True),
    dict(num_layers=3, dropout=0.4),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@every_backend
@every_module
def test_options(cls, backend, dtype, options):
    m = made(cls, backend, dtype, **options)
    x = torch.randn(5, 9, 4, dtype=dtype)
    assert_same(*both(m, lambda m: m(x)))
    assert_same(*both(m, lambda m: m(x[0])))  # unbatched


@every_backend
@every_module
def test_states_lengths_and_packed_sequences(cls, backend, dtype):
    m = made(cls, backend, dtype, num_layers=2, bidirectional=True)
    x, h = torch.randn(9, 3, 4, dtype=dtype), torch.randn(4, 3, 6, dtype=dtype)
    hx = (h, h.flip(0)) if cls is StableLSTM else h
    assert_same(*both(m, lambda m: m(x, hx)))
    assert_same(*both(m, lambda m: m(x, hx, lengths=torch.tensor([4, 9, 0]))))
    packed = pack_sequence([x[:4, 0], x[:, 1], x[:1, 2]], enforce_sorted=False)
    assert_same(*both(m, lambda m: m(packed, hx)))


@every_module
def test_a_stream_goes_on_where_it_stopped(cls):
    m, x = made(cls), torch.randn(9, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        whole, end = m(x)
        first, hx = m(x[:5])
        rest, last = m(x[5:], hx)
    assert_same([torch.cat([first, rest]), *states((rest, last))[1:]], [whole, *states((rest, end))[1:]])


@every_backend
@every_module
def test_double_backward_and_forward_mode(cls, backend, dtype):
    m, x = made(cls, backend, dtype), torch.randn(7, 2, 4, dtype=dtype, requires_grad=True)
    found = []
    for plan in (Scanned(), Recurrent()):
        with use_plan(m, plan):
            (dx,) = torch.autograd.grad(m(x)[0].square().sum(), x, create_graph=True)
            again = torch.autograd.grad(dx.square().sum(), [x, m.weight_hh_l0])
            tangent = jvp(lambda x: m(x)[0], (x.detach(),), (torch.ones_like(x),))
            found.append([dx.detach(), *again, *tangent])
    assert_same(*found)


@every_module
def test_per_sample_gradients(cls):
    m = made(cls)
    x = torch.randn(5, 7, 4, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in m.named_parameters()}
    loss = lambda p, sample: functional_call(m, p, (sample,))[0].square().sum()  # noqa: E731
    found = vmap(grad(loss), in_dims=(None, 1))(parameters, x)
    for i in range(7):
        alone = grad(loss)(parameters, x[:, i])
        assert_same([g[i] for g in found.values()], alone.values())


@every_module
def test_one_weight_for_each_sample(cls):
    """Weights mapped by vmap: cascades of different groups beside each other."""
    m, x = made(cls), torch.randn(3, 7, 4, dtype=torch.float64)
    parameters = {k: torch.stack([v.detach(), 2 * v.detach(), 0 * v.detach()]) for k, v in m.named_parameters()}
    run = lambda p, x: functional_call(m, p, (x,))[0]  # noqa: E731
    found = vmap(run)(parameters, x)
    for i in range(3):
        assert_same([found[i]], [run({k: v[i] for k, v in parameters.items()}, x[i])])


@pytest.mark.parametrize("backend,dtype", [pytest.param(*BACKENDS[0], marks=pytest.mark.check), *BACKENDS[1:]], ids=str)
@every_module
def test_compile(cls, backend, dtype):
    """One whole graph, forward and backward, for every T."""
    m = made(cls, backend, dtype, num_layers=2, bidirectional=True)
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (9, 13):
        x, found = torch.randn(steps, 2, 4, dtype=dtype), []
        for f in (m, compiled):
            m.zero_grad()
            y = f(x)[0]
            y.sum().backward()
            found.append([y, *(w.grad.clone() for w in m.parameters())])
        assert_same(*found)


@every_module
def test_export(cls):
    m = made(cls).eval()
    shapes = ({0: torch.export.Dim("T", max=4096), 1: torch.export.Dim("B", max=64)},)
    program = torch.export.export(m, (torch.randn(9, 3, 4, dtype=torch.float64),), dynamic_shapes=shapes)
    x = torch.randn(21, 5, 4, dtype=torch.float64)
    assert_same(states(program.module()(x)), states(m(x)))


@pytest.mark.parametrize("backend", [backend for backend, _ in BACKENDS])
def test_opcheck(backend):
    xp, w, h, c = torch.randn(12, 16), torch.zeros(16, 4), torch.randn(2, 4), torch.randn(2, 4)
    w[3, 1] = 0.7
    p = ("lstm", 6, 2, -2, 0, -1.0, 1, "auto", False, 0.9, backend)
    tests = ("test_schema", "test_faketensor")
    recurrence, backward = torch.ops.stable_rnn.recurrence, torch.ops.stable_rnn.recurrence_backward
    given = (xp, w, None, None, h, c, None, None, None, *p, True)
    torch.library.opcheck(recurrence, given, test_utils=tests)
    y, _, _, saved, cells, _ = recurrence(*given)
    given = (torch.randn(12, 4), h, c, y, saved, cells, w, None, None, c, None, None, None, *p)
    torch.library.opcheck(backward, given, test_utils=tests)


@every_module
@pytest.mark.parametrize("backend", [backend for backend, _ in BACKENDS])
def test_autocast(cls, backend):
    m, x = made(cls, backend, torch.float32), torch.randn(7, 2, 4)
    found = []
    for plan in (Scanned(), Recurrent()):
        with use_plan(m, plan), torch.autocast("cpu", torch.bfloat16):
            y = m(x)[0]
            found += [y, *torch.autograd.grad(y.float().square().sum(), list(m.parameters()))]
    for a, b in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        # rounded to bfloat16 in the same places; sums between them in float32
        assert a.dtype == b.dtype and (a - b).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * b.abs().max()
    # on CPUs nn.GRU's outputs have the state's dtype
    assert found[0].dtype == (torch.float32 if cls is StableGRU else torch.bfloat16)


def test_functional():
    x, w_ih, w_hh = torch.randn(9, 2, 4), torch.randn(20, 4), torch.randn(4, 5, 5).tril(-1).view(20, 5)
    gru, rnn = (w_ih[:15], w_hh[:15], w_ih[:15, 0], w_ih[:15, 1]), (w_ih[:5], w_hh[:5])
    for run in (
        lambda plan: functional.lstm(x, w_ih, w_hh, plan=plan, clamp=0.7, reverse=True),
        lambda plan: functional.gru(x, *gru, plan=plan, clamp=0.7),
        lambda plan: functional.rnn(x, *rnn, plan=plan, nonlinearity="relu"),
    ):
        assert_same(states(run(Scanned())), states(run(Recurrent())))


# ---- what it refuses


@every_module
def test_other_weights_are_refused(cls):
    m = cls(4, 6, stability=None, plan=Scanned())
    with pytest.raises(ValueError, match=r"needs a cascade.*weight_hh\[0, 0\] = .*unit 0 reads itself"):
        m(torch.randn(5, 2, 4))
    m = made(cls, dtype=torch.float32)
    m(torch.randn(5, 2, 4))
    with torch.no_grad():
        m.weight_hh_l0[2, 4] = 1.0
    with pytest.raises(ValueError, match=r"weight_hh\[2, 4\] = 1: unit 2 reads unit 4"):
        m(torch.randn(5, 2, 4))


def test_projected_states_are_refused():
    m = StableLSTM(4, 6, proj_size=3, stability=None, plan=Scanned())
    with pytest.raises(ValueError, match=r"Scanned\(\) has no projected states \(proj_size"):
        m(torch.randn(5, 2, 4))


def test_a_model_of_torch_goes_all_the_way():
    """stabilize, project, run: what a user does."""
    model = nn.Sequential(nn.LSTM(4, 6, num_layers=2))
    stabilize(model, stability=Cascade(2), project=True)
    x = torch.randn(50, 3, 4)
    plain = model(x)[0]
    with use_plan(model, Scanned()) as scanned:
        assert_same([scanned(x)[0]], [plain])
    assert repr(Scanned()) == "Scanned()" and Scanned() == Scanned()
