"""`stable_rnn.functional`: the recurrences as functions, held against torch's modules; shapes and types refused by name."""

import pytest
import torch
from torch import nn

from stable_rnn import Chunked, Recurrent, StableLSTM, Verified, Windowed
from stable_rnn import functional as F

T, B, I, H = 9, 3, 4, 5


def weights(module, way=""):
    return [getattr(module, f"{kind}_l0{way}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # float64: a few roundings


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_lstm_is_nn_lstm(batch_first, proj_size):
    plain = nn.LSTM(I, H, bidirectional=True, batch_first=batch_first, proj_size=proj_size).double()
    x = torch.randn(B, T, I, dtype=torch.float64) if batch_first else torch.randn(T, B, I, dtype=torch.float64)
    h0, c0 = torch.randn(2, B, proj_size or H, dtype=torch.float64), torch.randn(2, B, H, dtype=torch.float64)
    y, (h, c) = plain(x, (h0, c0))
    for d, way in enumerate(("", "_reverse")):
        w_hr = getattr(plain, f"weight_hr_l0{way}") if proj_size else None
        ours, (h_n, c_n) = F.lstm(x, *weights(plain, way), w_hr, h0[d], c0[d], reverse=d == 1, batch_first=batch_first)
        close(ours, y.chunk(2, 2)[d]), close(h_n, h[d]), close(c_n, c[d])


@pytest.mark.parametrize("batch_first", [False, True])
def test_gru_is_nn_gru_and_so_are_its_gradients(batch_first):
    plain = nn.GRU(I, H, bidirectional=True, batch_first=batch_first).double()
    x = torch.randn(B, T, I, dtype=torch.float64) if batch_first else torch.randn(T, B, I, dtype=torch.float64)
    h0 = torch.randn(2, B, H, dtype=torch.float64)
    y, h = plain(x, h0)
    for d, way in enumerate(("", "_reverse")):
        ours, h_n = F.gru(x, *weights(plain, way), h0[d], reverse=d == 1, batch_first=batch_first)
        theirs = y.chunk(2, 2)[d]
        close(ours, theirs), close(h_n, h[d])
        found, want = (
            torch.autograd.grad(t.pow(2).sum(), weights(plain, way), retain_graph=True) for t in (ours, theirs)
        )
        for a, b in zip(found, want, strict=True):
            close(a, b)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn_is_nn_rnn_and_so_are_its_gradients(nonlinearity):
    plain = nn.RNN(I, H, nonlinearity=nonlinearity).double()
    x = torch.randn(T, B, I, dtype=torch.float64)
    y, h = plain(x)
    ours, h_n = F.rnn(x, *weights(plain), nonlinearity=nonlinearity)
    close(ours, y), close(h_n, h[0])
    for a, b in zip(
        torch.autograd.grad(ours.pow(2).sum(), weights(plain)),
        torch.autograd.grad(y.pow(2).sum(), weights(plain)),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("plan", [Recurrent(), Windowed(3), Chunked(4, 2), Verified()])
def test_plans_lengths_and_clamp_are_the_modules(plan):
    module = StableLSTM(I, H, stability=None, plan=plan)
    x, lengths = torch.randn(T, B, I), torch.tensor([T, 2, 0])
    y, (h, c) = module(x, lengths=lengths)
    ours, (h_n, c_n) = F.lstm(x, *weights(module), lengths=lengths, plan=plan)
    for a, b in ((ours, y), (h_n, h[0]), (c_n, c[0])):
        assert torch.equal(a, b)
    assert not torch.equal(
        F.lstm(x, *weights(module), plan=plan, clamp=0.3)[0], F.lstm(x, *weights(module), plan=plan)[0]
    )


def test_one_bias_is_enough_and_autocast_is_followed():
    module = StableLSTM(I, H, stability=None)
    w_ih, w_hh, b_ih, b_hh = weights(module)
    x = torch.randn(T, B, I)
    assert torch.equal(F.lstm(x, w_ih, w_hh, b_ih + b_hh)[0], F.lstm(x, w_ih, w_hh, None, b_ih + b_hh)[0])
    gru, none = nn.GRU(I, H), torch.zeros(3 * H)
    w, v, b_ih, b_hh = weights(gru)
    assert torch.equal(F.gru(x, w, v, b_ih)[0], F.gru(x, w, v, b_ih, none)[0])
    assert torch.equal(F.gru(x, w, v, None, b_hh)[0], F.gru(x, w, v, none, b_hh)[0])
    w_ih, w_hh, b_ih, b_hh = weights(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.lstm(x, w_ih, w_hh, b_ih, b_hh)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(w_hh=torch.zeros(4 * H, H + 1)), ValueError, "w_hh must have shape"),
        (dict(w_ih=torch.zeros(4 * H, I + 1)), ValueError, "w_ih must have shape"),
        (dict(b_ih=torch.zeros(H)), ValueError, "b_ih must have shape"),
        (dict(h0=torch.zeros(1, B, H)), ValueError, "h0 must have shape"),
        (dict(c0=torch.zeros(B, H, dtype=torch.float64)), ValueError, "c0 must be dense, torch.float32"),
        (dict(w_hr=torch.zeros(H, 2)), ValueError, "w_hr must have shape"),
        (dict(w_hh=torch.zeros(4 * H, H).to_sparse()), ValueError, "w_hh must be dense, .*got .*sparse"),
        (dict(input=torch.zeros(T, B, I).to_sparse()), ValueError, "input must be dense"),
        (
            dict(input=torch.zeros(T, B, I).int(), w_ih=torch.zeros(4 * H, I).int(), w_hh=torch.zeros(4 * H, H).int()),
            ValueError,
            "input must be dense and of a real floating dtype, got .*int32",
        ),
        (dict(input=torch.zeros(T, B, I, dtype=torch.cfloat)), ValueError, "real floating dtype, got .*complex64"),
        (dict(input=torch.zeros(T, I)), ValueError, "3 dimensions"),
        (dict(input=torch.zeros(0, B, I)), RuntimeError, "at least one step"),
        (dict(input=[1.0]), TypeError, "input must be a Tensor"),
        (dict(b_hh=0.0), TypeError, "b_hh must be a Tensor or None"),
        (dict(plan=Chunked), TypeError, "plan must be"),
        (dict(clamp=0.0), ValueError, "clamp must lie in"),
        (dict(backend="fast"), ValueError, "backend must be"),
        (dict(lengths=torch.tensor([T + 1, 1, 1])), ValueError, "lengths must lie in"),
    ],
)
def test_bad_input_is_named(change, error, text):
    good = dict(input=torch.zeros(T, B, I), w_ih=torch.zeros(4 * H, I), w_hh=torch.zeros(4 * H, H))
    with pytest.raises(error, match=text):
        F.lstm(**(good | change))


def test_autocast_converts_what_it_does_for_modules():
    x, w_ih, w_hh = torch.zeros(T, B, I), torch.zeros(4 * H, I), torch.zeros(4 * H, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.lstm(x, w_ih.half(), w_hh)
        with pytest.raises(ValueError, match="w_hh must be dense, torch.float32 .*got .*float64"):
            F.lstm(x, w_ih, w_hh.double())


def test_unknown_nonlinearity():
    with pytest.raises(ValueError, match="nonlinearity"):
        F.rnn(torch.zeros(T, B, I), torch.zeros(H, I), torch.zeros(H, H), nonlinearity="gelu")


def test_old_names_and_spellings_still_work_and_say_where_they_went():
    import stable_rnn
    from stable_rnn import stability

    assert len(stable_rnn.__all__) <= 22
    with pytest.warns(DeprecationWarning, match="stable_rnn.functional.spectral_project_"):
        assert stable_rnn.spectral_project_ is F.spectral_project_
    with pytest.warns(DeprecationWarning, match="stable_rnn.stability.Certificate"):
        assert stable_rnn.Certificate is stability.Certificate
    with pytest.warns(DeprecationWarning, match="clamp="):
        assert stable_rnn.Certified(cap=True) == stable_rnn.Certified(clamp=True)
    with pytest.raises(AttributeError, match="no attribute 'lstm_'"):
        stable_rnn.lstm_  # noqa: B018
