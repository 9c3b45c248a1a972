"""Modules and cells on tensors that do not lie row by row: what row-major copies give, in eager mode, compiled and exported."""

import pytest
import torch
from layouts import LAYOUTS, place, plain
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

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

PLANS = [Recurrent(), Windowed(3), Chunked(4, 2), Verified(chunk=4, warmup=2)]
BACKENDS = ["reference"] + (["cpu"] if _native.lib else [])
CELLS = [(StableRNNCell, nn.RNNCell), (StableLSTMCell, nn.LSTMCell), (StableGRUCell, nn.GRUCell)]


def tensors(result):
    """All tensors of a result."""
    if isinstance(result, torch.Tensor):
        return [result.data if isinstance(result, PackedSequence) else result]
    return [t for part in result if part is not None for t in tensors(part)]


def close(found, expected):
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-5
        )  # float32: library products of other strides sum in another order


def variants(values, layout, alone=True):
    """Every tensor alone in the layout, and all of them."""
    for which in (*range(len(values) * alone), None):
        yield [place(t, layout) if which in (i, None) else t for i, t in enumerate(values)]


def values_and_gradients(m, x, hx, weights):
    """Outputs, and gradients by upstream ones that lie column by column."""
    leaves = [t.detach().requires_grad_() for t in (x, *hx)]
    state = leaves[1:] if len(leaves) > 2 else leaves[1]
    outputs = tensors(
        torch.func.functional_call(m, weights, (leaves[0], tuple(state) if isinstance(state, list) else state))
    )
    loss = sum(
        (y.transpose(0, -1) * torch.linspace(-1, 1, y.numel()).view(y.transpose(0, -1).shape)).sum() for y in outputs
    )
    return outputs, torch.autograd.grad(loss, [*leaves, *weights.values()])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bidirectional": True}, {"proj_size": 3}], ids=str)
