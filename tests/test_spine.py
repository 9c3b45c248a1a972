"""The way from a module to a kernel is short, and the kernels' fields are said once: `params.h` and `ops/recurrence/fields.py` agree."""

import re
import sys
from pathlib import Path

import pytest
import torch
from executor import build

import stable_rnn
from stable_rnn import Chunked, Recurrent, StableLSTM, Verified, Windowed, _native
from stable_rnn.ops.recurrence import fields

PACKAGE = str(Path(stable_rnn.__file__).parent)
CSRC = Path(__file__).parents[1] / "csrc" / "include" / "stable_rnn"
MOST = 8
PLANS = [Recurrent(), Windowed(3), Chunked(4, 2), Verified(chunk=4, warmup=2)]
compiled = pytest.mark.skipif(_native.lib is None, reason=f"compiled module: {_native.reason}")


def way(run, binding, start):
    """The calls between the function `start` of the package and a call of `binding`, the latter included: our own functions by name, and
    one `torch` for each stretch of torch's (a Function's `apply`, the dispatch of an op, with all that they call in between)."""
    found = []

    def trace(frame, event, called):
        if event == "c_call" and called.__name__ == binding and not found:
            calls = [binding]
            while frame is not None and frame.f_code.co_qualname != start:
                ours = frame.f_code.co_filename.startswith(PACKAGE)
                if ours or calls[-1] != "torch":
                    calls.append(frame.f_code.co_qualname if ours else "torch")
                frame = frame.f_back
            assert frame is not None, f"{binding} was not called from {start}: {calls}"
            found.append(calls[::-1])

    before = sys.getprofile()
    sys.setprofile(trace)
    try:
        run()
    finally:
        sys.setprofile(before)
    assert found, f"{binding} was not called"
    return found[0]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=compiled),
        pytest.param("cuda", marks=pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")),
    ]
)
def backend(request, monkeypatch):
    """(the backend's name, the end of its bindings' names); the CUDA kernels on CPU tensors, in the block executor."""
    if request.param == "cuda":
        build.on_cpu_tensors(monkeypatch)
    yield request.param, "_cuda" if request.param == "cuda" else ""


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_few_calls_from_the_module_to_the_kernel(plan, training, backend):
    name, end = backend
    m, x = StableLSTM(3, 4, stability=None, plan=plan, backend=name), torch.randn(9, 2, 3)
    with torch.set_grad_enabled(training):
        calls = way(lambda: m(x), "recurrence_forward" + end, "StableLSTM.forward")
    assert len(calls) <= MOST + 4 * isinstance(plan, Verified), calls  # which adds its own loops
    assert "torch" not in calls or training, calls


@pytest.mark.parametrize("plan", [Recurrent(), Chunked(4, 2)], ids=str)
def test_few_calls_in_the_backward_pass(plan, backend):
    name, end = backend
    y, _ = StableLSTM(3, 4, stability=None, plan=plan, backend=name)(torch.randn(9, 2, 3))
    calls = way(lambda: y.sum().backward(), "recurrence_backward" + end, "FusedRecurrence.backward")
    assert len(calls) <= MOST // 2, calls


def members(header: str, struct: str) -> list[str]:
    """The fields of a struct in a header, in their order; those of Lanes where it has them."""
    text = re.sub(r"//[^\n]*", "", (CSRC / header).read_text())
    body = re.search(rf"struct {struct} \{{(.*?)\}};", text, re.S)[1]
    found = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"((?:const )?\w+\*?)\s+(.*)", declaration, re.S).groups()
        found += members(header, "Lanes") if kind == "Lanes" else [name.strip() for name in names.split(",")]
    return found


STRUCTS = [
    ("params.h", "ForwardParams", fields.FORWARD, "recurrence_forward"),
    ("params.h", "BackwardParams", fields.BACKWARD, "recurrence_backward"),
    ("params.h", "WindowedBackwardParams", fields.WINDOWED_BACKWARD, "recurrence_windowed_backward"),
    ("cuda.h", "CudaLaunch", fields.LAUNCH, None),
    ("cuda.h", "ScanParams", fields.SCAN, None),
    ("cuda.h", "ScanBackwardParams", fields.SCAN_BACKWARD, None),
]


@pytest.mark.parametrize("header, struct, ours, binding", STRUCTS, ids=[struct for _, struct, *_ in STRUCTS])
def test_one_list_of_fields(header, struct, ours, binding):
    assert list(ours) == members(header, struct)
    assert set(ours.values()) == {None}
    if binding and _native.lib:
        assert re.findall(r"(\w+): ", getattr(_native.lib, binding).__doc__.split(" -> ")[0]) == list(ours)


@compiled
def test_a_field_that_no_struct_has_is_refused():
    with pytest.raises(TypeError):
        _native.lib.recurrence_forward(*{**dict.fromkeys(fields.FORWARD, 0), "c_0": 0}.values())
