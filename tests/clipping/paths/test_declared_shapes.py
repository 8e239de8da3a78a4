"""Tensors of another shape than Keras declared: seen in the trial trace and in each that trains."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_bandmf import clipping
from keras_bandmf.clipping import explain
from keras_bandmf.clipping.factors import Unsupported
from keras_bandmf.clipping.paths.book_keeping import forward
from keras_bandmf.clipping.paths.declared_shapes import checked_shapes
from keras_bandmf.clipping.paths.routing import trial_reason
from keras_bandmf.clipping.rowwise.decision import rowwise


def normed(t):
    """Along axis 1 as declared: of the rows if there is one more axis than that."""
    return ops.reshape(ops.normalize(t, axis=1), (-1, 4))


def queries(t):
    """With a mask of one axis too many the scores are those of all rows with all rows."""
    mask = ops.reshape(ops.mean(t, axis=-1), (-1, 1, 6)) > 0.5
    return ops.mean(layers.Attention()([t, t], mask=[mask, None]), axis=1)


def rotated(x):
    hub = pytest.importorskip("keras_hub")
    positions = ops.mean(x, axis=(1, 2))
    return ops.max(hub.layers.RotaryEmbedding()(x[:, :1], positions=positions), axis=1)


OTHER_SHAPES = {
    "mask of attention": lambda x: queries(x),
    "positions": rotated,
    "in a nested model": lambda x: keras.Model(z := keras.Input((6, 4)), queries(z))(x),
    "in a nested sequence": lambda x: keras.Sequential(
        [keras.Model(z := keras.Input((6, 4)), queries(z)), layers.Dense(4)]
    )(x),
}


@pytest.mark.parametrize("length", [6, None])
@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_tensors_of_another_shape_than_declared_go_one_row_at_a_time(name, length):
    """The tables read axes off declared shapes: the trial trace compares each with the tensor."""
    x = keras.Input((6, 4))
    model = keras.Model(x, layers.Dense(1)(OTHER_SHAPES[name](x)))
    model.compile(loss="mse")
    spec = tf.function(
        lambda x, y: tf.constant(trial_reason(model, x, y, None, None) or "none"),
        input_signature=[tf.TensorSpec([None, length, 4]), tf.TensorSpec([None, 1])],
    )
    found = spec(tf.ones([3, 6, 4]), tf.ones([3, 1])).numpy().decode()
    assert "is not of the declared shape" in found


@pytest.mark.parametrize("empty", [True, False])
def test_what_is_declared_to_be_empty_must_be_empty(empty):
    """An empty tensor may be returned beside the rows, as by DeiT's encoder."""

    class Beside(layers.Layer):
        def call(self, x):
            return x, x[:0] if empty else x

        def compute_output_shape(self, shape):
            return shape, (0, *shape[1:])

    clipping.declare_row_wise(Beside)
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(1)(Beside()(x)[0]))
    model.compile(loss="mse")
    reason = trial_reason(model, tf.ones([3, 4]), tf.ones([3, 1]), None, None)
    assert reason is None if empty else "is not of the declared shape" in reason
    assert (explain(model).route == "book-keeping") and not rowwise(model).unknown


def test_every_trace_is_looked_at_also_those_with_an_unknown_number_of_rows():
    class Deep(layers.Layer):
        """Of more axes than declared where the number of rows is not known, as in `fit`."""

        def call(self, x):
            return x[None] if x.shape[0] is None else x

        def compute_output_shape(self, shape):
            return shape

    clipping.declare_row_wise(Deep)
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(1)(normed(Deep()(x))))

    def run(x):
        with checked_shapes(model):
            return forward(model, x)

    with pytest.raises(Unsupported, match="not of the declared shape"):
        tf.function(run).get_concrete_function(tf.TensorSpec([None, 4]))
    tf.function(run).get_concrete_function(tf.TensorSpec([5, 4]))
    model.compile(loss="mse")

    @tf.function(input_signature=[tf.TensorSpec([None, 4]), tf.TensorSpec([None, 1])])
    def sums(x, y):
        return clipping.clipped_gradients(model, x, y).sums

    sums(np.ones((5, 4), "float32"), np.ones((5, 1), "float32"))
    assert explain(model).route == "general"
    assert "_run_through_graph" not in vars(model)


def test_a_promise_that_fails_only_where_the_number_of_rows_is_not_known_is_found():
    """As `RandomElasticTransform` does; all that is run eagerly knows the number."""

    @clipping.declare_row_wise
    class First(layers.Layer):
        def call(self, x):
            return x + x[:1] if x.shape[0] is None else x

    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(1)(First()(x)))
    model.compile(loss="mse")
    data = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    with pytest.raises(ValueError, match="declared row-wise changes the output|mixes examples"):
        clipping.check_model(model, data, np.ones((5, 1), "float32"))


def test_a_shared_layer_is_compared_call_by_call():
    x, shared = keras.Input((6, 4)), layers.Dense(4)
    h = ops.mean(shared(shared(x)), axis=1) + shared(x[:, 0])
    model = keras.Model(x, layers.Dense(1)(shared(h)))
    model.compile(loss="mse")
    clipping.check_model(model, np.ones((3, 6, 4), "float32"), np.ones((3, 1), "float32"))
    assert explain(model).route == "book-keeping"
