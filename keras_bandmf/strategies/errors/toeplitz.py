"""The errors of a Toeplitz strategy and their gradients, by three exact routes in TensorFlow.

Let c be the first column of C (b coefficients), and the workload prefix sums. The first column of
C^-1 is `h = 1 / c(z)`, its running sum is `x = h / (1 - z)`, and row i of A C^-1 has the squared
norm `e_i = x_0^2 + ... + x_i^2`. Every function here returns or differentiates

    error = sum_t (mean_weight * (n - t) + last_weight) * x_t^2.

The weights `(1 / n, 0)` give the mean of e, and `(0, 1)` its last entry, which is its largest.

 * scan: computes h in blocks of b - 1. Block 2j follows from block j by a power of one matrix:
   O(n b).
 * doubling: never forms h. Sums of squares over p steps give those over 2p: O(b^3 log n).
 * fft: computes h as the inverse of a power series, by Newton's iteration: O(n log n).

None of them loops over steps, so a graph is traced once for all n and b.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import tensorflow as tf

#: The ways to compute an error, and those that form h.
Route = Literal["scan", "doubling", "fft"]
ResponseRoute = Literal["scan", "fft"]
ROUTES: tuple[Route, ...] = get_args(Route)
# Above this many steps, no vector with an entry for each step is formed.
MAX_VECTOR_STEPS = 10**8

_VECTOR = tf.TensorSpec([None], tf.float64)
_SCALAR = tf.TensorSpec([], tf.float64)
_LENGTH = tf.TensorSpec([], tf.int32)


class Doubled(NamedTuple):
    """What the doubling route knows after n steps.

    Attributes:
      error: scalar, the weighted error that the docstring of the module defines.
      gradient: `(b,)`, its gradient with respect to the coefficients.
      summed: scalar, `e_0 + ... + e_{n-1}`.
      last: scalar, `e_{n-1}`.
      state: `(b,)`, `(x_n, h_n, h_{n-1}, ..., h_{n-b+2})`.
      covariance: `(b,)`, the weighted sum over t of `x_t * (x_t, h_t, ..., h_{t-b+2})`.
    """

    error: tf.Tensor
    gradient: tf.Tensor
    summed: tf.Tensor
    last: tf.Tensor
    state: tf.Tensor
    covariance: tf.Tensor


def cheapest_route(num_steps: int, num_bands: int) -> Route:
    """Returns the route with the least work for one value and gradient.

    Args:
      num_steps: n.
      num_bands: b, at least 2.

    Returns:
      One of `ROUTES`. The estimates are in units of about a nanosecond of one core. An estimate
      that is wrong by a factor of two costs at most that factor in time, and changes no result.
    """
    if num_steps > MAX_VECTOR_STEPS:
        return "doubling"
    n, b, levels = float(num_steps), float(num_bands), math.log2(num_steps) + 1
    length = fft_length(num_steps, num_bands)
    transforms = 3.0 * length * math.log2(length)
    newton = 3.6 * 2.0 ** math.ceil(levels - 1) * levels
    powers = 0.03 * b**3 * (1 + math.log2(n / b))
    cost: dict[Route, float] = {
        "doubling": 3e5 + levels * (1e5 + 0.5 * b**3),
        "scan": 7e5 + 0.1 * n * b + powers + transforms,
        "fft": 8e5 + 3e4 * levels + newton + transforms,
    }
    return min(ROUTES, key=lambda route: cost[route])


def fft_length(num_steps: int, num_bands: int) -> int:
    """Returns a power of two at which circular correlations up to lag b - 1 do not wrap around."""
    return 1 << (2 * num_steps + num_bands - 1).bit_length()


def step_bits(num_steps: int) -> np.ndarray:
    """Returns the binary digits of `num_steps` after the leading one, most significant first."""
    return np.array([digit == "1" for digit in bin(num_steps)[3:]], dtype=bool)


def weighted_error(
    coefficients: np.ndarray,
    num_steps: int,
    mean_weight: float,
    last_weight: float,
    route: Route,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the weighted error of a raw Toeplitz strategy and its gradient.

    Args:
      coefficients: `(b,)` float64, b >= 2: the first column of C, at any scale. The first entry is
        not zero.
      num_steps: n >= b.
      mean_weight: weight of `(n - t) * x_t^2`.
      last_weight: weight of `x_t^2`.
      route: one of `ROUTES`.

    Returns:
      The scalar error and its `(b,)` gradient, float64. They are not finite where C^-1 overflows.
    """
    if route == "doubling":
        doubled = doubling(coefficients, step_bits(num_steps), mean_weight, last_weight)
        return doubled.error, doubled.gradient
    length = fft_length(num_steps, len(coefficients))
    compiled = {"scan": _scan_error, "fft": _fft_error}[route]
    return compiled(coefficients, num_steps, mean_weight, last_weight, length)


