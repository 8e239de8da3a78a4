"""The counter-based normal stream: Philox words turned into normals by Box-Muller in float64.

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

#: The four words of each value of Philox's counter make two normals.
COUNTERS_PER_CHUNK = CHUNK // 2

#: Random bits of the radius: words 0 and 1 and the lower 24 bits of word 3.
RADIUS_BITS = 88

#: Random bits of the angle: the upper 8 bits of word 3 (swap, sign, position) and word 2.
ANGLE_BITS = 40

#: Taylor coefficients in powers of the squared angle: up to pi / 4 what they leave out is below
#: 2^-53 of the value (sine 2^-53.9, cosine 2^-56).
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(8)]
_COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(9)]

#: Those of log(m) / (2 s) in powers of s^2, s = (m - 1) / (m + 1). For m from sqrt(1/2) to
#: sqrt(2), s^2 is at most 0.0295 and what they leave out is below 2^-55 of the value.
_LOGARITHM = [1 / (2 * k + 1) for k in range(10)]

#: A parabola close to 1 / x for x from 1 + sqrt(1/2) to 1 + sqrt(2).
_RECIPROCAL = [1.477756, -0.722444, 0.116863]

_ROOT_OF_HALF = math.sqrt(0.5)


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
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws part of row `step` of the stream of independent standard normals.

    The 128 bits of `key` are Philox's 64-bit key and an offset of the half of its counter that
    numbers the pairs of normals; the other half holds the step.

    Formal guarantees:
        Under one key, distinct pairs of elements and distinct steps use distinct counters of
        Philox, as long as fewer than 2**64 steps and 2**65 elements are drawn. Random keys have
        the same Philox key with probability 2**-64. Philox is a statistical generator, not a
        proven cipher. Given ideal words, see `box_muller`.

    Args:
        key: shape (2,), int64 or uint64.
        step: scalar integer, the row.
        first_chunk: the part starts at element `first_chunk * CHUNK`.
        num_chunks: how many chunks to draw.

    Returns:
        The elements of even and of odd number, shape (num_chunks * CHUNK / 2,) each, float64.
        They are to be used in one XLA program: it makes a loop for each array that is written,
        and may compute all words again in each.
    """
    return box_muller(*_words(key, step, first_chunk, num_chunks))


def _words(
    key: tf.Tensor, step: tf.Tensor, first_chunk: int, num_chunks: int
) -> tuple[tf.Tensor, ...]:
    """The four Philox words of each pair of a part of row `step`."""
    key = tf.bitcast(key, tf.uint64)
    # The offset also keeps compilers from embedding, as a constant, what depends on `low` alone.
    low = tf.constant(first_chunk * COUNTERS_PER_CHUNK, tf.uint64) + key[1]
    counters = tf.range(num_chunks * COUNTERS_PER_CHUNK, dtype=tf.int32)
    return philox.words(tf.cast(counters, tf.uint64) + low, tf.cast(step, tf.uint64), key[0])


