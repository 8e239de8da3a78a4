"""The record belongs to the variables: nothing that trained them on private data is forgotten."""

import copy
import gc
import weakref
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.record import history
from tests import runs

DATA = runs.counting_data()
FIXED = {"sampling": "fixed_order", "max_participations": 2, "min_separation": 12}
MODES = [({}, 1), ({"run_eagerly": True}, 1), ({"jit_compile": True}, 1), ({}, 2)]


def layers():
    """A body and a head."""
    return [
        keras.layers.Dense(4, activation="tanh", name="body"),
        keras.layers.Dense(1, name="head"),
    ]


def model_of(parts):
    """A private model over the layers."""
    return bandmf.privatize(keras.Sequential([keras.Input((96,)), *parts]))


def train(model, plan, steps=2, run_eagerly=True, **options):
    """Compiles with an optimizer of its own, without a seed, and makes a few steps."""
    runs.compiled(model, plan, seed=None, run_eagerly=run_eagerly, **options)
    model.fit(plan.batches(*DATA), epochs=1, steps_per_epoch=steps, verbose=0)
    return model


def caveats(model):
    """The caveats of a model's statement, as one text."""
    return " ".join(bandmf.statement(model).caveats)


@pytest.mark.parametrize(("options", "replicas"), MODES)
def test_the_head_and_then_all_are_one_statement(options, replicas):
    """Two-phase fine-tuning: two plans on the same data."""
    head, whole = runs.make_plan(noise_multiplier=2.0), runs.make_plan(noise_multiplier=3.0)
    model = runs.in_scope(replicas, lambda: model_of(layers()))
    options = {"run_eagerly": False, **options}
    model.layers[0].trainable = False
    runs.in_scope(replicas, lambda: train(model, head, 12, **options))
    model.layers[0].trainable = True
    runs.in_scope(replicas, lambda: train(model, whole, 12, **options))
    statement = bandmf.statement(model)
    assert [run.plan_fingerprint for run in statement.runs] == [head.fingerprint, whole.fingerprint]
    assert [run.steps_charged for run in statement.runs] == [12, 12]
    alone = head.epsilon(12), whole.epsilon(12)
    assert max(alone) < statement.epsilon < sum(alone)
    assert "unknown" not in caveats(model) and statement.private


def test_a_frozen_layer_keeps_what_it_cost():
    body = layers()
    train(model_of(body), runs.make_plan())
    model = model_of([body[0], keras.layers.Dense(1)])
    model.layers[0].trainable = False
    assert len(bandmf.statement(train(model, runs.make_plan())).runs) == 2


def test_a_second_model_over_the_layers_knows_the_first_run():
    parts = layers()
    first = train(model_of(parts), runs.make_plan())
    second = keras.Sequential([keras.Input((96,)), *parts])
    assert bandmf.statement(second) == bandmf.statement(first)
    bandmf.privatize(second)
    assert len(bandmf.statement(train(second, runs.make_plan())).runs) == 2
    assert len(bandmf.statement(first).runs) == 2


def test_a_loop_is_in_the_statement_of_a_later_fit():
    """Eight steps at next to no noise, and then a fit with much."""
    loud, quiet = runs.make_plan(noise_multiplier=0.1, **FIXED), runs.make_plan(**FIXED)
    model = model_of(layers())
    optimizer = bandmf.BandMFOptimizer("sgd", loud)
    step = tf.function(
        lambda: optimizer.apply_clipped(
            bandmf.clipped_gradients(model, DATA[0][:8], DATA[1][:8], loss="mse"),
            model.trainable_variables,
        )
    )
    optimizer.build(model.trainable_variables)
    for _ in range(4):
        step()
    assert "loop" in bandmf.statement(model).data
    runs.compiled(model, quiet, seed=None)
    model.fit(*DATA, epochs=1, verbose=0)
    statement = bandmf.statement(model)
    assert [run.steps_run for run in statement.runs] == [4, 12]
    assert statement.runs[0].steps_charged == 24  # who loops may have looked
    assert statement.epsilon > loud.epsilon() > 10 * quiet.epsilon()
    assert "unknown" not in caveats(model)