def impulse_response(
    coefficients: np.ndarray, num_steps: int, route: ResponseRoute = "scan"
) -> tf.Tensor:
    """Returns h, the first `num_steps` coefficients of `1 / c(z)`.

    Args:
      coefficients: `(b,)` float64, b >= 2.
      num_steps: n, at most `MAX_VECTOR_STEPS`.
      route: "scan", which is accurate for any coefficients, or "fft", whose errors are relative to
        the largest |h|.

    Returns:
      `(n,)` float64 tensor.
    """
    return {"scan": _compiled_scan, "fft": _compiled_fft}[route](coefficients, num_steps)


# ------------------------------------------------------------------------------ doubling


def _transition(c: tf.Tensor) -> tf.Tensor:
    """Returns the `(b, b)` matrix from the state (x_t, h_t, ..., h_{t-b+2}) to that of t + 1.

    Its eigenvalue 1, that of the running sum, belongs to the first column (1, 0, ..., 0), which
    products keep exactly. At n = 10^9 the companion matrix of c(z) (1 - z) would have lost it.
    """
    b = tf.size(c)
    newest = -c[1:] / c[0]
    pad = tf.ones([1], tf.float64)
    shift = tf.eye(b - 2, b - 1, dtype=tf.float64)
    lower = tf.concat([tf.zeros([b - 2, 1], tf.float64), shift], axis=1)
    top = tf.stack([tf.concat([pad, newest], 0), tf.concat([0.0 * pad, newest], 0)])
    return tf.concat([top, lower], axis=0)


