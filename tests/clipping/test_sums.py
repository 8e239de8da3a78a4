"""What one row more changes in a clipped sum whose other rows are chosen to make it round badly.

The rows: half of them carry the sum to where a float32 is 2^-k wide, the others move it by a
little more than half of that up and a little less than half of it down, so that each pair of
roundings gains a unit as soon as the row in question is there.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.clipping.factors import LARGEST_CHAIN, Layout, Lookup, Outer, Rows
from keras_bandmf.noise import lattice

WIDTH = 64
COUNT = 4096


def chosen_rows(with_row):
    """(rows, width) float32; the row in question has norm 1 and stands second."""
    half = COUNT // 2
    unit = 2.0 ** (np.log2(half / 8) - 24)
    large = np.full((half, WIDTH), 0.125)
    large[0] -= 2 * unit * (int(np.sqrt(COUNT)) + 2)
    up, down = unit * (1 + 2**-10), -unit * (1 - 2**-10)
    small = np.where(np.arange(half)[:, None] % 2 == 0, up, down) * np.ones(WIDTH)
    row = np.full((1, WIDTH), 0.125 if with_row else 0.0)
    return np.concatenate([large[:1], row, large[1:], small]).astype("float32")


def change(total):
    """Norm of what the row in question changes in `total(rows)`."""
    sums = [np.asarray(total(chosen_rows(present)), float) for present in (True, False)]
    return float(np.linalg.norm(sums[0] - sums[1]))


def by_rows(rows):
    return Rows(tf.convert_to_tensor(rows)).weighted_sum(tf.ones(rows.shape[0]))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradients_of_single_examples_add_up_within_what_is_charged(jit_compile):
    found = change(tf.function(by_rows, jit_compile=jit_compile))
    charged = lattice.largest_batch(COUNT) * lattice.FLOAT32_ROUNDING
    assert abs(found - 1) <= charged
    # Added in a row, as a product of matrices adds them on many processors, they do not.
    plain = change(lambda rows: np.cumsum(rows, axis=0, dtype="float32")[-1])
    assert plain - 1 > 10 * charged


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("known", [True, False])
def test_blocks_of_any_number_of_rows(count, known):
    rows = np.random.default_rng(count).normal(size=(count, 3, 2)).astype("float32")
    weights = np.linspace(0, 1, count).astype("float32")
    signature = [tf.TensorSpec([count if known else None, 3, 2]), tf.TensorSpec([None])]
    total = tf.function(lambda r, w: Rows(r).weighted_sum(w), signature)
    np.testing.assert_allclose(total(rows, weights), np.tensordot(weights, rows, 1), atol=1e-5)


def test_equal_rows_add_up_exactly_enough():
    row = np.random.default_rng(0).normal(size=WIDTH).astype("float32")
    row /= np.linalg.norm(row)
    total = by_rows(np.tile(row, (16_384, 1)))
    assert np.linalg.norm(np.asarray(total, float) - 16_384.0 * row) < 16_384 * 18 * 2.0**-24


@keras.saving.register_keras_serializable("keras_bandmf_tests")
class Unknown(keras.layers.Layer):
    """A layer without a rule, so one row at a time."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), initializer="zeros")

    def call(self, x):
        return keras.ops.sum(x * self.w, axis=-1, keepdims=True)


def linear(layer):
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, layer(inputs))


def output(_, y_pred):
    return tf.reduce_mean(y_pred, axis=-1)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("microbatch_size", [None, 500])