def test_an_eager_loop_and_one_without_its_optimizer_are_recorded():
    model = model_of(layers())
    optimizer = bandmf.BandMFOptimizer("sgd", runs.make_plan(**FIXED))
    gradients = bandmf.clipped_gradients(model, DATA[0][:8], DATA[1][:8], loss="mse")
    optimizer.apply_clipped(gradients, model.trainable_variables)
    del optimizer
    assert bandmf.statement(model).steps_run == 1


def test_runs_about_other_neighbors_are_refused_before_they_begin():
    model = train(model_of(layers()), runs.make_plan())
    before = model.get_weights()
    with pytest.raises(ValueError, match="adjacency"):
        train(model, runs.make_plan(sampling="fixed_order"))
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert bandmf.statement(model).runs == ()


class Fails(keras.callbacks.Callback):
    """Ends a fit in the middle."""

    def on_train_batch_end(self, batch, logs=None):
        """Raises."""
        raise KeyboardInterrupt


def test_a_fit_that_failed_is_in_the_statement():
    model, plan = model_of(layers()), runs.make_plan()
    runs.compiled(model, plan, seed=None)
    with pytest.raises(KeyboardInterrupt):
        model.fit(plan.batches(*DATA), callbacks=[Fails()], verbose=0, epochs=1)
    statement = bandmf.statement(train(model, runs.make_plan()))
    assert [run.steps_charged for run in statement.runs] == [24, 2]


def test_a_seeded_run_makes_all_later_ones_not_private():
    model, plan = model_of(layers()), runs.make_plan()
    runs.compiled(model, plan, seed=1)
    model.fit(plan.batches(*DATA), steps_per_epoch=1, verbose=0, epochs=1)
    assert not bandmf.statement(train(model, plan)).private


def saved(tmp_path):
    """The file of a model that ran its whole plan, and its statement."""
    model, plan = model_of(layers()), runs.make_plan()
    runs.compiled(model, plan, seed=None)
    model.fit(plan.batches(*DATA), epochs=2, verbose=0)
    model.save(tmp_path / "run.keras")
    return tmp_path / "run.keras", bandmf.statement(model)


def test_weights_loaded_without_their_optimizer_have_an_unknown_history(tmp_path):
    """As in tasks whose `load_model` brings another optimizer."""
    path, _ = saved(tmp_path)
    loaded = bandmf.privatize(keras.saving.load_model(path, compile=False))
    train(loaded, runs.make_plan())
    assert "history unknown of 4 of 4 weights" in str(bandmf.statement(loaded)).replace("\n", " ")
    fresh = model_of(layers())
    fresh.set_weights(loaded.get_weights())
    assert "history unknown of 4" in caveats(train(fresh, runs.make_plan()))


@pytest.mark.parametrize("kind", ["path", "string", "statement", "json"])
def test_a_history_can_be_given_with_the_loaded_model(kind, tmp_path):
    path, before = saved(tmp_path)
    loaded = keras.saving.load_model(path, compile=False)
    given = {"path": path, "string": str(path), "statement": before, "json": before.to_json()}
    bandmf.privatize(loaded, history=given[kind])
    assert bandmf.statement(loaded) == before
    after = bandmf.statement(train(loaded, runs.make_plan()))
    assert after.runs[0] == before and after.runs[1].steps_charged == 2
    assert after.epsilon > before.epsilon and "unknown" not in str(after)
    assert len(bandmf.statement(bandmf.privatize(loaded, history=given[kind])).runs) == 2


def test_a_history_of_unknown_weights_stays_unknown_through_a_file(tmp_path):
    path, _ = saved(tmp_path)
    loaded = bandmf.privatize(keras.saving.load_model(path, compile=False))
    train(loaded, runs.make_plan()).save(path)
    again = keras.saving.load_model(path, compile=False)
    assert "unknown" in caveats(bandmf.privatize(again, history=path))


