"""A private `fit`, in every execution mode: batches, noise, budget, refusals."""

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import keras_bandmf as bandmf
from tests import runs

MODES = {
    "compiled": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "several_steps": {"steps_per_execution": 3},
}


@pytest.mark.parametrize(
    ("mode", "replicas"),
    [("compiled", 1), ("eager", 1), ("xla", 1), ("compiled", 2), ("xla", 2)],
)
def test_noise_has_the_covariance_of_the_mechanism(mode, replicas):
    """Chi-square over all pairs of steps, false-alarm rate 1e-4 each."""
    steps = 24 if mode == "eager" else 64  # an eager step costs as much as ten compiled ones
    plan = runs.make_plan(num_bands=6, num_steps=steps, noise_multiplier=2.0)
    model = runs.compiled_in_scope(replicas, runs.noise_model, plan, **MODES[mode])
    updates = runs.fit(model, plan.batches(*runs.noise_data()), epochs=6)
    assert updates.shape == (steps, 2000)
    statistic, degrees = runs.whitened_statistic(plan, updates)
    assert statistic < scipy.stats.chi2.isf(1e-4, degrees)
    # The test sees it if the rows are taken for independent ones.
    identity = runs.make_plan(num_bands=1, num_steps=steps, noise_multiplier=2.0)
    assert runs.whitened_statistic(identity, updates)[0] > scipy.stats.chi2.isf(1e-4, degrees)


@pytest.mark.parametrize(
    ("mode", "replicas"), [*((mode, 1) for mode in MODES), ("compiled", 2), ("eager", 2)]
)
def test_every_step_sees_its_batch_once_and_divides_by_the_expected_size(mode, replicas):
    """Rules 2, 5 and 8: the counting model's update is 1/8 for each participant, else nothing."""
    plan = runs.make_plan(noise_multiplier=5e-7)
    model = runs.compiled_in_scope(replicas, runs.counting_model, plan, **MODES[mode])
    batches = plan.batches(*runs.counting_data(), seed=5)
    steps = 12 if mode == "eager" else 24
    recorded = runs.fit(model, batches, steps_per_epoch=steps // 2)
    expected = np.zeros((steps, 96))
    for step in range(steps):
        expected[step, batches.indices(step)] = 1 / 8
    if mode == "several_steps":
        expected = expected.reshape(8, 3, 96).sum(axis=1)
    assert len({len(batches.indices(step)) for step in range(steps)}) > 3
    np.testing.assert_allclose(recorded, expected, atol=1e-6)


def test_steps_per_execution_on_two_replicas_is_refused():
    """Keras itself fails there; half a collective would hang."""
    plan = runs.make_plan()
    model = runs.compiled_in_scope(2, runs.counting_model, plan, steps_per_execution=3)
    with pytest.raises(ValueError, match="steps_per_execution"):
        model.fit(plan.batches(*runs.counting_data()), verbose=0, epochs=1)


def test_two_replicas_train_to_the_same_weights_as_one():
    plan = runs.make_plan()
    x, y = runs.regularized_data()

    def make():
        model = bandmf.privatize(runs.regularized_model(300))
        return runs.compiled(model, plan, inner="adam", loss="mse", metrics=["mae"])

    weights, histories = [], []
    for replicas in (1, 2):
        model = runs.in_scope(replicas, make)
        history = model.fit(plan.batches(x, y), epochs=2, verbose=0)
        weights.append([w.numpy() for w in model.trainable_variables])
        histories.append(history.history)
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(two, one, atol=2e-5)
    for name in ("loss", "mae"):
        np.testing.assert_allclose(histories[1][name], histories[0][name], rtol=1e-4)


def test_microbatches_change_nothing_but_memory():
    """Rule 8: noise and sums do not depend on how the batch is computed."""
    plan = runs.make_plan()
    results = []
    for microbatch_size in (None, 3):
        model = runs.counting_model()
        bandmf.privatize(model, microbatch_size=microbatch_size)
        runs.compiled(model, plan)
        results.append(runs.fit(model, plan.batches(*runs.counting_data())))
    np.testing.assert_allclose(results[1], results[0], atol=1e-6)


def test_metrics_see_unpadded_rows_only():
    """Rule 3: the accuracy and loss of the history are those of the drawn rows."""
    plan = runs.make_plan(noise_multiplier=1e-7, num_steps=12)
    x, y = runs.counting_data()
    model = runs.counting_model()
    runs.compiled(model, plan, loss="mse", metrics=["mse", keras.metrics.MeanAbsoluteError()])
    model.optimizer.learning_rate = 0.0
    batches = plan.batches(x, np.arange(96, dtype=np.float32), seed=2)
    history = model.fit(batches, epochs=1, verbose=0).history
    drawn = np.concatenate([batches.indices(step) for step in range(12)])
    np.testing.assert_allclose(history["mean_absolute_error"][0], drawn.mean(), rtol=1e-5)
    np.testing.assert_allclose(history["mse"][0], (drawn**2.0).mean(), rtol=1e-5)
    np.testing.assert_allclose(history["loss"][0], (drawn**2.0).mean(), rtol=1e-5)


def test_regularizers_act_after_the_noise_and_unclipped():
    plan = runs.make_plan(noise_multiplier=1e-7, num_steps=1, num_bands=1)
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(3, use_bias=False, kernel_regularizer="l2")]
    )
    start = model.layers[0].kernel.numpy() * 100
    model.layers[0].kernel.assign(start)
    runs.compiled(bandmf.privatize(model), plan)
    history = model.fit(plan.batches(*runs.noise_data()), epochs=1, steps_per_epoch=1, verbose=0)
    np.testing.assert_allclose(model.layers[0].kernel.numpy(), start * (1 - 0.02), rtol=1e-4)
    np.testing.assert_allclose(history.history["loss"], 0.01 * (start**2).sum(), rtol=1e-4)


