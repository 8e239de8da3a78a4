"""A layer without a rule runs one example at a time, and the rest of the model does not."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf import clipping
from keras_bandmf.clipping import check_model, clipped_gradients, declare_row_wise, explain
from tests.clipping import reference

ROWS = 4


def data(*shape):
    return np.random.default_rng(0).normal(size=(ROWS, *shape)).astype("float32")


class Own(layers.Layer):
    """A weight of its own; `change` is what is done with inputs and weight."""

    def __init__(self, change=None):
        super().__init__()
        self.change = change

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), initializer="normal")


@declare_row_wise
class Changed(Own):
    def call(self, inputs):
        return self.change(inputs, keras.ops.convert_to_tensor(self.w))


def product(x, w):
    return x * w


def not_vectorized(x, w):
    """With an operation that TensorFlow cannot vectorize over examples."""
    return x * w * tf.cast(tf.unique(tf.reshape(x, [-1]))[0][0] * 0 + 1, x.dtype)


def model_of(layer, shape=(3,)):
    model = keras.Sequential([keras.Input(shape), layer, layers.Flatten(), layers.Dense(2)])
    model.compile(loss="mse")
    return model


def assert_equal_to_one_by_one(model, x, y, jit=False):
    per_example, _ = reference.gradients(model, x, y, None)
    clip = float(np.median(reference.clipped(per_example, 1.0)[0]))
    norms, sums = reference.clipped(per_example, clip)
    run = tf.function(
        lambda x, y: clipped_gradients(model, x, y, l2_norm_clip=clip),
        jit_compile=jit,
        autograph=False,
    )
    found = run(*keras.tree.map_structure(tf.constant, (x, y)))
    assert explain(model).route == "book-keeping", explain(model)
    assert reference.error(found.sums, sums) < 1e-5
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5, atol=1e-5 * norms.max())


@pytest.mark.parametrize("jit", [False, True])
def test_a_declared_layer(jit):
    assert_equal_to_one_by_one(model_of(Changed(product)), data(3), data(2), jit)


def test_what_cannot_be_vectorized_is_looped_over():
    x = data(3)
    layer = Changed(not_vectorized)
    assert clipping.check_rule(layer, x) < 1e-5
    assert_equal_to_one_by_one(model_of(Changed(not_vectorized)), x, data(2))


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda: layers.Attention(use_scale=True), [(5, 3), (5, 3)]),
        (lambda: layers.Attention(use_scale=True, score_mode="concat"), [(5, 3), (6, 3)]),
        (lambda: layers.AdditiveAttention(), [(5, 3), (6, 3), (6, 3)]),
    ],
)
def test_layers_of_keras_with_several_inputs(make, shapes):
    inputs = [keras.Input(shape) for shape in shapes]
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(make()(inputs))))
    model.compile(loss="mse")
    assert_equal_to_one_by_one(model, [data(*shape) for shape in shapes], data(1))
    assert [row[2] for row in explain(model).rows] == ["by example", "book-keeping"]


@declare_row_wise
class Masked(Own):
    """Sees the mask of its inputs, and a number besides."""

    def call(self, inputs, factor=1.0, mask=None):
        kept = keras.ops.cast(mask, inputs.dtype)[..., None]
        return inputs * self.w * kept * factor


def test_masks_and_other_arguments():
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 3, mask_zero=True)(tokens)
    outputs = layers.Dense(2)(layers.Flatten()(Masked()(x, factor=2.0)))
    model = keras.Model(tokens, outputs)
    model.compile(loss="mse")
    ids = np.random.default_rng(0).integers(0, 3, size=(ROWS, 5)).astype("int32")
    assert_equal_to_one_by_one(model, ids, data(2))


@declare_row_wise
class TwoOutputs(Own):
    def call(self, inputs):
        return {"a": inputs * self.w, "b": keras.ops.sum(inputs * self.w**2, axis=-1), "c": inputs}


@pytest.mark.parametrize("used", ["a", "b", "c", "ab", "abc"])
def test_several_outputs_of_which_some_are_used(used):
    inputs = keras.Input((3,))
    outputs = TwoOutputs()(inputs)
    parts = [layers.Reshape((-1,))(outputs[name]) for name in used]
    joined = layers.Concatenate()(parts) if len(parts) > 1 else parts[0]
    model = keras.Model(inputs, layers.Dense(2)(joined))
    model.compile(loss="mse")
    assert_equal_to_one_by_one(model, data(3), data(2))


@declare_row_wise
class Noisy(Own):
    def __init__(self):
        super().__init__()
        self.dropout = layers.Dropout(0.5)

    def call(self, inputs):
        return self.dropout(inputs) * self.w


@declare_row_wise
class Losing(Own):
    def call(self, inputs):
        self.add_loss(keras.ops.sum(self.w))
        return inputs * self.w


@declare_row_wise
class Counting(Own):
    def build(self, shape):
        super().build(shape)
        self.count = self.add_weight(shape=(), trainable=False)

    def call(self, inputs):
        self.count.assign_add(1.0)
        return inputs * self.w


@declare_row_wise
class Shared(Own):
    """Gives the layer inside a tensor that belongs to no example."""

    def __init__(self):
        super().__init__()
        self.inside = Table()

    def call(self, inputs):
        return inputs * self.w + self.inside(keras.ops.ones((9, 3)), inputs)


@declare_row_wise
class Table(Own):
    def call(self, table, inputs):
        return inputs * keras.ops.sum(table * self.w)


@declare_row_wise
class Assigning(Own):
    def call(self, inputs):
        self.w.assign(0.5 * self.w)
        return inputs * self.w


@declare_row_wise
class Compiled(Own):
    """Keeps the trace of a batch, and in it the weights of that pass."""

    @tf.function
    def call(self, inputs):
        return inputs * self.w


@declare_row_wise
class CallsCompiled(Own):
    def call(self, inputs):
        return self.change(inputs) * self.w


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Noisy, "draws random numbers"),
        (Losing, "calls `add_loss`"),
        (Counting, "writes a variable"),
        (Assigning, "writes a variable"),
        (Shared, "not known to be that of the examples"),
        (Compiled, "it has a `tf.function`"),
        (lambda: CallsCompiled(tf.function(tf.tanh)), "it has a `tf.function`"),
        (lambda: CallsCompiled(lambda x: tf.function(tf.tanh)(x)), "calls a `tf.function`"),
    ],
)
def test_what_cannot_run_twice_or_apart_goes_the_general_path(layer, why):
    """A second run would draw other numbers; losses and writes would be lost."""
    model = model_of(layer())
    try:
        clipped_gradients(model, data(3), data(2))
    except ValueError:  # the general path refuses losses and writes
        pass
    assert explain(model).route == "general" and why in explain(model).why


class Notes:
    """An object of which Keras knows nothing."""


@declare_row_wise
class Leaving(layers.Layer):
    """Leaves a tensor of all rows on an object."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def call(self, inputs):
        self.notes.rows = 3.0 * inputs
        return inputs


