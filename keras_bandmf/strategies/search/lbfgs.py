"""L-BFGS for smooth objectives with millions of unknowns, which ends when it gains little.

SciPy's L-BFGS-B has no option to end when the gain of an iteration is small, and its long BLAS
calls are split over threads that wait for each other when a core is busy. Here vectors are
allocated once and then changed in place, in pieces that are too short to be split.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from keras_bandmf.strategies.search.scipy_lbfgs import Progress

# The constants of Armijo and Wolfe, and the most tries of one line search.
_DECREASE = 1e-4
_CURVATURE = 0.9
_MAX_TRIES = 30
# The gain is an average over this many iterations: a small gain may be followed by larger ones.
_WINDOW = 5
# How many numbers are handled at a time: they fit in the cache, and BLAS uses one thread for them.
_PIECE = 8192

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]


class DescentState(NamedTuple):
    """Everything that the next iterations depend on.

    Attributes:
      point: `(k,)` float64.
      gradient: `(k,)` float64, at `point`.
      values: the value at the start and after each iteration.
      evaluations: how many values and gradients were computed.
      pairs: `(moved, turned)`, `(k,)` float64 each, from the oldest to the newest: how far the
        point moved in an iteration, and how the gradient changed.
    """

    point: np.ndarray
    gradient: np.ndarray
    values: list[float]
    evaluations: int
    pairs: list[tuple[np.ndarray, np.ndarray]]


class Descent(NamedTuple):
    """The end of a descent.

    Attributes:
      point: `(k,)` float64, the best point that was found.
      value: the value at `point`.
      gain: what an iteration still gained, on average over the last few.
      evaluations: how many values and gradients were computed.
      converged: whether `gain` fell below the gain that was asked for.
      gap: how far `value` is above the minimum of the quadratic model of L-BFGS: half of the
        gradient times the step that it proposes. This is an estimate, not a bound. Where it was
        measured, it was two to four times too small.
      state: the state from which the descent can continue.
    """

    point: np.ndarray
    value: float
    gain: float
    evaluations: int
    converged: bool
    gap: float
    state: DescentState


class _Point:
    """A point, its value and its gradient, in vectors that are reused."""

    def __init__(self, size: int):
        self.at, self.gradient, self.value = np.zeros(size), np.zeros(size), np.inf

    @property
    def is_finite(self) -> bool:
        # A sum is finite only if every entry is.
        return bool(np.isfinite(self.value) and np.isfinite(np.sum(self.gradient)))


class _Pair(NamedTuple):
    """How the point moved, how the gradient changed, and the product of the two."""

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
    """Minimizes a smooth function that may be infinite in parts of the space.

    Args:
      objective: point `(k,)` float64 -> (value, gradient `(k,)`). A value or gradient that is not
        finite means +inf. The gradient is read before the next call, which may overwrite it. The
        value should be a logarithm, so that its decrease is a relative gain.
      start: `(k,)`, where the objective is finite. It is not changed.
      first_step: the length of the first step that is tried.
      gain: the descent ends when the last five iterations lowered the value by less than this on
        average.
      max_iterations: the number of iterations after which the descent ends in any case.
      memory: the number of pairs of vectors that are kept.
      callback: called with a `Progress` after every iteration.
      checkpoint: called with the state after every iteration, before `callback`. Its vectors are
        overwritten later.
      resume: a state from which to continue in place of `start`, exactly as if the descent had not
        been interrupted. Its iterations count.

    Returns:
      A `Descent`, whose value is never above that at `start`.

    Raises:
      ValueError: if the objective is not finite at `start`.
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
            "Expected the objective to be finite where the search starts. "
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
        if not slope < 0.0:  # The pairs no longer describe the curvature, or the gradient is 0.
            pairs.clear()
            slope = _set_direction(direction, here.gradient, pairs)
        step = 1.0 if pairs else first_step / max(math.sqrt(-slope), 1e-300)
        found = _line_search(evaluate, here, direction, slope, step, spare) if slope else None
        if found is None:
            # Without pairs, not even the gradient leads downhill: rounding ends the search.
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
    recent = _recent_gain(values)
    return Descent(here.at, here.value, recent, evaluations, converged, gap, state())


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    pieces = range(0, len(a), _PIECE)
    return math.fsum(float(np.dot(a[i : i + _PIECE], b[i : i + _PIECE])) for i in pieces)


def _add(vector: np.ndarray, factor: float, other: np.ndarray) -> None:
    """Adds `factor * other` to `vector`, in place."""
    for i in range(0, len(vector), _PIECE):
        vector[i : i + _PIECE] += factor * other[i : i + _PIECE]


def _has_converged(values: list[float], gain: float) -> bool:
    return len(values) > _WINDOW and _recent_gain(values) < gain


def _recent_gain(values: list[float]) -> float:
    """Returns the average gain of the last few iterations."""
    recent = values[-1 - _WINDOW :]
    return (recent[0] - recent[-1]) / max(1, len(recent) - 1)


def _set_direction(direction: np.ndarray, gradient: np.ndarray, pairs: deque[_Pair]) -> float:
    """Sets the direction to minus the inverse Hessian of the pairs times the gradient.

    (Nocedal's two-loop recursion.) Returns the slope of the objective along the direction.
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
    """Finds a step that decreases the objective enough and, if possible, flattens its slope.

    Returns:
      The point after the step, one of `spare`; None if no step decreases the objective enough.
    """
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