def test_fit_ends_at_the_last_step_and_then_refuses():
    """Rule 8: step n + 1 is an error."""
    plan = runs.make_plan(num_steps=17)
    model = runs.compiled(runs.counting_model(), plan)
    batches = plan.batches(*runs.counting_data())
    assert len(runs.fit(model, batches, epochs=5)) == 17
    before = model.get_weights()[0]
    with pytest.raises(ValueError, match="17 steps"):
        model.fit(batches, epochs=1, verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], before)


def test_a_second_fit_goes_on_where_the_first_ended():
    plan = runs.make_plan(noise_multiplier=5e-7)
    whole = runs.compiled(runs.counting_model(), plan)
    expected = runs.fit(whole, plan.batches(*runs.counting_data()))
    model = runs.compiled(runs.counting_model(), plan)
    batches = plan.batches(*runs.counting_data())
    parts = [
        runs.fit(model, batches, epochs=1, steps_per_epoch=5),
        runs.fit(model, batches, epochs=1, steps_per_epoch=7),
        runs.fit(model, plan.batches(*runs.counting_data()), epochs=1),
    ]
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_compile_may_come_first_and_models_may_be_unbuilt():
    plan = runs.make_plan()
    model = keras.Sequential([keras.layers.Dense(4, activation="relu"), keras.layers.Dense(1)])
    runs.compiled(model, plan, loss="mse")
    bandmf.privatize(model)
    x, y = runs.counting_data()
    history = model.fit(
        plan.batches(x, y[:, None]), epochs=2, verbose=0, validation_data=(x, y[:, None])
    )
    assert np.isfinite(history.history["val_loss"]).all()


@bandmf.clipping.declare_row_wise
class Subclassed(keras.Model):
    """A model with two outputs in a dict and its own call."""

    def __init__(self):
        super().__init__()
        self.body = keras.layers.Dense(6, activation="tanh")
        self.drop = keras.layers.Dropout(0.5)
        self.heads = [keras.layers.Dense(1), keras.layers.Dense(3)]

    def call(self, inputs, training=False):
        """Returns a dict of outputs from a dict of inputs."""
        hidden = self.drop(self.body(inputs["features"]), training=training)
        return {"value": self.heads[0](hidden), "kind": self.heads[1](hidden)}


