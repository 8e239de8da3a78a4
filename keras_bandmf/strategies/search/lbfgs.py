"""L-BFGS for smooth objectives with millions of unknowns, ended by its gain per iteration.

SciPy's L-BFGS-B cannot be told to end at a gain, and its long BLAS calls are split over threads
that wait for each other wherever a core is busy. Here vectors are made once and then changed in
place, in pieces too short for that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from keras_bandmf.strategies.search.scipy_lbfgs import Progress

# Armijo's and Wolfe's constants, and tries of one line search.
_DECREASE = 1e-4
_CURVATURE = 0.9
_MAX_TRIES = 30
# The gain is judged over this many iterations: a single small one may be followed by larger ones.
_WINDOW = 5
# Numbers handled at a time: below the length from which BLAS takes threads, and in cache.
_PIECE = 8192

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]


class DescentState(NamedTuple):
    """All that the next iterations depend on.

    Attributes:
      point: `(k,)` float64.
      gradient: `(k,)` float64, at `point`.
      values: the value at the start and after each iteration.
      evaluations: values and gradients computed.
      pairs: `(moved, turned)`, `(k,)` float64 each, from the oldest to the newest.
    """

    point: np.ndarray
    gradient: np.ndarray
    values: list[float]
    evaluations: int
    pairs: list[tuple[np.ndarray, np.ndarray]]


class Descent(NamedTuple):
    """Where a descent ended.

    Attributes:
      point: `(k,)` float64, the best point met.
      value: the value at `point`.
      gain: what an iteration still gained, on average over the last few.
      evaluations: values and gradients computed.
      converged: whether `gain` fell below what was asked for.
      gap: how far `value` is above the minimum, as the quadratic model of L-BFGS has it: half of
        the gradient times the step it proposes. An estimate, not a bound: two to four times too
        small where it was measured.
      state: from which the descent can go on.
    """

    point: np.ndarray
    value: float
    gain: float
    evaluations: int
    converged: bool
    gap: float
    state: DescentState


class _Point:
    """A point, its value and its gradient, in vectors that are used again."""

    def __init__(self, size: int):
        self.at, self.gradient, self.value = np.zeros(size), np.zeros(size), np.inf

    @property
    def is_finite(self) -> bool:
        # A sum is finite only if every entry is.
        return bool(np.isfinite(self.value) and np.isfinite(np.sum(self.gradient)))


class _Pair(NamedTuple):
    """How the gradient turned when the point moved, and the product of the two."""

    moved: np.ndarray
    turned: np.ndarray
    product: float


def descend(
    objective: Objective,
    start: np.ndarray,
    first_step: float,
    gain: float,
    max_iterations: int,
    memory: int = 10,
    callback: Callable[[Progress], object] | None = None,
    checkpoint: Callable[[DescentState], object] | None = None,
    resume: DescentState | None = None,
) -> Descent:
    """Minimises a smooth function that may be infinite in parts of the space.

    Args:
      objective: point `(k,)` float64 -> (value, gradient `(k,)`); a value or gradient that is not
        finite means +inf. The gradient is read before the next call and may be overwritten by it.
        The value should be a logarithm, so that its decrease is a relative gain.
      start: `(k,)`, where the objective is finite; not changed.
      first_step: length of the first step tried.
      gain: ends when an iteration lowers the value by less than this, over five on average.
      max_iterations: iterations after which to give up.
      memory: pairs of vectors kept.
      callback: called with a `Progress` after every iteration.
      checkpoint: called with the state after every iteration, before `callback`; its vectors are
        overwritten later.
      resume: a state to go on from, exactly as if the descent had not been left, in place of
        `start`; its iterations count.

    Returns:
      A `Descent`; its value is never above that at `start`.

    Raises:
      ValueError: the objective is not finite at `start`.
    """
    evaluations = resume.evaluations if resume else 0

    def evaluate(point: _Point) -> None:
        nonlocal evaluations
        evaluations += 1
        point.value, gradient = objective(point.at)
        point.gradient[:] = gradient

    size = np.size(start)
    here, *spare = (_Point(size) for _ in range(3))
    pairs: deque[_Pair] = deque()
    if resume:
        here.at[:], here.gradient[:], here.value = resume.point, resume.gradient, resume.values[-1]
        pairs.extend(_Pair(*pair, _dot(*pair)) for pair in resume.pairs)
    else:
        here.at[:] = start
        evaluate(here)
    if not here.is_finite:
        raise ValueError(
            "The objective must be finite where the search starts. "
            f"Received: value={here.value}. Start from another point."
        )

    def state() -> DescentState:
        kept = [(pair.moved, pair.turned) for pair in pairs]
        return DescentState(here.at, here.gradient, list(values), evaluations, kept)

    direction = np.empty(size)
    values = list(resume.values) if resume else [here.value]
    converged = _has_converged(values, gain)
    while not converged and len(values) <= max_iterations:
        slope = _set_direction(direction, here.gradient, pairs)
        if not slope < 0.0:  # the pairs have lost their meaning, or the gradient is zero
            pairs.clear()
            slope = _set_direction(direction, here.gradient, pairs)
        step = 1.0 if pairs else first_step / max(math.sqrt(-slope), 1e-300)
        found = _line_search(evaluate, here, direction, slope, step, spare) if slope else None
        if found is None:
            # No decrease even along the gradient: rounding ends the search.
            converged = not pairs
            pairs.clear()
            continue
        old = pairs.popleft() if len(pairs) == memory else None
        moved, turned = (old.moved, old.turned) if old else (np.empty(size), np.empty(size))
        np.subtract(found.at, here.at, out=moved)
        np.subtract(found.gradient, here.gradient, out=turned)
        if (product := _dot(moved, turned)) > 0.0:
            pairs.append(_Pair(moved, turned, product))
        spare = [point for point in (here, *spare) if point is not found]
        here = found
        values.append(here.value)
        if checkpoint is not None:
            checkpoint(state())
        recent = _recent_gain(values)
        if callback is not None:
            steepest = max(float(np.max(here.gradient)), -float(np.min(here.gradient)))
            done = len(values) - 1
            callback(Progress(evaluations, here.value, steepest, done, recent, gain))
        converged = _has_converged(values, gain)
    gap = -0.5 * _set_direction(direction, here.gradient, pairs)
    found = here.at, here.value, _recent_gain(values), evaluations
    return Descent(*found, converged, gap, state())


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    pieces = range(0, len(a), _PIECE)
    return math.fsum(float(np.dot(a[i : i + _PIECE], b[i : i + _PIECE])) for i in pieces)


def _add(vector: np.ndarray, factor: float, other: np.ndarray) -> None:
    """`vector += factor * other`, in place."""
    for i in range(0, len(vector), _PIECE):
        vector[i : i + _PIECE] += factor * other[i : i + _PIECE]


def _has_converged(values: list[float], gain: float) -> bool:
    return len(values) > _WINDOW and _recent_gain(values) < gain


def _recent_gain(values: list[float]) -> float:
    """The gain of an iteration, on average over the last few."""
    recent = values[-1 - _WINDOW :]
    return (recent[0] - recent[-1]) / max(1, len(recent) - 1)


def _set_direction(direction: np.ndarray, gradient: np.ndarray, pairs: deque[_Pair]) -> float:
    """Minus the gradient times the inverse Hessian the pairs describe; returns the slope along it.

    (Nocedal's two loops.)
    """
    np.negative(gradient, out=direction)
    shares = []
    for pair in reversed(pairs):
        shares.append(_dot(pair.moved, direction) / pair.product)
        _add(direction, -shares[-1], pair.turned)
    if pairs:
        direction *= pairs[-1].product / _dot(pairs[-1].turned, pairs[-1].turned)
    for pair, share in zip(pairs, reversed(shares), strict=True):
        _add(direction, share - _dot(pair.turned, direction) / pair.product, pair.moved)
    return _dot(direction, gradient)


def _line_search(
    evaluate: Callable[[_Point], None],
    here: _Point,
    direction: np.ndarray,
    slope: float,
    step: float,
    spare: list[_Point],
) -> _Point | None:
    """A step with sufficient decrease and, if tries allow, a flatter slope, by bisection."""
    tried, best = spare
    low, high, is_best = 0.0, math.inf, False
    for _ in range(_MAX_TRIES):
        np.multiply(direction, step, out=tried.at)
        tried.at += here.at
        evaluate(tried)
        if tried.is_finite and tried.value <= here.value + _DECREASE * step * slope:
            if not is_best or tried.value < best.value:
                tried, best, is_best = best, tried, True
            if _dot(direction, best.gradient) >= _CURVATURE * slope:
                return best
            low = step
        elif is_best:
            return best
        else:
            high = step
        step = 2.0 * low if high == math.inf else 0.5 * (low + high)
    return best if is_best else None
