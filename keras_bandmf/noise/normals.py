"""The counter-based normal stream: Philox bits turned into normals by Box-Muller.

Element `j` of row `step` depends on `(key, step, j)` alone, so a stream may be drawn in parts, by
any number of replicas and in any order, and is always the same stream.
"""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
import tensorflow as tf

#: Elements drawn as one unit. A shard of the stream is a whole number of chunks.
CHUNK = 1024

#: Philox makes four 32-bit words for each value of its counter.
_WORDS_PER_COUNTER = 4
_PHILOX = 1


def fresh_key() -> np.ndarray:
    """Returns 128 secret bits of the operating system: shape (2,), uint64."""
    return np.frombuffer(os.urandom(16), dtype=np.uint64).copy()


def key_from_seed(seed: int) -> np.ndarray:
    """Returns the key of a test seed, shape (2,), uint64. Anyone who knows the seed knows it."""
    digest = hashlib.sha256(f"keras_bandmf test seed {seed}".encode()).digest()
    return np.frombuffer(digest[:16], dtype=np.uint64).copy()


def fold_key(key: np.ndarray, purpose: str) -> np.ndarray:
    """Derives the key of one purpose from a run key.

    SHA-256 is one-way, so the key of one purpose tells nothing about that of another.

    Args:
        key: shape (2,), uint64.
        purpose: what the derived key is for, such as `"noise"` or `"sampler"`.

    Returns:
        Shape (2,), uint64.
    """
    digest = hashlib.sha256(np.asarray(key, np.uint64).tobytes() + purpose.encode()).digest()
    return np.frombuffer(digest[:16], dtype=np.uint64).copy()


def standard_normals(
    key: tf.Tensor, step: tf.Tensor, first_chunk: int, num_chunks: int
) -> tf.Tensor:
    """Draws part of row `step` of the stream of independent standard normals.

    The 128 bits of `key` are Philox's 64-bit key and an offset of the half of its counter that
    holds the step; the other half numbers the blocks of four words. A magnitude has 31 random
    bits, so the largest value is sqrt(2 * 32 * ln 2) = 6.66.

    Formal guarantees:
        Distinct `(key, step, element)` use distinct Philox outputs as long as fewer than 2**64
        steps and 2**66 elements are drawn. Philox is a statistical generator, not a proven
        cipher, and normals are rounded to float32.

    Args:
        key: shape (2,), int64 or uint64.
        step: scalar integer, the row.
        first_chunk: the part starts at element `first_chunk * CHUNK`.
        num_chunks: how many chunks to draw.

    Returns:
        Shape (num_chunks * CHUNK,), float32.
    """
    key = tf.bitcast(key, tf.uint64)
    block = tf.constant(first_chunk * CHUNK // _WORDS_PER_COUNTER, tf.uint64)
    counter = tf.stack([block, key[1] + tf.cast(step, tf.uint64)])
    words = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[num_chunks * CHUNK], key=key[:1], counter=counter, alg=_PHILOX, dtype=tf.int32
    )
    words = tf.reshape(words, [num_chunks, 2, CHUNK // 2])
    # Signed words convert to float far faster than unsigned ones. The half unit keeps log finite.
    magnitude_bits = tf.bitwise.bitwise_and(words[:, 0], 0x7FFFFFFF)
    uniform = tf.cast(magnitude_bits, tf.float32) * 2.0**-31 + 2.0**-32
    radius = tf.sqrt(-2.0 * tf.math.log(uniform))
    angle = tf.cast(words[:, 1], tf.float32) * (math.pi * 2.0**-31)
    pairs = tf.stack([radius * tf.cos(angle), radius * tf.sin(angle)], axis=1)
    return tf.reshape(pairs, [num_chunks * CHUNK])
