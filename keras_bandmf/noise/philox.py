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
    # Constants are made once: each one takes time when a graph is traced.
    mask, half = tf.constant(2**32 - 1, tf.uint64), tf.constant(32, tf.uint64)
    multipliers = [tf.constant(number, tf.uint64) for number in _MULTIPLIERS]
    weyl = [tf.constant(number, tf.uint64) for number in _WEYL]

    def lower(value: tf.Tensor) -> tf.Tensor:
        return tf.bitwise.bitwise_and(value, mask)

    def upper(value: tf.Tensor) -> tf.Tensor:
        return tf.bitwise.right_shift(value, half)

    # Only the lower half of each word counts. What the upper half holds is dropped when the word is
    # multiplied, and at the end.
    first, second, third, fourth = low, upper(low), high, upper(high)
    even, odd = key, upper(key)
    for _ in range(_ROUNDS):
        # Products of 32-bit numbers, in 64 bits.
        product, other = lower(first) * multipliers[0], lower(third) * multipliers[1]
        first, second, third, fourth = (
            _xor(_xor(upper(other), second), even),
            other,
            _xor(_xor(upper(product), fourth), odd),
            product,
        )
        even, odd = even + weyl[0], odd + weyl[1]
    return lower(first), lower(second), lower(third), lower(fourth)


def _xor(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(left, right)
