"""Certificates: what one can ask them, rounding, jumps, and every kind of input, good and bad."""

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from certificate_search import outputs, step
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from stable_rnn import (
    Certified,
    Chunked,
    ForgetCap,
    StableGRU,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    Windowed,
    certificate,
    use_plan,
)
from stable_rnn.stability import certificate_from_state_dict
from stable_rnn.stability.bounds import drive_of_data
from stable_rnn.stability.certificate import certify
from stable_rnn.stability.weights import read_module

# ---- the functions of a certificate


def test_window_is_the_least():
    for module in (
        StableLSTM(4, 8, 2),
        StableRNN(4, 8),
        StableLSTM(3, 5, bidirectional=True, stability=Certified(rate=0.8)),
    ):
        found = module.certificate()
        for eps in (0.3, 1e-2, 1e-6, 1e-12):
            k = found.window(eps)
            assert found.truncation_error(k) <= eps
            assert k == 1 or found.truncation_error(k - 1) > eps


def test_without_stability_the_trivial_bound_is_left():
    lstm, rnn, relu = nn.LSTM(8, 64), nn.RNN(8, 64), nn.RNN(8, 64, nonlinearity="relu")
    for module, bound in ((lstm, 2.0), (rnn, 2.0), (relu, math.inf)):
        with torch.no_grad():
            module.weight_hh_l0.mul_(5)
        found = certificate(module)
        assert not found.stable and found.rate >= 1
        assert found.truncation_error(100) == pytest.approx(bound, rel=1e-3)
        with pytest.raises(ValueError, match="not certified stable"):
            found.window(1e-3)
        assert "NOT certified stable" in str(found)
    assert certificate(lstm).window(2.5) == 1


def test_forget_cap_alone_still_has_a_bound():
    found = StableLSTM(8, 64, stability=ForgetCap(0.9)).certificate()
    assert found.layers[0].forget == 0.9 and not found.stable


def test_inputs_of_any_size():
    assert certificate(StableRNN(4, 8), input_bound=math.inf).stable
    assert certificate(StableLSTM(4, 8, stability=Certified(clamp=True))).stable
    assert not certificate(StableLSTM(4, 8), input_bound=math.inf).stable
    relu = certificate(StableRNN(4, 8, nonlinearity="relu"), input_bound=math.inf)
    assert relu.stable and relu.truncation_error(50) == math.inf
    with pytest.raises(ValueError, match="stays at inf"):
        relu.window(0.1)


def test_a_larger_bound_gives_a_larger_rate():
    module = StableLSTM(4, 8)
    rates = [module.certificate(input_bound=bound).rate for bound in (0.0, 0.5, 1.0, 2.0)]
    assert rates == sorted(rates) and rates[1] < rates[2]


def test_data_sharpen_and_hold():
    torch.manual_seed(3)
    module = StableLSTM(3, 4, 2, bidirectional=True).double()
    x = torch.rand(40, 3, dtype=torch.float64) * 0.4 + 0.3
    known, blind = module.certificate(x), module.certificate()
    levels = read_module(module)
    assert known.rate < blind.rate
    for k in (1, 3, 9):
        error = (outputs(levels, x, k) - outputs(levels, x, 40)).abs().max().item()
        assert error <= known.truncation_error(k) < blind.truncation_error(k)
    w = levels[0][0]
    u = x @ w.w_ih.mT + w.bias
    drive = drive_of_data(w, x)
    assert (drive.low <= u.amin(0)).all() and (u.amax(0) <= drive.high).all() and u.norm(dim=1).max() <= drive.norm


def test_every_form_of_input():
    x, lengths = torch.rand(6, 3, 2), torch.tensor([6, 2, 4])
    padded = x.clone()
    for row, n in enumerate(lengths):
        padded[n:, row] = 100.0  # padding must not count
    module, batch_first = StableLSTM(2, 4), StableLSTM(2, 4, batch_first=True)
    batch_first.load_state_dict(module.state_dict())
    packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
    rows = torch.cat([x[:n, row] for row, n in enumerate(lengths)])
    masked = (
        certificate(module, padded, lengths=lengths),
        batch_first.certificate(padded.transpose(0, 1), lengths=lengths),
    )
    rates = {found.rate for found in (*masked, module.certificate(packed), module.certificate(rows))}
    assert len(rates) == 1
    assert module.certificate(padded).rate > rates.pop()


