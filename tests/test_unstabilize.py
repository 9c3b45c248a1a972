"""The way back to torch's own classes, and what knows only these: quantization, TorchScript, torch.fx, ONNX."""

import copy
import io
import pickle

import pytest
import torch
import torch.fx
from torch import nn

from stable_rnn import (
    Certified,
    Chunked,
    ForgetCap,
    StableGRU,
    StableGRUCell,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    Verified,
    Windowed,
    stabilize,
    unstabilize,
    use_plan,
)

X = torch.randn(9, 3, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.rnn, self.fc = nn.LSTM(5, 6), nn.RNN(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        return self.fc(self.rnn(y)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantization():
    net = stabilize(Net()).eval()
    expected = net(X)
    done = torch.ao.quantization.quantize_dynamic(unstabilize(net), {nn.LSTM, nn.Linear})
    assert type(done.lstm) is torch.ao.nn.quantized.dynamic.LSTM
    assert (done(X) - expected).abs().max() < 0.05  # 8-bit weights


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts():
    net = stabilize(Net())
    expected, children = net(X), dict(net.named_modules())
    for m in (net, net.rnn, stabilize(nn.LSTMCell(5, 6), cells=True)):
        with pytest.raises(RuntimeError, match=r"module\.to_torch\(\).* unstabilize\(model\)"):
            torch.jit.script(m)
    assert dict(net.named_modules()) == children
    torch.testing.assert_close(torch.jit.script(unstabilize(net))(X), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(tmp_path, dynamo):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    net = stabilize(Net(), plan=Verified()).eval()
    with pytest.raises(Exception) as error:
        torch.onnx.export(net, (X,), tmp_path / "net.onnx", dynamo=dynamo)
    assert "unstabilize(model)" in str(error.value)
    torch.onnx.export(unstabilize(net), (X,), tmp_path / "net.onnx", dynamo=dynamo)
    assert "LSTM" in {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}


def test_clamps_are_not_dropped_unasked():
    net = nn.ModuleDict(
        {
            "a": StableLSTM(3, 4),
            "b": nn.Sequential(StableLSTM(3, 4, stability=Certified(clamp=True, forget=0.7))),
            "c": StableLSTMCell(3, 4, stability=ForgetCap(0.5)),
            "d": StableRNN(3, 4, stability=Certified(clamp=True)),
        }
    )
    kinds = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=r"clamped, .*: b\.0 at 0\.7, c at 0\.5; pass allow_change=True"):
        unstabilize(net)
    with pytest.raises(ValueError, match="clamped, .*: the model at 0.5"):
        unstabilize(net["c"])
    assert [type(m) for m in net.modules()] == kinds
    assert unstabilize(net, allow_change=True) is net
    assert [type(m) for m in net.modules()][1:] == [nn.LSTM, nn.Sequential, nn.LSTM, nn.LSTMCell, nn.RNN]


class Own(StableLSTM):
    pass


def test_what_has_no_way_back():
    parametrized = nn.utils.parametrizations.weight_norm(StableRNN(3, 4, stability=None), "weight_hh_l0")
    for m, text in (
        (Own(3, 4), r"1 is test_unstabilize\.Own, a subclass of StableLSTM"),
        (parametrized, "1 is a parametrized StableRNN .*remove_parametrizations"),
    ):
        net = nn.Sequential(StableLSTM(3, 4), m)
        with pytest.raises(ValueError, match=f"unstabilize: {text}"):
            unstabilize(net)
        assert type(net[0]) is StableLSTM
    with pytest.raises(TypeError, match="unstabilize: model must be an nn.Module, got str"):
        unstabilize("model")
    plain = Net()
    assert unstabilize(plain) is plain


@pytest.mark.parametrize(
    "make",
    [
        lambda: StableLSTMCell(5, 6),
        lambda: StableRNNCell(5, 6, nonlinearity="relu", bias=False),
        lambda: StableLSTM(5, 6, 2, bidirectional=True),
        lambda: StableRNN(5, 6, nonlinearity="relu"),
    ],
)
def test_to_torch_is_a_copy(make):
    m = make().eval()
    plain, x = m.to_torch(), X if isinstance(m, nn.RNNBase) else X[0]
    assert type(plain) is type(unstabilize(copy.deepcopy(m))) and not plain.training
    for a, b in zip(flat(plain(x)), flat(m(x)), strict=True):
        torch.testing.assert_close(a, b)
    assert not {w.data_ptr() for w in m.parameters()} & {w.data_ptr() for w in plain.parameters()}


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


# ---- torch.fx


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([nn.LSTMCell(5, 6), nn.RNNCell(6, 6)])

    def forward(self, x, state):
        h, c = self.inner[0](x, state)
        return self.inner[1](h) + c


@pytest.mark.parametrize("plan", [Windowed(2), Chunked(4, 2)], ids=str)
def test_symbolic_trace(plan):
    net = stabilize(Net(), plan=plan)
    traced = torch.fx.symbolic_trace(net)
    leaves = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert leaves == [node.target for node in torch.fx.symbolic_trace(Net()).graph.nodes if node.op == "call_module"]
    torch.testing.assert_close(traced(X), net(X))
    assert type(unstabilize(traced).lstm) is nn.LSTM
    net = stabilize(Cells(), cells=True)
    args = X[0], (torch.randn(3, 6), torch.randn(3, 6))
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(*args), net(*args))


def test_what_fx_cannot_trace_names_the_way_out():
    cells = StableLSTMCell(5, 6), StableRNNCell(5, 6), StableGRUCell(5, 6)
    for m in (StableLSTM(5, 6), StableRNN(5, 6), StableGRU(5, 6), *cells):
        with pytest.raises(RuntimeError, match=r"torch\.fx cannot trace .* unstabilize\(model\)"):
            torch.fx.symbolic_trace(m)
    net = stabilize(Net())
    net.lstm.register_forward_hook(lambda m, a, y: None)
    with pytest.raises(RuntimeError, match="hooks would be traced and run again.* unstabilize"):
        torch.fx.symbolic_trace(net)
    torch.fx.symbolic_trace(unstabilize(net))


def test_pickles_of_what_was_swapped():
    net = stabilize(Net(), stability=Certified(), plan=Windowed(2))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(X), net(X))


def test_inside_of_use_plan():
    net = stabilize(Net())
    with use_plan(net, Windowed(2)):
        unstabilize(net)
    assert vars(net.lstm).keys() == vars(nn.LSTM(5, 6)).keys()
    stabilize(net)


def test_pickles_with_old_names():
    """Of whole models: the modules of one step stood in stable_rnn.cells, `clamp` was called clamped."""
    for cls in (StableLSTMCell, StableRNNCell):
        assert pickle.loads(b"cstable_rnn.cells\n%s\n." % cls.__name__.encode()) is cls
    for stability in (Certified(), Certified(0.9, clamp=True)):
        now = pickle.dumps(stability, protocol=0)
        old = now.replace(b"Vclamp\n", b"Vclamped\n")
        assert old != now and pickle.loads(old) == pickle.loads(now) == stability
