"""The sensitivity of C, from how often and how far apart an example takes part.

The sensitivity is the largest norm of `sum_{i in pattern} C[:, i] u_i'` over allowed patterns and
vectors u_i of norm at most 1. A pattern is allowed if it has at most `max_participations` steps,
any two at least `min_separation` apart; with `fixed_order=True`, exactly that far apart. The
algorithms are in `participation`. The evenly spaced worst case is theorem 2 of Kalinin and Lampert,
arXiv 2405.13763.
"""

from __future__ import annotations

import math

import numpy as np

from keras_bandmf.strategies.participation import (
    Products,
    fixed_order_maximum,
    is_affordable,
    max_separated_sum,
    participations,
    row_bounds,
    separated_bound,
    separated_maximum,
)

# The most entries of C'C, and the most (steps x participations), from which a bound is computed.
_MAX_ENTRIES = 10**8
_MAX_WORK = 10**8
# A rise of unit-norm coefficients that counts as none. The bound holds either way.
_ROUNDING = 1e-14


def banded_toeplitz(coefficients: np.ndarray, num_steps: int, column_normalize: bool) -> np.ndarray:
    """Returns a dense lower-triangular Toeplitz C.

    Args:
      coefficients: `(b,)` float64.
      num_steps: n.
      column_normalize: whether every column is divided by its norm.

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
    fixed_order: bool = False,
) -> float:
    """Returns the sensitivity of a banded Toeplitz strategy, or an upper bound on it.

    Args:
      coefficients: `(b,)` float64 of norm 1.
      num_steps: n >= b.
      column_normalize: whether the columns of C are divided by their norms.
      max_participations: the most participations of an example.
      min_separation: the least distance, in steps, between two of them.
      fixed_order: whether they are exactly that far apart.

    Returns:
      Let k be the number of participations that fit. The result is exact for k = 1, for
      b <= `min_separation` (the root of the sum of k squared column norms), and for raw strategies
      with non-negative, non-increasing coefficients. For other non-negative coefficients it is
      exact in fixed order, and without it where `participation.is_affordable`. Otherwise it is an
      upper bound.

    Raises:
      ValueError: if the upper bound is needed and b is too large for it.

    Formal guarantees:
      Never below the sensitivity over all patterns of the schema. For b <= `min_separation` the
      columns of a pattern share no row, so squared norms add; column norms do not increase along
      the steps, so the earliest evenly spaced pattern is the worst. Coefficients that are not
      non-increasing are bounded by the least non-increasing sequence that is nowhere below their
      absolute values: C, entry by entry, and so every sum of its columns, is then below that one's.
    """
    bands = len(coefficients)
    fits = participations(num_steps, max_participations, min_separation)
    if fits == 1:
        return 1.0
    if bands <= min_separation:
        if column_normalize:
            return math.sqrt(fits)
        return _disjoint(coefficients, num_steps, fits, min_separation)
    falling = np.maximum.accumulate(np.abs(coefficients)[::-1])[::-1]
    evenly_spaced = math.inf
    if not column_normalize:
        evenly_spaced = _evenly_spaced(falling, num_steps, fits, min_separation)
        if np.max(falling - coefficients) <= _ROUNDING:
            return evenly_spaced
    search = _toeplitz_fixed_order if fixed_order else _toeplitz_separated
    bound = search(coefficients, num_steps, column_normalize, fits, min_separation)
    if not math.isfinite(min(bound, evenly_spaced)):
        raise ValueError(
            f"Expected num_bands <= min_separation, or at most {_MAX_ENTRIES} entries of C'C from "
            "which to bound the sensitivity of a column-normalized strategy. Received: num_bands="
            f"{bands}, min_separation={min_separation}. Use num_bands <= min_separation, where the "
            "sensitivity is exact, or column_normalize=False."
        )
    return min(bound, evenly_spaced)


def banded_sensitivity(
    columns: np.ndarray, max_participations: int, min_separation: int, fixed_order: bool = False
) -> float:
    """Returns the sensitivity of a banded strategy of unit columns, or an upper bound on it.

    Args:
      columns: `(n, b)` float64. Row j is column j of C from its diagonal down, of norm 1, with
        zeros for what would lie below row n - 1 of C.
      max_participations: the most participations of an example.
      min_separation: the least distance, in steps, between two of them.
      fixed_order: whether they are exactly that far apart.

    Returns:
      Let k be the number of participations that fit. The result is exact for k = 1 and for
      b <= `min_separation` (`sqrt(k)`). With more bands it is the root of the largest sum of |C'C|
      over a pattern, which is exact if no two columns that overlap have a negative product. Without
      `fixed_order`, that sum is itself bounded where `participation.is_affordable` is False.

    Formal guarantees:
      Never below the sensitivity over all patterns of the schema. For b <= `min_separation` the
      columns of a pattern share no row, so squared norms add.
    """
    n, bands = columns.shape
    fits = participations(n, max_participations, min_separation)
    if fits == 1:
        return 1.0
    if bands <= min_separation:
        return math.sqrt(fits)
    step = min_separation if fixed_order else 1
    products = {0: np.ones(n)}
    for lag in range(min_separation, bands, step):
        inner = np.einsum("jk,jk->j", columns[: n - lag, lag:], columns[lag:, : bands - lag])
        products[lag] = np.append(np.abs(inner), np.zeros(lag))
    if fixed_order:
        return math.sqrt(fixed_order_maximum(products, fits, min_separation))
    return math.sqrt(_separated(products, fits, min_separation))


def _separated(products: Products, fits: int, separation: int) -> float:
    """Returns the largest sum of |C'C| over a min-separation pattern, or an upper bound on it."""
    n = len(products[0])
    if is_affordable(n, max(products), fits, separation):
        return separated_maximum(products, fits, separation)
    if n * fits > _MAX_WORK:
        return fits * float(np.max(row_bounds(products, fits, separation)))
    return separated_bound(products, fits, separation)