def test_histories_that_are_none_are_refused(tmp_path):
    path, before = saved(tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert history.MEMBER in archive.namelist()
    loaded = keras.saving.load_model(path, compile=False)
    keras.saving.save_model(loaded, tmp_path / "plain.keras")
    for wrong in (tmp_path / "plain.keras", tmp_path / "missing.keras", "{}", "[1]"):
        with pytest.raises(ValueError, match="history|Statement"):
            bandmf.privatize(loaded, history=wrong)
    with pytest.raises(TypeError, match="history"):
        bandmf.privatize(loaded, history=3)
    with pytest.raises(ValueError, match="unbuilt"):
        bandmf.privatize(keras.Sequential([keras.layers.Dense(1)]), history=before)


def with_keras_file(model, tmp_path):
    """Through `model.save` and `load_model`."""
    model.save(tmp_path / "run.keras")
    return bandmf.privatize(keras.saving.load_model(tmp_path / "run.keras"))


def with_weights(model, tmp_path):
    """Through `save_weights`, into a new model."""
    model.save_weights(tmp_path / "run.weights.h5")
    other = runs.compiled(model_of(layers()), model.optimizer.plan, seed=None)
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "run.weights.h5")
    return other


def with_checkpoint(model, tmp_path):
    """Through `tf.train.Checkpoint`, into a new model."""
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "run")
    other = runs.compiled(model_of(layers()), model.optimizer.plan, seed=None)
    other.optimizer.build(other.trainable_variables)
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)
    return other


@pytest.mark.parametrize("road", [with_keras_file, with_weights, with_checkpoint])
def test_a_restored_optimizer_brings_the_whole_history(road, tmp_path):
    """Its own run goes on as one; those before it are composed."""
    plans = [runs.make_plan(noise_multiplier=m) for m in (2.0, 3.0)]
    model = model_of(layers())
    for plan in plans:
        train(model, plan)
    other = road(model, tmp_path)
    other.fit(plans[1].batches(*DATA), steps_per_epoch=2, verbose=0, epochs=1)
    first, second = bandmf.statement(other).runs
    assert (first.steps_charged, second.steps_run, second.steps_charged) == (2, 4, 24)
    assert "unknown" not in caveats(other)
    assert "restored" in caveats(other)


def test_steps_of_an_optimizer_stay_when_it_takes_over_another_run(tmp_path):
    """Weights that were overwritten may have been released before."""
    plan = runs.make_plan()
    train(model_of(layers()), plan).save_weights(tmp_path / "run.weights.h5")
    other = train(model_of(layers()), plan)
    other.load_weights(tmp_path / "run.weights.h5")
    assert len(bandmf.statement(other).runs) == 2


def test_a_checkpoint_without_a_history_makes_it_unknown():
    model = runs.compiled(model_of(layers()), runs.make_plan(), seed=None)
    model.optimizer.build(model.trainable_variables)
    arrays = model.optimizer.run_state.to_arrays()
    model.optimizer.load_own_variables(arrays)
    model.fit(model.optimizer.plan.batches(*DATA), steps_per_epoch=1, verbose=0, epochs=1)
    assert "unknown" in caveats(model)
    with pytest.raises(ValueError, match="damaged"):
        model.optimizer.load_own_variables(arrays | {"history": np.zeros(3, np.uint8)})


def test_weights_changed_between_fits_or_after_are_named(tmp_path):
    """A file of weights alone brings no history."""
    plan = runs.make_plan()
    other = train(model_of(layers()), plan)
    model = train(model_of(layers()), plan)
    assert "not those" not in caveats(model)
    own = model.get_weights()
    model.set_weights(other.get_weights())
    assert "4 of 4 weights" in caveats(model) and "not those" in caveats(model)
    model.set_weights(own)
    assert "not those" not in caveats(model)
    model.set_weights(other.get_weights())
    model.fit(plan.batches(*DATA), steps_per_epoch=1, verbose=0, epochs=1)
    assert "history unknown of 4" in caveats(model)


