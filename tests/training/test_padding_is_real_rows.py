"""Models that accept no row but those of the data train: padding is rows of the data, masked."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_bandmf as bandmf
from tests import runs

VOCABULARY = [10, 20, 30, 40]
ROWS = 37
SEED = 5  # draws 6, 6, 5 and 0 rows in the first steps


def categories():
    """Category numbers, none of them 0, and targets."""
    rng = np.random.default_rng(0)
    x = np.asarray(VOCABULARY)[rng.integers(0, 4, (ROWS, 2))]
    return x, rng.normal(size=(ROWS, 1)).astype(np.float32)


def look_up():
    """Fails on every number outside the vocabulary."""
    inputs = keras.Input((2,), dtype="int64")
    x = layers.IntegerLookup(vocabulary=VOCABULARY, num_oov_indices=0, oov_token=-1)(inputs)
    x = layers.Flatten()(layers.Embedding(6, 3)(x))
    return keras.Model(inputs, layers.Dense(1)(x))


def logarithm():
    """Minus infinity on zeros, and NaN in the gradient."""
    inputs = keras.Input((2,), dtype="int64")
    x = keras.ops.log(keras.ops.cast(inputs, "float32"))
    return keras.Model(inputs, layers.Dense(1)(x / (keras.ops.sum(x, -1, keepdims=True) - 1.0)))


@bandmf.clipping.declare_row_wise
class Declared(keras.Model):
    """Looks up in a call of its own, which is declared row-wise."""

    def __init__(self):
        super().__init__()
        self.inner = look_up()

    def call(self, inputs):
        """Asks the inner model."""
        return self.inner(inputs)


def made(make, microbatch_size=None, batch_size=3, sampling="cyclic_poisson", **options):
    """A private model of a plan of small batches, and its batches."""
    plan = runs.make_plan(
        num_bands=1,
        num_steps=12 if batch_size == 3 else 8,
        noise_multiplier=0.0,
        num_examples=ROWS,
        batch_size=batch_size,
        sampling=sampling,
    )
    keras.utils.set_random_seed(5)
    model = bandmf.privatize(make(), microbatch_size=microbatch_size)
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(0.1), plan, l2_norm_clip=1.0, seed=2)
    model.compile(optimizer, loss="mse", metrics=["mae"], **options)
    return model, plan


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (look_up, {}),
        (look_up, {"run_eagerly": True}),
        (Declared, {}),
        (logarithm, {}),
        (logarithm, {"jit_compile": True}),
    ],
    ids=["look_up", "look_up_eager", "declared", "logarithm", "logarithm_xla"],
)
def test_microbatches_of_any_size_and_sampled_batches_train(make, options):
    """The sum over chunks is that of the whole batch, empty batches included."""
    found = []
    for size in (None, 3):
        model, plan = made(make, size, **options)
        batches = plan.batches(*categories(), seed=SEED)
        assert [len(batches.indices(t)) for t in range(4)] == [6, 6, 5, 0]
        steps = 4 if "run_eagerly" in options else 12
        history = model.fit(batches, epochs=1, steps_per_epoch=steps, verbose=0).history
        assert np.isfinite(list(history.values())).all()
        found.append([w.numpy() for w in model.trainable_variables])
    for whole, chunked in zip(*found, strict=True):
        assert np.isfinite(whole).all()
        np.testing.assert_allclose(chunked, whole, rtol=1e-4, atol=1e-5)


def test_models_and_losses_are_built_without_rows_of_zeros():
    """Also where all rows are alike, so that the check has to make others up."""
    x, y = np.full((5, 2), 30), np.ones((5, 1), np.float32)
    unbuilt = keras.Sequential(
        [
            layers.IntegerLookup(vocabulary=VOCABULARY, num_oov_indices=0, oov_token=-1),
            layers.Embedding(6, 3),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    bandmf.clipping.check_model(unbuilt, x, y, loss="mse")
    for targets in (y, [y, y]):
        inner = look_up()
        outputs = inner.output if targets is y else [inner.output, layers.Dense(1)(inner.output)]
        model = keras.Model(inner.input, outputs)
        model.compile(loss="mse")
        clipped = bandmf.clipped_gradients(model, x, targets)
        assert all(np.isfinite(total).all() for total in clipped.sums)


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=["compiled", "xla"])
def test_a_row_of_nan_that_is_padding_reaches_neither_weights_nor_logs(size, options):
    """In a fixed order the rows of an incomplete batch never take part: they are padding only."""

    def dense():
        return keras.Sequential([keras.Input((4,)), layers.Dense(2, "tanh"), layers.Dense(1)])

    x = np.random.default_rng(1).normal(size=(ROWS, 4)).astype(np.float32)
    results = []
    for poison in (0.0, np.nan):
        model, plan = made(dense, size, batch_size=20, sampling="fixed_order", **options)
        drawn = plan.batches(x, seed=3).indices(0)
        poisoned = np.where(np.isin(np.arange(ROWS), drawn)[:, None], x, x + poison)
        batches = plan.batches(poisoned, poisoned[:, :1], seed=3)
        paddings = [batches.batch(t)["x"] for t in range(8)]
        assert any(np.isnan(rows).any() for rows in paddings) == bool(poison)
        history = model.fit(batches, verbose=0).history
        results.append([*history.values(), *(w.numpy() for w in model.trainable_variables)])
    for clean, poisoned in zip(*results, strict=True):
        np.testing.assert_array_equal(poisoned, clean)
