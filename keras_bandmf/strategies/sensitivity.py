"""From how often and how far apart an example takes part, to the sensitivity of C.

The sensitivity is the largest norm of `sum_{i in pattern} C[:, i] u_i'` over allowed patterns and
vectors u_i of norm at most 1. A pattern is allowed if it has at most `max_participations` steps,
any two at least `min_separation` apart. (Algorithms: Choquette-Choo et al., arXiv 2306.08153,
algorithms 3 to 5; evenly spaced worst case: arXiv 2405.13763, theorem 2.)
"""

from __future__ import annotations

import math

import numpy as np

# Largest matrix side and largest (steps x participations) the upper bound works through.
_MAX_SIDE = 4096
_MAX_WORK = 10**8


def max_separated_sum(
    values: np.ndarray, max_participations: int, min_separation: int
) -> np.ndarray:
    """Returns the largest sum of `values` over an allowed pattern (VecSens).

    Args:
      values: `(..., n)` float64, not negative.
      max_participations: most steps in a pattern.
      min_separation: least distance of two of them.

    Returns:
      `(...)` float64.
    """
    n = values.shape[-1]
    best = np.zeros_like(values)
    for _ in range(participations(n, max_participations, min_separation)):
        later = np.zeros_like(values)
        if min_separation < n:
            later[..., : n - min_separation] = best[..., min_separation:]
        best = np.maximum.accumulate((values + later)[..., ::-1], axis=-1)[..., ::-1]
    return best[..., 0]


