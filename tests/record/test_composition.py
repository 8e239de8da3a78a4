"""Several runs on the same data: the composed epsilon, and the statement of them all."""

import dataclasses
import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from keras_bandmf.accounting.accountant import FINITE_NOISE_SHARE
from keras_bandmf.accounting.composition import composed_epsilon, event_parts
from keras_bandmf.record.composition import compose
from tests.plans import make_plan

HEAD = make_plan(noise_multiplier=2.0, epochs=1)
WHOLE = make_plan(noise_multiplier=1.2, num_bands=2)
FIXED = make_plan(sampling="fixed_order", noise_multiplier=3.0)


def by_dp_accounting(plans, delta, interval=1e-4):
    """The composition, without this package's own."""
    accountant = PLDAccountant(value_discretization_interval=interval)
    for plan in plans:
        accountant.compose(plan.dp_event())
    return accountant.get_epsilon(delta)


def test_two_plans_cost_what_dp_accounting_says():
    whole = compose([HEAD.statement(), WHOLE.statement()])
    expected = by_dp_accounting([HEAD, WHOLE], WHOLE.delta)
    assert expected <= whole.epsilon <= expected * 1.001
    assert max(HEAD.epsilon(), WHOLE.epsilon()) <= whole.epsilon
    assert whole.epsilon <= HEAD.epsilon() + WHOLE.epsilon()
    assert whole.runs == (HEAD.statement(), WHOLE.statement())
    assert whole.num_steps == HEAD.num_steps + WHOLE.num_steps


def test_unsampled_gaussians_merge_exactly():
    whole = compose([FIXED.statement(), FIXED.statement()])
    merged = dp_accounting.GaussianDpEvent(3.0 / math.sqrt(2))
    accountant = PLDAccountant(value_discretization_interval=1e-4).compose(merged)
    # The noise of either run has its share of delta.
    delta = FIXED.delta * (1 - 2 * FINITE_NOISE_SHARE)
    assert whole.epsilon == pytest.approx(accountant.get_epsilon(delta), rel=1e-4)


def test_the_same_plan_twice_is_one_of_twice_the_rounds():
    whole = compose([WHOLE.statement()] * 2)
    # Two runs have two shares of delta for their noise, a plan of twice the rounds has one.
    assert whole.epsilon == pytest.approx(make_plan(**TWICE).epsilon(), rel=1e-3)
    assert whole.epsilon > make_plan(**TWICE).epsilon()


TWICE = {"noise_multiplier": 1.2, "num_bands": 2, "epochs": 6}


def test_delta_may_be_chosen_and_is_the_last_runs_otherwise():
    other = make_plan(noise_multiplier=1.2, delta=1e-7)
    statements = [HEAD.statement(), other.statement()]
    assert compose(statements).delta == 1e-7
    chosen = compose(statements, 1e-3)
    assert chosen.delta == 1e-3 and chosen.epsilon < compose(statements).epsilon
    alone = compose([HEAD.statement()], 1e-6)
    assert alone.epsilon == pytest.approx(by_dp_accounting([HEAD], 1e-6), rel=1e-3)
    assert alone.runs == () and alone.delta == 1e-6


@pytest.mark.parametrize("delta", [1e-14, 1e-90])
def test_where_the_accountant_cannot_the_sum_is_the_bound(delta):
    epsilon, name = composed_epsilon([(15, 0.2, 2.0), (30, 0.1, 1.2)], delta)
    assert "summed" in name and epsilon >= by_dp_accounting([HEAD, WHOLE], 1e-9)


def test_no_noise_is_an_infinite_epsilon():
    epsilon, _ = composed_epsilon([(15, 0.2, 2.0), (30, 0.1, 1e-8)], 1e-5)
    assert epsilon == math.inf
    assert composed_epsilon([(1, 1.0, 0.0)], 1e-5)[0] == math.inf
    assert composed_epsilon([], 1e-5)[0] == 0.0


def test_composed_statements_are_taken_apart_and_read_back():
    two = compose([HEAD.statement(), WHOLE.statement()])
    three = compose([two, HEAD.statement()])
    assert len(three.runs) == 3
    assert type(three).from_json(three.to_json()) == three
    text = str(three)
    assert "3 runs on the same data" in text and "run 3" in text and "fixed in advance" in text


def test_a_run_that_is_not_private_makes_the_whole_not_private():
    bad = dataclasses.replace(HEAD.statement(), private=False, not_private_reason="a fixed seed")
    whole = compose([bad, WHOLE.statement()])
    assert not whole.private and "fixed seed" in whole.not_private_reason


def test_guarantees_about_different_neighbors_are_not_composed():
    with pytest.raises(ValueError, match="adjacency"):
        compose([HEAD.statement(), FIXED.statement()])
    with pytest.raises(ValueError, match="unit"):
        other = dataclasses.replace(HEAD.statement(), unit="person")
        compose([HEAD.statement(), other])


def test_a_statement_without_its_events_is_not_composed():
    with pytest.raises(ValueError, match="events"):
        compose([dataclasses.replace(HEAD.statement(), events=()), HEAD.statement()])
    with pytest.raises(ValueError, match="at least one"):
        compose([])
    with pytest.raises(ValueError, match="event"):
        event_parts(dp_accounting.LaplaceDpEvent(1.0))


@pytest.mark.parametrize("events", ["abc", [(1, 2)], [(1, 1.5, 1.0)], [(0, 0.5, 1.0)]])
def test_bad_events_are_refused(events):
    with pytest.raises((ValueError, TypeError)):
        dataclasses.replace(HEAD.statement(), events=events)


def ran(plan, **changes):
    """The statement of a run of all steps."""
    facts = {"executed": True, "steps_run": plan.num_steps, "noise_tail": 0.0}
    return dataclasses.replace(plan.statement(), **(facts | changes))


def tail_of(plan, share):
    """A tail that costs this share of what is set aside for it, at the epsilon of the plan."""
    return share * FINITE_NOISE_SHARE * plan.delta / (1 + math.exp(plan.epsilon()))


def test_tails_that_each_run_affords_may_be_too_much_for_all():
    one, two = (ran(WHOLE, run_id=name, noise_tail=tail_of(WHOLE, 0.9)) for name in ("a", "b"))
    whole = compose([one, two])
    assert one.private and two.private and not whole.private
    assert "tails" in whole.not_private_reason


@pytest.mark.parametrize("tail", [0.0, 1e-20])
def test_tails_that_all_runs_afford_withdraw_nothing(tail):
    assert compose([ran(WHOLE, noise_tail=tail), ran(HEAD, noise_tail=tail)]).private


def test_a_smaller_delta_may_not_afford_the_tail():
    run = ran(WHOLE, noise_tail=tail_of(WHOLE, 0.9))
    assert not compose([run], 2 * FINITE_NOISE_SHARE * WHOLE.delta).private


def test_a_run_of_an_earlier_release_is_charged_all_that_its_tail_may_cost():
    assert not compose([ran(HEAD, noise_tail=None), ran(WHOLE, noise_tail=None)]).private


def test_plans_have_no_tails_yet():
    assert compose([WHOLE.statement(), WHOLE.statement()]).private
