"""Several rows of one example: their mean gradient, clipped once, equals the loop."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf import clipping
from keras_bandmf.clipping import clipped_gradients
from tests.clipping import reference, zoo

HEAVY = {"bert", "resnet"}
SIZE = 3
# Three examples of three rows: a whole one, one with a masked row, and one with two.
ROWS = np.array([0, 1, 2, 3, 4, 5, 6, 0, 1])
MASK = np.array([1, 1, 1, 1, 0, 1, 0, 1, 0], bool)

ALL = pytest.mark.parametrize(
    "make",
    [
        pytest.param(m, id=m.__name__, marks=pytest.mark.slow if m.__name__ in HEAVY else ())
        for m in zoo.ZOO
    ],
)


def picked(data):
    return keras.tree.map_structure(lambda t: None if t is None else t[ROWS], data)


def mean_gradients(per_example, mask=MASK, size=SIZE):
    """The gradient of each example: the mean over its rows that are not masked, in NumPy."""
    found = []
    for g in per_example:
        g = g[ROWS].reshape(-1, size, *g.shape[1:])
        kept = mask.reshape(-1, size, *[1] * (g.ndim - 2))
        found.append(np.where(kept, g, 0).sum(1) / np.maximum(kept.sum(1), 1))
    return found


def with_nan(data):
    """The data with NaN in all masked rows that can hold it."""

    def spoiled(t):
        if t is None or np.asarray(t).dtype.kind != "f":
            return t
        t = np.array(t)
        t[~MASK] = np.nan
        return t

    return keras.tree.map_structure(spoiled, data)


def expectation(make):
    model, x, y, weight = make()
    means = mean_gradients(reference.gradients(model, x, y, weight)[0])
    clip = float(np.median(reference.clipped(means, 1.0)[0]))
    norms, sums = reference.clipped(means, clip)
    return model, *(picked(t) for t in (x, y, weight)), clip, norms, sums


@ALL
@pytest.mark.parametrize("microbatch_size", [None, 1, 2])
def test_equals_the_loop(make, microbatch_size):
    model, x, y, weight, clip, norms, sums = expectation(make)
    for data in (x, with_nan(x)):
        found = clipped_gradients(
            model,
            data,
            y,
            weight,
            l2_norm_clip=clip,
            mask=MASK,
            microbatch_size=microbatch_size,
            rows_per_example=SIZE,
        )
        assert reference.error(found.sums, sums) < 1e-5
        np.testing.assert_allclose(found.norms, norms, rtol=1e-5, atol=1e-6 * norms.max())
        assert found.losses.shape == found.mask.shape == (len(ROWS),)
        assert found.was_clipped.shape == found.example_mask.shape == (3,)
        leaf = keras.tree.flatten(found.outputs)[0]
        assert leaf.shape[0] == len(ROWS)


@pytest.mark.parametrize("make", [zoo.mlp, zoo.cnn, zoo.lstm, zoo.unknown_layer, zoo.transformer])
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("known", [True, False])
def test_compiled(make, jit_compile, known):
    model, x, y, weight, clip, norms, sums = expectation(make)

    def step(x, y, weight, mask):
        return clipped_gradients(
            model, x, y, weight, l2_norm_clip=clip, mask=mask, rows_per_example=SIZE
        )

    def spec(t):
        t = tf.convert_to_tensor(t)
        return tf.TensorSpec([len(ROWS) if known else None, *t.shape[1:]], t.dtype)

    data = keras.tree.map_structure(
        lambda t: None if t is None else tf.convert_to_tensor(t), (x, y, weight, MASK)
    )
    signature = keras.tree.map_structure(lambda t: None if t is None else spec(t), data)
    compiled = tf.function(step, jit_compile=jit_compile)
    found = compiled.get_concrete_function(*signature)(*data)
    assert reference.error(found.sums, sums) < 1e-5
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5, atol=1e-6 * norms.max())


@pytest.mark.parametrize("clip_mode", ["per_layer", "automatic"])
def test_equal_rows_count_like_one(clip_mode):
    model, x, y, weight = zoo.mlp()
    one = clipped_gradients(model, x, y, weight, l2_norm_clip=0.1, clipping=clip_mode)
    x, y, weight = (
        keras.tree.map_structure(lambda t: None if t is None else np.repeat(t, 4, axis=0), data)
        for data in (x, y, weight)
    )
    four = clipped_gradients(
        model, x, y, weight, l2_norm_clip=0.1, clipping=clip_mode, rows_per_example=4
    )
    assert reference.error(four.sums, [np.asarray(s) for s in one.sums]) < 1e-5


def test_many_rows_never_count_for_more_than_the_clip_norm():
    model, x, y, weight = zoo.cnn()
    x, y, weight = picked(x), picked(y), picked(weight)
    found = clipped_gradients(
        model, x, y, weight, l2_norm_clip=1e-3, rows_per_example=len(ROWS), mask=MASK
    )
    norm = np.sqrt(sum(float(tf.reduce_sum(tf.square(s))) for s in found.sums))
    assert norm == pytest.approx(1e-3, rel=1e-4)


def test_a_bad_row_drops_its_example_only():
    model, x, y, weight, clip, _, _ = expectation(zoo.mlp)
    spoiled = np.array(x)
    spoiled[4] = np.nan  # masked out in MASK: harmless
    spoiled[0] = np.nan
    found = clipped_gradients(
        model, spoiled, y, weight, l2_norm_clip=clip, mask=MASK, rows_per_example=SIZE
    )
    without = MASK.copy()
    without[:SIZE] = False
    rest = clipped_gradients(
        model, x, y, weight, l2_norm_clip=clip, mask=without, rows_per_example=SIZE
    )
    for ours, theirs in zip(found.sums, rest.sums, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * clip)
    np.testing.assert_array_equal(rest.example_mask, [False, True, True])


@pytest.mark.parametrize(
    ("rows", "positions"), [(1, 30), (1, 256), (1, 2048), (8, 256), (16, 4), (512, 1)]
)
def test_small_gradients_that_read_one_entry_of_a_table_are_not_lost(rows, positions):
    """In float32 each of them vanishes beside the large one, which then cancels."""
    ids, scale = keras.Input((positions,), dtype="int32"), keras.Input((positions, 1))
    read = keras.layers.Embedding(3, 1, embeddings_initializer="zeros")(ids)
    mean = keras.layers.GlobalAveragePooling1D()(keras.layers.Multiply()([read, scale]))
    model = keras.Model([ids, scale], mean)
    model.compile("sgd", loss="mse")
    factors = np.full(rows * positions, 2.0**-24 * 0.99, np.float32)
    factors[0], factors[-1] = 1.0, -1.0
    x = [np.ones((rows, positions), np.int32), factors.reshape(rows, positions, 1)]
    y = np.full((rows, 1), 2.0**30, np.float32)
    found = clipped_gradients(model, x, y, l2_norm_clip=1.0, rows_per_example=rows)
    assert clipping.explain(model).route == "book-keeping"
    assert float(tf.norm(found.sums[0])) <= 1.0 + 1e-5


def test_a_sequence_of_length_zero():
    model = keras.Sequential([keras.Input((None, 3)), keras.layers.Dense(2), SumOfPositions()])
    clipping.declare_row_wise(SumOfPositions)
    model.compile(loss="mse")
    found = clipped_gradients(model, np.zeros((4, 0, 3)), np.ones((4, 2)), rows_per_example=2)
    assert all(not np.any(s) for s in found.sums) and found.norms.shape == (2,)


@keras.saving.register_keras_serializable(package="keras_bandmf_tests")
class SumOfPositions(keras.layers.Layer):
    """The sum over positions, which may be none."""

    def call(self, x):
        return keras.ops.sum(x, axis=1)


class Centered(keras.layers.Layer):
    """Mixes the rows of a batch, so that the model takes the general path."""

    def call(self, x):
        return x - keras.ops.mean(x, axis=0, keepdims=True)


def test_rows_of_one_example_never_share_a_pass_of_a_mixing_layer():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(Centered()(inputs) + inputs))
    model.compile(loss="mse")
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(4, 4)).astype("float32"), rng.normal(size=(4, 2)).astype("float32")
    mask = np.array([True, False, True, True])
    first = clipped_gradients(model, x, y, mask=mask, rows_per_example=2)
    x[1] = 100.0
    second = clipped_gradients(model, x, y, mask=mask, rows_per_example=2)
    for ours, theirs in zip(first.sums, second.sums, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_empty_batch_sums_to_zero():
    model, x, y, weight = zoo.mlp()
    none = keras.tree.map_structure(lambda t: None if t is None else t[:0], (x, y, weight))
    found = clipped_gradients(model, *none, rows_per_example=4)
    assert all(not np.any(s) for s in found.sums) and found.norms.shape == (0,)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, None])
def test_refuses_other_sizes(size):
    model, x, y, weight = zoo.mlp()
    with pytest.raises((TypeError, ValueError), match="rows_per_example"):
        clipped_gradients(model, x, y, weight, rows_per_example=size)


def test_refuses_a_number_of_rows_that_does_not_fit():
    model, x, y, weight = zoo.mlp()
    with pytest.raises(ValueError, match="multiple of rows_per_example=2"):
        clipped_gradients(model, x, y, weight, rows_per_example=2)


def test_grouped_factors_are_the_sums_of_their_rows():
    rng = np.random.default_rng(2)
    mask = tf.constant([True, True, False, True])
    a, g = rng.normal(size=(4, 2, 3, 5)), rng.normal(size=(4, 2, 3, 4))
    layout = clipping.factors.Layout((2, 5, 4))
    whole = np.einsum("bgti,bgto->bgio", a, g) * np.array([1, 1, 0, 1])[:, None, None, None]
    expected = whole.reshape(2, 2, 2, 5, 4).sum(1)
    outer = clipping.Outer(tf.constant(a, tf.float32), tf.constant(g, tf.float32), layout)
    grouped = outer.grouped(2, mask)
    for factor in (grouped, grouped.as_rows()):
        np.testing.assert_allclose(
            factor.squared_norms(), np.sum(expected**2, axis=(1, 2, 3)), rtol=1e-5
        )
        total = factor.weighted_sum(tf.constant([1.0, 0.5]))
        np.testing.assert_allclose(total, expected[0] + 0.5 * expected[1], rtol=1e-4, atol=1e-5)
