"""What `check_model` refuses, by name and with the way out (rule 6)."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_bandmf.clipping import (
    LayerRule,
    Rows,
    check_model,
    clipped_gradients,
    constant,
    declare_row_wise,
    explain,
    register_rule,
)
from keras_bandmf.clipping.checks.agreement import disagreement
from keras_bandmf.clipping.checks.snapshot import Snapshot
from keras_bandmf.clipping.losses import batch_loss
from keras_bandmf.clipping.modes import checked_mode
from tests.clipping import zoo

X = np.random.default_rng(0).normal(size=(5, 4, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(5, 2)).astype("float32")


def model_of(*middle, compiled=True, shape=(4, 6)):
    model = keras.Sequential(
        [keras.Input(shape), layers.Dense(6, name="before"), *middle]
        + [layers.Flatten(), layers.Dense(2, name="after")]
    )
    if compiled:
        model.compile(loss="mse")
    return model


class Center(layers.Layer):
    """Subtracts the mean of the batch."""

    def call(self, x):
        return x - ops.mean(x, axis=0, keepdims=True)


class Counter(layers.Layer):
    """Keeps a running mean, as a variable of Keras or of TensorFlow."""

    def __init__(self, raw, **kwargs):
        super().__init__(**kwargs)
        self.raw = raw
        if raw:
            self.mean = tf.Variable(0.0, trainable=False, name="running_mean")

    def build(self, shape):
        if not self.raw:
            self.mean = self.add_weight(shape=(), trainable=False, name="running_mean")

    def call(self, x):
        self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(x))
        return x


class Penalty(layers.Layer):
    def call(self, x):
        self.add_loss(ops.mean(ops.square(x)))
        return x


@declare_row_wise
class Fold(layers.Layer):
    """(batch, time, features) -> (batch * time, features) around a Dense layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(6, name="folded")

    def build(self, shape):
        self.inner.build((None, shape[-1]))

    def call(self, x):
        flat = self.inner(ops.reshape(x, (-1, x.shape[-1])))
        return ops.reshape(flat, (-1, *x.shape[1:]))


def test_batch_normalization_is_refused_by_name_with_the_replacement():
    model = model_of(layers.BatchNormalization(name="bn"))
    for call in (clipped_gradients, check_model):
        with pytest.raises(ValueError, match="GroupNormalization.*'sequential.*bn'"):
            call(model, X, Y)
    model.get_layer("bn").trainable = False
    check_model(model, X, Y)
    clipped_gradients(model, X, Y)


def test_a_layer_that_mixes_examples_is_named():
    with pytest.raises(ValueError, match="'.*center.*' of type Center mixes examples"):
        check_model(model_of(Center(name="center")), X, Y)


def test_mixing_is_found_for_each_number_of_rows():
    for rows in (1, 2, 3, 5):
        with pytest.raises(ValueError, match="Center"):
            check_model(model_of(Center()), X[:rows], Y[:rows])
    same = np.repeat(X[:1], 3, axis=0)
    with pytest.raises(ValueError, match="Center"):
        check_model(model_of(Center()), same, Y[:3])


@pytest.mark.parametrize("threshold", [3, 15])
def test_mixing_of_many_rows_or_of_an_unknown_number_is_found(threshold):
    """As layers of Keras do that take an unknown number of rows for one."""

    class Sometimes(Center):
        def call(self, x):
            unknown = x.shape[0] is None
            if threshold == 3:
                return super().call(x) if unknown else x
            many = ops.shape(x)[0] > threshold
            return ops.where(many, super().call(x), x)

    with pytest.raises(ValueError, match="Sometimes mixes"):
        check_model(model_of(Sometimes()), X, Y)


class Shift(layers.Layer):
    """Adds to each row the one before it, or the one behind it; the row at that end is alone."""

    def __init__(self, before):
        super().__init__()
        self.before = before

    def call(self, x):
        if self.before:
            return ops.concatenate([x[:1], x[1:] + x[:-1]], axis=0)
        return ops.concatenate([x[:-1] + x[1:], x[-1:]], axis=0)


@pytest.mark.parametrize("before", [True, False])
def test_mixing_that_spares_the_first_or_the_last_row_is_found(before):
    with pytest.raises(ValueError, match="mixes examples"):
        check_model(model_of(Shift(before)), X, Y)


def test_mixing_of_token_ids_is_found():
    tokens = keras.Input((4,), dtype="int32")
    x = Center(name="center")(layers.Embedding(9, 3)(tokens))
    model = keras.Model(tokens, layers.Dense(1)(layers.Flatten()(x)))
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="Center"):
        check_model(model, zoo.integers(9, 4), zoo.floats(1))


def test_mixing_by_an_operation_of_a_functional_model_is_named():
    inputs = keras.Input((4, 6))
    x = layers.Dense(6)(inputs)
    x = x - ops.max(x, axis=0, keepdims=True)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="(?i)type (Max|Subtract) mixes"):
        check_model(model, X, Y)


