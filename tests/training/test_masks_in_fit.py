"""Random layers in a private fit: which seeds run, what is saved of them, and what is repeated."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_bandmf as bandmf
from keras_bandmf.clipping.seeds import seed_generators
from tests import runs


def model_of():
    return bandmf.privatize(
        keras.Sequential(
            [
                keras.Input((8,)),
                layers.Dropout(0.5),
                layers.Dense(4, "tanh"),
                layers.GaussianNoise(0.3),
                layers.Dense(1),
            ]
        )
    )


def data(rows=96):
    x = np.random.default_rng(0).normal(size=(rows, 8)).astype("float32")
    return x, np.zeros((rows, 1), "float32")


def plan():
    return runs.make_plan(noise_multiplier=1e-3)


def trained(replicas=1, seed=3, **options):
    keras.utils.set_random_seed(1)
    model = runs.compiled_in_scope(replicas, model_of, plan(), seed=seed, loss="mse", **options)
    updates = runs.fit(model, model.optimizer.plan.batches(*data()), epochs=1)
    return model, updates


@pytest.mark.parametrize("replicas", [1, 2])
def test_fit_moves_no_generator_and_repeats_with_its_seed(replicas):
    model, updates = trained(replicas)
    for generator in seed_generators(model):
        state = np.array(generator.state)
        assert state[1] == 0, "Keras counts draws there"
    again = trained(replicas)[1]
    np.testing.assert_allclose(again, updates, atol=1e-6)


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"run_eagerly": True}], ids=str)
def test_fit_moves_no_generator_by_xla_and_eagerly(options):
    model, updates = trained(**options)
    assert all(np.array(generator.state)[1] == 0 for generator in seed_generators(model))
    assert np.isfinite(updates).all()


def test_set_random_seed_does_not_choose_the_masks():
    keys = {trained(seed=None)[0].optimizer.run_state.get_mask_key().tobytes() for _ in range(2)}
    assert len(keys) == 2


def test_the_mask_key_is_in_no_trace_and_no_release(tmp_path):
    model, _ = trained(seed=None)
    key = model.optimizer.run_state.get_mask_key()
    step = tf.function(lambda: model.optimizer.run_state.mask_seeds(tf.constant(3)).of_pass(0))
    traced = step.get_concrete_function().graph.as_graph_def().SerializeToString()
    bandmf.export(model, tmp_path / "served")
    with pytest.warns(UserWarning, match="secrets"):
        model.save(tmp_path / "model", zipped=False)
    written = runs.all_bytes(tmp_path) + traced + repr(model.optimizer.get_config()).encode()
    for word in key:
        assert word.tobytes() not in written and str(word) not in str(written)


@pytest.mark.parametrize("replay", [False, True])
def test_a_restore_repeats_masks_with_replay_only(replay):
    model, _ = trained(replay=replay)
    state = model.optimizer.run_state
    saved = state.to_arrays(replay)
    other, _ = trained(seed=4, replay=replay)
    before, theirs = (m.optimizer.run_state.get_mask_key() for m in (model, other))
    other.optimizer.run_state.from_arrays(saved, replay)
    after = other.optimizer.run_state.get_mask_key()
    assert np.array_equal(after, before) == replay
    assert not np.array_equal(after, theirs)
    assert saved["mask_key"].size == (2 if replay else 0)


def test_too_many_steps_for_the_seeds_are_refused(monkeypatch):
    from keras_bandmf.optimizers import state

    monkeypatch.setattr(state, "STEP_BITS", 4)
    with pytest.raises(ValueError, match="steps times replicas.*24 steps on 1 replicas"):
        trained()


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
def test_each_step_of_a_fit_draws_masks_of_its_own(options):
    """The same eight rows of ones in every step: the updates are sums of masks."""
    plan = runs.make_plan(
        num_examples=8, num_bands=1, num_steps=6, noise_multiplier=1e-4, sampling="fixed_order"
    )
    model = keras.Sequential(
        [keras.Input((40,)), layers.Dropout(0.5), layers.Dense(1, kernel_initializer="zeros")]
    )
    model = runs.compiled(bandmf.privatize(model), plan, clip=100.0, **options)
    rows = np.ones((8, 40), np.float32), np.zeros(8, np.float32)
    masks = np.rint(runs.fit(model, plan.batches(*rows), epochs=6)[:, :40] * 8 / 2)
    assert len({tuple(row) for row in masks}) == 6
    assert 3 < masks.mean() < 5


def test_seeds_of_steps_and_replicas_are_distinct():
    found = set()

    @tf.function(autograph=False)
    def seeds(state, step):
        return runs.mirrored().run(lambda: state.mask_seeds(step).of_pass(0))

    model, _ = trained(2)
    for step in range(24):
        values = seeds(model.optimizer.run_state, tf.constant(step))
        found |= {int(v) for v in runs.mirrored().experimental_local_results(values)}
    assert len(found) == 48