@tf.function(
    input_signature=[_VECTOR, tf.TensorSpec([None], tf.bool), _SCALAR, _SCALAR], autograph=False
)
def doubling(
    coefficients: tf.Tensor, bits: tf.Tensor, mean_weight: tf.Tensor, last_weight: tf.Tensor
) -> Doubled:
    """Returns the weighted error by the doubling route.

    It takes O(b^3 log n) time and O(b^2 log n) memory, for any n below 2^53. Let F be the
    transition, E = e_0 e_0', Q_p = sum_{t<p} F^t' E F^t and T_p = sum_{t<p} (p - t) F^t' E F^t.
    Then

        Q_2p = Q_p + F^p' Q_p F^p,      T_2p = T_p + p Q_p + F^p' T_p F^p,

    and one more step adds the outer product of row 0 of F^p to Q, then the new Q to T. The adjoint
    goes through the same levels backwards. The adjoint of E is the weighted covariance of the
    states.

    Args:
      coefficients: `(b,)` float64, b >= 2.
      bits: `step_bits(n)`.
      mean_weight: scalar; see the docstring of the module.
      last_weight: scalar; see the docstring of the module.

    Returns:
      A `Doubled` of float64 tensors.
    """
    with tf.device("CPU:0"):
        mm = tf.matmul
        c = coefficients
        b, levels = tf.size(c), tf.size(bits)
        step = _transition(c)
        first = tf.one_hot([0], b, dtype=tf.float64)
        unit = mm(first, first, transpose_a=True)
        store = [
            tf.TensorArray(tf.float64, levels, clear_after_read=False, element_shape=[None, None])
            for _ in range(3)
        ]

        def forward(i, p, power, q, t, powers, qs, ts):
            powers, qs, ts = powers.write(i, power), qs.write(i, q), ts.write(i, t)
            t = t + p * q + mm(power, mm(t, power), transpose_a=True)
            q = q + mm(power, mm(q, power), transpose_a=True)
            power = mm(power, power)

            def one_more():
                row = power[:1]
                longer = q + mm(row, row, transpose_a=True)
                return mm(step, power), longer, t + longer

            power, q, t = tf.cond(bits[i], one_more, lambda: (power, q, t))
            p = 2.0 * p + tf.cast(bits[i], tf.float64)
            return i + 1, p, power, q, t, powers, qs, ts

        one = tf.ones([], tf.float64)
        _, n, power, q, t, powers, qs, ts = tf.while_loop(
            lambda i, *_: i < levels, forward, (0, one, step, unit, unit, *store)
        )
        start = (tf.one_hot(0, b, dtype=tf.float64) + tf.one_hot(1, b, dtype=tf.float64)) / c[0]
        summed = tf.tensordot(start, tf.linalg.matvec(t, start), 1)
        last = tf.tensordot(start, tf.linalg.matvec(q, start), 1)
        outer = start[:, None] * start

        def backward(i, p, d_power, d_q, d_t, d_step, moments):
            power, q, t = powers.read(i), qs.read(i), ts.read(i)

            def undo_one_more():
                squared = mm(power, power)
                grown = d_q + d_t
                row = mm(squared[:1], grown)
                d_squared = mm(step, d_power, transpose_a=True)
                d_squared = tf.concat([d_squared[:1] + 2.0 * row, d_squared[1:]], axis=0)
                d_longer_step = d_step + mm(d_power, squared, transpose_b=True)
                return d_squared, grown, d_longer_step, moments + mm(row, squared, transpose_b=True)

            d_power, d_q, d_step, moments = tf.cond(
                bits[i], undo_one_more, lambda: (d_power, d_q, d_step, moments)
            )
            p = tf.floor(p / 2.0)
            power_q, power_t = mm(power, d_q), mm(power, d_t)
            d_power = (
                mm(d_power, power, transpose_b=True)
                + mm(power, d_power, transpose_a=True)
                + 2.0 * (mm(q, power_q) + mm(t, power_t))
            )
            d_q = d_q + p * d_t + mm(power_q, power, transpose_b=True)
            d_t = d_t + mm(power_t, power, transpose_b=True)
            return i - 1, p, d_power, d_q, d_t, d_step, moments

        zero = tf.zeros_like(step)
        _, _, d_power, d_q, d_t, d_step, moments = tf.while_loop(
            lambda i, *_: i >= 0,
            backward,
            (levels - 1, n, zero, last_weight * outer, mean_weight * outer, zero, zero[:1]),
        )
        error = mean_weight * summed + last_weight * last
        d_newest = tf.reduce_sum((d_power + d_step)[:2, 1:], axis=0)
        # c_0 acts through newest = -c_1.. / c_0 and through start = (1, 1, 0, ..) / c_0.
        d_leading = (tf.tensordot(d_newest, c[1:], 1) / c[0] - 2.0 * error) / c[0]
        gradient = tf.concat([d_leading[None], -d_newest / c[0]], axis=0)
        state = tf.linalg.matvec(power, start)
        return Doubled(error, gradient, summed, last, state, (d_q + d_t + moments)[0])


# ------------------------------------------------------------------- vectors over the steps