def test_cells_and_plain_modules_agree_with_the_stable_ones():
    lstm = StableLSTM(3, 5)
    plain = nn.LSTM(3, 5)
    plain.load_state_dict(lstm.state_dict())
    rate = lstm.certificate().rate
    assert certificate(plain).rate == pytest.approx(rate, rel=1e-2)
    for cell in (nn.LSTMCell(3, 5), StableLSTMCell(3, 5)):
        cell.load_state_dict({name.removesuffix("_l0"): p for name, p in lstm.state_dict().items()})
        assert certificate(cell).rate == pytest.approx(rate, rel=1e-2)
    for cell in (nn.RNNCell(3, 5, nonlinearity="relu"), StableRNNCell(3, 5, nonlinearity="relu")):
        assert certificate(cell).layers[0].cell == "rnn_relu"


def test_state_dicts():
    lstm, rnn = StableLSTM(3, 5, 2, bidirectional=True, proj_size=2), nn.RNN(3, 4)
    gru = StableGRU(3, 4, 2)
    model = nn.ModuleDict({"enc": lstm, "dec": rnn, "gru": gru, "cell": nn.LSTMCell(2, 3), "lin": nn.Linear(2, 2)})
    two = {"two.weight_ih_l0": torch.zeros(8, 2), "two.weight_hh_l0": torch.zeros(8, 4)}
    with pytest.warns(UserWarning, match="two has a weight_hh_l0 of the shape .8, 4., of no RNN, LSTM or GRU"):
        found = certificate_from_state_dict(model.state_dict() | two)
    assert set(found) == {"enc", "dec", "gru", "cell"}
    assert found["gru"].rate == pytest.approx(gru.certificate().rate) and found["gru"].stable
    assert [layer.name for layer in found["enc"].layers] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert found["enc"].rate == pytest.approx(lstm.certificate().rate, rel=1e-2)
    assert found["dec"].rate == certificate(rnn).rate and "tanh cells" in str(found["dec"])
    assert certificate_from_state_dict(rnn.state_dict())[""].rate == certificate(rnn).rate
    with pytest.warns(UserWarning, match="the model has no weight_ih_l0; skipped"):
        assert certificate_from_state_dict({"weight_hh_l0": torch.zeros(3, 4), "other": torch.zeros(2)}) == {}
    blind = certificate_from_state_dict(lstm.state_dict(), 5.0)[""]
    assert blind.rate == pytest.approx(certify(read_module(lstm), 5.0).rate) and "|inputs| <= 5" in str(blind)


def test_str_states_the_assumptions():
    text = str(StableLSTM(3, 4, 2).certificate())
    for part in (
        "stable: rate",
        "l0:",
        "l1:",
        "forget gate <=",
        "window for an error of 0.001",
        "|inputs| <= 1",
        "zero initial state",
        "eval mode",
        "exact arithmetic",
    ):
        assert part in text
    assert pickle.loads(pickle.dumps(StableLSTM(3, 4).certificate())).stable


def test_torchs_defaults_do_not_matter():
    module = StableLSTM(3, 8)
    rate = module.certificate().rate
    with torch.device("meta"):
        assert module.certificate().rate == rate
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert module.certificate().rate == rate
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert module.certificate().rate == rate and StableLSTM(3, 8).certificate().stable
    finally:
        torch.set_default_dtype(before)


