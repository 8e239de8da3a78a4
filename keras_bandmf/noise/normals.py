"""The counter-based normal stream: Philox words turned into normals by Box-Muller in float64.

Element `j` of row `step` depends on `(key, step, j)` alone. So a stream may be drawn in parts, by
any number of replicas and in any order, and it is always the same stream.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import NamedTuple

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


class Series(NamedTuple):
    """How the elementary functions are computed.

    Attributes:
        logarithm: The coefficients of -4 atanh(s) / s in powers of s^2, which is -2 log(m) / s for
            s = (m - 1) / (m + 1), with m from sqrt(1/2) to sqrt(2), where s^2 is at most 0.0295.
        newton_steps: The number of Newton steps for the reciprocal of m + 1.
        cosine: The coefficients in powers of t^2, where t is the angle in quarters of a turn, at
            most 1/2.
        sine: The same for the sine divided by t.
    """

    logarithm: list[float]
    newton_steps: int
    cosine: list[float]
    sine: list[float]


def _series(
    logarithm: list[float], newton_steps: int, cosine: list[float], sine: list[float]
) -> Series:
    """Makes a series from coefficients of atanh(s) / s, and of angles in radians."""
    quarter = math.pi / 2
    return Series(
        [-4.0 * c for c in logarithm],
        newton_steps,
        [c * quarter ** (2 * k) for k, c in enumerate(cosine)],
        [c * quarter ** (2 * k + 1) for k, c in enumerate(sine)],
    )


#: Taylor series. What is left out is below 2^-53 of the value (sine 2^-53.9, cosine 2^-56,
#: logarithm 2^-55).
FINE = _series(
    [1 / (2 * k + 1) for k in range(10)],
    3,
    [(-1) ** k / math.factorial(2 * k) for k in range(9)],
    [(-1) ** k / math.factorial(2 * k + 1) for k in range(8)],
)

#: The least squares fit of the relative error on 4000 Chebyshev nodes, without error where pieces
#: meet (m at sqrt(1/2) and sqrt(2), angles of pi / 4). Elsewhere it is off by up to 2^-37.5
#: (logarithm), 2^-33.8 (cosine) and 2^-37.4 (sine) of the value.
FAST = _series(
    [
        1.0000000000046572,
        0.3333333255893698,
        0.20000205541955465,
        0.14266688273243677,
        0.11824429673182907,
    ],
    2,
    [
        0.9999999999378947,
        -0.4999999953497977,
        0.04166660983627234,
        -0.00138864297092866,
        2.4363696638712567e-05,
    ],
    [
        0.9999999999949465,
        -0.1666666662725419,
        0.008333328384328622,
        -0.00019839086804422336,
        2.7163115621084485e-06,
    ],
)

#: A parabola close to 1 / x for x from 1 + sqrt(1/2) to 1 + sqrt(2).
_RECIPROCAL = [1.477756, -0.722444, 0.116863]

_ROOT_OF_HALF = math.sqrt(0.5)


def fresh_key() -> np.ndarray:
    """Returns 128 secret bits from the operating system, of shape (2,), uint64."""
    return np.frombuffer(os.urandom(16), dtype=np.uint64).copy()


def key_from_seed(seed: int) -> np.ndarray:
    """Returns the key of a test seed, of shape (2,), uint64. Whoever knows the seed knows it."""
    digest = hashlib.sha256(f"keras_bandmf test seed {seed}".encode()).digest()
    return np.frombuffer(digest[:16], dtype=np.uint64).copy()


def fold_key(key: np.ndarray, purpose: str) -> np.ndarray:
    """Derives the key of one purpose from a run key.

    SHA-256 is one-way, so the key of one purpose tells nothing about that of another.

    Args:
        key: The run key, of shape (2,), uint64.
        purpose: What the derived key is for, such as `"noise"` or `"sampler"`.

    Returns:
        The derived key, of shape (2,), uint64.
    """
    digest = hashlib.sha256(np.asarray(key, np.uint64).tobytes() + purpose.encode()).digest()
    return np.frombuffer(digest[:16], dtype=np.uint64).copy()


def standard_normals(
    key: tf.Tensor,
    step: tf.Tensor,
    first_chunk: int | tf.Tensor,
    num_chunks: int,
    series: Series = FAST,
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
        key: The key, of shape (2,), int64 or uint64.
        step: The number of the row, a scalar integer.
        first_chunk: The part starts at element `first_chunk * CHUNK`; an int64 tensor if it is one.
        num_chunks: The number of chunks to draw.
        series: `FAST` or `FINE`.

    Returns:
        The elements with even and those with odd numbers, each of shape
        (num_chunks * CHUNK / 2,), float64. Use both in the same XLA program: XLA makes a loop for
        each array that is written, and may compute all words again in each.
    """
    return box_muller(*_words(key, step, first_chunk, num_chunks), series)


def _words(
    key: tf.Tensor, step: tf.Tensor, first_chunk: int | tf.Tensor, num_chunks: int
) -> philox.Words:
    """Returns the four Philox words of each pair of a part of row `step`."""
    key, offset = tf.bitcast(key, tf.uint64)[0], tf.bitcast(key, tf.int64)[1]
    # The offset also keeps compilers from embedding, as a constant, what depends on `low` alone.
    # Counters are added as int64, which gives the same bits: Grappler turns sums of uint64 into an
    # operation that GPUs do not have.
    low = tf.convert_to_tensor(first_chunk * COUNTERS_PER_CHUNK, tf.int64) + offset
    counters = tf.cast(tf.range(num_chunks * COUNTERS_PER_CHUNK, dtype=tf.int32), tf.int64)
    low = tf.bitcast(counters + low, tf.uint64)
    return philox.words(low, tf.cast(step, tf.uint64), key)