@pytest.mark.parametrize("mode", ["compiled", "eager", "xla"])
def test_subclassed_model_with_dicts_two_outputs_and_weights(mode):
    plan = runs.make_plan()
    model = bandmf.privatize(Subclassed())
    runs.compiled(
        model,
        plan,
        inner="adam",
        loss={
            "value": "mse",
            "kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        },
        metrics={"kind": ["accuracy"]},
        **MODES[mode],
    )
    rng = np.random.default_rng(0)
    x = {"features": rng.normal(size=(96, 4)).astype(np.float32)}
    y = {"value": x["features"][:, :1], "kind": rng.integers(0, 3, 96)}
    weights = {"value": np.ones(96, np.float32), "kind": rng.uniform(0, 2, 96).astype(np.float32)}
    batches = plan.batches(x, y, weights)
    history = model.fit(batches, epochs=2, steps_per_epoch=3, verbose=0).history
    assert len(history["loss"]) == 2 and np.isfinite(history["loss"]).all()
    assert 0 <= history["kind_accuracy"][-1] <= 1


def test_loss_and_clone_lose_privacy_and_are_refused(tmp_path):
    """Rule 1: a plain model compiled with BandMFOptimizer does not train."""
    plan = runs.make_plan()
    x, y = runs.counting_data()
    model = runs.compiled(runs.counting_model(), plan)
    model.fit(plan.batches(x, y), epochs=1, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    clone = runs.compiled(keras.models.clone_model(model), plan)
    for plain in (loaded, clone):
        with pytest.raises(ValueError, match="privatize"):
            plain.fit(x, y, epochs=1, verbose=0)


def refusals():
    """Arguments of `fit` that must be refused, and what the error names."""
    x, y = runs.counting_data()
    plan = runs.make_plan()
    return {
        "generator": (lambda b: ((iter([(x, y)]),), {}), "plan.batches"),
        "dataset": (lambda b: ((tf.data.Dataset.from_tensor_slices((x, y)).batch(8),), {}), "plan"),
        "dataset_of_batches": (lambda b: ((b.dataset(),), {}), "plan.batches"),
        "other_plan": (
            lambda b: ((runs.make_plan(noise_multiplier=2.0).batches(x, y),), {}),
            "optimizer's plan",
        ),
        "y": (lambda b: ((b, y), {}), "`y`"),
        "batch_size": (lambda b: ((b,), {"batch_size": 8}), "batch_size"),
        "shuffle": (lambda b: ((b,), {"shuffle": True}), "shuffle"),
        "class_weight": (lambda b: ((b,), {"class_weight": {0: 1.0}}), "class_weight"),
        "sample_weight": (lambda b: ((b,), {"sample_weight": y}), "sample_weight"),
        "validation_split": (lambda b: ((b,), {"validation_split": 0.1}), "validation_split"),
        "too_many_steps": (lambda b: ((b,), {"steps_per_epoch": 13}), "steps_per_epoch"),
        "no_steps": (lambda b: ((b,), {"steps_per_epoch": 0}), "steps_per_epoch"),
    }, plan


@pytest.mark.parametrize("name", refusals()[0])
def test_data_and_arguments_outside_the_plan_are_refused(name):
    """Rule 7: sampler, noise and accounting come from one plan."""
    cases, plan = refusals()
    make_arguments, names = cases[name]
    model = runs.compiled(runs.counting_model(), plan)
    arguments, options = make_arguments(plan.batches(*runs.counting_data()))
    before = model.get_weights()[0]
    with pytest.raises(ValueError, match=names):
        model.fit(*arguments, verbose=0, **options)
    np.testing.assert_array_equal(model.get_weights()[0], before)


def test_single_batches_are_refused_even_after_a_fit():
    plan = runs.make_plan()
    x, y = runs.counting_data()
    model = runs.compiled(runs.counting_model(), plan)
    model.fit(plan.batches(x, y), epochs=1, verbose=0)
    with pytest.raises(ValueError, match="single batches"):
        model.train_on_batch(x[:8], y[:8])
    with pytest.raises(ValueError, match="not accounted"):
        model.train_step((x[:8], y[:8]))


@pytest.mark.parametrize(
    "callback",
    [
        keras.callbacks.EarlyStopping(monitor="loss"),
        keras.callbacks.ReduceLROnPlateau(monitor="accuracy"),
        keras.callbacks.ModelCheckpoint("x.keras", monitor="loss", save_best_only=True),
        keras.callbacks.TerminateOnNaN(),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_on_training_metrics_are_refused(callback):
    """Rule 9."""
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan)
    with pytest.raises(ValueError, match=f"{type(callback).__name__} .*not private"):
        model.fit(plan.batches(*runs.counting_data()), verbose=0, callbacks=[callback], epochs=1)


def test_callbacks_on_validation_metrics_run():
    plan = runs.make_plan()
    x, y = runs.counting_data()
    model = runs.compiled(runs.counting_model(), plan)
    stopping = keras.callbacks.EarlyStopping(monitor="val_loss", patience=0, min_delta=1e9)
    model.fit(plan.batches(x, y), epochs=2, verbose=0, callbacks=[stopping], validation_data=(x, y))
    assert "val_loss" in str(bandmf.statement(model))


def test_foreign_data_needs_a_declared_fixed_order():
    """Rule 7: the declaration is quoted by the statement."""
    x, y = runs.counting_data()
    plan = runs.make_plan(
        sampling="fixed_order", max_participations=2, min_separation=12, noise_multiplier=1e-7
    )
    model = runs.compiled(runs.counting_model(), plan)
    updates = runs.fit(model, x, y=y)
    assert len(updates) == 24
    in_order = np.tile(np.repeat(np.eye(12), 8, axis=1), (2, 1))
    np.testing.assert_allclose(updates, in_order / 8, atol=1e-4)
    assert "declared" in str(bandmf.statement(model))


def test_mixed_float16_is_refused():
    """Rule 12: Keras would skip steps by looking at the gradients."""
    plan = runs.make_plan()
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = runs.compiled(runs.counting_model(), plan, loss="mse")
        with pytest.raises(ValueError, match="mixed_float16"):
            model.fit(plan.batches(*runs.counting_data()), verbose=0, epochs=1)
    finally:
        keras.config.set_dtype_policy(policy)


def test_bfloat16_models_train_with_float32_noise():
    plan = runs.make_plan()
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = runs.compiled(runs.counting_model(), plan, loss="mse")
        updates = runs.fit(model, plan.batches(*runs.counting_data()))
    finally:
        keras.config.set_dtype_policy(policy)
    assert updates.shape == (24, 96) and np.isfinite(updates).all()


def test_batch_normalization_is_refused_with_its_replacement():
    """Rule 6, through `fit`."""
    plan = runs.make_plan()
    model = keras.Sequential(
        [keras.Input((96,)), keras.layers.Dense(4), keras.layers.BatchNormalization()]
    )
    runs.compiled(bandmf.privatize(model), plan)
    with pytest.raises(ValueError, match="BatchNormalization.*GroupNormalization|LayerNorm"):
        model.fit(plan.batches(*runs.counting_data()), verbose=0, epochs=1)


def test_an_overridden_train_step_is_refused():
    class Custom(keras.Model):
        """Has its own training step."""

        def train_step(self, data):
            """Does nothing."""
            return {}

    with pytest.raises(ValueError, match="train_step"):
        bandmf.privatize(Custom())


@pytest.mark.parametrize("thing", [None, 3, keras.layers.Dense(1), type("Model", (), {})()])
def test_only_keras_models_can_be_privatised(thing):
    with pytest.raises(TypeError, match="keras.Model"):
        bandmf.privatize(thing)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "8"])
def test_bad_microbatch_sizes_are_refused(size):
    with pytest.raises((TypeError, ValueError), match="microbatch_size"):
        bandmf.privatize(keras.Sequential([keras.layers.Dense(1)]), microbatch_size=size)


def test_a_private_model_needs_the_private_optimizer():
    plan = runs.make_plan()
    model = runs.counting_model()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="BandMFOptimizer"):
        model.fit(plan.batches(*runs.counting_data()), verbose=0, epochs=1)


def test_the_class_of_the_model_is_untouched():
    before = {name: getattr(keras.Sequential, name) for name in ("fit", "train_step")}
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan)
    model.fit(plan.batches(*runs.counting_data()), verbose=0, epochs=1)
    assert before == {name: getattr(keras.Sequential, name) for name in before}
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    other.compile("sgd", "mse")
    other.fit(np.zeros((4, 2)), np.zeros((4, 1)), verbose=0, epochs=1)
