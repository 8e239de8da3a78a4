"""Clipping modes, the fraction of clipped examples and microbatches in a private `fit`."""

import re

import keras
import numpy as np
import pytest

import keras_bandmf as bandmf
from keras_bandmf.clipping import AutomaticClipping, FlatClipping, PerLayerClipping
from tests import runs

FRACTION = "clipped_fraction_not_private"
OTHERS = {
    "per_layer": "per_layer",
    "shares": PerLayerClipping({"count": 2.0}),
    "automatic": "automatic",
    "gamma": AutomaticClipping(0.5),
}


def optimizer_of(clipping, clip=1.0, **changes):
    options = {"sampling": "fixed_order", "max_participations": 2, "min_separation": 12}
    plan = runs.make_plan(**(options | changes))
    return bandmf.BandMFOptimizer("sgd", plan, clip, clipping=clipping, seed=1)


def gradients(clipping, clip=1.0):
    model = runs.counting_model()
    x, y = runs.counting_data()
    found = bandmf.clipped_gradients(
        model, x[:3], y[:3], l2_norm_clip=clip, clipping=clipping, loss=runs.prediction_loss
    )
    return model, found


@pytest.mark.parametrize("clipping", OTHERS.values(), ids=OTHERS)
def test_gradients_clipped_in_another_mode_or_split_are_refused(clipping):
    """Rule 1: the whole mode is compared, with its settings."""
    model, flat = gradients("flat")
    _, found = gradients(clipping)
    variables = model.trainable_variables
    for given, other in ((found, "flat"), (flat, clipping), (found, PerLayerClipping({"a": 3.0}))):
        with pytest.raises(ValueError, match="optimizer's mode"):
            optimizer_of(other).apply_clipped(given, variables)
    optimizer = optimizer_of(clipping)
    own, found = gradients(clipping)
    optimizer.apply_clipped(found, own.trainable_variables)
    assert optimizer.steps_done == 1


