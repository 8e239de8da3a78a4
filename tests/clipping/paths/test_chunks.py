"""Batches in chunks: what fills the last one, and that it counts for nothing."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_bandmf as bandmf
from keras_bandmf.clipping.paths import chunks
from keras_bandmf.clipping.paths.book_keeping import Clipped

BATCH = 7
WAYS = ["eager", "known", "unknown", "xla"]


def in_way(way, function, *data):
    """Calls a function of tensors eagerly, or in a graph that may know the number of rows."""
    data = [tf.constant(part) for part in data]
    if way == "eager":
        return function(*data)
    rows = None if way == "unknown" else data[0].shape[0]
    specs = [tf.TensorSpec([rows, *t.shape[1:]], t.dtype) for t in data]
    return tf.function(function, jit_compile=way == "xla", input_signature=specs)(*data)


def seen_rows(x, y, sample_weight, mask):
    """Stands in for a model: the sums are what it sees, and what of that counts."""
    del y, sample_weight
    counted = tf.where(mask, x, tf.zeros_like(x))
    smallest = tf.reduce_min(x)[None]
    none = tf.zeros_like(x)
    return Clipped(
        sums=[tf.reduce_sum(counted)[None], tf.cast(smallest < 1.0, tf.float32)],
        norms=none,
        losses=none,
        was_clipped=mask,
        outputs=x,
        attached=[{"mask": mask}],
        rows_mixed=tf.constant(False),
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 10])
def test_every_row_of_a_chunk_is_one_of_the_batch(way, size):
    x = np.arange(1, BATCH + 1, dtype=np.float32)

    def function(x):
        mask = tf.ones_like(x) > 0
        found = chunks.clip_in_chunks(seen_rows, x, None, None, mask, size)
        return found.sums, found.outputs, found.attached[0]["mask"]

    (total, made_up), outputs, mask = in_way(way, function, x)
    assert float(total[0]) == x.sum() and float(made_up[0]) == 0.0
    np.testing.assert_array_equal(outputs, x)
    assert np.all(mask) and len(mask) == BATCH


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows_per_example", [1, 2])
def test_padding_of_nan_counts_for_nothing(way, rows_per_example):
    """The first example fills the last chunk, also where it is masked itself and holds NaN."""
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    rng = np.random.default_rng(0)
    count = BATCH * rows_per_example
    x, y = (rng.normal(size=(count, width)).astype(np.float32) for width in (3, 2))
    mask = np.arange(count) >= rows_per_example
    spoiled = np.where(mask[:, None], x, np.nan).astype(np.float32)

    def sums(x, y, mask):
        return bandmf.clipped_gradients(
            model,
            x,
            y,
            loss="mse",
            mask=mask,
            microbatch_size=3,
            rows_per_example=rows_per_example,
        ).sums

    kept = slice(rows_per_example, None)
    expected = in_way(way, sums, x[kept], y[kept], mask[kept])
    for found, sum_of_kept in zip(in_way(way, sums, spoiled, y, mask), expected, strict=True):
        assert np.any(found)
        np.testing.assert_allclose(found, sum_of_kept, rtol=1e-5, atol=1e-6)


def test_chunks_of_strings():
    inputs = keras.Input((1,), dtype="string")
    numbers = layers.StringLookup(vocabulary=["a", "b"], num_oov_indices=0)(inputs)
    hidden = layers.Flatten()(layers.Embedding(4, 3)(numbers))
    model = keras.Model(inputs, layers.Dense(1)(hidden))
    x, y = tf.constant([["a"], ["b"], ["a"], ["b"], ["b"]]), np.ones((5, 1), np.float32)
    whole, chunked = (
        bandmf.clipped_gradients(model, x, y, loss="mse", microbatch_size=size).sums
        for size in (None, 3)
    )
    for one, other in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
