"""A preconditioner for the search for a banded strategy.

It changes variables so that the error has about the same curvature in all directions.

Far from the first and the last step, the second derivative of the error is the same at every
column of C: its entry for lag k of column j and lag l of column j' depends only on j' - j, k and l.
It has a closed form where C and A are Toeplitz. With X = C'C the error is tr(A'A X^-1), a convex
function of X, whose second derivative along D and E is

    2 tr(W D Y E),      Y = X^-1 = C^-1 C^-T,      W = Y A'A Y,

and moving entry (j + k, j) of C moves X by r e_j' + e_j r' with r = C' e_(j+k). The products of
these with W, Y and C involve W, Y, Q = B'B, V = Q C^-T, C^-1 and the identity, all of which are
Toeplitz. (At the optimum the first derivative vanishes on the bands, so the second derivative with
respect to C is just that with respect to X.)

The square root of this curvature is divided out in the frequency domain. That costs L-BFGS two
convolutions for each evaluation and saves more than half of its iterations.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.signal

from keras_bandmf.strategies.errors.banded import WorkloadBlocks, unit_response

# Above this many bands, the b x b matrices of all frequencies would be larger than the problem.
MAX_BANDS = 64
# In units of b: the distance beyond which the curvature and the inverse of its root couple columns
# by less than a thousandth, and the number of columns that are convolved at once.
_REACH, _PERIOD = 8, 48
# The least curvature, as a share of the mean: smaller values are not known accurately enough.
_LEAST = 0.01
# How many pieces of columns are transformed together.
_TOGETHER = 16


def middle_response(workload: WorkloadBlocks, num_steps: int) -> np.ndarray:
    """Returns the outputs of the workload after a unit input in the middle of the run.

    Args:
      workload: A in blocks of m steps.
      num_steps: n.

    Returns:
      `(n - j, h)` float64: column j of A from row j on, where j is about n / 2, for each of the h
      outputs of a step.
    """
    block = workload.read_input.shape[2]
    return unit_response(workload, num_steps, -(-num_steps // block) // 2)


def curvature(coefficients: np.ndarray, response: np.ndarray, reach: int) -> np.ndarray:
    """Returns the second derivative of the error with respect to the columns of a Toeplitz C.

    Args:
      coefficients: `(b,)` float64 of norm 1, the columns of C.
      response: `(T, h)` float64, the columns of A, which is Toeplitz, too, for each output.
      reach: the number of columns to either side.

    Returns:
      `(2 reach + 1, b, b)` float64: `[reach + d, l, k]` for entry k of column j and entry l of
      column j + d. Directions that only change the norms of the columns are removed. The values are
      not finite if C^-1 overflows.
    """
    b, length = len(coefficients), len(response)
    size = scipy.fft.next_fast_len(4 * length + 2 * (reach + 2 * b), real=True)
    with np.errstate(over="ignore", invalid="ignore"):
        impulse = np.zeros(length)
        impulse[0] = 1.0
        inverse = np.pad(scipy.signal.lfilter([1.0], coefficients, impulse), (0, size - length))
        factors = scipy.signal.lfilter([1.0], coefficients, response, axis=0)
        spectra = scipy.fft.rfft(factors, size, axis=0)
        gains = scipy.fft.rfft(inverse)
        power = np.square(np.abs(gains))
        y = scipy.fft.irfft(power, size)
        q = scipy.fft.irfft(np.sum(np.square(np.abs(spectra)), axis=1), size)
        v = scipy.fft.irfft(scipy.fft.rfft(q) * gains, size)
        w = scipy.fft.irfft(scipy.fft.rfft(q) * power, size)
    # The sequences are cyclic, so negative indices stand for negative lags.
    d = np.arange(-reach, reach + 1)[:, None, None]
    l, k = np.arange(b)[:, None], np.arange(b)  # noqa: E741
    found = v[d - k] * inverse[-d - l] + q[d + l - k] * y[d]
    found += w[d] * (k == d + l) + v[-d - l] * inverse[d - k]
    across = np.eye(b) - np.outer(coefficients, coefficients)
    return 2.0 * across @ found @ across


class Preconditioner:
    """A symmetric linear map of columns after which a descent sees a curvature of about 1.

    Args:
      kernel: `(2 reach + 1, b, b)` float64, from `curvature`.
      coefficients: `(b,)` float64 of norm 1. The map leaves changes along them as they are, since
        the kernel does not contain them.
      num_steps: n.

    Raises:
      ValueError: if the kernel is not finite, or zero.
    """

    def __init__(self, kernel: np.ndarray, coefficients: np.ndarray, num_steps: int):
        reach = len(kernel) // 2
        if not (np.all(np.isfinite(kernel)) and np.trace(kernel[reach]) > 0.0):
            raise ValueError(
                "Expected a curvature that is finite and positive on average. Received: kernel "
                f"with trace {np.trace(kernel[reach])} at distance 0. Search without a "
                "preconditioner."
            )
        b = len(coefficients)
        self._reach = reach
        self._size = scipy.fft.next_fast_len(min(_PERIOD * b, num_steps) + 2 * reach, real=True)
        # The mean over all frequencies and over all directions but that of the coefficients.
        typical = np.trace(kernel[reach]) / max(1, b - 1)
        coarse = scipy.fft.next_fast_len(4 * reach, real=True)
        spectrum = _spectrum(kernel / typical, coarse)
        spectrum = 0.5 * (spectrum + spectrum.conj().transpose(0, 2, 1))
        values, vectors = np.linalg.eigh(spectrum + np.outer(coefficients, coefficients))
        values = np.maximum(values, _LEAST)
        root = np.matmul(vectors / np.sqrt(values)[:, None], vectors.conj().transpose(0, 2, 1))
        # Cut off at `reach`, so that applying the map to pieces is exact and symmetric.
        cyclic = scipy.fft.irfft(root, coarse, axis=0)
        self._spectrum = _spectrum(cyclic[np.arange(-reach, reach + 1)], self._size)

    def __call__(self, columns: np.ndarray) -> np.ndarray:
        """Returns the map of the columns. The map is its own adjoint.

        Args:
          columns: `(n, b)` float64.

        Returns:
          `(n, b)` float64, a new array.
        """
        n, b = columns.shape
        reach, size = self._reach, self._size
        step = size - 2 * reach
        result = np.empty_like(columns)
        for first in range(0, n, step * _TOGETHER):
            starts = range(first, min(n, first + step * _TOGETHER), step)
            pieces = np.zeros((size, b, len(starts)))
            for i, start in enumerate(starts):
                low, high = max(0, start - reach), min(n, start + step + reach)
                pieces[low - start + reach : high - start + reach, :, i] = columns[low:high]
            product = np.matmul(self._spectrum, scipy.fft.rfft(pieces, axis=0, overwrite_x=True))
            pieces = scipy.fft.irfft(product, size, axis=0, overwrite_x=True)
            for i, start in enumerate(starts):
                stop = min(n, start + step)
                result[start:stop] = pieces[reach : reach + stop - start, :, i]
        return result


def preconditioner_of(start: np.ndarray, workload: WorkloadBlocks) -> Preconditioner | None:
    """Returns a preconditioner for a search, from the column in the middle of its start.

    Args:
      start: `(n, b)` float64, columns of norm 1.
      workload: A in blocks.

    Returns:
      The preconditioner. None where it would not save time (many bands, few steps) or has no
      meaning (C^-1 overflows, or A has no effect in the middle of the run).
    """
    n, b = start.shape
    # Making it costs O(b^4), and an iteration of the search O(n b^2).
    if b > MAX_BANDS or n < b * b:
        return None
    coefficients = start[(n - b) // 2]
    reach = min(_REACH * b, n - 1)
    kernel = curvature(coefficients, middle_response(workload, n), reach)
    try:
        return Preconditioner(kernel, coefficients, n)
    except ValueError:
        return None


def _spectrum(kernel: np.ndarray, size: int) -> np.ndarray:
    """Returns the Fourier transform, `(size // 2 + 1, b, b)` complex128, of a centered kernel."""
    reach = len(kernel) // 2
    cyclic = np.zeros((size, *kernel.shape[1:]))
    cyclic[: reach + 1], cyclic[size - reach :] = kernel[reach:], kernel[:reach]
    return scipy.fft.rfft(cyclic, axis=0)
