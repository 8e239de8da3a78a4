"""Every log of a private `fit` is that of Keras's own `fit` on the same batches.

Without noise and with a clip norm that nothing reaches, a step of a fixed order is the step of
plain SGD. What differs is then the logs' own fault.
"""

import keras
import numpy as np
import pytest
from keras import layers, metrics

import keras_bandmf as bandmf
from tests import runs
from tests.training.log_cases import (
    BATCH,
    CASES,
    EPOCHS,
    MODES,
    ROWS,
    STEPS,
    Case,
    classes,
    dense,
    draws,
    logits,
    mean_of_batch,
    two_heads,
    two_outputs_in_dict,
)


class LogsOfEachStep(keras.callbacks.Callback):
    """Records the logs of each step."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        """Copies the logs."""
        self.logs.append({name: np.asarray(value).item() for name, value in logs.items()})


def of_rows(structure, rows):
    """Returns some rows of every array of a structure."""
    return keras.tree.map_structure(lambda a: None if a is None else a[rows], structure)


def plan_of_case():
    return runs.make_plan(
        num_bands=1,
        num_steps=EPOCHS * STEPS,
        noise_multiplier=0.0,
        num_examples=ROWS,
        batch_size=BATCH,
        sampling="fixed_order",
    )


def logs_of_fit(case, optimizer, data, fitting):
    """Returns the history and the logs of each step of a new model of the case."""
    keras.utils.set_random_seed(7)
    model = case.make()
    if not model.built:
        model(of_rows(case.x, slice(0, 1)))
    if isinstance(optimizer, bandmf.BandMFOptimizer):
        bandmf.privatize(model, **case.privatize)
    case.edit(model)
    model.compile(optimizer, **keras.tree.map_structure(_copied, case.options))
    steps = LogsOfEachStep()
    history = model.fit(
        *data,
        epochs=EPOCHS,
        verbose=0,
        callbacks=[steps],
        validation_data=(case.x, case.y, case.weight) if case.validation else None,
        validation_batch_size=BATCH,
        **fitting,
    ).history
    return history, steps.logs


def _copied(option):
    """Returns a metric of its own for each model: one would count both of them."""
    if isinstance(option, metrics.Metric):
        return type(option).from_config(option.get_config())
    return option


def both_logs(case, **mode):
    """Returns (history, logs of steps) of plain and of private training on the same batches."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(case.policy or policy)
    case.options |= mode
    try:
        plan = plan_of_case()
        batches = plan.batches(case.x, case.y, case.weight, seed=3)
        order = np.concatenate([batches.indices(t) for t in range(STEPS)])
        plain = (of_rows(part, order) for part in (case.x, case.y))
        fitting = {"batch_size": BATCH, "shuffle": False}
        expected = logs_of_fit(
            case,
            keras.optimizers.SGD(case.rate),
            tuple(plain),
            fitting | {"sample_weight": of_rows(case.weight, order)},
        )
        optimizer = bandmf.BandMFOptimizer(
            keras.optimizers.SGD(case.rate), plan, l2_norm_clip=1e4, seed=1
        )
        return expected, logs_of_fit(case, optimizer, (batches,), {})
    finally:
        keras.config.set_dtype_policy(policy)


def check(expected, found, tolerance=2e-5):
    for plain, private in (
        (expected[0], found[0]),
        *zip(expected[1], found[1], strict=True),
    ):
        assert list(private) == list(plain)
        for name, values in plain.items():
            np.testing.assert_allclose(
                private[name], values, rtol=tolerance, atol=tolerance, err_msg=name
            )


# A model more of a kind that others stand for.
SLOW = {
    "convolution",
    "embedding",
    "masked_last_state",
    "masked_sequences_of_many_lengths",
    "metric_function",
    "own_compute_loss_without_compiled",
    "own_loss_class",
    "regularizer",
    "several_losses_of_three_outputs",
    "subclassed",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES],
)
def test_logs_are_those_of_keras(name):
    case = CASES[name]()
    check(*both_logs(case), tolerance=2e-2 if case.policy else 2e-5)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("xla", "dict"),
        ("xla", "masked_sequences"),
        ("xla", "softmax"),
        ("eager", "dict"),
        ("eager", "own_compute_loss"),
        ("several_steps", "dict"),
    ],
)
def test_logs_are_those_of_keras_in_other_modes(mode, name):
    check(*both_logs(CASES[name](), **MODES[mode]))


def test_validation_takes_the_batch_size_of_rows_as_keras_does():
    """Keras takes the mean over batches of the losses of outputs, so that their size shows."""
    case = two_outputs_in_dict()
    case.options["metrics"] = case.options["weighted_metrics"] = None
    model, histories = case.make(), []
    data = {"validation_data": (case.x, case.y), "batch_size": BATCH, "epochs": 1, "verbose": 0}
    for private in (False, True):
        optimizer = keras.optimizers.SGD(0.0)
        if private:
            optimizer = bandmf.BandMFOptimizer(optimizer, plan_of_case(), l2_norm_clip=1.0)
            bandmf.privatize(model)
        model.compile(optimizer, **case.options)
        histories.append(model.fit(case.x, case.y, **data).history)
    for name in ("val_loss", "val_size_loss", "val_kind_loss"):
        np.testing.assert_allclose(histories[1][name], histories[0][name], rtol=1e-5)


