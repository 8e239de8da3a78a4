"""Private runs whose noise is drawn again: its law, replicas, restores and what is saved."""

import keras
import numpy as np
import pytest
import scipy.stats

import keras_bandmf as bandmf
from keras_bandmf.noise import RegeneratedNoise
from keras_bandmf.strategies import BandedInverseStrategy
from tests import runs
from tests.training.test_resume import ROADS, new_run, through_weights


def inverse_plan(num_steps=24, taps=5, **changes):
    """A plan over 96 examples, 12 steps an epoch, in a fixed order."""
    strategy = BandedInverseStrategy.optimize(num_steps, taps, num_steps // 12, 12)
    options = {"sampling": "fixed_order", "strategy": strategy, "num_bands": None}
    return runs.make_plan(num_steps=num_steps, **(options | changes))


@pytest.mark.parametrize(
    "replicas,options", [(1, {}), (1, {"jit_compile": True}), (1, {"run_eagerly": True}), (2, {})]
)
def test_noise_has_the_covariance_of_the_mechanism(replicas, options):
    """Chi-square over all pairs of 48 steps of `fit`; false-alarm rate 1e-4."""
    plan = inverse_plan(num_steps=48)
    model = runs.compiled_in_scope(replicas, runs.noise_model, plan, seed=5, **options)
    updates = runs.fit(model, plan.batches(*runs.noise_data()), epochs=4)
    assert type(model.optimizer.run_state.noise) is RegeneratedNoise
    statistic, degrees = runs.whitened_statistic(plan, updates)
    assert statistic < scipy.stats.chi2.isf(1e-4, degrees)
    text = str(bandmf.statement(model))
    assert "BandedInverseStrategy, C^-1" in text and "48 run, 48 charged" in text


def test_two_replicas_train_to_the_weights_of_one():
    plan, data = inverse_plan(), runs.noise_data()
    one, two = (
        runs.fit(runs.compiled_in_scope(n, runs.noise_model, plan), plan.batches(*data))
        for n in (1, 2)
    )
    np.testing.assert_allclose(two, one, atol=1e-5)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("replay", [False, True])
def test_a_restore_goes_on_bit_for_bit_with_replay_and_with_new_noise_without(
    road, replay, tmp_path
):
    plan, data = inverse_plan(noise_multiplier=1e-3), runs.counting_data()
    whole = new_run(runs.counting_model, plan)
    expected = runs.fit(whole, plan.batches(*data))
    model = new_run(runs.counting_model, plan, replay=replay)
    first = runs.fit(model, plan.batches(*data), epochs=1, steps_per_epoch=9)
    restored = road(model, new_run(runs.counting_model, plan, replay=replay, seed=77), tmp_path)
    updates = np.concatenate([first, runs.fit(restored, plan.batches(*data), epochs=2)])
    if replay:
        np.testing.assert_array_equal(updates, expected)
    else:
        assert np.abs(updates[9:] - expected[9:]).max() > 1e-4
        np.testing.assert_array_equal(np.round(updates * 8), np.round(expected * 8))


def test_noise_keeps_its_covariance_across_restores_within_its_taps(tmp_path):
    """Restored after 10 and after 12 of 48 steps: rows of Z of three keys in one row of noise."""
    plan, data = inverse_plan(num_steps=48, taps=8, noise_multiplier=2.0), runs.noise_data()
    model = new_run(runs.noise_model, plan)
    updates = [runs.fit(model, plan.batches(*data), epochs=1, steps_per_epoch=10)]
    for seed, steps in ((4, 2), (5, None)):
        model = through_weights(model, new_run(runs.noise_model, plan, seed=seed), tmp_path)
        options = {"epochs": 3} if steps is None else {"epochs": 1, "steps_per_epoch": steps}
        updates.append(runs.fit(model, plan.batches(*data), **options))
    updates = np.concatenate(updates)
    assert len(updates) == 48
    statistic, degrees = runs.whitened_statistic(plan, updates)
    assert statistic < scipy.stats.chi2.isf(1e-4, degrees)


def test_a_restore_onto_two_replicas_goes_on_with_the_same_run(tmp_path):
    plan, data = inverse_plan(), runs.noise_data()
    expected = runs.fit(new_run(runs.noise_model, plan), plan.batches(*data))
    model = new_run(runs.noise_model, plan, replay=True)
    runs.fit(model, plan.batches(*data), epochs=1, steps_per_epoch=9)
    other = new_run(runs.noise_model, plan, replicas=2, replay=True, seed=8)
    restored = through_weights(model, other, tmp_path)
    updates = runs.fit(restored, plan.batches(*data), epochs=2)
    np.testing.assert_allclose(updates, expected[9:], atol=1e-5)


def test_a_checkpoint_has_no_more_keys_than_it_needs(tmp_path):
    """Neither the noise key nor the keys of rows of Z that no later row of noise has."""
    plan, data = inverse_plan(), runs.noise_data()
    model = runs.compiled(runs.noise_model(), plan, seed=None)
    runs.fit(model, plan.batches(*data), epochs=1, steps_per_epoch=9)
    with pytest.warns(UserWarning, match="secrets"):
        model.save_weights(tmp_path / "run.weights.h5")
    noise = model.optimizer.run_state.noise
    written = runs.all_bytes(tmp_path)
    keys = noise._step_keys.numpy()
    assert noise.get_key().tobytes() not in written
    found = [key.tobytes() in written for key in keys]
    assert found == [5 <= step < 9 for step in range(24)]


def test_nothing_secret_is_exported(tmp_path):
    plan, data = inverse_plan(), runs.noise_data()
    model = runs.compiled(runs.noise_model(), plan, seed=None)
    runs.fit(model, plan.batches(*data), epochs=1, steps_per_epoch=9)
    bandmf.export(model, tmp_path / "served")
    written = runs.all_bytes(tmp_path)
    noise = model.optimizer.run_state.noise
    assert not [key for key in noise._step_keys.numpy() if key.tobytes() in written]
    assert not [secret for secret in runs.secrets(model) if secret in written]


def test_carriers_are_refused():
    plan = inverse_plan()
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(30), keras.layers.Dense(2)])
    model = bandmf.privatize(model)
    bandmf.enable_rgp(model, rank=2, refresh_every=4)
    model.compile(bandmf.BandMFOptimizer("sgd", plan), loss="mse")
    with pytest.raises(ValueError, match="across a refresh.*Received: strategy="):
        model.optimizer.build(model.trainable_variables)