def box_muller(
    first: tf.Tensor,
    second: tf.Tensor,
    third: tf.Tensor,
    fourth: tf.Tensor,
    series: Series = FAST,
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
        ends. With `FINE` the normals returned are off by less than 2^-46 of the radius from those
        of exact arithmetic, with `FAST` by less than 2^-33, if addition, multiplication and root
        are those of IEEE 754, fused or not (tested against 60 digits, over whole ranges and at
        their ends). Both are float64 throughout, of the same random bits: the errors of `FAST` are
        a smooth function of the ideal normals, and change their density by less than 2^-28 of it
        between the joints of its pieces, where they jump by less than 2^-36 (tested).

    Args:
        first: The first word, below 2**32, as uint64, of any shape.
        second: The second word, in the same form.
        third: The third word, in the same form.
        fourth: The fourth word, in the same form.
        series: `FAST` or `FINE`.

    Returns:
        Two float64 tensors of that shape.
    """
    radius = tf.sqrt(_twice_energy(first, second, fourth, series))
    swap = _signed(tf.bitwise.left_shift(fourth, _word(32))) < 0
    sign = tf.bitwise.bitwise_and(tf.bitwise.left_shift(fourth, _word(33)), _word(2**63))
    radius_of_cosine = tf.bitcast(_xor(tf.bitcast(radius, tf.uint64), sign), tf.float64)
    # The bits of the angle as those of a number from 1 to 2, its middle in the middle of a cell.
    fine = tf.bitwise.bitwise_and(tf.bitwise.right_shift(fourth, _word(10)), _word(63 << 14))
    turn = tf.bitwise.bitwise_or(tf.bitwise.left_shift(third, _word(20)), fine)
    turn = _or_float(turn, 1.0 + 2.0**-39) - 1.5
    square = turn * turn
    cosine = radius_of_cosine * _polynomial(series.cosine, square)
    sine = radius * (turn * _polynomial(series.sine, square))
    return tf.where(swap, sine, cosine), tf.where(swap, cosine, sine)


def _twice_energy(
    first: tf.Tensor, second: tf.Tensor, fourth: tf.Tensor, series: Series
) -> tf.Tensor:
    """Returns -2 log U, from U below one half and from 1 - U above, summed from the small end."""
    word = tf.bitwise.bitwise_or(tf.bitwise.left_shift(first, _word(32)), second)
    above = _signed(word) < 0
    # All bits of a U of at least one half are flipped, so that they give 1 - U.
    flips = tf.bitcast(tf.bitwise.right_shift(_signed(word), tf.constant(63, tf.int64)), tf.uint64)
    word = _xor(word, flips)
    # First 52 bits, and then 12, 24 and the half.
    high = _or_float(tf.bitwise.right_shift(word, _word(12)), 1.0) - 1.0
    middle = tf.bitwise.left_shift(_lower(word, 12), _word(25))
    low = tf.bitwise.left_shift(_lower(_xor(fourth, flips), 24), _word(1))
    low = _or_float(tf.bitwise.bitwise_or(middle, low), 2.0**-37 + 2.0**-89) - 2.0**-37
    part = high + low
    uniform = tf.where(above, 1.0 - part, part)
    # U = 2^exponent * m with m from sqrt(1/2) to sqrt(2); log m by s = (m - 1) / (m + 1).
    bits = tf.bitcast(uniform, tf.uint64) + _word(_bits(1.0) - _bits(_ROOT_OF_HALF))
    mantissa = _lower(bits, 52) + _word(_bits(_ROOT_OF_HALF))
    mantissa = tf.bitcast(mantissa, tf.float64)
    exponent = _or_float(tf.bitwise.right_shift(bits, _word(52)), 2.0**52) - (2.0**52 + 1023.0)
    # For a U near 1, only its distance from 1 has all digits.
    above_root = uniform >= _ROOT_OF_HALF
    ratio = tf.where(above_root, -part, mantissa - 1.0)
    ratio *= _reciprocal(mantissa + 1.0, series.newton_steps)
    logarithm = ratio * _polynomial(series.logarithm, ratio * ratio)
    return exponent * (-2.0 * math.log(2.0)) + logarithm


def _reciprocal(x: tf.Tensor, newton_steps: int) -> tf.Tensor:
    """Returns 1 / x for x from 1 + sqrt(1/2) to 1 + sqrt(2).

    It makes Newton steps from a parabola that is off by 2^-9.4: two steps leave 2^-37, three 2^-51.
    For a division, XLA would compute what comes before it twice: here, all of Philox.
    """
    value = _polynomial(_RECIPROCAL, x)
    for _ in range(newton_steps):
        value += value * (1.0 - x * value)
    return value


def _word(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint64)


def _signed(word: tf.Tensor) -> tf.Tensor:
    return tf.bitcast(word, tf.int64)


def _lower(word: tf.Tensor, places: int = 32) -> tf.Tensor:
    return tf.bitwise.bitwise_and(word, _word(2**places - 1))


def _xor(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(left, right)


def _or_float(word: tf.Tensor, value: float) -> tf.Tensor:
    """Returns the float64 that has the bits of `value` and of the word.

    This avoids the conversion of 64-bit integers, which processors without AVX-512 do not have.
    """
    return tf.bitcast(tf.bitwise.bitwise_or(word, _word(_bits(value))), tf.float64)


def _bits(value: float) -> int:
    """Returns the bits of a float64 as an integer."""
    return int(np.float64(value).view(np.int64))


def _polynomial(coefficients: list[float], x: tf.Tensor) -> tf.Tensor:
    """Evaluates a polynomial by Horner's rule, with coefficients from the constant on."""
    value: tf.Tensor = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value