@pytest.mark.parametrize("mode", ["compiled", "eager", "xla"])
def test_an_incomplete_batch_of_the_users_own_order(mode):
    """The last batch of an epoch has two rows: Keras weighs batches of an output alike, or not."""
    case = two_outputs_in_dict()
    case.options |= MODES[mode]
    case.rate, case.validation = 0.0, False
    plan = runs.make_plan(
        num_bands=1,
        num_steps=EPOCHS * (STEPS + 1),
        noise_multiplier=0.0,
        num_examples=ROWS,
        batch_size=BATCH,
        sampling="fixed_order",
        max_participations=EPOCHS,
        min_separation=STEPS + 1,
    )
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(0.0), plan, l2_norm_clip=1e4, seed=1)
    data = {"batch_size": BATCH, "sample_weight": case.weight}
    expected, found = (
        logs_of_fit(case, each, (case.x, case.y), data | {"shuffle": False})
        for each in (keras.optimizers.SGD(0.0), optimizer)
    )
    check(expected, found)


def test_class_weights_reach_weighted_metrics():
    case = Case(
        dense(5, 3), draws(4), classes(3), loss=logits(), weighted_metrics=["accuracy"], rate=0.2
    )
    by_class = {0: 0.5, 2: 3.0}
    plan = plan_of_case()
    batches = plan.batches(case.x, case.y, class_weight=by_class, seed=3)
    order = np.concatenate([batches.indices(t) for t in range(STEPS)])
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(0.2), plan, l2_norm_clip=1e4, seed=1)
    expected = logs_of_fit(
        case,
        keras.optimizers.SGD(0.2),
        (case.x[order], case.y[order]),
        {"batch_size": BATCH, "shuffle": False, "class_weight": by_class},
    )
    check(expected, logs_of_fit(case, optimizer, (batches,), {}))


@pytest.mark.parametrize("mode", ["compiled", "eager"])
@pytest.mark.parametrize("loss", ["mse", mean_of_batch], ids=["mse", "one_number"])
def test_steps_without_examples_change_no_log(mode, loss):
    """The size of sampled batches varies. A function of one number is NaN for an empty batch."""
    plan = runs.make_plan(
        num_bands=1, num_steps=12, noise_multiplier=0.0, num_examples=12, batch_size=1
    )
    case = Case(two_heads(), draws(4)[:12], [draws(1)[:12], draws(3, seed=5)[:12]])
    batches = plan.batches(case.x, case.y, seed=3)
    drawn = [batches.indices(t) for t in range(12)]
    assert min(map(len, drawn)) == 0 and max(map(len, drawn)) > 1
    model = bandmf.privatize(case.make())
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(0.0), plan, l2_norm_clip=1e4, seed=1)
    model.compile(optimizer, loss, metrics=[["mae", mean_of_batch], []], **MODES[mode])
    history = model.fit(batches, epochs=1, verbose=0).history
    errors = [a - b for a, b in zip(model.predict(case.x, verbose=0), case.y, strict=True)]
    squares = [np.mean(e**2, axis=-1) for e in errors]
    seen = np.concatenate(drawn)
    expected = {"loss": sum(squares)[seen].mean(), "size_mae": np.abs(errors[0])[seen].mean()}
    # Where Keras does not know the number of rows while it traces, each batch counts once.
    over = [d for d in drawn if len(d)] if mode == "compiled" else [seen]
    for name, of_output in zip(("size", "kind"), squares, strict=True):
        expected[f"{name}_loss"] = np.mean([of_output[d].mean() for d in over])
    expected["size_mean_of_batch"] = np.mean([squares[0][d].mean() for d in drawn if len(d)])
    assert set(history) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(history[name], value, rtol=1e-4, err_msg=name)


class Remembers(keras.Model):
    """Keeps a running mean of its outputs in the loss, and reads it there at the next step."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)
        self.center = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        """Applies the layer."""
        return self.dense(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Adds the mean of this batch to that of earlier ones."""
        value = keras.ops.mean(keras.ops.square(y_pred - y)) + self.center
        self.center.assign(0.9 * self.center + 0.1 * keras.ops.mean(y_pred))
        return value


@pytest.mark.parametrize("mode", ["compiled", "eager", "xla"])
def test_what_a_loss_keeps_of_private_rows_is_dropped(mode):
    """Logs are computed by the user's own `compute_loss`, whose other effects must not happen."""
    model = bandmf.privatize(Remembers())
    plan = plan_of_case()
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(0.1), plan, l2_norm_clip=1.0, seed=1)
    model.compile(optimizer, **MODES[mode])
    history = model.fit(plan.batches(draws(4), draws(2)), epochs=1, verbose=0).history
    assert float(model.center.value) == 0.0
    assert history["loss"][0] > 0.0
