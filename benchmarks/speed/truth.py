"""What a contestant should have computed, in float64, and how far rounding may take it from there.

Every contestant is held to the function that it claims to compute: `recurrent` (`Verified` too, to its own tolerance), `windowed`
(a sample of windows, each run by itself), `chunked`. The gradient is checked through an upstream gradient that is zero but for the
sampled times, so that windows need no more work than that.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_rnn import Chunked
from stable_rnn.ops.recurrence.reference import arithmetic
from stable_rnn.plans import step_rounding

from ..baselines import overlap_chunks
from .cases import Case
from .models import stable_module

STRETCH, STRETCHES = 256, 16  # steps and number of the runs that eager torch makes in the case's dtype
_UNIT = {"tf32": 2.0**-10}


class Answer(NamedTuple):
    """Outputs at `times` (None: all), and the gradients of x and weight_hh_l0 where the case goes backward."""

    times: Tensor | None
    y: Tensor
    gradients: dict[str, Tensor]


class Allowed(NamedTuple):
    """Largest error of outputs; largest error of a gradient, relative to its own largest entry."""

    y: float
    gradient: float


class Truth:
    """plain: nn.LSTM, nn.GRU or nn.RNN in the case's dtype; x (T, B, H)."""

    def __init__(self, case: Case, plain: nn.RNNBase, x: Tensor, seed: int = 0) -> None:
        self.case, self.plain = case, plain
        self.exact = copy.deepcopy(plain).double()
        self.x = x.detach()
        self.x64 = self.x.double()
        draw = torch.Generator().manual_seed(seed)
        # Windows in float64 take about 100 k H bytes each with what autograd keeps: some hundred MB in all.
        count = max(2, min(64, 2**23 // (case.k * case.H * case.B)))
        drawn = torch.randint(case.T, (count,), generator=draw)
        edges = torch.tensor([0, case.k - 1, case.chunk - 1, case.chunk, case.T - 1]).clamp(max=case.T - 1)
        self.times = torch.cat([drawn, edges]).unique().to(x.device)
        self.upstream = torch.zeros(case.T, case.B, case.H, dtype=x.dtype, device=x.device)
        self.upstream[self.times] = torch.randn(len(self.times), case.B, case.H, generator=draw).to(x.device, x.dtype)

    # ---- answers

    @cached_property
    def recurrent(self) -> Answer:
        return self._answer(lambda m, x: m(x)[0])

    @cached_property
    def chunked(self) -> Answer:
        """Outputs by stock modules where those can, the gradient by the adjoint rule on lanes (which is not the derivative)."""
        C, w = self.case.chunk, self.case.k
        if self.case.backward or self.case.T % C or w > C:
            ours = stable_module(self.case.cell, self.case.H, stability=None, plan=Chunked(C, w), backend="reference")
            ours.load_state_dict(self.plain.state_dict())
            found = self._answer(lambda m, x: m(x)[0], ours.to(self.x64))
            if self.case.T % C or w > C:
                return found
        with torch.no_grad():
            y = overlap_chunks(self.exact, self.x64, C, w)()
        return Answer(None, y, found.gradients if self.case.backward else {})

    @cached_property
    def cut(self) -> Answer:
        """Chunks whose gradient stops at the chunks' starts: what autograd makes of them."""
        return self._answer(lambda m, x: overlap_chunks(m, x, self.case.chunk, self.case.k)())

    @cached_property
    def windowed(self) -> Answer:
        k = min(self.case.k, self.case.T)
        late = self.times[self.times >= k - 1]
        early = torch.arange(k - 1, device=self.x.device)

        def run(m: nn.RNNBase, x: Tensor) -> Tensor:
            windows = x[(late - (k - 1)) + torch.arange(k, device=x.device)[:, None]]  # (k, S, B, I)
            h = m(windows.flatten(1, 2))[1]
            last = (h[0] if isinstance(h, tuple) else h)[0].unflatten(0, (len(late), -1))
            return last if k == 1 else torch.cat([m(x[: k - 1])[0], last])

        return self._answer(run, times=torch.cat([early, late]))

    def _answer(self, run, m: nn.RNNBase | None = None, times: Tensor | None = None) -> Answer:
        m, x = self.exact if m is None else m, self.x64.clone().requires_grad_(self.case.backward)
        with torch.set_grad_enabled(self.case.backward):
            y = run(m, x)
        if not self.case.backward:
            return Answer(times, y, {})
        upstream = self.upstream.double() if times is None else self.upstream[times].double()
        dx, dw = torch.autograd.grad(y, (x, m.weight_hh_l0), upstream)
        return Answer(times, y.detach(), {"x": dx, "weight_hh_l0": dw})

    # ---- errors

    def error_of_recurrence(self, y: Tensor) -> tuple[float, float]:
        """Against the float64 recurrent run: largest absolute error, and relative to max(1, |h|)."""
        want = self.recurrent.y
        error = (y.detach().double() - want).abs()
        return largest(error), largest(error / want.abs().clamp(min=1))

    def errors(self, answer: Answer, y: Tensor, gradients: dict[str, Tensor]) -> tuple[float, float | None]:
        """Against an answer: of outputs, and of the worst gradient relative to its largest entry."""
        y = y.detach() if answer.times is None else y.detach()[answer.times]
        worst = [
            largest(gradients[name].double() - want) / max(largest(want), 1e-300)
            for name, want in answer.gradients.items()
            if name in gradients
        ]
        return largest(y.double() - answer.y), max_or_nan(worst) if worst else None

    # ---- what rounding may do

    @cached_property
    def allowed(self) -> Allowed:
        """Twice the error of eager torch in this dtype, step by step over stretches spread over the sequence, plus what it may have been
        lucky with: the rounding of one result, and the order of one sum (its error grows like a random walk)."""
        case, kind = self.case, self.x.dtype
        steps, lanes = min(STRETCH, case.T), min(STRETCHES, -(-case.T // STRETCH))
        starts = torch.linspace(0, case.T - steps, lanes).long()
        rows = starts + torch.arange(steps)[:, None]  # (S, lanes)
        x = self.x[rows.to(self.x.device), : max(1, 64 // lanes)].flatten(1, 2)
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
        found, want = (
            self._stretch(m, x.to(like), upstream.to(like))
            for m, like in ((self.plain, kind), (self.exact, torch.float64))
        )
        unit, of_sums = _UNIT.get(case.dtype, torch.finfo(kind).eps), torch.finfo(arithmetic(kind)).eps
        scale = max(1.0, largest(self.recurrent.y))
        y = 2 * largest(found[0].double() - want[0]) + scale * (unit + of_sums * (2 * case.H) ** 0.5)
        gradient = 0.0
        if case.backward:
            eager = max(largest(f.double() - w) / max(largest(w), 1e-300) for f, w in zip(found[1:], want[1:]))
            gradient = 2 * eager + unit + of_sums * (case.T * case.B) ** 0.5 + self._kinks(y)  # dW sums over all times
        return Allowed(y, gradient)

    @cached_property
    def jumps(self) -> float:
        """What `Verified`'s jumps add, in units of y or of the largest adjoint: twice its tolerance times the largest growth that 32
        random directions of the state showed within 64 steps."""
        steps, small = min(64, self.case.T), 1e-6
        x = self.x64[:steps, :1].expand(-1, 33, -1)
        signs = torch.randn(2, 1, 33, self.case.H, generator=torch.Generator().manual_seed(2)).sign().to(x)
        signs[:, :, 0] = 0  # the run that the others are compared with
        with torch.no_grad():
            lstm = isinstance(self.exact, nn.LSTM)
            y, last = self.exact(x, (small * signs[0], small * signs[1]) if lstm else small * signs[0])
        growth = max(1.0, largest(y[:, 1:] - y[:, :1]) / small)
        scale = max(1.0, largest(y), largest(last[1]) if lstm else 0.0)
        return 2 * step_rounding(self.x) * growth * scale

    def _kinks(self, error: float) -> float:
        """relu's derivative jumps at zero: what changes when every pre-activation moves by the error allowed, in units of a gradient."""
        if self.case.cell != "rnn_relu":
            return 0.0
        worst = 0.0
        for move in (-error, error):
            m = copy.deepcopy(self.exact)
            m.bias_ih_l0.data += move
            moved = self._answer(lambda m, x: m(x)[0], m).gradients
            worst = max(
                worst,
                *(largest(moved[name] - g) / max(largest(g), 1e-300) for name, g in self.recurrent.gradients.items()),
            )
        return worst

    def _stretch(self, m: nn.RNNBase, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        """y (S, n, H), and with gradients those of x and weight_hh_l0, by a plain loop."""
        x = x.clone().requires_grad_(self.case.backward)
        with torch.set_grad_enabled(self.case.backward):
            h = c = x.new_zeros(x.shape[1], self.case.H)
            ys = []
            for t in range(x.shape[0]):
                xp, q = F.linear(x[t], m.weight_ih_l0, m.bias_ih_l0), F.linear(h, m.weight_hh_l0, m.bias_hh_l0)
                if self.case.cell == "gru":
                    (x_r, x_z, x_n), (q_r, q_z, q_n) = xp.chunk(3, 1), q.chunk(3, 1)
                    n = torch.tanh(x_n + torch.sigmoid(x_r + q_r) * q_n)
                    h = n + torch.sigmoid(x_z + q_z) * (h - n)
                    ys.append(h)
                    continue
                z = xp + q
                if self.case.cell == "lstm":
                    i, f, g, o = z.chunk(4, 1)
                    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                    h = torch.sigmoid(o) * torch.tanh(c)
                else:
                    h = torch.tanh(z) if self.case.cell == "rnn_tanh" else torch.relu(z)
                ys.append(h)
            y = torch.stack(ys)
        if not self.case.backward:
            return (y,)
        return y.detach(), *torch.autograd.grad(y, (x, m.weight_hh_l0), upstream)


def largest(values: Tensor) -> float:
    """Largest absolute value; NaN if there is one."""
    return float(values.abs().max()) if values.numel() else 0.0


def max_or_nan(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).max())