def box_muller(
    first: tf.Tensor, second: tf.Tensor, third: tf.Tensor, fourth: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Turns the words of Philox's counters into pairs of independent standard normals, float64.

    The radius is sqrt(-2 log U) of U = (the 88 bits of `first`, `second` and the lower 24 bits of
    `fourth`, plus a half) * 2^-88. The upper two bits of `fourth` say whether cosine and sine are
    swapped, and the cosine's sign; its next six bits follow those of `third` in an angle within
    pi / 4 of the first axis, where polynomials give cosine and sine. All directions are equally
    likely, and compilers vectorize all of it.

    Formal guarantees:
        Given ideal words, U is uniform on the middles of 2^88 equal cells, and the radius ends at
        sqrt(2 * 89 * ln 2) = 11.1. Where U is small it is summed geometrically, and where it is
        close to 1 its distance from 1 is: the energy -log U keeps its relative precision at both
        ends. The normals returned are off by less than 2^-46 of the radius from those of exact
        arithmetic, if addition, multiplication, division and root are those of IEEE 754, fused or
        not (tested against 60 digits, over whole ranges and at their ends).

    Args:
        first: uint32, as all of them, of any shape.
        second: of the same shape.
        third: of the same shape.
        fourth: of the same shape.

    Returns:
        Two float64 tensors of that shape.
    """
    radius = tf.sqrt(2.0 * _energy(first, second, fourth))
    swap = tf.equal(_bit(fourth, 31), 1)
    sign = tf.bitwise.left_shift(_bit(fourth, 30), _word(63))
    radius_of_cosine = tf.bitcast(_xor(tf.bitcast(radius, tf.uint64), sign), tf.float64)
    fine = tf.bitwise.bitwise_and(tf.bitwise.right_shift(fourth, _word(24)), _word(63))
    turn = (_float(third) - 2.0**31) + (_float(fine) * 2.0**-6 + 2.0**-7)
    turn *= math.pi / 4 * 2.0**-31
    square = turn * turn
    cosine = radius_of_cosine * _polynomial(_COSINE, square)
    sine = radius * (turn * _polynomial(_SINE, square))
    return tf.where(swap, sine, cosine), tf.where(swap, cosine, sine)


def _energy(first: tf.Tensor, second: tf.Tensor, fourth: tf.Tensor) -> tf.Tensor:
    """-log U, from U below one half and from 1 - U above, each summed from its small end."""
    # All bits of a U of at least one half are flipped: what they then give is 1 - U.
    above = _bit(first, 31)
    flips = _word(0) - above
    high, middle = (_float(_lower(_xor(word, flips))) for word in (first, second))
    low = _float(_lower(_xor(fourth, flips), 24))
    part = high * 2.0**-32 + (middle * 2.0**-64 + (low * 2.0**-88 + 2.0**-89))
    uniform = tf.where(tf.equal(above, 1), 1.0 - part, part)
    # U = 2^exponent * m with m from sqrt(1/2) to sqrt(2); log m by s = (m - 1) / (m + 1).
    bits = tf.bitcast(uniform, tf.uint64) + _word(_bits(1.0) - _bits(_ROOT_OF_HALF))
    mantissa = tf.bitwise.bitwise_and(bits, _word(2**52 - 1)) + _word(_bits(_ROOT_OF_HALF))
    mantissa = tf.bitcast(mantissa, tf.float64)
    exponent = _float(tf.bitwise.right_shift(bits, _word(52))) - 1023.0
    # Of a U near 1 only its distance from 1 has all digits.
    above_root = uniform >= _ROOT_OF_HALF
    ratio = tf.where(above_root, -part, mantissa - 1.0) * _reciprocal(mantissa + 1.0)
    logarithm = 2.0 * ratio * _polynomial(_LOGARITHM, ratio * ratio)
    return -(exponent * math.log(2.0) + logarithm)


def _reciprocal(x: tf.Tensor) -> tf.Tensor:
    """1 / x for x from 1 + sqrt(1/2) to 1 + sqrt(2), off by less than 2^-51 of it.

    Three steps of Newton's from a parabola that is off by 2^-9. XLA would compute what comes
    before a division twice: here, all of Philox.
    """
    value = _polynomial(_RECIPROCAL, x)
    for _ in range(3):
        value += value * (1.0 - x * value)
    return value


def _word(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint64)


def _bit(word: tf.Tensor, place: int) -> tf.Tensor:
    """One bit of uint64 values, 0 or 1."""
    return tf.bitwise.bitwise_and(tf.bitwise.right_shift(word, _word(place)), _word(1))


def _lower(word: tf.Tensor, places: int = 32) -> tf.Tensor:
    return tf.bitwise.bitwise_and(word, _word(2**places - 1))


def _xor(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(left, right)


def _float(value: tf.Tensor) -> tf.Tensor:
    """Integers below 2^52, uint64, as float64: the bits of 2^52 + value, minus 2^52.

    No conversion: processors without AVX-512 have none for 64 bits.
    """
    shifted = tf.bitwise.bitwise_or(value, _word(_bits(2.0**52)))
    return tf.bitcast(shifted, tf.float64) - 2.0**52


def _bits(value: float) -> int:
    """The bits of a float64 as an integer."""
    return int(np.float64(value).view(np.int64))


def _polynomial(coefficients: list[float], x: tf.Tensor) -> tf.Tensor:
    """Horner's rule, coefficients from the constant on."""
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value
