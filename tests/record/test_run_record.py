"""What is charged, and when nothing is stated: the optimizer's counter stands in for a run."""

import numpy as np
import pytest

import keras_bandmf as bandmf
from tests import runs


def built():
    """A built optimizer of 24 steps, 12 an epoch."""
    optimizer = bandmf.BandMFOptimizer("sgd", runs.make_plan())
    optimizer.build(runs.counting_model().trainable_variables)
    return optimizer


def recorded(optimizer, last_step, epochs=1):
    """The record of one `fit` that ended at `last_step`."""
    with optimizer.record.fit("data", [], epochs, 12):
        optimizer.iterations.assign(last_step)
    return optimizer.record


def test_nothing_is_stated_after_a_failed_restore():
    """Keras may have loaded the weights of a run with less noise."""
    optimizer = built()
    with pytest.raises(ValueError, match="no state"):
        optimizer.load_own_variables({"seeded": np.array(1, np.int32)})
    with pytest.raises(ValueError, match="could not be restored"):
        optimizer.record.statement()


@pytest.mark.parametrize("step", [0, 5])
def test_an_optimizer_that_went_back_is_charged_in_full(step):
    """Restored alone, it leaves the steps it made in the weights."""
    optimizer = built()
    record = recorded(optimizer, 12)
    assert record.statement().steps_charged == 12
    optimizer.iterations.assign(step)
    statement = record.statement()
    assert statement.steps_charged == 24
    assert any("all 24 are charged" in caveat for caveat in statement.caveats)


@pytest.mark.parametrize("last_step", [12, 15])
def test_a_stop_before_the_end_is_charged_in_full(last_step):
    """Rule 9: a stop looks at released weights: even public validation data then tell of rows."""
    assert recorded(built(), last_step, epochs=20).statement().steps_charged == 24


@pytest.mark.parametrize(("noise", "private"), [(1.0, True), (0.15, False)])
def test_finite_tails_are_not_enough_for_an_epsilon_that_is_very_large(noise, private):
    """At epsilon 50 a value beyond the tail of one neighbor is likelier than delta."""
    plan = runs.make_plan(noise_multiplier=noise, num_steps=1, num_bands=1)
    optimizer = bandmf.BandMFOptimizer("sgd", plan)
    optimizer.build(runs.counting_model().trainable_variables)
    statement = recorded(optimizer, 1).statement()
    assert statement.private == private
    assert private or "tails" in statement.not_private_reason


def test_a_fit_that_fails_is_charged_in_full():
    optimizer = built()
    record = optimizer.record
    with pytest.raises(KeyboardInterrupt), record.fit("data", [], 1, 12):
        optimizer.iterations.assign(12)
        raise KeyboardInterrupt
    assert record.statement().steps_charged == 24


def test_a_fit_that_did_not_begin_at_zero_is_charged_in_full():
    optimizer = built()
    optimizer.iterations.assign(3)
    assert recorded(optimizer, 15).statement().steps_charged == 24


def test_a_restored_run_is_charged_in_full_even_from_its_beginning():
    """Nobody knows what was seen of the steps it made before."""
    optimizer = built()
    optimizer.load_own_variables(optimizer.run_state.to_arrays())
    assert recorded(optimizer, 12).statement().steps_charged == 24


def test_a_plan_without_a_guarantee_gives_none_to_its_run():
    optimizer = bandmf.BandMFOptimizer("sgd", runs.make_plan(noise_multiplier=1e-7))
    optimizer.build(runs.counting_model().trainable_variables)
    statement = recorded(optimizer, 24).statement()
    assert not statement.private and statement.not_private_reason


def test_the_declaration_of_the_user_is_quoted():
    plan = runs.make_plan(sampling="fixed_order", max_participations=2, min_separation=12)
    statement = bandmf.BandMFOptimizer("sgd", plan).record.statement()
    assert any("at most 2 participations" in caveat for caveat in statement.caveats)


def test_a_record_of_an_earlier_release_is_read():
    """It also wrote the step at which each fit was to end; nothing else may be there."""
    facts = recorded(built(), 12).to_facts()
    (fit,) = facts["fits"]
    assert "requested_step" not in fit
    record = built().record
    record.take_over(facts | {"fits": [fit | {"requested_step": 12}]})
    assert [vars(one) for one in record.fits] == [fit]
    with pytest.raises(ValueError, match="damaged"):
        record.take_over(facts | {"fits": [fit | {"other": 1}]})