@declare_row_wise
class Reading(Own):
    """Reads that tensor, each row its own: in a second run with one row it would read all."""

    def call(self, inputs):
        return self.change(inputs * self.w, self.notes.rows)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a, b: a * b, "does not give one row"),
        (lambda a, b: a * b[: tf.shape(a)[0]], "a tensor that is not among its arguments"),
    ],
)
def test_what_another_call_left_behind_does_not_bring_other_rows_into_a_row(change, why):
    """Without the check, norms of rows changed with other rows, and the sum by more than 2."""
    notes, reading = Notes(), Reading(change)
    reading.notes = notes
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(2)(reading(Leaving(notes)(inputs))))
    model.compile(loss="mse")

    @tf.function(autograph=False)
    def norms(x, y):
        return clipped_gradients(model, x, y).norms

    x, y = tf.constant(data(3)), tf.constant(data(2))
    before = norms(x, y)
    after = norms(tf.concat([-30.0 * x[:1], x[1:]], axis=0), y)
    np.testing.assert_allclose(before[1:], after[1:], rtol=1e-6)
    assert why in explain(model).why


def test_a_frozen_layer_is_not_run_again():
    layer = Changed(product)
    model = model_of(layer)
    layer.trainable = False
    assert_equal_to_one_by_one(model, data(3), data(2))


def test_layers_inside_stay_on_book_keeping():
    @declare_row_wise
    class Block(Own):
        def __init__(self):
            super().__init__()
            self.inside = layers.Dense(3)

        def call(self, inputs):
            return self.inside(inputs * self.w) + self.inside(inputs)

    model = model_of(Block())
    assert_equal_to_one_by_one(model, data(3), data(2))
    assert [row[2] for row in explain(model).rows] == [
        "by example",
        "book-keeping",
        "book-keeping",
    ]


def test_other_rows_do_not_change_a_row():
    """The rule's factor of an example is a function of that example."""
    model = model_of(Changed(product))
    x, y = data(3), data(2)
    alone = clipped_gradients(model, x[:1], y[:1], l2_norm_clip=0.01)
    others = x.copy()
    others[1:] = np.nan
    beside = clipped_gradients(model, others, y, l2_norm_clip=0.01)
    assert reference.error(beside.sums, [np.asarray(t) for t in alone.sums]) < 1e-5


def test_check_model_keeps_the_verdict():
    model = model_of(Changed(product))
    check_model(model, data(3), data(2))
    assert explain(model).why == "checked against one example at a time"


def test_bfloat16(bfloat16):
    x = data(3)
    assert clipping.check_rule(Changed(product), x) < 5e-2
