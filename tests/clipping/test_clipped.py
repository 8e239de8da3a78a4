"""`clipped_gradients`: arguments, losses, routes, replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf.clipping import (
    ClippedGradients,
    FlatClipping,
    check_model,
    clipped_gradients,
    declare_row_wise,
    explain,
)
from tests import runs
from tests.clipping import reference, zoo


@pytest.fixture
def small():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, "tanh"), layers.Dense(1)])
    model.compile(loss="mse")
    return model, zoo.floats(3), zoo.floats(1)


@pytest.mark.parametrize("clip", [0, -1.0, np.inf, np.nan, "1", None, True, tf.constant(1.0)])
def test_bad_clip(small, clip):
    with pytest.raises((TypeError, ValueError), match="l2_norm_clip"):
        clipped_gradients(*small, l2_norm_clip=clip)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_numpy_numbers_are_numbers(jit_compile):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    x, y = np.ones((7, 3), "float32"), np.zeros((7, 1), "float32")

    def sums(clip, size):
        clipped = tf.function(
            lambda x, y: clipped_gradients(model, x, y, l2_norm_clip=clip, microbatch_size=size),
            jit_compile=jit_compile,
        )
        return [total.numpy() for total in clipped(x, y).sums]

    for a, b in zip(sums(np.float32(0.5), np.int64(3)), sums(0.5, 3), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "automatic"])
def test_bad_microbatch_size(small, size):
    with pytest.raises((TypeError, ValueError), match="microbatch_size"):
        clipped_gradients(*small, microbatch_size=size)


@pytest.mark.parametrize(
    "mask", [np.ones(3, bool), np.ones(zoo.ROWS), np.ones((zoo.ROWS, 1), bool)]
)
def test_bad_mask(small, mask):
    with pytest.raises(ValueError, match="mask"):
        clipped_gradients(*small, mask=mask)


def test_bad_data_and_models(small):
    model, x, y = small
    with pytest.raises(ValueError, match="x.*RaggedTensor"):
        clipped_gradients(model, tf.ragged.constant([[1.0], [2.0, 3.0]]), y)
    with pytest.raises(ValueError, match="y.*SparseTensor"):
        clipped_gradients(model, x, tf.sparse.from_dense(y))
    with pytest.raises(ValueError, match="built"):
        clipped_gradients(keras.Sequential([layers.Dense(1)]), x, y, loss="mse")
    with pytest.raises(ValueError, match="`loss=`"):
        clipped_gradients(keras.Sequential([keras.Input((3,)), layers.Dense(1)]), x, y)
    with pytest.raises(ValueError, match="keras.Model"):
        clipped_gradients(lambda x: x, x, y)


@pytest.mark.parametrize("loss", ["mae", keras.losses.Huber(), lambda y, p: tf.abs(y - p)])
@pytest.mark.parametrize("graph", [False, True])
def test_loss_argument_replaces_the_compiled_loss(small, loss, graph):
    model, x, y = small
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    other.compile(loss=loss)
    expected = clipped_gradients(other, x, y)
    call = tf.function(clipped_gradients) if graph else clipped_gradients
    found = call(model, x, y, loss=loss)
    assert reference.error(found.sums, [np.asarray(s) for s in expected.sums]) < 1e-6


def test_result_is_a_structure_of_tensorflow(small):
    found = tf.function(lambda: clipped_gradients(*small, l2_norm_clip=0.5))()
    assert isinstance(found, ClippedGradients)
    assert (found.l2_norm_clip, found.clipping) == (0.5, FlatClipping())
    again = tf.nest.map_structure(tf.identity, found)
    assert again.clipping == FlatClipping() and len(again.sums) == 4
    assert again.was_clipped.dtype == tf.bool and again.was_clipped.shape == found.norms.shape


class OwnLoss(keras.Model):
    """Overrides `compute_loss`, looks at x, calls a layer and tracks a metric."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = layers.Dense(4, "tanh"), layers.Dense(3)
        self.tracker = keras.metrics.Mean(name="own")

    def build(self, shape):
        self.hidden.build(shape)
        self.head.build((None, 4))

    def call(self, x):
        return self.head(self.hidden(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = keras.ops.mean(keras.ops.square(y_pred - x))
        loss += keras.ops.mean(self.hidden(2 * x) ** 2)
        self.tracker.update_state(loss)
        return loss


@pytest.mark.parametrize("graph", [False, True])
def test_overridden_compute_loss_is_honoured_one_at_a_time(graph):
    model = OwnLoss()
    model.build((None, 3))
    model.compile()
    x = zoo.floats(3)
    expected = []
    for i in range(zoo.ROWS):
        row = tf.constant(x[i : i + 1])
        with tf.GradientTape() as tape:
            loss = model.compute_loss(row, None, model(row))
        expected.append(tape.gradient(loss, [v.value for v in model.trainable_variables]))
    expected = [np.stack(c).astype("float64") for c in zip(*expected, strict=True)]
    clip = float(np.median(reference.clipped(expected, 1.0)[0]))
    model.reset_metrics()
    check_model(model, x)
    call = tf.function(clipped_gradients) if graph else clipped_gradients
    found = call(model, tf.constant(x), l2_norm_clip=clip)
    assert reference.error(found.sums, reference.clipped(expected, clip)[1]) < 1e-5
    assert explain(model).route == "general" and "compute_loss" in explain(model).why
    assert float(model.tracker.count) == 0


def test_overridden_compute_loss_with_regularizers_is_refused():
    model = OwnLoss()
    model.hidden.kernel_regularizer = keras.regularizers.L2(0.1)
    model.build((None, 3))
    model.compile()
    with pytest.raises(ValueError, match="compute_loss.*regularizers"):
        clipped_gradients(model, zoo.floats(3))


@pytest.mark.parametrize("first", [check_model, clipped_gradients])
def test_losses_that_keras_has_not_built_yet(first):
    """Several outputs have a metric each, made on first use: not inside a graph."""
    model, *data = zoo.two_outputs_shared()
    graph = tf.function(lambda: clipped_gradients(model, *data).sums)
    with pytest.raises(ValueError, match="check_model"):
        graph()
    first(model, *data)
    graph()
    assert all(float(m.count) == 0 for m in model._compile_loss.metrics)
    expected = reference.clipped(reference.gradients(model, *data)[0], 1.0)[1]
    assert reference.error(graph(), expected) < 1e-5


def test_metrics_and_compiled_loss_are_left_alone(small):
    model, x, y = small
    model.compile(loss="mse", metrics=["mae"])
    before = [v.numpy().copy() for v in model.metrics_variables]
    clipped_gradients(model, x, y)
    for v, b in zip(model.metrics_variables, before, strict=True):
        np.testing.assert_array_equal(v.numpy(), b)


def test_route_is_forgotten_when_the_model_changes(small):
    model, x, y = small
    check_model(model, x, y)
    model.layers[0].trainable = False
    found = clipped_gradients(model, x, y)
    assert len(found.sums) == 2
    model.layers[0].trainable = True
    model.layers[0].enable_lora(1)
    found = clipped_gradients(model, x, y)
    assert len(found.sums) == len(model.trainable_variables)
    assert explain(model).route == "book-keeping"
    assert [tuple(s.shape) for s in found.sums] == [
        tuple(v.shape) for v in model.trainable_variables
    ]


def test_weight_used_behind_its_layers_back_takes_the_general_path():
    @declare_row_wise
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.code = layers.Dense(2, use_bias=False, name="code")

        def build(self, shape):
            self.code.build(shape)

        def call(self, x):
            return keras.ops.matmul(self.code(x), keras.ops.transpose(self.code.kernel))

    model = Tied()
    model.build((None, 3))
    model.compile(loss="mse")
    x = zoo.floats(3)
    per_example, _ = reference.gradients(model, x, x, None)
    found = clipped_gradients(model, x, x, l2_norm_clip=0.3)
    assert reference.error(found.sums, reference.clipped(per_example, 0.3)[1]) < 1e-5
    assert "code/kernel" in explain(model).why


def test_explain_is_a_table():
    model, x, y, _ = zoo.frozen_and_masked()
    before = explain(model)
    assert before.route == "book-keeping" and "not checked" in before.why
    check_model(model, x, y)
    text = str(explain(model))
    assert "frozen" in text and "nothing to train" in text and "EmbeddingRule" in text
    assert "book-keeping path (checked against one example at a time)" in text
    text = str(explain(zoo.unknown_layer()[0]))
    assert "general" in text and "declare_row_wise" in text
    text = str(explain(zoo.by_example()[0]))
    assert "by example" in text and "ByExampleRule: no rule for Gated" in text


def test_explain_names_the_rule_of_a_cell_by_its_layer():
    model = zoo.lstm()[0]
    (cell, *_) = explain(model).rows
    assert cell[1:3] == ("LSTMCell", "book-keeping")
    assert cell[3] == f"LSTMRule of {model.layers[0].path}"


def test_frozen_layers_cost_nothing():
    model, x, y, _ = zoo.frozen_and_masked()
    found = clipped_gradients(model, x, y)
    assert len(found.sums) == len(model.trainable_variables) == 4


def test_nothing_to_train_gives_no_sums(small):
    model, x, y = small
    model.trainable = False
    found = clipped_gradients(model, x, y)
    assert found.sums == [] and np.all(np.asarray(found.norms) == 0)


@pytest.mark.parametrize("make", [zoo.mlp, zoo.two_outputs_shared, zoo.lstm, zoo.transformer])
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_two_replicas_give_the_sum_of_one_device(make, size, reduction):
    """Not scaled by the number of replicas (rule 3), whatever the reduction."""
    strategy = runs.mirrored()
    with strategy.scope():
        model, x, y, weight = make()
        if make is zoo.two_outputs_shared:
            losses = {
                "label": keras.losses.SparseCategoricalCrossentropy(reduction=reduction),
                "value": "mse",
            }
            model.compile(loss=losses, loss_weights={"label": 1.0, "value": 0.3})
    per_example, _ = reference.gradients(model, x, y, weight)
    clip = float(np.median(reference.clipped(per_example, 1.0)[0]))
    expected = reference.clipped(per_example, clip)[1]
    check_model(model, x, y, weight)

    leaves = [t for t in keras.tree.flatten((x, y, weight)) if t is not None]
    halves = strategy.experimental_distribute_values_from_function(
        lambda context: tuple(
            t[:4] if context.replica_id_in_sync_group == 0 else t[4:] for t in leaves
        )
    )

    def replica(tensors):
        rows = iter(tensors)
        data = keras.tree.map_structure(lambda t: None if t is None else next(rows), (x, y, weight))
        return clipped_gradients(model, *data, l2_norm_clip=clip, microbatch_size=size).sums

    parts = tf.function(lambda: strategy.run(replica, (halves,)))()
    parts = [strategy.experimental_local_results(s) for s in parts]
    assert reference.error([a + b for a, b in parts], expected) < 1e-5


def test_dropout_inside_microbatches_on_two_replicas():
    strategy = runs.mirrored()
    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), layers.Dropout(0.5), layers.Dense(1)])
        model.compile(loss="mse")
    x, y = tf.ones((6, 8)), tf.zeros((6, 1))

    def replica():
        return clipped_gradients(model, x, y, microbatch_size=2).norms

    norms = tf.function(lambda: strategy.run(replica))()
    norms = np.stack([n.numpy() for n in strategy.experimental_local_results(norms)])
    assert norms.shape == (2, 6) and len(np.unique(np.round(norms[0], 6))) > 3
