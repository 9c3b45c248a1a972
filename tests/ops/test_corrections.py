"""The corrections of checked lanes: scans against loops, responses against the maps they measure, and what is not finite stays there."""

from math import inf, nan

import pytest
import torch

from stable_rnn.ops.recurrence import corrections
from stable_rnn.ops.recurrence.corrections import Borders, Response, clipped_scan, corrected, probed, slow_units

F64 = dict(dtype=torch.float64)


def borders(n, batch, hidden, seed=0):
    torch.manual_seed(seed)
    h, c, h_end, c_end = torch.randn(4, n, batch, hidden, **F64).unbind()
    exists = torch.ones(n, batch, dtype=torch.bool)
    return Borders(h.tanh(), c, h_end.tanh(), c_end, torch.rand(n, batch, hidden, **F64), exists)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("limits", [False, True])
def test_clipped_scan_is_the_loop(n, limits):
    torch.manual_seed(n)
    a, b = torch.rand(n, 2, 5, **F64), torch.randn(n, 2, 5, **F64)
    a[torch.rand(a.shape) < 0.2] = 0
    low, high = (-torch.rand(n, 2, 5, **F64), torch.rand(n, 2, 5, **F64)) if limits else (b - 1e30, b + 1e30)
    d, expected = torch.zeros(2, 5, **F64), []
    for j in range(n):
        d = (a[j] * d + b[j]).clamp(low[j], high[j])
        expected.append(d)
    found = clipped_scan(a, b, low, high)
    roundings = dict(
        rtol=1e-14, atol=1e-14
    )  # float64: doublings add in another order than the loop, 2e-16 of sums near 5
    torch.testing.assert_close(found, torch.stack(expected) if n else b, **roundings)


@pytest.mark.parametrize("n", [1, 2, 5, 70])
def test_linear_scan_in_log_depth_is_the_loop(n, monkeypatch):
    torch.manual_seed(n)
    r, b = 0.5 * torch.randn(n, 2, 3, 3, **F64), torch.randn(n, 2, 3, **F64)
    found = []
    for few in (0, 100):
        monkeypatch.setattr(corrections, "FEW", few)
        found.append(corrections._linear_scan(r, b, b - inf, b + inf))
    torch.testing.assert_close(
        *found, rtol=1e-12, atol=1e-12
    )  # float64: products of up to 70 matrices, in another order


def test_a_lane_whose_predecessor_stays_starts_exactly_at_its_end():
    """Bitwise: that is how borders come to agree bitwise."""
    made = borders(6, 2, 4)
    made.c[:3], made.h[:3] = made.c_end[:3], made.h_end[:3]  # the first three borders agree
    h, c = corrected(made, True, None, None)
    assert torch.equal(c[:4], made.c_end[:4]) and torch.equal(h[:4], made.h_end[:4])
    assert not torch.equal(c[4], made.c_end[4])


def test_decay_of_a_diagonal_map_is_exact():
    """Lanes that do what decay says, c_end = P c + k: one correction brings the starts of the sequential run."""
    torch.manual_seed(0)
    n, decay, k = 9, torch.rand(10, 1, 4, **F64), 0.1 * torch.randn(10, 1, 4, **F64)
    exact, c = [], torch.zeros(1, 4, **F64)
    for j in range(n):
        c = decay[j] * c + k[j]
        exact.append(c)
    start = torch.zeros(n + 1, 1, 4, **F64)
    end = decay * start + k
    h = torch.zeros(n, 1, 4, **F64)
    _, found = corrected(
        Borders(h, start[1:], h, end[:-1], decay[:-1], torch.ones(n, 1, dtype=torch.bool)), True, None, None
    )
    torch.testing.assert_close(found, torch.stack(exact), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("has_cell", [False, True])
def test_probes_measure_the_response(linear, has_cell, monkeypatch):
    """Of lanes that are matrices, in small groups; a unit that no probe moves has none."""
    monkeypatch.setattr(corrections, "WORKSPACE", 40)
    made, slow = borders(3, 2, 4), torch.tensor([1, 3])
    maps = torch.randn(3 * 2, 4, 4, **F64)
    bias = 0 if linear else 1

    def ends(lane, unit, h, c):
        state = c if has_cell else h
        moved = (state[:, None] @ maps[lane])[:, 0] + bias
        return (2 * moved, moved) if has_cell else (moved, h.new_empty(0))

    c = made.c if has_cell else torch.empty(0, **F64)
    h_end, c_end = ends(torch.arange(6), None, made.h.flatten(0, 1), c.flatten(0, 1) if has_cell else None)
    h_end, c_end = h_end.view(3, 2, 4), c_end.view(3, 2, 4) if has_cell else c_end
    found = probed(ends, made.h, c, h_end, c_end, slow, linear, None)
    exact = maps.view(3, 2, 4, 4)[:, :, slow].clamp(-corrections.STEEP, corrections.STEEP)
    torch.testing.assert_close(found.c if has_cell else found.h, exact, rtol=1e-9, atol=1e-9)
    if has_cell:
        torch.testing.assert_close(found.h, 2 * exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("where", ["decay", "response", "c", "c_end"])
def test_what_is_not_finite_stays_in_its_lane(value, where):
    """A probe or a decay that is no number corrects nothing; a state that is none is handed on to the next lane only."""
    made = borders(6, 1, 4)
    answers = torch.randn(6, 1, 2, 4, **F64)
    response = Response(torch.tensor([0, 2]), answers, answers.clone())
    field = response.c if where == "response" else getattr(made, where)
    field[2, 0, 0] = value
    if where == "response":  # as `probed` hands it on
        response = response._replace(c=response.c.nan_to_num(0.0, 0.0, 0.0))
    h, c = corrected(made, True, None, response)
    good = torch.ones(6, 1, 4, dtype=torch.bool)
    good[2, 0, 0] = where != "c_end"
    assert c[good].isfinite().all() and h.isfinite().all()
    if where == "c_end":
        torch.testing.assert_close(c[2, 0, 0], made.c_end[2, 0, 0], equal_nan=True)


def test_slow_units_are_those_that_some_lane_keeps():
    decay = torch.zeros(3, 2, 5)
    decay[1, 0, 3], decay[0, 1, 1] = 0.5, 2e-3
    assert slow_units(decay).tolist() == [1, 3]