def test_copies_of_models_and_variables_keep_the_record():
    model = train(model_of(layers()), runs.make_plan())
    other = copy.deepcopy(model)
    assert bandmf.statement(other).steps_charged == 24
    keys = [m.optimizer.run_state.noise.get_key() for m in (model, other)]
    assert not np.array_equal(*keys)
    for copier in (copy.copy, copy.deepcopy):
        with pytest.raises(ValueError):
            copier(model.optimizer)


def test_a_model_that_no_run_trained_has_no_statement():
    with pytest.raises(ValueError, match="not private"):
        bandmf.statement(keras.Sequential([keras.Input((96,)), *layers()]))


def test_the_record_holds_no_optimizer_alive_and_no_secret():
    model = train(model_of(layers()), runs.make_plan())
    text = history.to_json(model.weights) + str(vars(model.optimizer.record))
    state = model.optimizer.run_state
    for word in np.concatenate([state.sampler_key, state.noise.get_key()]):
        assert str(word) not in text and str(word.view(np.int64)) not in text
    kept = weakref.ref(model.optimizer)
    train(model, runs.make_plan())
    gc.collect()
    assert kept() is None and len(bandmf.statement(model).runs) == 2


def other_weights():
    """Weights that no private run made: as of training without noise."""
    return [
        value + 1.0 for value in keras.Sequential([keras.Input((96,)), *layers()]).get_weights()
    ]


def test_parts_know_the_runs_that_their_gradients_ran_through():
    """The body was trained through a head of an earlier run, and a new head over such a body."""
    model = model_of(layers())
    model.layers[0].trainable = False
    train(model, runs.make_plan())
    model.layers[0].trainable = True
    train(model, runs.make_plan())
    body = keras.Sequential([keras.Input((96,)), model.layers[0]])
    assert len(bandmf.statement(body).runs) == 2
    body.trainable = False
    head = keras.layers.Dense(1)
    train(model_of([model.layers[0], head]), runs.make_plan())
    assert len(bandmf.statement(keras.Sequential([keras.Input((4,)), head])).runs) == 3


def test_a_head_over_a_body_of_unknown_history_is_unknown_too():
    parts = layers()
    model = model_of(parts)
    parts[0].set_weights(other_weights()[:2])
    parts[0].trainable = False
    train(model, runs.make_plan())
    assert "unknown" in caveats(keras.Sequential([keras.Input((4,)), parts[1]]))


def test_without_a_private_step_weights_of_unknown_history_are_not_private():
    model = runs.compiled(model_of(layers()), runs.make_plan(), seed=None)
    assert bandmf.statement(model).private
    model.set_weights(other_weights())
    model = runs.compiled(model_of(layers()), runs.make_plan(), seed=None)
    model.set_weights(other_weights())
    statement = bandmf.statement(model)
    assert not statement.private and "unknown" in str(statement)


def test_equal_runs_in_a_statement_are_several():
    """Two runs of one plan say the same, but for their ids."""
    model, plan = model_of(layers()), runs.make_plan()
    train(train(model, plan), plan)
    before = bandmf.statement(model)
    for given in (before, before.to_json()):
        other = bandmf.privatize(model_of(layers()), history=given)
        assert len(bandmf.statement(other).runs) == 2
        assert bandmf.statement(other).epsilon == before.epsilon


def test_two_that_went_on_from_one_file_are_two_runs(tmp_path):
    model = train(model_of(layers()), runs.make_plan())
    model.save(tmp_path / "run.keras")
    branch = keras.saving.load_model(tmp_path / "run.keras")
    # The file holds no step that the branch does not.
    bandmf.privatize(branch, history=tmp_path / "run.keras")
    assert bandmf.statement(branch).runs == ()
    for one in (model, branch):
        one.fit(one.optimizer.plan.batches(*DATA), steps_per_epoch=1, verbose=0, epochs=1)
    both = keras.Sequential([keras.Input((96,)), model.layers[0], branch.layers[1]])
    assert len(bandmf.statement(both).runs) == 2
    bandmf.privatize(both).save(tmp_path / "both.keras")
    again = keras.saving.load_model(tmp_path / "both.keras", compile=False)
    bandmf.privatize(again, history=tmp_path / "both.keras")
    assert len(bandmf.statement(again).runs) == 2


