"""The largest sums over the participation patterns of an example.

Let X = C'C. An example that takes part in the steps of a pattern moves C G by a squared norm of
`sum_{s,t in pattern} X[s, t] <u_s, u_t>` with norms of u at most 1. This is at most
`sum_{s,t in pattern} |X[s, t]|`, which is reached if no entry in it is negative. A pattern of the
min-separation schema has at most `max_participations` steps, any two at least `min_separation`
apart. A pattern of the fixed order has steps exactly `min_separation` apart. (Choquette-Choo et
al., arXiv 2306.08153, algorithms 3 to 5.)

Functions take X by its diagonals, `products[m][i] = |X[i, i + m]|`, each `(n,)` float64 with zeros
for `i >= n - m`. A lag that is missing is zero everywhere. Lags below the separation, except 0, are
never read.
"""

from __future__ import annotations

import math

import numpy as np

Products = dict[int, np.ndarray]

# The most elementary operations of the exact algorithm, and how many entries of X are handled at a
# time.
_MAX_WORK = 3 * 10**8
_MAX_ENTRIES = 10**7


def participations(num_steps: int, max_participations: int, min_separation: int) -> int:
    """Returns how many participations fit: at most `max_participations`, `min_separation` apart."""
    return min(max_participations, -(-num_steps // min_separation))


def max_separated_sum(
    values: np.ndarray, max_participations: int, min_separation: int
) -> np.ndarray:
    """Returns the largest sum of `values` over an allowed pattern (VecSens).

    Args:
      values: `(..., n)` float64, not negative.
      max_participations: the most steps in a pattern.
      min_separation: the least distance between two of them.

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


def row_bounds(products: Products, fits: int, separation: int) -> np.ndarray:
    """Returns, for each step, the largest sum over its row of |X| for a pattern that contains it.

    Args:
      products: diagonals of |X|.
      fits: the most participations.
      separation: the least distance between two of them.

    Returns:
      `(n,)` float64: `|X[i, i]|` and the largest sum of `|X[i, j]|` over up to `fits - 1` others.
    """
    n = len(products[0])
    lags = [m for m in products if m >= separation]
    if not lags or fits == 1:
        return products[0].copy()
    reach = max(lags)
    rows = np.empty(n)
    block = max(1, _MAX_ENTRIES // (2 * reach + 1))
    for first in range(0, n, block):
        last = min(first + block, n)
        # Entry reach + m belongs to step i + m. Steps closer than the separation stay zero.
        around = np.zeros((last - first, 2 * reach + 1))
        for m in lags:
            around[:, reach + m] = products[m][first:last]
            before = products[m][max(0, first - m) : max(0, last - m)]
            around[last - first - len(before) :, reach - m] = before
        rows[first:last] = max_separated_sum(around, fits - 1, separation)
    return rows + products[0]


def separated_bound(products: Products, fits: int, separation: int) -> float:
    """Returns an upper bound on `sum_{s,t in pattern} |X[s, t]|` over all min-separation patterns.

    Args:
      products: diagonals of |X|.
      fits: the most participations.
      separation: the least distance between two of them.

    Returns:
      The bound: `row_bounds`, summed over the worst pattern.
    """
    return float(max_separated_sum(row_bounds(products, fits, separation), fits, separation))


def separated_work(num_steps: int, reach: int, fits: int, separation: int) -> float:
    """Returns the number of elementary operations of `separated_maximum`, or `inf` if it is huge.

    Args:
      num_steps: n.
      reach: the largest lag at which X is not zero.
      fits: the most participations.
      separation: the least distance between two of them.
    """
    # Counts the sets of lags from `separation` to `reach - separation`; see `_states`.
    counts = [1] * separation
    for _ in range(reach - 2 * separation + 1):
        counts.append(counts[-1] + counts[-separation])
        if counts[-1] > _MAX_WORK:
            return math.inf
    gaps = max(0, reach - separation + 1)
    depth = max(1, reach // separation)
    return float(counts[-1]) * gaps * depth * num_steps * fits


def is_affordable(num_steps: int, reach: int, fits: int, separation: int) -> bool:
    """Returns whether `separated_maximum` takes seconds at most."""
    return separated_work(num_steps, reach, fits, separation) <= _MAX_WORK


def separated_maximum(products: Products, fits: int, separation: int) -> float:
    """Returns the largest `sum_{s,t in pattern} |X[s, t]|` over all min-separation patterns.

    This is a dynamic program. Its state is the last participation, and those before it that the
    next participation can still overlap with: with `reach` the largest lag of X, those at lags of
    at most `reach - separation`.

    Args:
      products: diagonals of |X|.
      fits: the most participations.
      separation: the least distance between two of them.

    Returns:
      The exact maximum, after `separated_work` operations.
    """
    diagonal = products[0]
    n, reach = len(diagonal), max(products)
    zeros = np.zeros(n)
    states = _states(reach, separation)
    # best[state][i] is the largest sum of a pattern that ends at step i with this past, or -inf.
    best = {state: np.full(n, -np.inf) for state in states}
    best[()] = diagonal.copy()
    largest = float(np.max(diagonal))
    for _ in range(1, fits):
        following = {state: np.full(n, -np.inf) for state in states}
        for state, sums in best.items():
            for gap in range(separation, min(reach, n - 1) + 1):
                met = products.get(gap, zeros)[: n - gap].copy()
                for lag in state:
                    if lag + gap <= reach:
                        met[lag:] += products.get(lag + gap, zeros)[: n - gap - lag]
                past = tuple(m for m in (gap, *(m + gap for m in state)) if m + separation <= reach)
                target = following[past][gap:]
                np.maximum(target, sums[: n - gap] + 2.0 * met + diagonal[gap:], out=target)
        apart = max(reach + 1, separation)
        if apart < n:
            before = np.maximum.accumulate(np.max(list(best.values()), axis=0))[: n - apart]
            target = following[()][apart:]
            np.maximum(target, before + diagonal[apart:], out=target)
        best = following
        largest = max(largest, float(np.max(list(best.values()))))
    return largest


def _states(reach: int, separation: int) -> list[tuple[int, ...]]:
    """Returns all sets of lags, `separation` apart, that the next participation can still meet."""
    found: list[tuple[int, ...]] = [()]
    for state in found:
        first = state[-1] if state else 0
        found.extend((*state, lag) for lag in range(first + separation, reach - separation + 1))
    return found


def fixed_order_maximum(products: Products, fits: int, separation: int) -> float:
    """Returns the largest `sum_{s,t in pattern} |X[s, t]|` over all patterns in fixed order.

    Args:
      products: diagonals of |X|. Lags that are not multiples of `separation` are not read.
      fits: the number of participations in a pattern, at most `ceil(n / separation)`.
      separation: the distance between two successive ones.

    Returns:
      The maximum over all patterns of at most `fits` steps.
    """
    n = len(products[0])
    starts = n - (fits - 1) * separation
    # A pattern that starts after these starts but within the first period has one participation
    # less and is not part of a longer pattern. Every other shorter pattern is part of one.
    fewer = 0.0
    if fits > 1 and starts < separation:
        fewer = fixed_order_maximum(products, fits - 1, separation)
    total = np.zeros(starts)
    for m in range(fits):
        diagonal = products.get(m * separation)
        if diagonal is None:
            continue
        # Sums over every separation-th step: running sums in each residue class.
        rows = -(-n // separation)
        padded = np.zeros((rows + 1) * separation)
        padded[separation : separation + n] = diagonal
        sums = np.cumsum(padded.reshape(rows + 1, separation), axis=0).reshape(-1)
        later = sums[(fits - m) * separation :][:starts]
        total += (1.0 if m == 0 else 2.0) * (later - sums[:starts])
    return max(fewer, float(np.max(total)))