def test_modules(options, backend, plan, layout):
    """Inputs, states and weights, on a batch of three and of one; with gradients and without."""
    for cls in (StableRNN, StableLSTM, StableGRU):
        if cls is not StableLSTM and "proj_size" in options:
            continue
        m = cls(4, 6, **options, plan=plan, backend=backend, stability=None)
        names, ways = [name for name, _ in m.named_parameters()], 1 + m.bidirectional
        for batch in (3, 1):
            hx = [torch.randn(ways, batch, options.get("proj_size", 6))] + (
                [torch.randn(ways, batch, 6)] if cls is StableLSTM else []
            )
            x = torch.randn(*((batch, 5) if m.batch_first else (5, batch)), 4)
            for laid in variants([x, *hx, *(w.detach() for w in m.parameters())], layout, plan == Recurrent()):
                found = []
                for given in (laid, [plain(t) for t in laid]):
                    x_, hx_ = given[0], given[1 : 1 + len(hx)]
                    weights = {
                        name: w.detach().requires_grad_() for name, w in zip(names, given[1 + len(hx) :], strict=True)
                    }
                    with torch.no_grad():
                        alone = torch.func.functional_call(m, weights, (x_, tuple(hx_) if len(hx_) > 1 else hx_[0]))
                    found.append((alone, values_and_gradients(m, x_, hx_, weights)))
                close(*found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ordered", [True, False])
def test_packed_input(ordered, layout):
    m = StableLSTM(4, 6, bidirectional=True, stability=None)
    packed = pack_sequence([torch.randn(n, 4) for n in ((5, 3, 1) if ordered else (1, 5, 3))], enforce_sorted=ordered)
    for data, h, c in variants([packed.data, torch.randn(2, 3, 6), torch.randn(2, 3, 6)], layout):
        found = [m(PackedSequence(d, *packed[1:]), hx) for d, *hx in ((data, h, c), map(plain, (data, h, c)))]
        close(*found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ours,theirs", CELLS)
def test_cells(ours, theirs, layout):
    """Bitwise what row-major copies give, and what torch's cells give."""
    m, other = ours(5, 7, stability=None), theirs(5, 7)
    other.load_state_dict(m.state_dict())
    names = [name for name, _ in m.named_parameters()]
    for batch in (3, 1):
        states = [torch.randn(batch, 7) for _ in range(2 if ours is StableLSTMCell else 1)]
        for x, *rest in variants([torch.randn(batch, 5), *states, *(w.detach() for w in m.parameters())], layout):
            hx, weights = rest[: len(states)], dict(zip(names, rest[len(states) :], strict=True))
            with torch.no_grad():
                run = lambda m, x, hx, weights: tensors(  # noqa: E731
                    torch.func.functional_call(m, weights, (x, tuple(hx) if len(hx) > 1 else hx[0]))
                )
                found = run(m, x, hx, weights)
                expected = run(m, plain(x), [plain(h) for h in hx], {k: plain(w) for k, w in weights.items()})
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) or layout == "negative"
                close(found, expected)
                close(found, run(other, x, hx, weights))


@pytest.mark.parametrize("layout", ["transposed", "odd_ones", "strided", "expanded"])
@pytest.mark.parametrize("cls", [StableRNN, StableLSTM, StableGRU])
def test_compiled(cls, layout):
    """aot_eager holds the fakes' strides against the graph that it traces, in both passes."""
    for batch in (1, 3):
        m = cls(4, 6, batch_first=True, stability=None)
        weights = dict(m.named_parameters())
        x, hx = (
            place(torch.randn(batch, 5, 4), layout),
            [place(torch.randn(1, batch, 6), layout) for _ in range(1 + (cls is StableLSTM))],
        )
        torch._dynamo.reset()
        compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
        close(
            values_and_gradients(compiled, x, hx, {f"_orig_mod.{name}": w for name, w in weights.items()}),
            values_and_gradients(m, x, hx, weights),
        )


@pytest.mark.parametrize("layout", ["transposed", "permuted", "strided", "odd_ones"])
def test_exported(layout):
    """A program made from row-major states runs on others, and one that was made from others gives the same."""
    m = StableLSTM(4, 6, stability=None).eval()
    for batch in (1, 3):
        x, hx = place(torch.randn(5, batch, 4), layout), (torch.randn(1, batch, 6), torch.randn(1, batch, 6))
        laid = tuple(place(h, layout) for h in hx)
        for example in (hx, laid):
            program = torch.export.export(m, (x, example)).run_decompositions().module()
            for given in (hx, laid):
                close(program(x, given), m(x, given))


class Convolved(nn.Module):
    """What a client compiled: the outputs of a batch of one, transposed for a convolution over time."""

    def __init__(self):
        super().__init__()
        self.lstm = StableLSTM(3, 8, batch_first=True, proj_size=4, stability=None)
        self.conv = nn.Conv1d(4, 5, 3, padding=1)

    def forward(self, x):
        return self.conv(self.lstm(x)[0].transpose(1, 2)).square().sum()


@pytest.fixture
def no_cache():
    """A graph that was compiled before a change of the fakes must not answer."""
    import torch._functorch.config
    import torch._inductor.config

    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def test_inductor_trains_on_a_batch_of_one(no_cache):
    net, x = Convolved(), torch.randn(1, 7, 3)
    expected = torch.autograd.grad(net(x), net.parameters())
    torch._dynamo.reset()
    close(torch.autograd.grad(torch.compile(net, fullgraph=True)(x), net.parameters()), expected)


@pytest.mark.check
def test_compiled_ahead_of_time(no_cache, tmp_path):
    """A package of AOTInductor, made and run with a transposed state."""
    m = StableLSTM(3, 4, stability=None).eval()
    x, h, c = torch.randn(5, 2, 3), torch.randn(1, 4, 2).mT, torch.randn(1, 2, 4)
    with torch.no_grad():
        program = torch.export.export(m, (x, (h, c)))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "lstm.pt2"))
        close(torch._inductor.aoti_load_package(package)(x, (h, c)), m(x, (h, c)))