@pytest.mark.parametrize("clipping", OTHERS.values(), ids=OTHERS)
def test_the_noise_is_that_of_the_modes_sensitivity(clipping):
    model, _ = gradients("flat")
    states = []
    for mode in ("flat", clipping):
        optimizer = optimizer_of(mode, clip=0.3)
        assert optimizer.clipping.sensitivity(0.3) == 0.3
        optimizer.build(model.trainable_variables)
        states.append(optimizer.run_state)
    rows = [state.noise.next()[0] for state in states]
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("clipping", OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_mode_is_refused(clipping):
    """Rule 11."""
    model, _ = gradients("flat")
    states = []
    for mode in ("flat", clipping, PerLayerClipping({"count": 5.0})):
        optimizer = optimizer_of(mode)
        optimizer.build(model.trainable_variables)
        states.append(optimizer.run_state)
    for state in states[1:]:
        with pytest.raises(ValueError, match="another run"):
            state.from_arrays(states[0].to_arrays(), replay=False)
    assert len({state.fingerprint for state in states}) == 3


@pytest.mark.parametrize("clipping", ["flat", *OTHERS.values()])
def test_the_mode_survives_the_config(clipping):
    optimizer = optimizer_of(clipping)
    config = keras.saving.serialize_keras_object(optimizer)
    other = keras.saving.deserialize_keras_object(config)
    assert other.clipping == optimizer.clipping
    assert keras.saving.serialize_keras_object(other) == config


@pytest.mark.parametrize("clipping", ["other", None, 3, FlatClipping])
def test_unknown_modes_are_refused(clipping):
    with pytest.raises(ValueError, match="clipping.*per_layer"):
        optimizer_of(clipping)


FLAT = ("flat", 1.0, "flat: .* sensitivity 3")
AUTOMATIC = ("automatic", 3 / 1.01, r"automatic: .* 3 / \(its norm \+ 0.01\).* sensitivity 3")
SHARES = (PerLayerClipping({"count": 9.0}), 1.0, "per layer: .*count 9.* sensitivity 3")


@pytest.mark.parametrize(
    ("case", "replicas", "mode"),
    [
        (FLAT, 1, {}),
        (SHARES, 1, {"jit_compile": True}),
        (AUTOMATIC, 1, {"jit_compile": True}),
        (AUTOMATIC, 2, {}),
    ],
)
def test_a_private_fit_clips_in_the_mode_and_states_it(case, replicas, mode):
    """Every gradient of the counting model has norm one."""
    clipping, contribution, words = case
    plan = runs.make_plan(noise_multiplier=5e-7, num_steps=12)

    def make():
        model = runs.counting_model()
        optimizer = bandmf.BandMFOptimizer(
            keras.optimizers.SGD(1.0), plan, 3.0, clipping=clipping, seed=3
        )
        model.compile(optimizer, loss=runs.prediction_loss, **mode)
        return model

    model = runs.in_scope(replicas, make)
    batches = plan.batches(*runs.counting_data(), seed=5)
    updates = runs.fit(model, batches, epochs=1)
    expected = np.zeros((12, 96))
    for step in range(12):
        expected[step, batches.indices(step)] = contribution / 8
    np.testing.assert_allclose(updates, expected, atol=1e-5)
    statement = bandmf.statement(model)
    assert statement.l2_norm_clip == 3.0
    text = " ".join(str(statement).split())
    assert re.search(words, text), text


def test_unknown_layers_are_refused_before_the_first_step():
    model = runs.counting_model()
    plan = runs.make_plan()
    clipping = PerLayerClipping({"no_such_layer": 2.0})
    model.compile(bandmf.BandMFOptimizer("sgd", plan, clipping=clipping), runs.prediction_loss)
    with pytest.raises(ValueError, match="no_such_layer"):
        model.fit(plan.batches(*runs.counting_data()), verbose=0, epochs=1)
    assert model.optimizer.steps_done == 0


def scaled_data():
    """Rows of norm 2 for the first 30 examples, 0.5 for the others."""
    x, y = runs.counting_data()
    return x * np.where(np.arange(96) < 30, 2, 0.5)[:, None].astype(np.float32), y


@pytest.mark.parametrize(
    ("replicas", "size", "mode"),
    [
        (1, None, {}),
        (1, 3, {"run_eagerly": True}),
        (1, "auto", {"jit_compile": True}),
        (2, "auto", {}),
    ],
)
def test_the_reported_fraction_counts_unpadded_rows(replicas, size, mode):
    plan = runs.make_plan(num_steps=24)
    model = runs.compiled_in_scope(replicas, runs.counting_model, plan, **mode)
    bandmf.privatize(model, microbatch_size=size, report_clipping=True)
    batches = plan.batches(*scaled_data(), seed=5)
    x, y = scaled_data()
    history = model.fit(batches, epochs=2, verbose=0, validation_data=(x, y)).history
    for epoch in range(2):
        steps = range(12 * epoch, 12 * epoch + 12)
        drawn = np.concatenate([batches.indices(step) for step in steps])
        np.testing.assert_allclose(history[FRACTION][epoch], np.mean(drawn < 30), rtol=1e-6)
    assert "val_" + FRACTION not in history
    assert FRACTION in " ".join(bandmf.statement(model).caveats)


def test_the_fraction_is_off_unless_asked_for_and_can_be_switched_off():
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan)
    batches = plan.batches(*runs.counting_data())
    assert FRACTION not in model.fit(batches, epochs=1, verbose=0).history
    assert FRACTION not in str(bandmf.statement(model))
    bandmf.privatize(model, report_clipping=True)
    assert FRACTION in model.fit(batches, epochs=1, steps_per_epoch=3, verbose=0).history
    bandmf.privatize(model)
    assert FRACTION not in model.fit(batches, epochs=1, steps_per_epoch=3, verbose=0).history
    assert FRACTION in str(bandmf.statement(model))


@pytest.mark.parametrize(
    "callback",
    [
        keras.callbacks.EarlyStopping(monitor=FRACTION),
        keras.callbacks.ReduceLROnPlateau(monitor=FRACTION),
        keras.callbacks.ModelCheckpoint("x.keras", monitor=FRACTION, save_best_only=True),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_on_the_fraction_are_refused(callback):
    """Rule 9."""
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan)
    bandmf.privatize(model, report_clipping=True)
    with pytest.raises(ValueError, match="not private"):
        model.fit(plan.batches(*runs.counting_data()), verbose=0, callbacks=[callback], epochs=1)


def test_loss_values_are_untouched_by_the_report():
    losses = []
    for report in (False, True):
        plan = runs.make_plan(noise_multiplier=1e-7)
        model = runs.compiled(runs.counting_model(), plan)
        bandmf.privatize(model, report_clipping=report)
        history = model.fit(plan.batches(*runs.counting_data()), epochs=1, verbose=0).history
        losses.append(history["loss"])
    np.testing.assert_array_equal(*losses)