def _scan_response(c: tf.Tensor, n: tf.Tensor) -> tf.Tensor:
    """Returns h, in blocks of p = b - 1.

    L block_{j+1} = -U block_j, where L and U are triangular Toeplitz matrices.
    """
    p = tf.size(c) - 1
    lag = tf.range(p)[:, None] - tf.range(p)
    lower = tf.linalg.band_part(tf.gather(c, tf.maximum(lag, 0)), -1, 0)
    upper = tf.linalg.band_part(tf.gather(c, tf.minimum(lag, 0) + p), 0, -1)
    first = tf.one_hot([0], p, dtype=tf.float64)
    solved = tf.linalg.triangular_solve(lower, tf.concat([-upper, tf.transpose(first)], 1))
    blocks = (n + p - 1) // p

    def double(rows, power):
        more = tf.minimum(tf.shape(rows)[0], blocks - tf.shape(rows)[0])
        rows = tf.concat([rows, tf.matmul(rows[:more], power, transpose_b=True)], axis=0)
        return rows, tf.matmul(power, power)

    rows, _ = tf.while_loop(
        lambda rows, _: tf.shape(rows)[0] < blocks,
        double,
        (tf.transpose(solved[:, p:]), solved[:, :p]),
        shape_invariants=(tf.TensorShape([None, None]), tf.TensorShape([None, None])),
    )
    return tf.reshape(rows, [-1])[:n]


def _fft_response(c: tf.Tensor, n: tf.Tensor) -> tf.Tensor:
    """Returns h, by Newton's iteration: if h is right mod z^k, h - h (c h - 1) is right mod z^2k.

    Only coefficients k to 2k - 1 of `c h` are needed, so cyclic products of length 2k are enough.
    """

    def double(h):
        k = tf.size(h)
        length = [2 * k]
        spectrum = tf.signal.rfft(h, length)
        excess = tf.signal.irfft(tf.signal.rfft(c, length) * spectrum, length)[k:]
        more = tf.signal.irfft(tf.signal.rfft(excess, length) * spectrum, length)[:k]
        return (tf.concat([h, -more], axis=0),)

    (h,) = tf.while_loop(
        lambda h: tf.size(h) < n, double, (1.0 / c[:1],), shape_invariants=(tf.TensorShape([None]),)
    )
    return h[:n]


def _error_of_response(
    h: tf.Tensor,
    bands: tf.Tensor,
    mean_weight: tf.Tensor,
    last_weight: tf.Tensor,
    length: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the weighted error and its gradient, `-2 sum_i l_i x_{i-j}` with `l = C^-T (w x)`.

    One product of spectra gives both correlations, because entries of l before step 0 meet zeros.
    """
    n = tf.size(h)
    x = tf.cumsum(h)
    left = tf.cast(n, tf.float64) - tf.cast(tf.range(n), tf.float64)
    weighted = (mean_weight * left + last_weight) * x
    spectra = [tf.signal.rfft(v, [length]) for v in (weighted, h, x)]
    product = spectra[0] * tf.math.conj(spectra[1] * spectra[2])
    gradient = -2.0 * tf.signal.irfft(product, [length])[:bands]
    return tf.reduce_sum(weighted * x), gradient


def _compiled(
    response: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compiles a response, and its error with gradient. Each is traced once, when first used."""

    @tf.function(input_signature=[_VECTOR, _LENGTH], autograph=False)
    def respond(coefficients, num_steps):
        with tf.device("CPU:0"):
            return response(coefficients, num_steps)

    @tf.function(input_signature=[_VECTOR, _LENGTH, _SCALAR, _SCALAR, _LENGTH], autograph=False)
    def error(coefficients, num_steps, mean_weight, last_weight, length):
        with tf.device("CPU:0"):
            h = response(coefficients, num_steps)
            return _error_of_response(h, tf.size(coefficients), mean_weight, last_weight, length)

    return respond, error


_compiled_scan, _scan_error = _compiled(_scan_response)
_compiled_fft, _fft_error = _compiled(_fft_response)