# ---- rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.RNN(64, 64),
        lambda: nn.RNN(8, 32, 2),
        lambda: nn.RNN(4, 32, nonlinearity="relu"),
        lambda: nn.LSTM(16, 32),
        lambda: nn.LSTM(8, 16, 2, bidirectional=True),
        lambda: nn.LSTM(8, 16, proj_size=4),
    ],
)
def test_rounding_of_real_runs(make, dtype):
    """Runs of torch's own modules against float64 stay within half of the term, which stands for two runs."""
    module = make()
    if isinstance(module, nn.RNN):
        with torch.no_grad():
            for name, p in module.named_parameters():
                if "weight_hh" in name:
                    nn.init.orthogonal_(p).mul_(0.9)
    else:
        Certified(rate=0.9).project_(module)
    module.to(dtype)
    found = certificate(module)
    x = (torch.rand(200, 4, module.input_size) * 2 - 1).to(dtype)
    with torch.no_grad():
        low = module(x)[0]
        exact = module.double()(x.double())[0]
    measured = (low.double() - exact).abs().max().item()
    assert 0 < measured <= found.rounding_error(dtype) / 2
    if isinstance(module, nn.RNN) and module.num_layers == 1 and module.nonlinearity == "tanh":
        assert found.rounding_error(dtype) < 200 * measured
    k = found.window(1e-9)
    assert (
        found.truncation_error(k, dtype=dtype) >= found.rounding_error(dtype) * 0.999
        or found.truncation_error(k, dtype) >= 1
    )
    with pytest.raises(ValueError, match="rounding in"):
        found.window(found.rounding_error(torch.float32) / 10, dtype=torch.float32)


def test_jumps():
    """A run with a jump every 5 steps stays within the bound of the run without."""
    module = StableLSTM(2, 4, 2).double()
    levels, x, jump = read_module(module), torch.rand(40, 2, dtype=torch.float64), 1e-3
    clean = dirty = x
    for (w,) in levels:
        states = []
        for source, size in ((clean, 0.0), (dirty, jump)):
            h, c, ys = x.new_zeros(1, 4), x.new_zeros(1, 4), []
            for t in range(40):
                if t % 5 == 0 and t:
                    h, c = h + size * torch.randn(1, 4).sign(), c + size * torch.randn(1, 4).sign()
                h, c = step(w, source[t] @ w.w_ih.mT + w.bias, h, c, 1.0)
                ys.append(h[0])
            states.append(torch.stack(ys))
        clean, dirty = states
    error = (clean - dirty).abs().max().item()
    assert 0 < error <= module.certificate().jump_bound(jump, 5)
    assert certificate(nn.LSTM(8, 64)).jump_bound(1e-3, 5) <= 2.0


# ---- errors


def test_errors():
    lstm = StableLSTM(3, 4)
    found = lstm.certificate()
    for k in (0, -3):
        with pytest.raises(ValueError, match=f"at least 1, got {k}"):
            found.truncation_error(k)
    for k in (2.0, True, "3"):
        with pytest.raises(TypeError, match="must be an int"):
            found.truncation_error(k)
    for eps in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="eps must be positive"):
            found.window(eps)
    with pytest.raises(TypeError, match="floating torch.dtype"):
        found.truncation_error(3, dtype=torch.int32)
    for bound in (-1.0, math.nan):
        with pytest.raises(ValueError, match="input_bound"):
            lstm.certificate(input_bound=bound)
    with pytest.raises(TypeError, match="input_bound"):
        lstm.certificate(input_bound="1")
    with pytest.raises(ValueError, match="input or input_bound"):
        lstm.certificate(torch.rand(2, 1, 3), input_bound=1.0)
    with pytest.raises(ValueError, match=r"input size 3, got the shape \(2, 1, 4\)"):
        lstm.certificate(torch.rand(2, 1, 4))
    with pytest.raises(ValueError, match="NaN or infinite"):
        lstm.certificate(torch.full((2, 1, 3), math.nan))
    with pytest.raises(ValueError, match="no step"):
        lstm.certificate(torch.rand(0, 1, 3))
    with pytest.raises(TypeError, match="got list"):
        lstm.certificate([1.0])
    with pytest.raises(TypeError, match="needs an RNN, LSTM or GRU .*Linear"):
        certificate(nn.Linear(3, 4))