def participations(num_steps: int, max_participations: int, min_separation: int) -> int:
    """Returns how many participations fit: at most `max_participations`, `min_separation` apart."""
    return min(max_participations, -(-num_steps // min_separation))


def gram_bound(gram: np.ndarray, max_participations: int, min_separation: int) -> float:
    """Returns an upper bound on the sensitivity of any C with `C'C = gram`.

    Args:
      gram: `(n, n)` float64.
      max_participations: most participations of an example.
      min_separation: least distance of two of them.

    Returns:
      The bound; exact where columns of distinct participations are orthogonal.

    Formal guarantees:
      Never below the sensitivity: the squared norm for a pattern is
      `sum_{s,t} gram[s, t] <u_s, u_t> <= sum_s sum_t |gram[s, t]|`, and both sums are replaced by
      their largest values over allowed patterns.
    """
    rows = max_separated_sum(np.abs(gram), max_participations, min_separation)
    return math.sqrt(float(max_separated_sum(rows, max_participations, min_separation)))


def banded_toeplitz(coefficients: np.ndarray, num_steps: int, column_normalize: bool) -> np.ndarray:
    """Returns the `(n, n)` lower-triangular Toeplitz C, its columns divided by their norms or not.

    Args:
      coefficients: `(b,)` float64.
      num_steps: n.
      column_normalize: whether every column gets norm 1.

    Returns:
      `(n, n)` float64.
    """
    lag = np.arange(num_steps)[:, None] - np.arange(num_steps)
    inside = (lag >= 0) & (lag < len(coefficients))
    matrix = np.where(inside, coefficients[np.where(inside, lag, 0)], 0.0)
    return matrix / np.linalg.norm(matrix, axis=0) if column_normalize else matrix


def toeplitz_sensitivity(
    coefficients: np.ndarray,
    num_steps: int,
    column_normalize: bool,
    max_participations: int,
    min_separation: int,
) -> float:
    """Returns the sensitivity of a banded Toeplitz strategy, or an upper bound on it.

    Args:
      coefficients: `(b,)` float64 of norm 1.
      num_steps: n >= b.
      column_normalize: whether the columns of C are divided by their norms.
      max_participations: most participations of an example.
      min_separation: least distance, in steps, of two of them.

    Returns:
      With k the number of participations that fit: exact for k = 1 and for b <= `min_separation`
      (`sqrt(k)` times the column norm), exact for raw strategies with non-negative, non-increasing
      coefficients, an upper bound otherwise.

    Raises:
      ValueError: the upper bound is needed and b is too large for it.

    Formal guarantees:
      Never below the sensitivity over all patterns of at most `max_participations` steps, any two
      at least `min_separation` apart. For b <= `min_separation` the columns of a pattern share no
      row, so squared norms add; column norms do not increase along the steps, so the earliest
      evenly spaced pattern is the worst.
    """
    bands = len(coefficients)
    fits = participations(num_steps, max_participations, min_separation)
    if fits == 1:
        return 1.0
    if bands <= min_separation:
        if column_normalize:
            return math.sqrt(fits)
        return _disjoint(coefficients, num_steps, fits, min_separation)
    falling = np.all(coefficients >= 0.0) and np.all(np.diff(coefficients) <= 0.0)
    if falling and not column_normalize:
        return _evenly_spaced(coefficients, num_steps, fits, min_separation)
    return _upper_bound(coefficients, num_steps, column_normalize, fits, min_separation)


def banded_sensitivity(columns: np.ndarray, max_participations: int, min_separation: int) -> float:
    """Returns the sensitivity of a banded strategy of unit columns, or an upper bound on it.

    Args:
      columns: `(n, b)` float64; row j is column j of C from its diagonal down, of norm 1, zero
        below row n - 1 of C.
      max_participations: most participations of an example.
      min_separation: least distance, in steps, of two of them.

    Returns:
      With k the number of participations that fit: exact for k = 1 and for b <= `min_separation`
      (`sqrt(k)`), `gram_bound` of the band of C'C otherwise.

    Formal guarantees:
      Never below the sensitivity over all patterns of at most `max_participations` steps, any two
      at least `min_separation` apart. For b <= `min_separation` the columns of a pattern share no
      row, so squared norms add.
    """
    n, bands = columns.shape
    fits = participations(n, max_participations, min_separation)
    if fits == 1:
        return 1.0
    if bands <= min_separation:
        return math.sqrt(fits)
    # Row j of |C'C| around its diagonal: entries further than b - 1 from it are zero.
    around = np.zeros((n, 2 * bands - 1))
    for lag in range(bands):
        products = columns[: n - lag, lag:] * columns[lag:, : bands - lag]
        inner = np.abs(np.sum(products, axis=1))
        around[: n - lag, bands - 1 + lag] = inner
        around[lag:, bands - 1 - lag] = inner
    rows = max_separated_sum(around, fits, min_separation)
    if n * fits > _MAX_WORK:
        return math.sqrt(fits * float(np.max(rows)))
    return math.sqrt(float(max_separated_sum(rows, fits, min_separation)))


def _disjoint(coefficients: np.ndarray, num_steps: int, fits: int, separation: int) -> float:
    """Exact for raw columns that share no row: full columns count 1, those cut at step n less."""
    full = min(fits, (num_steps - len(coefficients)) // separation + 1)
    cut = num_steps - separation * np.arange(full, fits)
    squares = np.cumsum(np.square(coefficients))[cut - 1]
    return math.sqrt(full + float(np.sum(squares)))


def _evenly_spaced(coefficients: np.ndarray, num_steps: int, fits: int, separation: int) -> float:
    """Exact for raw, non-negative, non-increasing coefficients: norm of `sum_t C[:, t sep]`.

    Row i of that sum depends on `i mod separation` alone once the first b rows are past and until
    the last participation, so only the rows of the first and the last few columns are summed.
    """
    bands = len(coefficients)
    # Participations whose columns can overlap; between the ends, periods repeat exactly.
    overlap = -(-bands // separation)
    kept = min(fits, 2 * overlap + 1)
    repeats = fits - kept
    length = num_steps - repeats * separation
    total = np.zeros(min(length, (kept - 1) * separation + bands))
    for t in range(kept):
        start = t * separation
        stop = min(start + bands, len(total))
        total[start:stop] += coefficients[: stop - start]
    period = total[(overlap - 1) * separation : overlap * separation]
    return math.sqrt(float(total @ total) + repeats * float(period @ period))


def _upper_bound(
    coefficients: np.ndarray, num_steps: int, column_normalize: bool, fits: int, separation: int
) -> float:
    """`gram_bound` in O(b^2) memory: more than b steps from both ends all rows of C'C are alike."""
    bands = len(coefficients)
    side = min(num_steps, 4 * bands)
    if side > _MAX_SIDE:
        raise ValueError(
            "With more bands than the separation, the sensitivity of this strategy is bounded "
            f"for up to {_MAX_SIDE // 4} bands. Received: num_bands={bands}, "
            f"min_separation={separation}. Use num_bands <= min_separation, where it is exact."
        )
    matrix = banded_toeplitz(coefficients, side, column_normalize)
    rows = max_separated_sum(np.abs(matrix.T @ matrix), fits, separation)
    if num_steps * fits > _MAX_WORK:
        return math.sqrt(fits * float(np.max(rows)))
    middle = np.full(num_steps - side, rows[side // 2])
    rows = np.concatenate([rows[: side // 2], middle, rows[side // 2 :]])
    return math.sqrt(float(max_separated_sum(rows, fits, separation)))