def test_mixing_inside_the_call_of_a_model_is_located():
    class Mixing(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.two = layers.Dense(3, name="one"), layers.Dense(2, name="two")

        def build(self, shape):
            self.one.build(shape)
            self.two.build((None, 3))

        def call(self, x):
            x = self.one(x)
            return self.two(x + x[::-1])

    model = Mixing()
    model.build((None, 6))
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="code before layer '.*two'"):
        check_model(model, X[:, 0], Y)


def test_time_major_is_refused():
    inputs = keras.Input((4, 6))
    x = ops.transpose(inputs, (1, 0, 2))
    x = layers.Dense(5)(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="Axis 0 of every output"):
        check_model(model, X, Y)


def test_attention_over_a_folded_batch_is_refused():
    inputs = keras.Input((4, 6))
    x = ops.transpose(inputs, (1, 0, 2))
    x = layers.MultiHeadAttention(1, 6, name="mha")(x, x)
    x = ops.transpose(x, (1, 0, 2))
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="Transpose mixes examples"):
        check_model(model, X, Y)


@pytest.mark.parametrize("checked", [False, True])
def test_a_folded_batch_axis_takes_the_general_path(checked):
    """Folding alone mixes nothing: book-keeping cannot do it, the general path can."""
    from tests.clipping import reference

    model = model_of(Fold(name="fold"))
    if checked:
        check_model(model, X, Y)
    per_example, _ = reference.gradients(model, X, Y, None)
    expected = reference.clipped(per_example, 0.5)[1]
    for way in (lambda f: f, tf.function):
        found = way(lambda: clipped_gradients(model, X, Y, l2_norm_clip=0.5))()
        assert reference.error(found.sums, expected) < 1e-5
    assert explain(model).route == "general" and "folded" in explain(model).why


def test_a_position_table_read_once_takes_the_general_path():
    """The table's output has no example axis, even where the batch is as long as the sequence."""
    from tests.clipping import reference

    class Places(keras.Model):
        def __init__(self):
            super().__init__()
            self.table, self.head = layers.Embedding(4, 6), layers.Dense(2)

        def build(self, shape):
            self.table.build()
            self.head.build((None, 6))

        def call(self, x):
            return self.head(ops.mean(ops.tanh(x + self.table(ops.arange(4))), axis=1))

    model = Places()
    model.build((None, 4, 6))
    model.compile(loss="mse")
    per_example, _ = reference.gradients(model, X[:4], Y[:4], None)
    found = clipped_gradients(model, X[:4], Y[:4], l2_norm_clip=0.5)
    assert reference.error(found.sums, reference.clipped(per_example, 0.5)[1]) < 1e-5


@pytest.mark.parametrize("raw", [False, True])
def test_a_forward_pass_that_writes_a_variable_is_refused(raw):
    model = model_of(Counter(raw, name="counter"))
    variable = model.get_layer("counter").mean
    before = float(variable)
    with pytest.raises(ValueError, match="running_mean"):
        check_model(model, X, Y)
    assert float(variable) == before


