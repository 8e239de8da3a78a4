"""Varied models and their data, whose logs under a private `fit` are compared with Keras's."""

import keras
import numpy as np
from keras import layers, losses, metrics

import keras_bandmf as bandmf

ROWS, BATCH, EPOCHS = 26, 8, 2
STEPS = ROWS // BATCH  # of an epoch; the last two rows never take part, and are padding at most
MODES = {
    "compiled": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "several_steps": {"steps_per_execution": 3},
}


class Case:
    """A model and how to train it: everything that plain and private `fit` share."""

    def __init__(self, make, x, y=None, weight=None, rate=0.1, validation=False, **options):
        self.make, self.x, self.y, self.weight = make, x, y, weight
        self.rate, self.validation, self.options = rate, validation, options
        self.policy = None
        self.privatize = {}
        self.edit = lambda model: None


def draws(*shape, seed=0):
    """Normal numbers, a row an example."""
    return np.random.default_rng(seed).normal(size=(ROWS, *shape)).astype(np.float32)


def classes(count, *shape, seed=1):
    """Class numbers."""
    return np.random.default_rng(seed).integers(0, count, (ROWS, *shape))


def weights(*shape, seed=2):
    """Weights, some of them zero."""
    drawn = np.random.default_rng(seed).uniform(0, 2, (ROWS, *shape)).astype(np.float32)
    return np.where(drawn < 0.3, 0.0, drawn).astype(np.float32)


def tokens(equal=False):
    """Sequences of tokens, 0 for padding: of one length, or of any, none included."""
    rng = np.random.default_rng(3)
    x = rng.integers(1, 9, (ROWS, 5)).astype(np.int32)
    lengths = np.full(ROWS, 3) if equal else rng.integers(0, 6, ROWS)
    x[np.arange(5)[None] >= lengths[:, None]] = 0
    return x


def dense(*units, activation=None, **options):
    """A function that makes a stack of dense layers."""

    def make():
        inner = [layers.Dense(n, activation="tanh", **options) for n in units[:-1]]
        last = layers.Dense(units[-1], activation=activation, **options)
        return keras.Sequential([keras.Input((4,)), *inner, last])

    return make


def two_heads(form=list, last=None):
    """A function that makes a model with two outputs, in a list or a dict."""

    def make():
        inputs = keras.Input((4,))
        body = layers.Dense(5, activation="tanh")(inputs)
        size = layers.Dense(1, name="size")(body)
        kind = layers.Dense(3, name="kind", activation=last)(body)
        return keras.Model(inputs, [size, kind] if form is list else {"size": size, "kind": kind})

    return make


def two_inputs():
    """A functional model with two inputs."""
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    joined = layers.Concatenate()([layers.Dense(3, activation="relu")(a), b])
    return keras.Model({"a": a, "b": b}, layers.Dense(1)(joined))


def recurrent(sequences):
    """A function that makes a recurrent model of masked tokens."""

    def make():
        inputs = keras.Input((5,), dtype="int32")
        x = layers.Embedding(9, 4, mask_zero=True)(inputs)
        x = layers.LSTM(3, return_sequences=sequences)(x)
        return keras.Model(inputs, layers.Dense(3)(x))

    return make


@bandmf.clipping.declare_row_wise
class Subclassed(keras.Model):
    """Two outputs in a dict, from a call of its own."""

    def __init__(self):
        super().__init__()
        self.body = layers.Dense(6, activation="tanh")
        self.heads = [layers.Dense(1), layers.Dense(3)]

    def call(self, inputs):
        """Returns a dict of outputs from a dict of inputs."""
        hidden = self.body(inputs["features"])
        return {"size": self.heads[0](hidden), "kind": self.heads[1](hidden)}


class OwnLoss(keras.Model):
    """Overrides `compute_loss`, and keeps a metric of it."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)
        self.errors = metrics.Mean(name="errors")

    def call(self, inputs):
        """Applies the layer."""
        return self.dense(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Adds a penalty that reads x to what Keras computes."""
        usual = super().compute_loss(x, y, y_pred, sample_weight)
        errors = keras.ops.mean(keras.ops.abs(y_pred - x[:, :2]), axis=-1)
        self.errors.update_state(errors)
        return usual + keras.ops.mean(errors)


class OwnLossAlone(OwnLoss):
    """Does not ask Keras for its loss, as the documentation of Keras does not either."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Takes the losses of the layers itself."""
        value = keras.ops.mean(keras.ops.square(y_pred - y))
        self.errors.update_state(value)
        return value + keras.ops.sum(self.losses)


