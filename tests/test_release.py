"""An exported model holds no key and no noise ring."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from tests import runs


def trained(num_bands=4):
    """A private model after an epoch."""
    plan = runs.make_plan(num_bands=num_bands)
    model = runs.compiled(runs.noise_model(units=40), plan)
    model.fit(plan.batches(*runs.noise_data()), epochs=1, verbose=0)
    return model


def test_export_holds_neither_key_nor_ring(tmp_path):
    """Rule 10; the same scan finds them in a file of `model.save_weights`."""
    model = trained()
    bandmf.export(model, tmp_path / "served")
    content = runs.all_bytes(tmp_path / "served")
    assert content
    assert not [secret for secret in runs.secrets(model) if secret in content]
    for name in (b"bandmf", b"BandMF", b"noise_ring", b"sampler_key"):
        assert name not in content
    model.save_weights(tmp_path / "secret.weights.h5")
    kept = (tmp_path / "secret.weights.h5").read_bytes()
    assert any(secret in kept for secret in runs.secrets(model))


def test_the_exported_model_answers_as_the_trained_one(tmp_path):
    model = trained()
    bandmf.export(model, tmp_path / "served")
    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    served = tf.saved_model.load(str(tmp_path / "served"))
    np.testing.assert_allclose(served.serve(x), model.predict(x, verbose=0), rtol=1e-5)


@pytest.mark.parametrize(("replay", "num_bands"), [(False, 4), (True, 4), (False, 1)])
def test_saving_warns_once_and_names_what_the_file_holds(replay, num_bands, tmp_path):
    """In the words of what is there: without replay no noise key is written."""
    plan = runs.make_plan(num_bands)
    model = runs.compiled(runs.noise_model(units=40), plan, replay=replay)
    model.optimizer.build(model.trainable_variables)
    with pytest.warns(UserWarning, match="secrets of a private run") as caught:
        model.save(tmp_path / "run.keras")
        model.save_weights(tmp_path / "run.weights.h5")
        tf.train.Checkpoint(optimizer=model.optimizer).save(tmp_path / "run")
    (message,) = [str(w.message) for w in caught if "private run" in str(w.message)]
    assert ("last 3 rows" in message) == (num_bands == 4) == ("rows of its noise" in message)
    assert "export" in message
    assert ("all noise of the run" in message) == replay
    content = (tmp_path / "run.weights.h5").read_bytes()
    state = model.optimizer.run_state
    assert state.sampler_key.tobytes() in content
    assert (state.noise.get_key().tobytes() in content) == replay


def test_a_saved_model_with_the_optimizer_is_refused(tmp_path):
    model = trained()
    with pytest.raises(ValueError, match="export"):
        tf.saved_model.save(model, str(tmp_path / "leak"))


def test_only_built_keras_models_are_exported(tmp_path):
    with pytest.raises(TypeError, match="keras.Model"):
        bandmf.export("model", tmp_path / "served")
    with pytest.raises(ValueError, match="unbuilt"):
        bandmf.export(keras.Sequential([keras.layers.Dense(1)]), tmp_path / "served")
