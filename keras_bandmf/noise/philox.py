"""Philox4x32-10, the counter-based generator of random bits, in plain TensorFlow operations.

XLA fuses them with what is computed from the words. TensorFlow's own operation gives the same
words, but is not fused, and XLA's version of it is twelve times slower on processors.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import tensorflow as tf

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


def words(low: tf.Tensor, high: tf.Tensor, key: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Returns the four random words of each counter.

    Args:
        low: the lower 64 bits of the counters, uint64, of any shape.
        high: the upper 64 bits, uint64, of a shape that broadcasts with that of `low`.
        key: scalar uint64.

    Returns:
        Four uint32 tensors of the broadcast shape.
    """
    first, second, third, fourth = *_halves(low), *_halves(high)
    even, odd = _halves(key)
    for _ in range(_ROUNDS):
        product, other = _multiply(first, _MULTIPLIERS[0]), _multiply(third, _MULTIPLIERS[1])
        first, second, third, fourth = (
            _xor(_xor(other[1], second), even),
            other[0],
            _xor(_xor(product[1], fourth), odd),
            product[0],
        )
        even, odd = even + tf.constant(_WEYL[0], tf.uint32), odd + tf.constant(_WEYL[1], tf.uint32)
    return first, second, third, fourth


def _halves(value: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The lower and the upper 32 bits of uint64 values."""
    upper = tf.bitwise.right_shift(value, tf.constant(32, tf.uint64))
    return tf.cast(value, tf.uint32), tf.cast(upper, tf.uint32)


def _multiply(value: tf.Tensor, multiplier: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The lower and the upper word of a product of words."""
    return _halves(tf.cast(value, tf.uint64) * tf.constant(multiplier, tf.uint64))


def _xor(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(left, right)
