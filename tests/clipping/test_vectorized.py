"""Functions of one row, applied to all rows."""

import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf.clipping.vectorized import vectorized

ROWS = {"a": tf.reshape(tf.range(6.0), [3, 2]), "b": [tf.constant([1.0, 2.0, 3.0])]}


def of_row(row):
    return row["b"][0] * row["a"], tf.reduce_sum(row["a"])


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_are_treated_apart(compiled):
    run = tf.function(lambda rows: vectorized(of_row, rows)) if compiled else vectorized
    scaled, sums = run(ROWS) if compiled else run(of_row, ROWS)
    a = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(scaled, a * [[1], [2], [3]])
    np.testing.assert_array_equal(sums, a.sum(1))


def test_many_eager_calls_warn_of_nothing(caplog):
    for _ in range(8):
        vectorized(of_row, ROWS)
    assert "retracing" not in caplog.text
    for _ in range(8):
        tf.vectorized_map(of_row, ROWS)  # which shows that the test can see a warning
    assert "retracing" in caplog.text


def test_what_cannot_be_vectorized_is_an_error_unless_it_may_loop():
    def strings(row):
        return tf.strings.length(tf.strings.as_string(row))

    with pytest.raises(ValueError, match="(?i)vectoriz|convert"):
        vectorized(strings, tf.range(3), or_loop=False)