def _disjoint(coefficients: np.ndarray, num_steps: int, fits: int, separation: int) -> float:
    """Returns the exact sensitivity for raw columns that share no row.

    Whole columns have norm 1; those that end at step n are shorter.
    """
    full = min(fits, (num_steps - len(coefficients)) // separation + 1)
    cut = num_steps - separation * np.arange(full, fits)
    squares = np.cumsum(np.square(coefficients))[cut - 1]
    return math.sqrt(full + float(np.sum(squares)))


def _evenly_spaced(coefficients: np.ndarray, num_steps: int, fits: int, separation: int) -> float:
    """Returns the exact sensitivity for raw, non-negative, non-increasing coefficients.

    It is the norm of `sum_t C[:, t separation]`. After the first b rows and until the last
    participation, row i of that sum depends only on `i mod separation`, so only the rows of the
    first and the last few columns are summed.
    """
    bands = len(coefficients)
    # The number of participations whose columns can overlap. Between the ends, the rows of a period
    # repeat exactly.
    overlap = -(-bands // separation)
    kept = min(fits, 2 * overlap + 1)
    repeats = fits - kept
    length = min(num_steps - repeats * separation, (kept - 1) * separation + bands)
    # Row i is the sum of c[i - t separation] over t < kept: a running sum in each residue class.
    rows = -(-length // separation)
    padded = np.zeros(rows * separation)
    padded[: min(bands, length)] = coefficients[:length]
    total = np.cumsum(padded.reshape(rows, separation), axis=0)
    if rows > kept:
        total[kept:] -= total[: rows - kept].copy()
    total = total.reshape(-1)[:length]
    period = total[(overlap - 1) * separation : overlap * separation]
    return math.sqrt(float(total @ total) + repeats * float(period @ period))


def _toeplitz_products(
    coefficients: np.ndarray, num_steps: int, column_normalize: bool, lags: range
) -> Products:
    """Returns the diagonals of |C'C| at lag 0 and at `lags`, for `num_steps` steps."""
    n, bands = num_steps, len(coefficients)
    lengths = np.minimum(n - np.arange(n), bands)
    squares = np.cumsum(np.square(coefficients))[lengths - 1]
    norms = np.sqrt(squares) if column_normalize else np.ones(n)
    products = {0: squares / norms**2}
    for lag in lags:
        if lag >= min(bands, n):
            break
        # Column i + lag ends where C ends. The part that it shares with column i ends there, too.
        sums = np.cumsum(coefficients[: bands - lag] * coefficients[lag:])
        shared = sums[np.minimum(bands - lag, lengths[lag:]) - 1]
        products[lag] = np.append(np.abs(shared) / (norms[: n - lag] * norms[lag:]), np.zeros(lag))
    return products


def _toeplitz_fixed_order(
    coefficients: np.ndarray, num_steps: int, column_normalize: bool, fits: int, separation: int
) -> float:
    """Returns the root of the largest sum of |C'C| over patterns in fixed order.

    It costs O(b^2 / separation). Outside the last b columns, C'C is Toeplitz. Let w be the number
    of participations whose columns can overlap. Of more than 2 w participations, the first and all
    those it overlaps with lie in that part, so the first adds one period. All starts from which the
    whole pattern lies in that part give the same sum, so one of them is enough.
    """
    bands = len(coefficients)
    overlap = -(-bands // separation)
    kept = min(fits, 2 * overlap)
    side = min(num_steps - (fits - kept) * separation, (kept - 1) * separation + bands + 1)
    lags = range(separation, bands, separation)
    products = _toeplitz_products(coefficients, side, column_normalize, lags)
    largest = fixed_order_maximum(products, kept, separation)
    inner = [abs(float(coefficients[: bands - m] @ coefficients[m:])) for m in lags]
    return math.sqrt(largest + (fits - kept) * (1.0 + 2.0 * math.fsum(inner)))


def _toeplitz_separated(
    coefficients: np.ndarray, num_steps: int, column_normalize: bool, fits: int, separation: int
) -> float:
    """Returns the root of the largest sum of |C'C| over min-separation patterns, or a bound on it.

    The bound takes O(b^2) memory, because all rows of C'C that are more than b steps from both ends
    are the same. The result is `inf` if even that is too much.
    """
    bands = len(coefficients)
    lags = range(separation, bands)
    side = num_steps
    if not is_affordable(num_steps, bands - 1, fits, separation):
        side = min(num_steps, 4 * bands)
    if side * len(lags) > _MAX_ENTRIES:
        return math.inf
    products = _toeplitz_products(coefficients, side, column_normalize, lags)
    if side == num_steps:
        return math.sqrt(_separated(products, fits, separation))
    rows = row_bounds(products, fits, separation)
    if num_steps * fits > _MAX_WORK:
        return math.sqrt(fits * float(np.max(rows)))
    middle = np.full(num_steps - side, rows[side // 2])
    rows = np.concatenate([rows[: side // 2], middle, rows[side // 2 :]])
    return math.sqrt(float(max_separated_sum(rows, fits, separation)))
