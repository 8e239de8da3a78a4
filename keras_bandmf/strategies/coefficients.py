"""The first column of a Toeplitz matrix: the square root's, and the check of any other."""

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
    k = np.arange(1.0, num_bands)
    return np.concatenate([[1.0], np.cumprod((2.0 * k - 1.0) / (2.0 * k))])


def checked_coefficients(coefficients: object) -> np.ndarray:
    """Returns the first column of a Toeplitz C, scaled to norm 1.

    Args:
      coefficients: a vector of real numbers, the first positive.

    Returns:
      `(b,)` float64, read-only; one that has norm 1 to rounding comes back to the last bit.

    Raises:
      ValueError: anything else.
    """
    try:
        vector = np.array(coefficients)
    except (TypeError, ValueError):  # ragged: judged below like any other non-vector
        vector = np.array(None)
    if vector.dtype.kind not in "fiu" or vector.ndim != 1 or vector.size == 0:
        raise ValueError(
            "`coefficients` must be a vector of at least one real number. Received: coefficients="
            f"{coefficients!r}. Pass the first column of C, from its diagonal down."
        )
    vector = vector.astype(np.float64)
    if not np.all(np.isfinite(vector)) or vector[0] <= 0.0:
        raise ValueError(
            "`coefficients` must be finite and the first, the diagonal of C, must be positive. "
            f"Received: coefficients={coefficients!r}. Change the sign of all, or drop leading "
            "zeros."
        )
    largest = np.max(np.abs(vector))
    # Squares of extreme entries would overflow or vanish. Others are not touched here: a column of
    # norm 1 may have none above 1/2, and has to come back to the last bit.
    if not 1e-100 < largest < 1e100:
        vector = vector / largest
    norm = math.sqrt(math.fsum(np.square(vector).tolist()))
    # What is of norm 1 to rounding is left alone: scaling it again would move its last bits.
    if abs(norm - 1.0) > 4.0 * np.finfo(np.float64).eps:
        vector = vector / norm
    vector.flags.writeable = False
    return vector