def test_float64_sums_change_by_the_row_alone(jit_compile, microbatch_size):
    model = linear(keras.layers.Dense(1, use_bias=False))

    def total(rows, float64_sums):
        clipped = bandmf.clipped_gradients(
            model,
            rows,
            tf.zeros((rows.shape[0], 1)),
            loss=output,
            l2_norm_clip=1.0,
            microbatch_size=microbatch_size,
            float64_sums=float64_sums,
        )
        return clipped.sums[0], clipped.norms

    compiled = tf.function(total, jit_compile=jit_compile)
    sums, norms = compiled(tf.constant(chosen_rows(True)), True)
    assert sums.dtype == norms.dtype == tf.float64
    found = change(lambda rows: compiled(tf.constant(rows), True)[0])
    assert abs(found - 1) <= lattice.largest_batch(COUNT) * lattice.FLOAT64_ROUNDING
    # The rows were chosen for a product that adds in a row: not all processors multiply so.
    product = tf.function(lambda rows: tf.linalg.matvec(rows, tf.ones(len(rows)), True))
    in_a_row = change(lambda rows: product(tf.constant(rows))) > 1.01
    if microbatch_size is None and not jit_compile and in_a_row:
        assert change(lambda rows: compiled(tf.constant(rows), False)[0]) > 1.01


@pytest.mark.parametrize("float64_sums", [True, False])
def test_one_row_at_a_time_changes_by_the_row_alone(float64_sums):
    model = linear(Unknown())

    @tf.function
    def total(rows):
        return bandmf.clipped_gradients(
            model, rows, tf.zeros((rows.shape[0], 1)), loss=output, float64_sums=float64_sums
        ).sums[0]

    found = change(lambda rows: total(tf.constant(rows)))
    rounding = lattice.FLOAT64_ROUNDING if float64_sums else lattice.FLOAT32_ROUNDING
    assert abs(found - 1) <= lattice.largest_batch(COUNT) * rounding


def test_sums_of_every_factor_are_float64_when_their_gradients_are():
    wide = tf.ones((2, 3, 4), tf.float64)
    weights = tf.ones(2, tf.float64)
    stacked = wide[:, None]
    for factor in (
        Rows(wide),
        Outer(stacked, stacked, Layout((4, 4))),
        Lookup(tf.zeros((2, 3), tf.int32), wide, 5),
    ):
        assert factor.weighted_sum(weights).dtype == tf.float64
        assert factor.squared_norms().dtype == tf.float64


def test_small_gradients_of_large_terms_have_a_floor_in_float64_too():
    """What cancels within an example disturbs the sum of all: it is bounded by the norm."""
    a = tf.constant([[[[1.0], [1.0]]]], tf.float64)
    g = tf.constant([[[[1.0], [-1.0]]]], tf.float64)
    least = 2.0 * (64.0 * 2.0**-23) ** 0.5
    assert float(Outer(a, g, Layout((1, 1))).squared_norms()[0]) == pytest.approx(least**2)
    found = Lookup(tf.zeros((1, 2), tf.int32), g[0], 1).squared_norms()
    assert float(found[0]) == pytest.approx(least**2)


def test_too_long_a_sum_in_float64_names_the_way_out():
    long = tf.zeros((LARGEST_CHAIN // 2 + 1, 1, 2, 1), tf.float64)
    weights = tf.ones(len(long), tf.float64)
    with pytest.raises(ValueError, match="microbatch_size"):
        Outer(long, long, Layout((1, 1))).weighted_sum(weights)
    with pytest.raises(ValueError, match="microbatch_size"):
        Lookup(tf.zeros(long.shape[::2], tf.int32), long[:, 0], 1).weighted_sum(weights)


def test_exact_noise_takes_float64_sums_only():
    model = linear(keras.layers.Dense(1))
    plan = bandmf.TrainingPlan(
        num_examples=40,
        batch_size=8,
        num_steps=4,
        noise_multiplier=1.0,
        delta=1e-3,
        num_bands=1,
        sampling="fixed_order",
        max_participations=1,
        min_separation=4,
    )
    optimizer = bandmf.BandMFOptimizer("sgd", plan, noise="exact")
    rows, targets = np.ones((8, WIDTH), "float32"), np.ones((8, 1), "float32")
    narrow = bandmf.clipped_gradients(model, rows, targets, loss="mse")
    with pytest.raises(ValueError, match="float64_sums=True"):
        optimizer.apply_clipped(narrow, model.trainable_variables)
    wide = bandmf.clipped_gradients(model, rows, targets, loss="mse", float64_sums=True)
    optimizer.apply_clipped(wide, model.trainable_variables)
    assert optimizer.steps_done == 1
