"""The random words: known answers of the generator's authors, and TensorFlow's own operation."""

import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf.noise import philox

# Counter, key and words, lowest word first: the known answers of the Random123 library.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def join(words):
    """uint64 values of words, lowest first."""
    numbers = [int(word, 16) for word in words.split()]
    return [low + (high << 32) for low, high in zip(numbers[::2], numbers[1::2], strict=True)]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_known_answers(counter, key, expected, jit_compile):
    arguments = [tf.constant(value, tf.uint64) for value in (*join(counter), *join(key))]
    found = tf.function(philox.words, jit_compile=jit_compile, autograph=False)(*arguments)
    assert [f"{int(word):08x}" for word in found] == expected.split()


def test_words_are_those_of_tensorflow():
    """Counters that pass from the lower to the upper 32 bits are among them."""
    first, high, key = 2**32 - 500, 2**63 + 12345, 2**64 - 987
    expected = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[4000],
        key=tf.constant([key], tf.uint64),
        counter=tf.constant([first, high], tf.uint64),
        alg=1,
        dtype=tf.uint32,
    )
    low = tf.constant(np.arange(first, first + 1000, dtype=np.uint64))
    found = philox.words(low, tf.constant(high, tf.uint64), tf.constant(key, tf.uint64))
    np.testing.assert_array_equal(np.stack(found, axis=1).ravel(), expected)
