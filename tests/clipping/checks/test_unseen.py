"""No value of a private row shows in Python code of a model or a loss (it could be kept)."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import keras_bandmf as bandmf
from keras_bandmf.clipping import check_model, declare_row_wise
from keras_bandmf.clipping.checks.unseen import UnseenForward, unseen
from tests import runs

# Every private number is large; no other is.
PRIVATE = 1e3
X = PRIVATE + np.random.default_rng(0).normal(size=(96, 4)).astype("float32")
Y = PRIVATE + np.random.default_rng(1).normal(size=(96, 2)).astype("float32")


class Sight:
    """Collects the values that Python code gets to see."""

    def __init__(self):
        self.values = []

    def look(self, *tensors):
        for t in tensors:
            if hasattr(t, "numpy") and not keras.backend.is_keras_tensor(t):
                self.values.append(t.numpy())

    def saw_private_rows(self):
        return any(np.max(np.abs(v), initial=0.0) > PRIVATE / 2 for v in self.values)


class Looking(layers.Layer):
    def __init__(self, sight, mixing=False, **kwargs):
        super().__init__(**kwargs)
        self.sight, self.mixing = sight, mixing

    def call(self, x):
        self.sight.look(x)
        return x - ops.mean(x, axis=0, keepdims=True) if self.mixing else x * 1.0


@declare_row_wise
class DeclaredLooking(Looking):
    pass


class LookingModel(keras.Model):
    """Built by its first call."""

    def __init__(self, sight):
        super().__init__()
        self.looking, self.head = Looking(sight), layers.Dense(2)

    def call(self, x):
        return self.head(self.looking(x))


def looking_loss(sight):
    def loss(y, y_pred):
        sight.look(y, y_pred)
        return ops.mean(ops.square(y - y_pred), axis=-1)

    return loss


def model_with(looking):
    return keras.Sequential([keras.Input((4,)), looking, layers.Dense(2)])


MODELS = {
    "layer": lambda sight: model_with(Looking(sight)),
    "declared": lambda sight: model_with(DeclaredLooking(sight)),
    "mixing": lambda sight: model_with(Looking(sight, mixing=True)),
    "unbuilt": LookingModel,
    "loss alone": lambda _: model_with(layers.Identity()),
}


@pytest.mark.parametrize("functions_run_eagerly", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_check_model_shows_no_private_row(kind, functions_run_eagerly):
    sight = Sight()
    model = MODELS[kind](sight)
    model.compile(loss=looking_loss(sight))
    tf.config.run_functions_eagerly(functions_run_eagerly)
    try:
        if kind == "mixing":  # it is looked for which layer mixes
            with pytest.raises(ValueError, match="Looking mixes examples"):
                check_model(model, X, Y)
        else:
            check_model(model, X, Y)
    finally:
        tf.config.run_functions_eagerly(False)
    assert not sight.saw_private_rows()


def test_a_layer_that_keeps_a_tensor_of_its_first_call_is_refused():
    class Keeping(layers.Layer):
        first = None

        def build(self, shape):
            pass

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, x.dtype)

        def call(self, x):
            if self.first is None:
                self.first = ops.mean(x, axis=0, keepdims=True)
            return x - self.first

    model = model_with(Keeping())
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="forward pass must be traceable"):
        check_model(model, X, Y)


class OwnLoss(keras.Model):
    """`compute_loss` of its own."""

    sight = None

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        self.sight.look(x, y, y_pred)
        return ops.mean(ops.square(y - y_pred))


def test_a_loss_of_the_model_sees_no_private_row():
    inputs = keras.Input((4,))
    model = OwnLoss(inputs, layers.Dense(2)(inputs))
    model.sight = sight = Sight()
    model.compile()
    check_model(model, X, Y)
    assert not sight.saw_private_rows()


@pytest.mark.parametrize("kind", ["layer", "declared", "unbuilt"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_private_fit_shows_no_private_row(kind, replicas):
    sight = Sight()
    plan = runs.make_plan()
    model = runs.compiled_in_scope(
        replicas,
        lambda: bandmf.privatize(MODELS[kind](sight)),
        plan,
        loss=looking_loss(sight),
    )
    model.fit(plan.batches(X, Y), epochs=1, steps_per_epoch=2, verbose=0)
    assert not sight.saw_private_rows()


def test_the_number_of_rows_is_unknown_where_it_can_be():
    seen = []

    def add(x, y):
        seen.append(x.shape[0])
        return [x + y]

    five, seven = tf.ones([5, 2]), tf.ones([7, 2])
    run = unseen(add, five, five)
    assert seen == [None] and run(seven, seven)[0].shape == (7, 2)

    def needs_it(x):
        return [x + tf.ones([int(x.shape[0]), 1])]

    assert unseen(needs_it, five)(five)[0].shape == (5, 2)


def test_outputs_keep_their_structure_and_masks():
    tokens = keras.Input((4,), dtype="int32")
    hidden = layers.Embedding(5, 3, mask_zero=True)(tokens)
    model = keras.Model(tokens, {"a": layers.Dense(2)(hidden), "b": [hidden]})
    x = tf.constant([[1, 2, 0, 0], [3, 0, 0, 0]])
    found, expected = UnseenForward(model, x)(x), model(x, training=True)
    keras.tree.assert_same_structure(found, expected)
    np.testing.assert_array_equal(found["a"], expected["a"])
    np.testing.assert_array_equal(found["a"]._keras_mask, expected["a"]._keras_mask)
