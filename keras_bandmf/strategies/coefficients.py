"""The first column of a Toeplitz matrix: that of the square root, and the check of any other."""

from __future__ import annotations

import math

import numpy as np


def square_root_coefficients(num_bands: int) -> np.ndarray:
    """Returns the first coefficients of `(1 - z)^(-1/2)`, the square root of the prefix sum.

    Args:
      num_bands: b >= 1.

    Returns:
      `(b,)` float64: 1, 1/2, 3/8, ... (Fichtenberger, Henzinger, Upadhyay, arXiv 2202.11205).
    """
    return fractional_coefficients(0.5, num_bands)


def fractional_coefficients(exponent: float, num_bands: int) -> np.ndarray:
    """Returns the first coefficients of `(1 - z)^(-gamma)`, a fractional power of the prefix sum.

    Args:
      exponent: gamma, in (0, 1).
      num_bands: b >= 1.

    Returns:
      `(b,)` float64: 1, gamma, gamma (gamma + 1) / 2, ...
    """
    k = np.arange(1.0, num_bands)
    return np.concatenate([[1.0], np.cumprod((k - 1.0 + exponent) / k)])


def checked_coefficients(coefficients: object) -> np.ndarray:
    """Returns the first column of a Toeplitz C, scaled to norm 1.

    Args:
      coefficients: a vector of real numbers, the first positive.

    Returns:
      `(b,)` float64, read-only. A vector whose norm is 1 to rounding keeps all its bits.

    Raises:
      ValueError: if it is anything else.
    """
    try:
        vector = np.array(coefficients)
    except (TypeError, ValueError):  # Ragged input is refused below, like any other non-vector.
        vector = np.array(None)
    if vector.dtype.kind not in "fiu" or vector.ndim != 1 or vector.size == 0:
        raise ValueError(
            "Expected `coefficients` to be a vector of at least one real number. Received: "
            f"coefficients={coefficients!r}. Pass the first column of C, from its diagonal down."
        )
    vector = vector.astype(np.float64)
    if not np.all(np.isfinite(vector)) or vector[0] <= 0.0:
        raise ValueError(
            "Expected `coefficients` to be finite and the first, the diagonal of C, to be "
            f"positive. Received: coefficients={coefficients!r}. Change the sign of all, or drop "
            "leading zeros."
        )
    largest = np.max(np.abs(vector))
    # The squares of extreme entries would overflow or vanish. Other entries are not scaled here,
    # because a column of norm 1 must keep all its bits.
    if not 1e-100 < largest < 1e100:
        vector = vector / largest
    norm = math.sqrt(math.fsum(np.square(vector).tolist()))
    # A vector of norm 1 to rounding is left alone: scaling it again would change its last bits.
    if abs(norm - 1.0) > 4.0 * np.finfo(np.float64).eps:
        vector = vector / norm
    vector.flags.writeable = False
    return vector
