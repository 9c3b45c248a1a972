"""Programs that leave: decomposed into torch's own operations, in onnxruntime, and as an AOTInductor package in a process without us."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import stable_rnn
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
    stabilize,
)

pytest.importorskip("torch._higher_order_ops.scan", reason="this torch has no scan")
pytestmark = [
    pytest.mark.filterwarnings("ignore:stable_rnn runs its slow reference recurrence"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
I, H = 4, 6
FREE = {0: torch.export.Dim("first", min=2), 1: torch.export.Dim("second", min=2)}
CASES = {
    "recurrent": (StableLSTM, dict(plan=Recurrent(), proj_size=3, bidirectional=True)),
    "windowed": (StableLSTM, dict(plan=Windowed(3))),
    "chunked": (StableGRU, dict(plan=Chunked(5, 3), batch_first=True, bidirectional=True)),
    "long warm-up": (StableRNN, dict(plan=Chunked(3, 9), nonlinearity="relu", bias=False)),
    "clamped": (StableLSTM, dict(plan=Verified(), stability=ForgetCap(0.6), batch_first=True)),
    "cascade": (StableGRU, dict(plan=Scanned(), stability=Cascade(2))),
    "per layer": (StableRNN, dict(plan=[Windowed(3), Recurrent()], num_layers=2)),
}


class Model(nn.Module):
    """A recurrent layer and what tells its states apart."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, hx=None, lengths=None):
        y, hidden = self.layer(x, hx, lengths=lengths)
        return y, *(hidden if isinstance(hidden, tuple) else (hidden,))


def model(name, dtype=torch.float32):
    cls, options = CASES[name]
    return Model(cls(I, H, dtype=dtype, **{"stability": None, **options})).eval()


def decomposed(m, *args, shapes=None):
    with torch.no_grad():
        program = torch.export.export(m, args, dynamic_shapes=(FREE,) if shapes is None else shapes)
    program = program.run_decompositions(stable_rnn.decompositions())
    assert not any("stable_rnn" in str(node.target) for node in program.graph.nodes)
    return program


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("windowed", "chunked", "clamped") else pytest.mark.check)
        for name in CASES
    ],
)
def test_torchs_own_operations(name):
    """The module's values, outputs and states, at other sizes than those of the export: fewer times than a window or chunk has, too."""
    m = model(name, torch.float64)
    run = decomposed(m, torch.randn(7, 3, I, dtype=torch.float64)).module()
    for sizes in ((7, 3), (13, 5), (2, 4), (4, 2)):
        x = torch.randn(*sizes, I, dtype=torch.float64)
        with torch.no_grad():
            for left, right in zip(run(x), m(x), strict=True):
                torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("plan", [Recurrent(), Windowed(3)], ids=str)
def test_resets(plan):
    """Sequences that begin anew: the mask is an input of the program."""
    layer = StableLSTM(I, H, stability=None, plan=plan, bidirectional=True, dtype=torch.float64)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, resets):
            return self.layer(x, resets=resets)[0]

    x, resets = torch.randn(7, 3, I, dtype=torch.float64), torch.rand(7, 3) < 0.3
    run = decomposed(Masked(), x, resets, shapes=(FREE, FREE)).module()
    x, resets = torch.randn(13, 5, I, dtype=torch.float64), torch.rand(13, 5) < 0.3
    with torch.no_grad():
        torch.testing.assert_close(run(x, resets), layer(x, resets=resets)[0])


@pytest.mark.parametrize("plan", [Recurrent(), Windowed(2), Chunked(5, 3)], ids=str)
def test_states_and_lengths(plan):
    """Sequences of no times keep their states; what lies past a length is not read."""
    m = Model(
        StableLSTM(I, H, bidirectional=plan != Recurrent(), stability=None, plan=plan, dtype=torch.float64)
    ).eval()
    x, lengths = torch.randn(9, 4, I, dtype=torch.float64), torch.tensor([9, 0, 4, 7])
    hx = tuple(torch.randn(1 + m.layer.bidirectional, 4, H, dtype=torch.float64) for _ in range(2))
    run = decomposed(m, x, hx, lengths, shapes=({0: FREE[0]}, (None, None), None)).module()
    x[4:, 2] = torch.nan
    with torch.no_grad():
        for left, right in zip(run(x, hx, lengths), m(x, hx, lengths), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)


