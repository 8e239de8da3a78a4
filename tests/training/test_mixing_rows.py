"""Models that mix rows now and then: refused, trained one row at a time, or stopped at the step."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import keras_bandmf as bandmf
from keras_bandmf import clipping
from keras_bandmf.clipping import declare_row_wise, explain
from tests import runs

TRIES = range(20)


class Mixing(layers.Layer):
    """Adds the mean of the others now and then, as `when(x, step)` says."""

    def __init__(self, probability=1.0, **kwargs):
        super().__init__(**kwargs)
        self.probability = probability
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, x):
        drawn = keras.random.uniform((), seed=self.seeds) < self.probability
        return ops.where(drawn, x[::-1] + x, x)


class MoreThanThree(layers.Layer):
    def call(self, x):
        return x[::-1] + x if x.shape[0] is None or x.shape[0] > 3 else x


class LargeValue(layers.Layer):
    """Mixes if any value of the batch is far out."""

    def call(self, x):
        return ops.where(ops.max(x) > 1.5, x[::-1] + x, x)


class ZeroInteger(layers.Layer):
    """A branch whose integer input happens to be zero in the first three rows."""

    def call(self, inputs):
        x, kind = inputs
        return x + ops.sum(ops.cast(kind, x.dtype) * ops.ones_like(x), axis=0, keepdims=True)


class Hidden(layers.Layer):
    """A mixing of size one beside a column of size 3e7."""

    def call(self, x):
        return ops.concatenate([x + x[::-1], 3e7 + ops.zeros_like(x)], axis=-1)


class FromStepSeven(layers.Layer):
    """Mixes from the seventh step on; the step is a variable that someone else counts."""

    step = None

    def call(self, x):
        return ops.where(FromStepSeven.step >= 7, x[::-1] + x, x)


def declared(kind):
    return declare_row_wise(type(kind.__name__, (kind,), {}))


def model_with(middle, private=True):
    inputs = keras.Input((6,))
    x = layers.Dense(5, name="before")(inputs)
    x = middle(x)
    model = keras.Model(inputs, layers.Dense(1, use_bias=False, name="after")(x))
    return bandmf.privatize(model) if private else model


def data(rows=96, width=6):
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, width)).astype("float32")
    x[:3] = 0.1
    return x, np.zeros(rows, np.float32)


def released_something(model, batches, steps=3):
    """Trains; whether any update was released that one row at a time would not have made."""
    before = [v.numpy().copy() for v in model.trainable_variables]
    try:
        model.fit(batches, epochs=1, steps_per_epoch=steps, verbose=0)
    except ValueError as error:
        assert "mix" in str(error) or "row-wise" in str(error), error
        after = [v.numpy() for v in model.trainable_variables]
        unchanged = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        return not unchanged and not all(np.isnan(a).all() for a in after)
    return explain(model).route != "general"


def image_model(mixer):
    # Functional models lose `Equalization`: its output spec is its input.
    model = keras.Sequential([keras.Input((4, 4, 3)), mixer, layers.Flatten(), layers.Dense(1)])
    return bandmf.privatize(model)


@pytest.mark.parametrize("kind", ["MixUp", "CutMix", "RandAugment", "AugMix", "Equalization"])
def test_known_mixers_are_refused_by_name_each_time(kind):
    if not hasattr(layers, kind):
        pytest.skip("not in this Keras")
    x = np.random.default_rng(0).uniform(0, 255, size=(96, 4, 4, 3)).astype("float32")
    plan = runs.make_plan()
    for seed in TRIES:
        options = {} if kind == "Equalization" else {"seed": seed}
        model = image_model(getattr(layers, kind)(**options))
        runs.compiled(model, plan)
        with pytest.raises(ValueError, match=f"{kind} mixes the examples"):
            clipping.check_model(model, x[:3], np.zeros(3, np.float32))
        with pytest.raises(ValueError, match=f"{kind} mixes the examples"):
            clipping.clipped_gradients(model, x[:3], np.zeros(3, np.float32))


BLIND = [MoreThanThree, LargeValue, Hidden]


@pytest.mark.parametrize("kind", [Mixing, *BLIND])
def test_undeclared_mixers_go_one_row_at_a_time(kind):
    """A row moves the sum by its own clipped gradient, whatever the others are: twenty rows."""
    model = model_with(kind(), private=False)
    model.compile(loss=runs.prediction_loss)
    x, y = data(24)

    @tf.function
    def sums(mask):
        found = clipping.clipped_gradients(model, x, y, mask=mask, l2_norm_clip=0.1).sums
        return tf.concat([tf.reshape(s, [-1]) for s in found], axis=0)

    everyone = sums(np.ones(24, bool)).numpy()
    alone = [sums(np.arange(24) == i).numpy() for i in TRIES]
    for i in TRIES:
        moved = everyone - sums(np.arange(24) != i).numpy()
        np.testing.assert_allclose(moved, alone[i], atol=1e-5)
        assert np.linalg.norm(moved) <= 0.1 * (1 + 1e-4)
    assert explain(model).route == "general"
    assert "declare_row_wise" in explain(model).why and kind.__name__ in explain(model).why


@pytest.mark.parametrize("probability", [0.5, 0.1])
def test_undeclared_random_mixing_is_never_released(probability):
    """The row check refuses it or it goes one row at a time: never book-keeping, twenty times."""
    x, y = data(5)
    for seed in TRIES:
        keras.utils.set_random_seed(seed)
        model = model_with(Mixing(probability), private=False)
        model.compile(loss=runs.prediction_loss)
        try:
            clipping.check_model(model, x, y)
        except ValueError as error:
            assert "mixes examples" in str(error)
        assert explain(model).route == "general"


@pytest.mark.parametrize("probability", [1.0, 0.5, 0.1])
def test_random_mixing_declared_row_wise_is_never_released(probability):
    kind = declared(Mixing)
    x, y = data(96)
    plan = runs.make_plan()
    for seed in TRIES:
        keras.utils.set_random_seed(seed)
        model = model_with(kind(probability))
        runs.compiled(model, plan, seed=seed)
        batches = plan.batches(x, y)
        assert not released_something(model, batches)
        if seed > 2 and probability == 1.0:
            break


@pytest.mark.parametrize("kind", BLIND)
def test_blind_spots_declared_row_wise_are_never_released(kind):
    kind = declared(kind)
    x, y = data(96)
    plan = runs.make_plan()
    for seed in TRIES:
        model = model_with(kind())
        runs.compiled(model, plan, seed=seed, run_eagerly=True)
        assert not released_something(model, plan.batches(x, y), steps=2)


@pytest.mark.parametrize("is_declared", [False, True])
def test_an_integer_that_is_zero_in_three_rows(is_declared):
    kind = declared(ZeroInteger) if is_declared else ZeroInteger
    x, y = data(96)
    kinds = (np.arange(96) > 2).astype("int32")[:, None]
    plan = runs.make_plan()
    for seed in TRIES:
        first, second = keras.Input((6,)), keras.Input((1,), dtype="int32")
        mixed = kind()([layers.Dense(5)(first), second])
        model = keras.Model([first, second], layers.Dense(1)(mixed))
        bandmf.privatize(model)
        runs.compiled(model, plan, seed=seed, run_eagerly=True)
        assert not released_something(model, plan.batches((x, kinds), y), steps=1)


class CountSteps(keras.callbacks.Callback):
    """Moves the clock of `FromStepSeven`, and keeps the weights of each step."""

    def __init__(self):
        super().__init__()
        self.finite = []

    def on_train_batch_begin(self, batch, logs=None):
        FromStepSeven.step.assign(batch + 1)

    def on_train_batch_end(self, batch, logs=None):
        self.finite.append(np.isfinite(self.model.trainable_variables[0].numpy()).all())


@pytest.mark.parametrize("way", ["compiled", "eager", "jit", "replicas", "microbatches"])
def test_mixing_that_begins_at_step_seven_ends_fit_at_step_seven(way):
    """The sentinel sees it in that very step: the update is NaN, and no later step runs."""
    kind = declared(FromStepSeven)
    replicas = 2 if way == "replicas" else 1
    plan = runs.make_plan()
    options = {"eager": {"run_eagerly": True}, "jit": {"jit_compile": True}}.get(way, {})

    def make():
        # Programs of XLA on a GPU cannot read int32 variables: they are kept on the CPU.
        FromStepSeven.step = tf.Variable(0, dtype=tf.int64)
        model = model_with(kind(), private=False)
        return bandmf.privatize(model, microbatch_size=4 if way == "microbatches" else None)

    x, y = data(96)
    for seed in range(2 if way == "compiled" else 1):
        model = runs.compiled_in_scope(replicas, make, plan, seed=seed, **options)
        clock = CountSteps()
        with pytest.raises(ValueError, match="masked row.*nothing was released"):
            model.fit(plan.batches(x, y), epochs=1, verbose=0, callbacks=[clock])
        assert clock.finite == [True] * 6
        assert model.optimizer.steps_done == 7
        for v in model.trainable_variables:
            assert np.isnan(v.numpy()).all()


def test_rows_that_are_not_mixed_go_on():
    """Row-wise layers of one's own, declared; infinite values in a masked row are no evidence."""

    @declare_row_wise
    class Steep(layers.Layer):
        def call(self, x):
            return ops.log(ops.abs(x))

    plan = runs.make_plan()
    model = model_with(Steep())
    runs.compiled(model, plan)
    x, y = data(96)
    x[5:20] = 0.0  # log 0, and zero times infinity in the gradient
    model.fit(plan.batches(x, y), epochs=1, verbose=0)
    assert all(np.isfinite(v.numpy()).all() for v in model.trainable_variables)
    assert explain(model).route == "book-keeping"


def test_direct_calls_with_a_mask_have_the_sentinel_and_without_have_not():
    model = model_with(declared(MoreThanThree)(), private=False)
    model.compile(loss=runs.prediction_loss)
    x, y = data(8)
    mask = np.arange(8) != 4
    found = clipping.clipped_gradients(model, x, y, mask=mask)
    assert bool(found.rows_mixed)
    assert not bool(clipping.clipped_gradients(model, x, y).rows_mixed)
    chunked = clipping.clipped_gradients(model, x, y, microbatch_size=4)
    assert bool(chunked.rows_mixed)
