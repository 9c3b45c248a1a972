"""The compiled kernels on weights of bfloat16: stored so, or rounded from float32 where torch's switches allow it."""

from dataclasses import replace

import lane_loop as loop
import pytest
import torch
from lane_loop import CELLS, Case
from test_native_recurrence import equal, project

from stable_rnn import Chunked, Scanned, StableGRU, StableLSTM, StableRNN, Verified, Windowed, _native, use_plan
from stable_rnn.precision import bfloat16_weights_allowed

pytestmark = pytest.mark.skipif(_native.lib is None, reason=f"compiled module: {_native.reason}")


@pytest.fixture(params=["recurrences", "products"])
def allowed(request):
    """Torch's switch for recurrences, or the one for matrix products."""
    rnn, before = getattr(torch.backends.mkldnn, "rnn", None), torch.get_float32_matmul_precision()
    if request.param == "products":
        torch.set_float32_matmul_precision("medium")
    elif rnn is None:
        pytest.skip("this torch has no switch for recurrences")
    else:
        rnn.fp32_precision = "bf16"
    yield
    if request.param == "products":
        torch.set_float32_matmul_precision(before)
    else:
        rnn.fp32_precision = "none"


def everything(case, made):
    """All outputs forward and backward, and of windows where it has them."""
    saved = loop.run_forward(case, made)
    found = saved | {f"back {k}": v for k, v in loop.run_backward(case, made, saved).items()}
    if case.stride == 1:
        found |= {f"windows {k}": v for k, v in loop.run_windowed(case, made, 0, case.lanes).items()}
    return found


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "hidden, out, stride, warmup", [(1, None, 9, 0), (33, None, 1, 3), (70, None, 4, 2), (40, 19, 1, 2)]
)
def test_rounded_weights_are_those_of_bfloat16(cell, hidden, out, stride, warmup, isa):
    """Bit by bit the run of float32 over weights that torch has rounded: states and sums stay float32. Backward too."""
    if out and cell != "lstm":
        return
    case = Case(cell, 9, 3, hidden, stride, warmup, out=out, lengths=(9, 0, 7))
    made = case.draw()
    rounded = {k: None if made[k] is None else made[k].bfloat16().float() for k in ("w_hh", "w_hr")}
    assert not torch.equal(made["w_hh"], rounded["w_hh"])
    for threads in (1, 2):
        case = replace(case, threads=threads)
        equal(everything(replace(case, bf16_weights=True), made), everything(case, made | rounded))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden, stride, warmup", [(33, 40, 0), (130, 16, 8), (45, 1, 3)])
def test_bitwise_over_threads_and_lanes(cell, hidden, stride, warmup, isa):
    case = Case(cell, 40, 5, hidden, stride, warmup, dtype=torch.bfloat16)
    made = case.draw()
    found = everything(case, made)
    for threads in (2, 3):
        equal(everything(replace(case, threads=threads), made), found)
    saved = {k: found[k] for k in loop.run_forward(case, made)}
    for lanes in ((0,), (case.lanes - 1,), (1, 2, 3, 4)):
        some = loop.with_lanes(case, lanes)
        for part, prefix in ((loop.run_forward(some, made), ""), (loop.run_backward(some, made, saved), "back ")):
            for name, value in part.items():
                written = ~value.isnan()
                assert torch.equal(value[written], found[prefix + name][written]), name


@pytest.mark.parametrize("inputs", [1, 2, 15, 16, 31, 33, 100])
def test_sums_that_are_exact_have_no_error(inputs, isa):
    """Small integers: each product meets its weight, an odd last one too, and nothing lies behind it."""
    g = torch.Generator().manual_seed(inputs)
    x, w = (torch.randint(-1, 2, (n, inputs), generator=g).bfloat16() for n in (7, 37))
    assert torch.equal(project(x, w, None, None).double(), x.double() @ w.double().T)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinity_pass_through(cell, isa):
    case = Case(cell, 6, 2, 21, stride=6, warmup=0, dtype=torch.bfloat16)
    made = case.draw()
    made["xp"][4] = loop.NAN  # row 0, time 2
    y = loop.run_forward(case, made)["y"].view(6, 2, 21)
    assert not y[:2].isnan().any() and not y[:, 1].isnan().any() and y[2:, 0].isnan().all()
    windows = replace(case, stride=1, warmup=2)  # from zeros, which times infinity are NaN: as in a plain product
    for kind in (dict(dtype=torch.bfloat16), dict(dtype=torch.float32, bf16_weights=True)):
        windows = replace(windows, **kind)
        made = windows.draw()
        made["w_hh"][3, 20] = float("inf")
        found, exact = loop.run_forward(windows, made), loop.loop_forward(windows, made)
        assert exact["y"][:, 3].isnan().any() and torch.equal(found["y"].isnan(), exact["y"].isnan())


