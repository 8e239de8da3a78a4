"""Philox4x32-10, the counter-based generator of random bits, in plain TensorFlow operations.

XLA fuses these operations with what is computed from the words. TensorFlow's own operation gives
the same words but is not fused, and XLA's version of it is twelve times slower on processors.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import tensorflow as tf

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


Words = tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]


def words(low: tf.Tensor, high: tf.Tensor, key: tf.Tensor) -> Words:
    """Returns the four random words of each counter.

    Args:
        low: The lower 64 bits of the counters, uint64, of any shape.
        high: The upper 64 bits, uint64, of a shape that broadcasts with that of `low`.
        key: A uint64 scalar.

    Returns:
        Four tensors of the broadcast shape: words below 2**32. They are uint64, because processors
        convert between widths slowly.
    """
    # Only the lower half of each word counts. What the upper half holds is dropped when the word is
    # multiplied, and at the end.
    first, second, third, fourth = low, _upper(low), high, _upper(high)
    even, odd = key, _upper(key)
    for _ in range(_ROUNDS):
        product, other = _multiply(first, _MULTIPLIERS[0]), _multiply(third, _MULTIPLIERS[1])
        first, second, third, fourth = (
            _xor(_xor(_upper(other), second), even),
            other,
            _xor(_xor(_upper(product), fourth), odd),
            product,
        )
        even, odd = even + tf.constant(_WEYL[0], tf.uint64), odd + tf.constant(_WEYL[1], tf.uint64)
    return _lower(first), _lower(second), _lower(third), _lower(fourth)


def _lower(value: tf.Tensor) -> tf.Tensor:
    """Returns the lower 32 bits of uint64 values."""
    return tf.bitwise.bitwise_and(value, tf.constant(2**32 - 1, tf.uint64))


def _upper(value: tf.Tensor) -> tf.Tensor:
    """Returns the upper 32 bits of uint64 values."""
    return tf.bitwise.right_shift(value, tf.constant(32, tf.uint64))


def _multiply(value: tf.Tensor, multiplier: int) -> tf.Tensor:
    """Returns the product, in 64 bits, of the lower 32 bits of values and a 32-bit number."""
    return _lower(value) * tf.constant(multiplier, tf.uint64)


def _xor(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(left, right)