@pytest.mark.parametrize(
    "lengths, error, text",
    [
        (torch.tensor([6, 2]), ValueError, r"shape \(3,\), one per sequence; got \(2,\)"),
        (torch.tensor([[6, 2, 1]]), ValueError, r"shape \(3,\)"),
        (torch.tensor([6, 7, 1]), ValueError, r"0\.\.6, got \[6, 7, 1\]"),
        (torch.tensor([6, -1, 1]), ValueError, r"0\.\.6"),
        (torch.tensor([6.0, 2.0, 1.0]), TypeError, "integers"),
        ([6, 2, 1], TypeError, "must be a Tensor"),
    ],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_that_do_not_fit(lengths, error, text, batch_first):
    module = nn.LSTM(2, 4, batch_first=batch_first)
    with pytest.raises(error, match=text):
        certificate(module, torch.rand(3, 6, 2) if batch_first else torch.rand(6, 3, 2), lengths=lengths)


def test_lengths_need_an_input_without_its_own():
    module, lengths = nn.LSTM(2, 4), torch.tensor([3, 2])
    with pytest.raises(ValueError, match="lengths need an input"):
        certificate(module, lengths=lengths)
    with pytest.raises(ValueError, match="PackedSequence has its own lengths"):
        certificate(module, pack_padded_sequence(torch.rand(3, 2, 2), lengths), lengths=lengths)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1_reverse", "bias_hh_l1", "weight_hr_l0"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(name, value):
    module = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    with torch.no_grad():
        getattr(module, name).view(-1)[0] = value
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite"):
        certificate(module)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite"):
        certificate_from_state_dict(module.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda: StableLSTM(3, 6, 2, bidirectional=True),
        lambda: StableRNN(3, 6, 2),
        lambda: StableLSTM(3, 6, proj_size=2),
    ],
)
def test_plans_of_a_module_stay_within_the_bound(make):
    module = make().double()
    x = torch.rand(50, 2, 3, dtype=torch.float64) * 2 - 1
    found = module.certificate()
    with torch.no_grad():
        truth = module(x)[0]
        for k in (1, 4, 16):
            with use_plan(module, Windowed(k)):
                error = (module(x)[0] - truth).abs().max().item()
            assert 0 < error <= found.truncation_error(k, dtype=torch.float64)
            with use_plan(module, Chunked(5, k - 1)):
                assert (module(x)[0] - truth).abs().max().item() <= found.truncation_error(k, dtype=torch.float64)


@pytest.mark.parametrize(
    "make, dtype",
    [
        (lambda: certificate(nn.RNN(3, 4, dtype=torch.complex64)), "weight_ih_l0 .*complex64"),
        (lambda: StableRNN(3, 4, dtype=torch.complex64), "weight_ih_l0 .*complex64"),
        (lambda: StableLSTM(3, 4, dtype=torch.complex64), "weight_ih_l0 .*complex64"),
        (lambda: StableRNNCell(3, 4, dtype=torch.complex64), "weight_ih .*complex64"),
        (lambda: StableRNN(3, 4).certificate(torch.zeros(5, 1, 3, dtype=torch.complex64)), "input .*complex64"),
        (lambda: StableRNN(3, 4).certificate(torch.zeros(5, 1, 3, dtype=torch.int64)), "input .*int64"),
        (
            lambda: certificate_from_state_dict({name: w.long() for name, w in nn.RNN(3, 4).state_dict().items()}),
            "weight_ih_l0 .*int64",
        ),
    ],
)
def test_proofs_are_about_real_numbers(make, dtype):
    with pytest.raises(TypeError, match=dtype.replace(" ", " must have a real floating dtype, got ")):
        make()


def test_sparse_weights_are_refused():
    state = nn.RNN(3, 4).state_dict()
    state["weight_hh_l0"] = state["weight_hh_l0"].to_sparse()
    with pytest.raises(TypeError, match=r"weight_hh_l0 must be a dense tensor, got the layout torch.sparse_coo"):
        certificate_from_state_dict(state)


def test_numbers_of_any_type():
    found = StableRNN(3, 4).certificate()
    assert found.truncation_error(np.int64(5)) == found.truncation_error(torch.tensor(5)) == found.truncation_error(5)
    assert found.window(np.float32(0.125)) == found.window(Fraction(1, 8)) == found.window(0.125)
    assert StableRNN(3, 4).certificate(input_bound=np.float32(2)).inputs == "|inputs| <= 2"
    for bad in (np.bool_(True), torch.tensor(True), np.complex64(1), 1j, torch.ones(2), "1"):
        with pytest.raises(TypeError, match="eps must be a number, got"):
            found.window(bad)