def test_seed_generators_and_metrics_may_be_written_and_are_put_back():
    class Metered(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.mean = keras.metrics.Mean(name="mean_activation")

        def call(self, x):
            self.mean.update_state(x)
            return x

    model = model_of(layers.Dropout(0.3), Metered())
    before = [v.numpy().copy() for v in [*model.variables, *model.metrics_variables]]
    check_model(model, X, Y)
    after = [v.numpy() for v in [*model.variables, *model.metrics_variables]]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_added_losses_are_refused_by_name():
    model = model_of(Penalty(name="penalty"))
    for call in (clipped_gradients, check_model):
        with pytest.raises(ValueError, match="add_loss.*penalty"):
            call(model, X, Y)
    model = model_of(layers.Dense(3, activity_regularizer="l2", name="lazy"))
    for call in (clipped_gradients, check_model):
        with pytest.raises(ValueError, match="activity_regularizer.*lazy"):
            call(model, X, Y)


def contrastive(y, p):
    """Every example against the others of its batch."""
    return -tf.nn.log_softmax(tf.matmul(p, p, transpose_b=True))[:, 0]


@pytest.mark.parametrize("loss", [contrastive, keras.losses.Dice(), keras.losses.Tversky()])
def test_a_loss_that_couples_examples_is_refused(loss):
    model = model_of(layers.Dense(2), compiled=False)
    y = np.abs(Y) if loss is not contrastive else Y
    with pytest.raises(ValueError, match="sum over examples"):
        check_model(model, X, y, loss=loss)


def test_per_example_dice_is_fine():
    model = model_of(layers.Dense(2), compiled=False)
    check_model(model, X, np.abs(Y), loss=keras.losses.Dice(axis=(1,)))


def test_pairwise_loss_on_scalar_scores_is_refused():
    def ranking(y, p):
        return tf.nn.softplus(p - tf.reverse(p, [0]))

    model = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
    with pytest.raises(ValueError, match="sum over examples"):
        check_model(model, X[:, 0], Y[:, :1], loss=ranking)


@declare_row_wise
class DeclaredCenter(Center):
    """A false promise."""


def test_a_head_of_zeros_does_not_hide_mixing():
    """Its gradient is that of mixed rows all the same."""
    model = model_of(DeclaredCenter())
    head = model.get_layer("after")
    head.kernel.assign(tf.zeros_like(head.kernel.value))
    before = [v.numpy() for v in model.variables]
    with pytest.raises(ValueError, match="DeclaredCenter mixes"):
        check_model(model, X, Y)
    for v, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(v.numpy(), value)


class Scaled:
    """Rows of gradients whose squared norms, or whose sums, are said to be another multiple."""

    def __init__(self, rows, norms, sums):
        self.rows, self.norms, self.sums = rows, norms, sums

    def joined(self, factors):
        return self

    def resolved(self):
        return self

    def squared_norms(self):
        return self.norms**2 * self.rows.squared_norms()

    def weighted_sum(self, weights):
        return self.sums * self.rows.weighted_sum(weights)


@pytest.mark.parametrize(
    ("norms", "sums", "why"),
    [(1.0, 1.0, None), (0.9, 1.0, "norms disagree"), (1.0, 1.1, "disagrees with one example")],
)
def test_a_rule_whose_norms_or_sums_alone_are_wrong_is_not_used(norms, sums, why):
    class Gain(layers.Layer):
        def build(self, shape):
            self.gain = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, x):
            return x * self.gain

    class GainRule(LayerRule):
        def forward(self, layer, inputs):
            return inputs * constant(layer.gain), inputs

        def gradients(self, layer, saved, g):
            rows = Rows(tf.reduce_sum(tf.cast(saved, g.dtype) * g, axis=1))
            return [(layer.gain, Scaled(rows, norms, sums))]

    register_rule(Gain, GainRule())
    model = model_of(Gain())
    check_model(model, X, Y)
    found = explain(model)
    assert found.route == ("book-keeping" if why is None else "general")
    assert why is None or why in found.why


def test_book_keeping_is_compared_with_passes_of_single_rows():
    """What mixes before the first trained layer would do so in both ways in a pass of the batch."""
    stack = [keras.Input((4, 6)), DeclaredCenter(), layers.Flatten(), layers.Dense(2)]
    model = keras.Sequential(stack)
    model.compile(loss="mse")
    data = (tf.constant(X), tf.constant(Y), None)
    snapshot = Snapshot(model, data[0])
    args = (batch_loss(model), snapshot, checked_mode("flat"))
    assert "disagree" in (disagreement(model, *data, *args) or "")
    model = model_of(layers.Dropout(0.5, seed=1))
    args = (batch_loss(model), Snapshot(model, data[0]), checked_mode("flat"))
    assert disagreement(model, *data, *args) is None


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_bfloat16", "bfloat16"])
def test_moved_variables_are_finite_keep_their_sign_and_are_put_back(dtype):
    inputs = keras.Input((4,))
    x = layers.LayerNormalization(dtype=dtype)(inputs)
    model = keras.Model(inputs, layers.Dense(2, kernel_initializer="zeros", dtype=dtype)(x))
    before = [v.numpy() for v in model.variables]
    snapshot = Snapshot(model, tf.ones([3, 4]))
    snapshot.randomize()
    moved = [v.numpy().astype("float64") for v in model.variables]
    for value, was in zip(moved, before, strict=True):
        assert np.all(np.isfinite(value)) and np.all(value != was.astype("float64"))
    assert np.all(moved[0] > 0)
    snapshot.put_back()
    for v, was in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(v.numpy(), was)


def test_no_rows_no_loss_no_model():
    model = model_of()
    with pytest.raises(ValueError, match="at least one example"):
        check_model(model, X[:0], Y[:0])
    with pytest.raises(ValueError, match="loss="):
        check_model(model_of(compiled=False), X, Y)
    with pytest.raises(ValueError, match="keras.Model"):
        check_model(lambda x: x, X, Y)


def test_unrolled_and_eager_only_models_still_work():
    class PythonBranch(layers.Layer):
        def call(self, x):
            return x * (2.0 if float(ops.max(ops.abs(x[0]))) > -1 else 1.0)

    model = model_of()
    model.build((None, 4, 6))
    eager = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    eager.compile(loss="mse", run_eagerly=True)
    check_model(eager, X[:, 0], Y)
    assert explain(eager).route == "book-keeping"


def test_check_leaves_no_tap_behind():
    model = model_of(Center())
    with pytest.raises(ValueError):
        check_model(model, X, Y)
    clean = model_of()
    check_model(clean, X, Y)
    for m in (model, clean):
        assert not any("call" in vars(layer) for layer in m._flatten_layers())