@pytest.mark.parametrize("road", [with_keras_file, with_weights, with_checkpoint])
def test_values_that_are_not_those_of_the_restored_file_are_named(road, tmp_path):
    model = road(train(model_of(layers()), runs.make_plan()), tmp_path)
    assert "not those" not in caveats(model)
    model.set_weights(other_weights())
    assert "not those" in caveats(model)
    model.fit(model.optimizer.plan.batches(*DATA), steps_per_epoch=1, verbose=0, epochs=1)
    assert "history unknown of 4" in caveats(model)


@pytest.mark.parametrize("road", ["file", "history", "loop"])
def test_moved_values_are_not_forgotten(road, tmp_path):
    """By saving, by a history that is given, or by one step of a loop."""
    model = model_of(layers())
    runs.compiled(model, runs.make_plan(**FIXED), seed=None)
    model.fit(*DATA, epochs=1, verbose=0)
    before = bandmf.statement(model)
    model.set_weights(other_weights())
    if road == "file":
        model.save(tmp_path / "run.keras")
        model = keras.saving.load_model(tmp_path / "run.keras", compile=False)
        bandmf.privatize(model, history=tmp_path / "run.keras")
    elif road == "history":
        bandmf.privatize(model, history=before)
    else:
        loop_step(model, model.optimizer)
    assert "history unknown of 4" in caveats(model)


def loop_step(model, optimizer):
    """One eager step of the user's own."""
    gradients = bandmf.clipped_gradients(model, DATA[0][:8], DATA[1][:8], loss="mse")
    optimizer.apply_clipped(gradients, model.trainable_variables)


def test_values_moved_between_the_steps_of_an_eager_loop_are_seen():
    model = keras.Sequential([keras.Input((96,)), *layers()])
    optimizer = bandmf.BandMFOptimizer("sgd", runs.make_plan(**FIXED))
    loop_step(model, optimizer)
    loop_step(model, optimizer)
    assert "unknown" not in caveats(model) and "loop" in caveats(model)
    model.set_weights(other_weights())
    loop_step(model, optimizer)
    assert "unknown" in caveats(model)


def test_a_loop_that_cannot_be_composed_is_refused_before_its_first_step():
    model = train(model_of(layers()), runs.make_plan())
    before = model.get_weights()
    optimizer = bandmf.BandMFOptimizer("sgd", runs.make_plan(**FIXED))
    for _ in range(2):
        with pytest.raises(ValueError, match="adjacency"):
            loop_step(model, optimizer)
    with pytest.raises(ValueError, match="delta"):
        train(train(model_of(layers()), runs.make_plan(delta=1e-3)), runs.make_plan(delta=1e-6))
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_model_saved_before_its_first_step_begins_its_run_when_loaded(tmp_path):
    model = runs.compiled(model_of(layers()), runs.make_plan(), seed=None)
    model.save(tmp_path / "new.keras")
    other = bandmf.privatize(keras.saving.load_model(tmp_path / "new.keras"))
    other.fit(other.optimizer.plan.batches(*DATA), steps_per_epoch=1, verbose=0, epochs=1)
    assert bandmf.statement(other).steps_run == 1 and "unknown" in caveats(other)


def test_loading_a_run_into_an_optimizer_that_is_not_built_says_what_to_do(tmp_path):
    model = train(model_of(layers()), runs.make_plan())
    model.save_weights(tmp_path / "run.weights.h5")
    other = runs.compiled(model_of(layers()), model.optimizer.plan, seed=None)
    with pytest.raises(ValueError, match="optimizer.build"):
        other.load_weights(tmp_path / "run.weights.h5")
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "run.weights.h5")
    assert bandmf.statement(other).steps_run == 2
