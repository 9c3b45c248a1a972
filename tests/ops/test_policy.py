"""What checked plans choose and spend, by the cost model alone: no call costs much more than the plain recurrence, and what was found out
is remembered for as long as it holds."""

from math import inf

import pytest
import torch

from stable_rnn.ops.recurrence import policy
from stable_rnn.ops.recurrence.policy import ALLOWANCE, DEVICES, LATER, RETRY, WORTH, Case, Ledger, Memory, choose
from stable_rnn.ops.recurrence.problem import AUTO, BackwardInputs, Inputs, Problem

SHAPES = [(steps, batch) for steps in (1, 33, 512, 4096, 65536) for batch in (1, 3, 64)]


def problem(steps, batch, cell="lstm", **numbers):
    return Problem(cell, steps, batch, AUTO, AUTO, tol=2e-6, max_passes=8)._replace(**numbers)


def case(p, batch=2, backward=False, resets=False):
    """What `Case.of` makes of such a call's tensors, of which it reads three things."""
    kind, state = BackwardInputs if backward else Inputs, torch.empty(batch, 1)
    tensors = dict.fromkeys(kind._fields) | {"h0": state, "dh_n": state, "resets": state if resets else None}
    return Case.of(kind(**{name: tensors[name] for name in kind._fields}), p)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", [1000, 4 * 128 * 128, 4 * 1024 * 1024])
@pytest.mark.parametrize("steps, batch", SHAPES)
def test_a_layer_that_never_agrees_costs_little_more(device, weights, steps, batch):
    """Whenever a stretch fails, what was spent and the rest of the plain run stay below the allowance, by the model."""
    choice = choose(problem(steps, batch), batch, weights, device)
    costs = choice.costs
    if choice.why:
        return
    assert choice.predicted <= WORTH
    p, ledger, first = choice.p, Ledger(choice), 0
    if choice.measure:
        policy.trial_places(choice, ledger)
        assert ledger.spent <= (ALLOWANCE - 1) * costs.plain
    while first < p.lanes():
        last = ledger.stretch(p, first)
        total = ledger.spent + (1 - max(first, 1) * p.stride / steps) * costs.plain  # as if it gave up
        if last == first:
            assert total <= (LATER if first else ALLOWANCE) * costs.plain * (1 + 1e-9)
            return
        ledger.spend((last - first) * batch, p.stride + p.warmup)
        total = ledger.spent + max(0, 1 - max(first, 1) * p.stride / steps) * costs.plain
        assert total <= (LATER if first else ALLOWANCE) * costs.plain * (1 + 1e-9)
        assert last - first >= 2 or last == p.lanes()
        first, ledger.agreed = last, True
    assert ledger.spent <= 1.05 * costs.plain


def test_large_batches_and_short_sequences_run_plainly_on_a_cpu():
    weights = 4 * 256 * 256
    assert choose(problem(8192, 64), 64, weights, "cpu").why == policy.CHEAPER
    assert choose(problem(64, 1), 1, weights, "cpu").why == policy.CHEAPER
    assert not choose(problem(8192, 1), 1, weights, "cpu").why
    assert not choose(problem(8192, 64, stride=64), 64, weights, "cpu").why  # the plan says so


@pytest.mark.parametrize(
    "cell, asked, found", [("lstm", "auto", "decay"), ("lstm", "none", "none"), ("rnn_tanh", "probes", "none")]
)
def test_corrections_follow_the_cell(cell, asked, found):
    assert choose(problem(100, 1, cell, correct=asked), 1, 1000, "cpu").correct == found


def test_a_clamped_gate_needs_no_trial():
    choice = choose(problem(8192, 1, cap=0.9), 1, 4 * 128 * 128, "cpu")
    assert choice.p.warmup == 147 and not choice.measure  # ln(2e-6 / 10) / ln(0.9) = 146.4


@pytest.mark.parametrize(
    "jumps, found",
    [
        ([0.0, 0.0], 16),
        ([1e-3, 1e-6], 32),
        ([0.1, 0.1], inf),
        ([0.1, 0.2], inf),
        ([inf, inf], inf),
        ([1e-1, 1e-2], 120.0),
    ],
)
def test_the_warmup_that_a_trial_asks_for(jumps, found):
    """The first that agrees, or by the exponential through two differences, a quarter longer."""
    assert policy.needed_warmup(jumps, [16, 32], 1e-6 * 1.001) == pytest.approx(found, abs=0.1)


def test_a_fallback_is_remembered_for_its_plan_shape_and_weights():
    memory, p = Memory(), problem(1000, 2)
    assert not memory.of("w").fell_back(case(p))
    memory.falls_back(case(p))
    assert memory.of("w").fell_back(case(p))
    assert memory.fell_back(case(problem(900, 2)))  # the same class of lengths
    for other in (problem(3000, 2), problem(1000, 2, tol=1e-3), problem(1000, -2)):
        assert not memory.fell_back(case(other))
    for other in (case(p, backward=True), case(p, batch=9), case(p, resets=True)):
        assert not memory.fell_back(other)
    assert not memory.of("changed").fell_back(case(p))
    assert not memory.of("w").fell_back(case(p))


def test_a_fallback_is_tried_again_after_a_while():
    memory, p = Memory(), problem(1000, 2)
    memory.falls_back(case(p))
    assert [memory.fell_back(case(p)) for _ in range(RETRY + 1)] == [True] * RETRY + [False]
    assert not memory.fell_back(case(p))
    # and may cost more than a first call
    assert memory.credit(case(p)) == policy.CREDIT and memory.credit(case(p, backward=True)) == 0
    memory.falls_back(case(p))
    assert memory.credit(case(p)) == 0


def test_a_pass_is_allowed_if_it_is_cheap_or_known_to_end_well():
    choice = choose(problem(1 << 16, 1), 1, 4 * 128 * 128, "cuda")
    plain, ledger = choice.costs.plain, Ledger(choice)
    assert ledger.allows(0.09 * plain, 0, inf) and not ledger.allows(0.11 * plain, 0, inf)
    assert ledger.allows(0.11 * plain, int(0.02 * choice.p.steps), inf)  # what is certain need not run again
    assert ledger.allows(0.2 * plain, 0, 0.4 * plain) and not ledger.allows(0.2 * plain, 0, 0.6 * plain)
    ledger.credit = policy.CREDIT
    assert ledger.allows(0.59 * plain, 0, inf) and not ledger.allows(0.61 * plain, 0, inf)
    given = Ledger(choose(problem(1 << 16, 1, stride=64), 1, 4 * 128 * 128, "cuda"))
    assert given.allows(100 * plain, 0, inf)


def test_chunks_are_long_where_a_pass_is_cheap():
    assert choose(problem(1 << 16, 1), 1, 4 * 128 * 128, "cuda").p.stride == policy.USUAL


def test_longer_chunks_where_they_may_be_paid():
    choice = choose(problem(1 << 16, 1), 1, 4 * 128 * 128, "cuda")
    choice.why = policy.MEMORY
    assert policy.longer(choice, Ledger(choice)).p.stride == policy.LONGER * choice.p.stride
    spent = Ledger(choice)
    spent.spent = 0.1 * choice.costs.plain
    assert policy.longer(choice, spent) is None
    given = choose(problem(1 << 16, 1, stride=128), 1, 4 * 128 * 128, "cuda")
    assert policy.longer(given, Ledger(given)) is None