def test_windows_are_feed_forward():
    graph = decomposed(model("windowed"), torch.randn(7, 3, I)).graph
    assert torch.ops.higher_order.scan not in [node.target for node in graph.nodes]


@pytest.mark.parametrize("plan", [Windowed(10**30), Chunked(10**30, 2), Chunked(3, 10**30)], ids=str)
def test_lanes_longer_than_a_fixed_length(plan):
    """The graph goes through the steps that there are."""
    m, x = Model(StableLSTM(I, H, stability=None, plan=plan)).eval(), torch.randn(4, 3, I)
    run = decomposed(m, x, shapes=(None,)).module()
    with torch.no_grad():
        for left, right in zip(run(x), m(x), strict=True):
            torch.testing.assert_close(left, right)


@pytest.mark.check
def test_a_program_with_gradients_is_exported_all_the_same():
    m, x = model("cascade"), torch.randn(7, 3, I)
    program = torch.export.export(m, (x,), dynamic_shapes=(FREE,)).run_decompositions(stable_rnn.decompositions())
    for left, right in zip(program.module()(x), m(x), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.check
def test_bfloat16():
    m, x = model("clamped", torch.bfloat16), torch.randn(7, 3, I, dtype=torch.bfloat16)
    run = decomposed(m, x).module()
    with torch.no_grad():
        for left, right in zip(run(x), m(x), strict=True):
            torch.testing.assert_close(left, right, rtol=0.02, atol=0.02)


@pytest.mark.check
@pytest.mark.parametrize("name", CASES)
def test_onnx(name, tmp_path):
    """In onnxruntime, with errors from float64 of the size of the module's own; one time and one sequence too."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    m = model(name)
    torch.onnx.export(decomposed(m, torch.randn(7, 3, I)), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    exact = model(name, torch.float64)
    exact.load_state_dict(m.state_dict())
    for sizes in ((7, 3), (13, 5), (1, 1)):
        x = torch.randn(*sizes, I)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            for left, right, true in zip(found, m(x), exact(x.double()), strict=True):
                error = (torch.from_numpy(left).double() - true).abs().max()
                assert error <= 4 * (right - true).abs().max() + 1e-7


ALONE = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
for x, expected in torch.load(sys.argv[2]):
    for left, right in zip(run(x), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
assert "stable_rnn" not in sys.modules
"""


@pytest.mark.check
@pytest.mark.parametrize("name", ["recurrent", "windowed", "chunked", "clamped"])
def test_aotinductor(name, tmp_path):
    m, package, cases = model(name), str(tmp_path / "model.pt2"), str(tmp_path / "cases.pt")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(decomposed(m, torch.randn(7, 3, I)), package_path=package)
        inputs = [torch.randn(*sizes, I) for sizes in ((7, 3), (13, 5), (2, 4))]
        torch.save([(x, m(x)) for x in inputs], cases)
    ran = subprocess.run([sys.executable, "-c", ALONE, package, cases], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_whole_model():
    """Layers among others, `stabilize`d."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.rnn, self.out = nn.LSTM(I, H), nn.RNN(H, H), nn.Linear(H, 2)

        def forward(self, x):
            return self.out(self.rnn(self.lstm(x)[0])[0][-1])

    m, x = stabilize(Net(), plan=Windowed(3)).eval(), torch.randn(7, 3, I)
    run = decomposed(m, x).module()
    with torch.no_grad():
        torch.testing.assert_close(run(x), m(x))
