"""Which values are taken for initial ones: those that an initializer gives again, bit for bit."""

import keras
import numpy as np
import pytest

from keras_bandmf.record import fresh


def noted(model):
    """A model whose layers were looked at."""
    fresh.note_initializers(model)
    return model


def stale(model):
    """The paths of variables that are not fresh."""
    return [v.path for v in noted(model).weights if not fresh.is_fresh(v)]


def functional():
    """Most layers that make variables."""
    inputs = keras.Input((8,), dtype="int32")
    x = keras.layers.Embedding(20, 6)(inputs)
    x = keras.layers.MultiHeadAttention(2, 3)(x, x)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.Bidirectional(keras.layers.LSTM(5, return_sequences=True))(x)
    x = keras.layers.GRU(4, return_sequences=True)(x)
    x = keras.layers.SeparableConv1D(3, 2)(x)
    x = keras.layers.Conv1D(3, 2, kernel_initializer="orthogonal")(x)
    x = keras.layers.EinsumDense("abc,cd->abd", (None, 4))(x)
    x = keras.layers.Dense(3, kernel_initializer="truncated_normal")(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_new_models_are_fresh_and_trained_ones_are_not(dtype):
    keras.config.set_floatx(dtype)
    try:
        model = functional()
        assert stale(model) == []
        for variable in model.weights:
            variable.assign(keras.ops.add(variable, 0.25))
        assert len(stale(model)) == len(model.weights)
    finally:
        keras.config.set_floatx("float32")


def test_looking_changes_no_random_state():
    model = functional()
    before = [keras.random.normal((2,)) for _ in range(1)]
    keras.utils.set_random_seed(3)
    first = np.asarray(keras.random.normal((2,)))
    keras.utils.set_random_seed(3)
    assert stale(model) == []
    np.testing.assert_array_equal(np.asarray(keras.random.normal((2,))), first)
    assert before


class Own(keras.initializers.Initializer):
    """Code of the user: may give anything."""

    def __call__(self, shape, dtype=None):
        """Twos."""
        return keras.ops.full(shape, 2.0, dtype=dtype)


PRETRAINED = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "initializer",
    [
        keras.initializers.Constant(PRETRAINED),
        Own(),
        keras.initializers.RandomNormal(mean=PRETRAINED, stddev=0.0, seed=1),
        keras.initializers.GlorotUniform(seed=keras.random.SeedGenerator(1)),
    ],
    ids=["array", "own", "mean", "generator"],
)
def test_an_initializer_that_may_hold_something_learnt_proves_nothing(initializer):
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(3, use_bias=False, kernel_initializer=initializer)]
    )
    assert len(stale(model)) == 1


def test_clones_and_copied_weights_are_not_fresh():
    model = functional()
    clone = keras.models.clone_model(model)
    assert stale(clone) == []
    clone.set_weights(model.get_weights())
    assert "embedding" in " ".join(stale(clone))


def test_weights_too_many_to_look_at_are_not(monkeypatch):
    model = functional()
    assert fresh.small_enough(model.weights)
    monkeypatch.setattr(fresh, "_MOST_VALUES", 100)
    assert not fresh.small_enough(model.weights)
