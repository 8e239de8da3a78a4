"""The counter-based normal stream: Philox words turned into normals by Box-Muller.

Element `j` of row `step` depends on `(key, step, j)` alone, so a stream may be drawn in parts, by
any number of replicas and in any order, and is always the same stream.
"""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
import tensorflow as tf

from keras_bandmf.noise import philox

#: Elements drawn as one unit. A shard of the stream is a whole number of chunks.
CHUNK = 1024

#: Two words of each value of Philox's counter make two normals.
_COUNTERS_PER_CHUNK = CHUNK // 2

#: Taylor coefficients in powers of the squared angle: up to pi / 4 what they leave out is 2e-9
#: (sine) and 3e-8 (cosine), below the last place of float32.
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(5)]
_COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(5)]

#: Those of -log(1 - x) / x. Up to x = 1 / 16, where they serve, they leave out 9e-9.
_LOGARITHM = [1 / (k + 1) for k in range(6)]
_LOGARITHM_LIMIT = 1 / 16


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
    numbers the pairs of normals; the other half holds the step. A magnitude has 31 random bits, so
    the largest value is sqrt(2 * 32 * ln 2) = 6.66; no value is 0.

    Formal guarantees:
        Under one key, distinct pairs of elements and distinct steps use distinct counters of
        Philox, as long as fewer than 2**64 steps and 2**65 elements are drawn. Random keys have
        the same Philox key with probability 2**-64. Philox is a statistical generator, not a
        proven cipher, and normals are rounded to float32.

    Args:
        key: shape (2,), int64 or uint64.
        step: scalar integer, the row.
        first_chunk: the part starts at element `first_chunk * CHUNK`.
        num_chunks: how many chunks to draw.

    Returns:
        Shape (num_chunks * CHUNK,), float32.
    """
    key = tf.bitcast(key, tf.uint64)
    # The offset also keeps compilers from embedding, as a constant, what depends on `low` alone.
    low = tf.constant(first_chunk * _COUNTERS_PER_CHUNK, tf.uint64) + key[1]
    pairs = _packed_pairs(low, tf.cast(step, tf.uint64), key[0], num_chunks)
    return tf.reshape(tf.bitcast(pairs, tf.float32), [num_chunks * CHUNK])


@tf.function(jit_compile=True, autograph=False)
def _packed_pairs(low: tf.Tensor, high: tf.Tensor, key: tf.Tensor, num_chunks: int) -> tf.Tensor:
    """Normals of the counters from `low` on, two in each uint64, shape (num_chunks * CHUNK / 2,).

    XLA makes a loop for each array that is written, and may compute the words again in each. So
    two words of each counter are dropped, and the two normals are packed into one array.
    """
    counters = tf.range(num_chunks * _COUNTERS_PER_CHUNK, dtype=tf.int32)
    magnitude, angle, _, _ = philox.words(tf.cast(counters, tf.uint64) + low, high, key)
    return _pack(*box_muller(magnitude, angle))


def box_muller(magnitude: tf.Tensor, angle: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Turns pairs of random uint32 words into pairs of independent standard normals, float32.

    Of `angle` 30 bits are an angle within pi / 4 of the first axis, where short polynomials give
    cosine and sine and compilers vectorize all of it; the last bit swaps them, the one before it
    is the cosine's sign: so all directions are equally likely.
    """
    # Signed words convert to float far faster than unsigned ones. The half unit keeps log finite.
    bits = tf.bitcast(tf.bitwise.right_shift(magnitude, tf.constant(1, tf.uint32)), tf.int32)
    uniform = tf.cast(bits, tf.float32) * 2.0**-31 + 2.0**-32
    # Of a uniform near 1 float32 keeps few digits: its distance from 1 has them all.
    distance = tf.cast(2**31 - 1 - bits, tf.float32) * 2.0**-31 + 2.0**-32
    energy = tf.where(
        distance < _LOGARITHM_LIMIT,
        distance * _polynomial(_LOGARITHM, distance),
        -tf.math.log(uniform),
    )
    radius = tf.sqrt(2.0 * energy)
    angle = tf.bitcast(angle, tf.int32)
    swap = tf.equal(tf.bitwise.bitwise_and(angle, 1), 1)
    radius_of_cosine = tf.where(tf.equal(tf.bitwise.bitwise_and(angle, 2), 2), -radius, radius)
    turn = (tf.cast(tf.bitwise.right_shift(angle, 2), tf.float32) + 0.5) * (math.pi / 4 * 2.0**-29)
    square = turn * turn
    cosine = radius_of_cosine * _polynomial(_COSINE, square)
    sine = radius * turn * _polynomial(_SINE, square)
    return tf.where(swap, sine, cosine), tf.where(swap, cosine, sine)


def _polynomial(coefficients: list[float], x: tf.Tensor) -> tf.Tensor:
    """Horner's rule, coefficients from the constant on."""
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def _pack(low: tf.Tensor, high: tf.Tensor) -> tf.Tensor:
    """Two float32 tensors as the halves of uint64 values."""
    low, high = (tf.cast(tf.bitcast(value, tf.uint32), tf.uint64) for value in (low, high))
    return tf.bitwise.bitwise_or(low, tf.bitwise.left_shift(high, tf.constant(32, tf.uint64)))