def test_gates_are_far_more_exact_than_their_storage(isa):
    """sigmoid s, 1 - s and tanh of an LSTM, by its cell states, which are float32, relative to each."""
    x = torch.cat([torch.linspace(-40, 80, 4001), torch.logspace(-30, 0, 500), -torch.logspace(-30, 0, 500)]).bfloat16()
    case = Case("lstm", 1, len(x), 1, stride=1, warmup=0, dtype=torch.bfloat16)
    big, made = torch.full_like(x, 100.0), case.draw()
    made |= dict(w_hh=torch.zeros(4, 1, dtype=x.dtype), c0=torch.ones(len(x), 1, dtype=x.dtype))
    run = lambda *gates: loop.run_forward(case, made | dict(xp=torch.stack(gates, 1)))["cells"][:, 0].double()  # noqa: E731
    unit = torch.finfo(torch.float32).eps
    opened, kept, tanh = run(x, -big, big, big), run(-big, x, big, big), run(big, -big, x, big)
    s, rest, exact = torch.sigmoid(x.double()), torch.sigmoid(-x.double()), torch.tanh(x.double())
    for found in (opened, kept):
        assert ((found - s).abs() <= 5e-6 * s).all() and ((found - s).abs() <= 5e-6 * rest + 2 * unit).all()
    assert ((tanh - exact).abs() <= 2e-5 * exact.abs()).all()


@pytest.mark.parametrize("make", [StableLSTM, StableGRU, StableRNN])
def test_no_worse_than_torchs_bfloat16(make, isa):
    """The error from float64 with the same weights, of outputs and last states, against that of torch's own recurrence."""
    torch.manual_seed(0)
    exact = make(40, 65, stability=None, dtype=torch.float64)
    ours = make(40, 65, stability=None, dtype=torch.bfloat16)
    ours.load_state_dict(exact.state_dict())
    exact.load_state_dict(ours.state_dict())
    x, errors = torch.randn(60, 7, 40).bfloat16(), {}
    with torch.no_grad():
        true = exact(x.double())
        for ours.backend in ("cpu", "torch"):
            found = ours(x)
            pairs = [(found[0], true[0]), *zip(_states(found[1]), _states(true[1]))]
            errors[ours.backend] = [float((a.double() - b).square().mean()) ** 0.5 for a, b in pairs]
    assert all(a <= 1.1 * b for a, b in zip(errors["cpu"], errors["torch"])), errors


def _states(hidden):
    return hidden if isinstance(hidden, tuple) else (hidden,)


@pytest.mark.parametrize("plan", [None, Windowed(4), Chunked(8, 4)], ids=str)
def test_torchs_switches_round_the_state_weights(plan, allowed):
    """As a module whose state weights were rounded beforehand, gradients too; its input weights stay float32."""
    assert bfloat16_weights_allowed()
    lstm = StableLSTM(9, 33, stability=None, backend="cpu")
    narrow = StableLSTM(9, 33, stability=None, backend="cpu")
    narrow.load_state_dict(lstm.state_dict())
    narrow.weight_hh_l0.data = lstm.weight_hh_l0.data.bfloat16().float()
    x, found = torch.randn(20, 2, 9), []
    for m in (lstm, narrow):
        with use_plan(m, plan or m.plan):
            y, _ = m(x)
        y.square().sum().backward()
        found.append((y, *(p.grad for p in m.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_the_switch_for_recurrences_counts_before_that_for_products():
    rnn, before = getattr(torch.backends.mkldnn, "rnn", None), torch.get_float32_matmul_precision()
    assert not bfloat16_weights_allowed()
    if rnn is None:
        return
    try:
        torch.set_float32_matmul_precision("medium")
        rnn.fp32_precision = "ieee"
        assert not bfloat16_weights_allowed()
        torch.set_float32_matmul_precision("high")
        rnn.fp32_precision = "bf16"
        assert bfloat16_weights_allowed()
    finally:
        rnn.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


def test_checked_chunks_agree_bitwise_with_the_plain_run(allowed):
    """Rounded once, the weights are the same in all lanes: borders agree as those of float32 do."""
    lstm, x = StableLSTM(5, 20, backend="cpu"), torch.randn(400, 1, 5)
    with torch.no_grad():
        plain = lstm(x)[0]
        with use_plan(lstm, Verified(tol=0, chunk=100)):
            assert torch.equal(lstm(x)[0], plain)
        assert lstm.last_report is not None
        gru = StableGRU(5, 8, stability=None, backend="cpu")
        gru.weight_hh_l0.data.zero_()
        with use_plan(gru, Scanned()):
            gru(x)  # scans take float32 weights
