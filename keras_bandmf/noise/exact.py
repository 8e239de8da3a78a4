"""Exact rounding of noise: the few doubtful values are computed to as many bits as needed.

A row is `rint(v)` with `v = a z - sum_k c_k n_k`. Computed in float64, `rint(v)` can be wrong only
where `v` is within a bound of a tie. There it is computed again, by `decimal`, with more random
bits.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_bandmf._keras_internals import inside_xla_program
from keras_bandmf.noise import philox

_CONTEXT = decimal.Context(prec=130, Emin=-9999, Emax=9999)
_HALF = decimal.Decimal("0.5")
_PI = decimal.Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534"
    "21170679821480865132823066470938446095505822317253594081284811"
)
#: Bounds on errors in float64. Relative to the radius: that of the normals, with the bits of the
#: angle that were not drawn. Absolute: the others. Radii whose square exceeds it are doubtful.
_OF_RADIUS, _ABSOLUTE, _SQUARE_LIMIT = 2.0**-38, 2.0**-42, 40.0
#: The largest number of rounds with more bits: each has 64 for the radius and 64 for the angle.
_ROUNDS = 15


def check_not_compiled() -> None:
    """Refuses to make exact noise in a program that XLA compiles.

    Raises:
        ValueError: If such a program is being traced.
    """
    if inside_xla_program():
        raise ValueError(
            'noise="exact" computes doubtful values in Python, which XLA cannot compile. Received: '
            "a step inside `tf.function(jit_compile=True)`. Compile the gradients alone, and call "
            "`apply_clipped` outside of it, as `fit` of a private model does; or use "
            'noise="default".'
        )


def root_of_log(numerator: int, bits: int) -> decimal.Decimal:
    """Returns sqrt(-2 log(numerator / 2^bits)) to 120 digits."""
    ratio = _CONTEXT.divide(decimal.Decimal(numerator), decimal.Decimal(2**bits))
    return _CONTEXT.sqrt(_CONTEXT.multiply(-2, _CONTEXT.ln(ratio)))


def direction(numerator: int, bits: int) -> tuple[decimal.Decimal, decimal.Decimal]:
    """Returns cosine and sine of the angle numerator / 2^bits * pi / 4 to 120 digits."""
    with decimal.localcontext(_CONTEXT):
        angle = decimal.Decimal(numerator) / 2 ** (bits + 2) * _PI
        square = -angle * angle
        cosine, sine, term, place = decimal.Decimal(0), decimal.Decimal(0), decimal.Decimal(1), 0
        while abs(term) > decimal.Decimal("1e-128"):
            cosine += term
            sine += term * angle / (2 * place + 1)
            place += 1
            term *= square / ((2 * place - 1) * (2 * place))
        return cosine, sine


def doubtful(
    pair: Sequence[tf.Tensor], scale: tf.Tensor, values: Sequence[tf.Tensor], sizes: tf.Tensor
) -> tf.Tensor:
    """Returns which pairs have a value whose rounding float64 does not settle.

    Formal guarantees:
        For any other pair, `rint(values)` is that of the real numbers whose first bits were drawn,
        if float64 arithmetic is that of IEEE 754 (fused or not), and the normals, those of
        `normals.FINE`, are off by less than 2^-46 of the radius: bits of the angle not drawn move
        a normal by at most 2^-38 * pi / 4 of the radius, those of the radius by at most 2^-43.5
        near zero, and by 2^-88 exp(r^2 / 2) < 2^-58 elsewhere below the limit.

    Args:
        pair: The two standard normals of each pair, of shape (m,) each.
        scale: The scalar `a`.
        values: The values `v` of both.
        sizes: For each pair, a bound on the rounding of the sums over k.

    Returns:
        Booleans of shape (m,).
    """
    square = tf.square(pair[0]) + tf.square(pair[1])
    # (1 + r^2) / 2 is at least r.
    bound = tf.abs(scale) * ((0.5 + 0.5 * square) * _OF_RADIUS + _ABSOLUTE) + sizes
    near = square > _SQUARE_LIMIT
    for value in values:
        near |= tf.abs(value - tf.floor(value) - 0.5) <= bound + tf.abs(value) * 2.0**-51
    return near


def rounded_pairs(
    key: np.ndarray,
    step: np.ndarray,
    indices: np.ndarray,
    coefficients: np.ndarray,
    past: np.ndarray,
) -> np.ndarray:
    """Computes a row again at a few pairs, exactly.

    Formal guarantees:
        Given ideal random words, each value is the rounding of `a z - sum_k c_k n_k` with `z`
        exactly normal and the coefficients exact, except with probability below 2^-900.

    Args:
        key: The noise key, of shape (2,), int64.
        step: The number of the row, below 2^60.
        indices: The numbers of the pairs in the whole row, of shape (m,).
        coefficients: `a`, and then `c` for each slot of the ring, of shape (b,), float64.
        past: The ring at these pairs, of shape (b - 1, m, 2), int32.

    Returns:
        The values of the row, of shape (m, 2), int32.
    """
    with tf.device("CPU"):
        drawn = [_words(key, int(step), indices, turn) for turn in range(2)]
    exact = [decimal.Decimal(float(value)) for value in coefficients]
    found = np.empty((len(indices), 2), np.int32)
    with decimal.localcontext(_CONTEXT):
        for place, index in enumerate(indices):
            words = [[int(word) for word in turn[place]] for turn in drawn]
            affine = [
                sum(
                    (c * int(n) for c, n in zip(exact[1:], past[:, place, half], strict=True)),
                    decimal.Decimal(0),
                )
                for half in range(2)
            ]
            while True:
                values = _rounded(words, exact[0], affine)
                if values is not None:
                    break
                turn = len(words)
                words.append([int(w) for w in _words(key, int(step), np.array([index]), turn)[0]])
            found[place] = values
    return found


def _words(key: np.ndarray, step: int, indices: np.ndarray, turn: int) -> np.ndarray:
    """Returns the Philox words of some pairs. More bits of a step come from steps beyond 2^60."""
    unsigned = np.asarray(key, np.int64).view(np.uint64)
    low = np.asarray(indices, np.int64).astype(np.uint64) + unsigned[1]
    words = philox.words(
        tf.constant(low), tf.constant(step + (turn << 60), tf.uint64), tf.constant(unsigned[0])
    )
    return np.stack([word.numpy() for word in words], axis=-1)


def _rounded(
    words: list[list[int]], scale: decimal.Decimal, affine: list[decimal.Decimal]
) -> tuple[int, int] | None:
    """Returns the two values of a pair, or None if more bits are needed."""
    first, second, third, fourth = words[0]
    uniform, bits = (first << 56) + (second << 24) + fourth % 2**24, 88
    turn, places = (third - 2**31) * 2**6 + (fourth >> 24) % 64, 37
    for one, two, three, four in words[1:]:
        uniform, bits = (uniform << 64) + (one << 32) + two, bits + 64
        turn, places = (turn << 64) + (three << 32) + four, places + 64
    if uniform == 0:
        return None
    largest, smallest = root_of_log(uniform, bits), decimal.Decimal(0)
    if uniform + 1 < 2**bits:
        smallest = root_of_log(uniform + 1, bits)
    cosine, sine = direction(2 * turn + 1, places + 1)
    radius = (largest + smallest) / 2
    # Digits beyond 120 are covered by the last term.
    error = abs(scale) * ((largest - smallest) + largest / 2**places + decimal.Decimal("1e-110"))
    cosine = -cosine if fourth >> 30 & 1 else cosine
    pair = (sine, cosine) if fourth >> 31 else (cosine, sine)
    values = []
    for share, past in zip(pair, affine, strict=True):
        value = scale * radius * share - past
        lower, upper = (math.floor(value + _HALF + move) for move in (-error, error))
        if lower != upper and len(words) <= _ROUNDS:
            return None
        values.append(min(max(lower, -(2**31)), 2**31 - 1))
    return values[0], values[1]
