"""What a pass reads, writes and draws: constants, seeds and weights, or it is refused (rule 17)."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import keras_bandmf as bandmf
from keras_bandmf.clipping import MaskSeeds, check_model, clipped_gradients
from tests import runs

X = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(5, 2)).astype("float32")


def model_of(*middle, loss="mse"):
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(6, name="before"), *middle, layers.Dense(2, name="after")]
    )
    model.compile(loss=loss)
    return model


def clipped(model, loss=None):
    """In a graph: eagerly there is nothing to look into, and `check_model` has to do."""
    key = tf.Variable([3, 4], dtype=tf.int64)

    def run():
        seeds = MaskSeeds(key.read_value(), tf.constant(0, tf.int64))
        return clipped_gradients(model, X, Y, loss=loss, mask_seeds=seeds).sums

    return tf.function(run, autograph=False)()


def in_check(model, loss=None):
    check_model(model, X, Y, loss=loss)


BOTH = pytest.mark.parametrize("call", [in_check, clipped])


class Metered(layers.Layer):
    """Writes a metric; reads it where asked."""

    def __init__(self, read, weights=False, **kwargs):
        super().__init__(**kwargs)
        self.read, self.own = read, weights
        self.mean = keras.metrics.Mean(name="activation")

    def build(self, shape):
        if self.own:  # no rule: the general path
            self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        if self.own:
            x = x * self.scale
        self.mean.update_state(x)
        return x - 1e-3 * self.mean.result() if self.read else x


@BOTH
@pytest.mark.parametrize("own", [False, True])
def test_a_layer_that_reads_its_metric_is_refused(call, own):
    with pytest.raises(ValueError, match="metric holds data.*(total|count)"):
        call(model_of(Metered(True, own)))


@BOTH
@pytest.mark.parametrize("own", [False, True])
def test_a_layer_that_only_writes_its_metric_is_fine(call, own):
    model = model_of(Metered(False, own))
    call(model)


class ReadsBehindABranch(Metered):
    """Under a condition that the data at hand do not meet."""

    def call(self, x):
        self.mean.update_state(x)
        result = self.mean.result
        return ops.cond(ops.max(x) > 1e6, lambda: x * result(), lambda: x)


class WritesBehindABranch(layers.Layer):
    def __init__(self):
        super().__init__()
        self.kept = tf.Variable(0.0, trainable=False, name="kept")

    def call(self, x):
        def write():
            with tf.control_dependencies([self.kept.assign_add(1.0)]):
                return tf.identity(x)

        return tf.cond(tf.reduce_max(x) > 1e6, write, lambda: x)


class WritesInALoop(WritesBehindABranch):
    def call(self, x):
        def body(i, x):
            with tf.control_dependencies([self.kept.assign_add(1.0)]):
                return i + 1, tf.identity(x)

        return tf.while_loop(lambda i, x: i < 2, body, (0, x))[1]


class WritesInAFunction(WritesBehindABranch):
    def call(self, x):
        @tf.function
        def write(x):
            self.kept.assign_add(1.0)
            return 2.0 * x

        return write(x)


@BOTH
def test_reads_and_writes_under_conditions_are_found(call):
    with pytest.raises(ValueError, match="metric holds data"):
        call(model_of(ReadsBehindABranch(True)))
    for layer in (WritesBehindABranch, WritesInALoop, WritesInAFunction):
        with pytest.raises(ValueError, match="may write no variable.*kept"):
            call(model_of(layer()))


class RunningMaximum(keras.losses.Loss):
    """Divides by the largest error of all steps so far."""

    def __init__(self, make):
        super().__init__()
        self.largest = make(1.0, trainable=False, name="largest")

    def call(self, y, p):
        error = ops.mean(ops.square(p - y), axis=-1)
        self.largest.assign(ops.maximum(self.largest, ops.max(error)))
        return error / self.largest


@BOTH
@pytest.mark.parametrize("own", [False, True])
def test_a_loss_that_keeps_a_variable_is_refused(call, own):
    loss = RunningMaximum(tf.Variable)
    model = model_of(Metered(False, own), loss=loss)
    with pytest.raises(ValueError, match="may write no variable.*largest"):
        call(model)
    assert float(loss.largest) == 1.0


def test_a_loss_with_a_variable_of_keras_never_writes_it():
    """What a loss writes to variables of Keras is dropped: it stays constant."""
    loss = RunningMaximum(keras.Variable)
    clipped(model_of(loss=loss))
    # This one couples rows besides.
    with pytest.raises(ValueError, match="sum over examples"):
        in_check(model_of(loss=loss))
    assert float(loss.largest) == 1.0


@BOTH
def test_a_loss_that_reads_a_metric_is_refused(call):
    metric = keras.metrics.Mean(name="spread")
    layer = Metered(False)
    layer.mean = metric

    def loss(y, p):
        return ops.mean(ops.square(p - y), axis=-1) * (1.0 + metric.result())

    with pytest.raises(ValueError, match="metric holds data"):
        call(model_of(layer, loss=loss))


def python_op(x):
    return tf.ensure_shape(tf.numpy_function(lambda a: a, [x], tf.float32), x.shape)


def queue_op(x):
    queue = tf.queue.FIFOQueue(10, [tf.float32])
    with tf.control_dependencies([queue.enqueue(tf.reduce_sum(x))]):
        return tf.identity(x)


def stateless_python_op(x):
    """Calls Python, and says that it does not matter."""
    y = tf.numpy_function(lambda a: a, [x], tf.float32, stateful=False)
    return tf.ensure_shape(y, x.shape)


@tf.nondifferentiable_batch_function(2, 2, 1000, autograph=False)
def _of_several_calls(x):
    return x + tf.reduce_sum(x)


def several_calls_op(x):
    """Sums what several calls bring."""
    return x + tf.ensure_shape(_of_several_calls(tf.stop_gradient(x)), x.shape)


@BOTH
@pytest.mark.parametrize("function", [python_op, queue_op, stateless_python_op, several_calls_op])
def test_operations_that_hide_a_state_are_refused(call, function):
    with pytest.raises(ValueError, match="out of sight"):
        call(model_of(layers.Lambda(function)))


@BOTH
def test_a_mutable_table_is_refused(call):
    table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.0)

    def keep(x):
        with tf.control_dependencies([table.insert(tf.constant([1], tf.int64), x[0, :1])]):
            return tf.identity(x)

    with pytest.raises(ValueError, match="may write no variable.*table"):
        call(model_of(layers.Lambda(keep)))


@BOTH
def test_constants_and_printing_are_fine(call):
    constant, variable = tf.constant(2.0), tf.Variable(3.0, trainable=False)
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([1], [2.0]), 0.0)

    def scale(x):
        tf.print(tf.reduce_sum(x), output_stream="file:///dev/null")
        return x * constant * variable * table.lookup(tf.constant(1))

    frozen = layers.BatchNormalization(trainable=False)
    call(model_of(layers.Lambda(scale), frozen, layers.Dropout(0.1)))


def test_connectionist_temporal_classification_trains():
    """Its gradient starts from `Empty`, which is filled with zeros there."""
    x = np.random.default_rng(2).normal(size=(5, 6, 4)).astype("float32")
    y = np.random.default_rng(3).integers(1, 4, size=(5, 2)).astype("int32")
    model = keras.Sequential([keras.Input((6, 4)), layers.Dense(5)])
    model.compile(loss=keras.losses.CTC())
    check_model(model, x, y)
    seeds = MaskSeeds(tf.constant([3, 4], tf.int64), tf.constant(0, tf.int64))
    run = tf.function(lambda x, y: clipped_gradients(model, x, y, mask_seeds=seeds).sums)
    assert all(np.any(s) and np.all(np.isfinite(s)) for s in run(x, y))


def test_memory_that_nobody_filled_is_refused():
    def add(x):
        return x + tf.raw_ops.Empty(shape=[1], dtype=tf.float32, init=False)

    with pytest.raises(ValueError, match="Empty"):
        check_model(model_of(layers.Lambda(add)), X, Y)


def test_a_model_that_cannot_be_traced_is_refused():
    class Looks(layers.Layer):
        def compute_output_shape(self, shape):
            return shape

        def call(self, x):
            return x * (2.0 if float(x[0, 0]) > 0 else 1.0)

    class Eager(keras.Model):
        def __init__(self):
            super().__init__()
            self.looks, self.head = Looks(), layers.Dense(2)

        def build(self, shape):
            self.head.build(shape)

        def call(self, x):
            return self.head(self.looks(x))

    model = Eager()
    model.build((None, 6))
    model.compile(loss="mse", run_eagerly=True)
    with pytest.raises(ValueError, match="forward pass must be traceable"):
        check_model(model, X, Y)


def test_python_state_of_an_eager_run_is_out_of_sight():
    """Documented, not promised: Python code runs once while a graph is traced."""
    kept = []
    model = model_of(layers.Lambda(lambda x: (kept.append(1), x)[1]))
    check_model(model, X, Y)
    assert kept


@pytest.mark.parametrize("reader", ["loss", "layer", "nobody"])
@pytest.mark.parametrize("way", ["plain", "branch", "function"])
def test_what_a_metric_function_writes_is_not_read(reader, way):
    """Here the largest label of earlier steps, without noise."""
    kept = tf.Variable(0.0, trainable=False, name="kept")

    def write(y):
        kept.assign(tf.maximum(kept, tf.reduce_max(tf.abs(y))))
        return 0.0

    def metric(y, y_pred):
        if way == "plain":
            write(y)
        elif way == "branch":
            tf.cond(tf.reduce_max(y) > 0.0, lambda: write(y), lambda: 0.0)
        else:
            tf.function(write)(y)
        return tf.abs(y - y_pred)

    def loss(y, y_pred):
        scale = 1.0 / (1.0 + kept) if reader == "loss" else 1.0
        return tf.reduce_mean(tf.square(scale * y - y_pred), axis=-1)

    plan = runs.make_plan()
    middle = layers.Lambda(lambda x: x * kept if reader == "layer" else x * 1.0)
    model = bandmf.privatize(keras.Sequential([keras.Input((6,)), middle, layers.Dense(2)]))
    runs.compiled(model, plan, loss=loss, metrics=[metric])
    random = np.random.default_rng(0)
    x, y = (random.normal(size=(96, n)).astype("float32") for n in (6, 2))
    refused = pytest.raises(ValueError, match="holds data of earlier steps.*kept")
    with contextlib.nullcontext() if reader == "nobody" else refused:
        model.fit(plan.batches(x, y), epochs=1, steps_per_epoch=1, verbose=0)


def test_metrics_of_python_code_and_of_keras_go_on():
    def metric(y, y_pred):
        found = tf.numpy_function(lambda a, b: np.abs(a - b).mean(), [y, y_pred], tf.float32)
        return tf.ensure_shape(found, [])

    model = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    # On GPUs Keras's "auto" is XLA, which has no Python code.
    metrics = [metric, "mae", keras.metrics.AUC()]
    model.compile(loss="mse", metrics=metrics, jit_compile=False)
    model.evaluate(X, np.abs(Y) / 10, verbose=0)
    check_model(model, X, np.abs(Y) / 10)