@keras.saving.register_keras_serializable(package="keras_bandmf_tests")
class Bias(metrics.Metric):
    """A metric written from scratch."""

    def __init__(self, name="bias", **options):
        super().__init__(name=name, **options)
        self.total = self.add_weight(name="total", initializer="zeros")
        self.rows = self.add_weight(name="rows", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds up errors."""
        errors = keras.ops.reshape(y_pred, [-1]) - keras.ops.reshape(y_true, [-1])
        self.total.assign_add(keras.ops.sum(errors))
        self.rows.assign_add(keras.ops.cast(keras.ops.size(errors), "float32"))

    def result(self):
        """Returns their mean."""
        return self.total / self.rows


class AbsoluteError(losses.Loss):
    """A loss written from scratch."""

    def call(self, y_true, y_pred):
        """Returns a loss for each row."""
        return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)


def squared(y_true, y_pred):
    """A loss that is a function."""
    return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


def mean_of_batch(y_true, y_pred):
    """A loss, or a metric, that returns one number for a batch."""
    return keras.ops.mean(keras.ops.square(y_true - y_pred))


def logits():
    """Cross-entropy of class numbers from logits."""
    return losses.SparseCategoricalCrossentropy(from_logits=True)


def _in_bfloat16():
    case = Case(dense(5, 1), draws(4), draws(1), loss="mse", metrics=["mae"])
    case.policy = "mixed_bfloat16"
    return case


def _in_microbatches():
    case = two_outputs_in_dict()
    case.privatize = {"microbatch_size": 3}
    return case


def _own_compute_metrics():
    case = Case(dense(5, 1), draws(4), draws(1), loss="mse", metrics=["mae"])

    def edit(model):
        inner, seen = model.compute_metrics, metrics.Mean(name="seen")

        def compute_metrics(x, y, y_pred, sample_weight=None):
            logs = inner(x, y, y_pred, sample_weight)
            seen.update_state(x)
            return {**logs, "seen": seen.result()}

        model.compute_metrics = compute_metrics

    case.edit = edit
    return case


def two_outputs_in_dict():
    return Case(
        two_heads(dict),
        draws(4),
        {"size": draws(1), "kind": classes(3)},
        {"size": weights(), "kind": weights(seed=5)},
        loss={"size": "mse", "kind": logits()},
        loss_weights={"size": 0.3, "kind": 2.0},
        metrics={"size": ["mae"], "kind": ["accuracy"]},
        weighted_metrics={"kind": ["accuracy"], "size": [Bias()]},
        validation=True,
    )


CASES = {
    "one_output": lambda: Case(dense(5, 1), draws(4), draws(1), loss="mse", metrics=["mae", "mse"]),
    "sample_weight": lambda: Case(
        dense(1),
        draws(4),
        draws(1),
        weights(),
        loss="mae",
        metrics=["mse"],
        weighted_metrics=["mse"],
    ),
    "validation": lambda: Case(
        dense(5, 3), draws(4), classes(3), loss=logits(), metrics=["accuracy"], validation=True
    ),
    "softmax": lambda: Case(
        dense(3, activation="softmax"),
        200 * draws(4),
        classes(3),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy", "sparse_categorical_crossentropy"],
        rate=1e-3,
    ),
    "sigmoid": lambda: Case(
        dense(2, activation="sigmoid"),
        100 * draws(4),
        classes(2, 2).astype(np.float32),
        loss="binary_crossentropy",
        metrics=[metrics.BinaryCrossentropy(), metrics.AUC(), "accuracy"],
        rate=1e-3,
    ),
    "dict": two_outputs_in_dict,
    "list": lambda: Case(
        two_heads(),
        draws(4),
        [draws(1), classes(3)],
        loss=["mse", logits()],
        metrics=[["mae"], ["accuracy"]],
    ),
    "list_with_loss_weights_and_one_weight": lambda: Case(
        two_heads(),
        draws(4),
        [draws(1), draws(3)],
        weights(),
        loss=["mse", "mse"],
        loss_weights=[3.0, 0.5],
        weighted_metrics=[["mae"], ["mse"]],
    ),
    "none_for_an_output": lambda: Case(
        two_heads(dict),
        draws(4),
        {"size": draws(1), "kind": classes(3)},
        loss={"size": "mse", "kind": None},
        metrics={"kind": ["accuracy"]},
    ),
    "several_losses_of_three_outputs": lambda: Case(
        two_heads(dict, "softmax"),
        draws(4),
        {"size": draws(1), "kind": classes(3)},
        loss={"size": losses.Huber(), "kind": "sparse_categorical_crossentropy"},
    ),
    "sum": lambda: Case(
        two_heads(),
        draws(4),
        [draws(1), draws(3)],
        loss=[losses.MeanSquaredError(reduction="sum"), losses.MeanAbsoluteError(reduction="sum")],
        rate=0.0,
    ),
    "regularizer": lambda: Case(
        dense(5, 1, kernel_regularizer="l2", bias_regularizer="l1"), draws(4), draws(1), loss="mse"
    ),
    "regularizer_and_two_outputs": lambda: Case(
        lambda: _regularized_heads(), draws(4), [draws(1), draws(3)], loss=["mse", "mae"]
    ),
    "masked_last_state": lambda: Case(
        recurrent(False), tokens(), classes(3), loss=logits(), metrics=["accuracy"]
    ),
    "masked_sequences": lambda: Case(
        recurrent(True),
        tokens(equal=True),
        classes(3, 5),
        loss=logits(),
        metrics=["accuracy"],
        weighted_metrics=["accuracy", metrics.SparseCategoricalCrossentropy(from_logits=True)],
    ),
    "masked_sequences_of_many_lengths": lambda: Case(
        recurrent(True),
        tokens(),
        classes(3, 5),
        weights(5),
        loss=logits(),
        weighted_metrics=["accuracy"],
        rate=0.0,  # the trained loss of a row is divided by its own tokens, not by the batch's
    ),
    "temporal_weights": lambda: Case(
        lambda: keras.Sequential([keras.Input((5, 2)), layers.SimpleRNN(3, return_sequences=True)]),
        draws(5, 2),
        draws(5, 3),
        weights(5),
        loss="mse",
        metrics=["mae"],
        weighted_metrics=["mae"],
    ),
    "ignored_class": lambda: Case(
        dense(5, 3),
        draws(4),
        classes(3),
        loss=losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1),
        rate=0.0,  # as above
    ),
    "own_metric": lambda: Case(dense(1), draws(4), draws(1), loss="mse", metrics=[Bias(), "mae"]),
    "metric_function": lambda: Case(
        dense(1), draws(4), draws(1), weights(), loss="mse", metrics=[squared, mean_of_batch]
    ),
    "loss_function": lambda: Case(dense(1), draws(4), draws(1), loss=squared),
    "loss_of_one_number": lambda: Case(dense(1), draws(4), draws(1), loss=mean_of_batch),
    "own_loss_class": lambda: Case(dense(1), draws(4), draws(1), weights(), loss=AbsoluteError()),
    "two_inputs": lambda: Case(
        two_inputs, {"a": draws(4), "b": draws(2)}, draws(1), loss="mse", metrics=["mae"]
    ),
    "subclassed": lambda: Case(
        Subclassed,
        {"features": draws(4)},
        {"size": draws(1), "kind": classes(3)},
        loss={"size": "mse", "kind": logits()},
        metrics={"kind": ["accuracy"]},
    ),
    "own_compute_loss": lambda: Case(
        OwnLoss, draws(4), draws(2), weights(), loss="mse", metrics=["mae"], rate=0.01
    ),
    "own_compute_loss_without_compiled": lambda: Case(
        OwnLossAlone, draws(4), draws(2), metrics=["mae"], rate=0.01
    ),
    "own_compute_metrics": _own_compute_metrics,
    "bfloat16": _in_bfloat16,
    "microbatches": _in_microbatches,
    "convolution": lambda: Case(
        lambda: keras.Sequential(
            [keras.Input((6, 6, 1)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(3)]
        ),
        draws(6, 6, 1),
        classes(3),
        loss=logits(),
        metrics=["accuracy", metrics.SparseTopKCategoricalAccuracy(2)],
    ),
    "embedding": lambda: Case(
        lambda: keras.Sequential(
            [
                keras.Input((5,), dtype="int32"),
                layers.Embedding(9, 3),
                layers.GlobalAveragePooling1D(),
                layers.Dense(1, activation="sigmoid"),
            ]
        ),
        tokens(),
        classes(2),
        loss="binary_crossentropy",
        metrics=["accuracy", metrics.Precision(), metrics.Recall()],
    ),
}


def _regularized_heads():
    inputs = keras.Input((4,))
    body = layers.Dense(5, kernel_regularizer="l2")(inputs)
    heads = [layers.Dense(1, name="size")(body), layers.Dense(3, name="kind")(body)]
    return keras.Model(inputs, heads)
