"""SciPy's L-BFGS-B for objectives that may overflow, with a checked end and progress."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.optimize

# The length of the first step. From the square-root coefficients, L-BFGS-B's own first step (up to
# 1) jumps to a point where C^-1 overflows, and its line search then ends after one iteration
# without a word.
FIRST_STEP = 0.01
_MEMORY = 10
_MAX_ROUNDS = 5
_MAX_ITERATIONS = 500


class Progress(NamedTuple):
    """The state of a search after an iteration, as the `callback` of `optimize` receives it.

    Attributes:
      evaluations: how many values and gradients were computed so far.
      value: the lowest value so far. `optimize` says of what.
      gradient_norm: the largest absolute entry of the gradient there, in the variables of the
        search.
      iteration: the number of iterations so far.
      gain: by how much an iteration lowered the value, on average over the last few. It is NaN if
        it does not decide when the search ends.
      target_gain: the gain below which the search ends, or NaN likewise.

    Example:
      >>> import keras_bandmf as bandmf
      >>> values = []
      >>> strategy = bandmf.strategies.ToeplitzStrategy.optimize(
      ...     num_steps=100, num_bands=4, callback=lambda progress: values.append(progress.value))
      >>> values == sorted(values, reverse=True)
      True
    """

    evaluations: int
    value: float
    gradient_norm: float
    iteration: int
    gain: float = math.nan
    target_gain: float = math.nan


class Minimum(NamedTuple):
    """The result of a search.

    Attributes:
      point: `(k,)` float64.
      value: the value at `point`.
      gradient_norm: the largest absolute entry of the gradient at `point`.
      evaluations: how many values and gradients were computed.
    """

    point: np.ndarray
    value: float
    gradient_norm: float
    evaluations: int


class _Wall:
    """The objective as SciPy sees it: it remembers the best point and never returns +inf.

    A line search that interpolates learns nothing from +inf. Where the objective overflows, SciPy
    receives a value above the best one that grows away from the best point instead, so that it
    tries a shorter step next. The best point is always one where the objective is finite.
    """

    def __init__(
        self, objective: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray
    ):
        self.objective = objective
        self.evaluations = 0
        self.point, self.value, self.gradient_norm = start, np.inf, np.inf

    def __call__(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        self.evaluations += 1
        value, gradient = self.objective(point)
        if not (np.isfinite(value) and np.all(np.isfinite(gradient))):
            away = point - self.point
            return self.value + 1.0, away / max(float(away @ away), 1e-300)
        if value < self.value:
            self.point, self.value = point.copy(), value
            self.gradient_norm = float(np.max(np.abs(gradient)))
        return value, gradient


def minimize(
    objective: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    tolerance: float = 1e-6,
    callback: Callable[[Progress], object] | None = None,
) -> Minimum:
    """Minimizes a smooth function that may be infinite in parts of the space.

    SciPy's own report of convergence is ignored. The gradient at the best point decides: if it is
    above `tolerance` after a round, another round starts from there, with a ten times shorter first
    step. Each round aims at a tenth of `tolerance`, which rounding may make impossible to reach.

    Args:
      objective: point `(k,)` float64 -> (value, gradient `(k,)`). A value or gradient that is not
        finite means +inf. The value should be of order one, such as a logarithm.
      start: `(k,)` float64, where the objective is finite. It is not changed.
      tolerance: the largest gradient entry at a minimum. The value is then right to about its
        square.
      callback: called with a `Progress` after every iteration. What it returns is ignored.

    Returns:
      A `Minimum`, the best point that was found.

    Raises:
      ValueError: if the objective is not finite at `start`.
      RuntimeError: if the gradient at the best point exceeds `tolerance` after the last round.
    """
    wall = _Wall(objective, np.array(start, np.float64))
    wall(wall.point)
    if not np.isfinite(wall.value):
        raise ValueError(
            "Expected the objective to be finite where the search starts. "
            f"Received: start={start}. Start from another point."
        )

    iterations = itertools.count(1)

    def report(_: np.ndarray) -> None:
        if callback is not None:
            callback(Progress(wall.evaluations, wall.value, wall.gradient_norm, next(iterations)))

    first_step = FIRST_STEP
    for _ in range(_MAX_ROUNDS):
        if wall.gradient_norm <= tolerance:
            break
        _search(wall, first_step, tolerance, report)
        first_step /= 10.0
    if wall.gradient_norm > tolerance:
        raise RuntimeError(
            f"Expected the search to end with a gradient of at most {tolerance}: it has not found "
            f"a minimum. Received: gradient_norm={wall.gradient_norm} after "
            f"{wall.evaluations} evaluations. Start from a point closer to the minimum."
        )
    return Minimum(wall.point, wall.value, wall.gradient_norm, wall.evaluations)


def _search(
    wall: _Wall, first_step: float, tolerance: float, report: Callable[[np.ndarray], None]
) -> None:
    """Runs L-BFGS-B once from the best point. `wall` remembers what it finds."""
    origin = wall.point.copy()

    def scaled(step: np.ndarray) -> tuple[float, np.ndarray]:
        # SciPy's first step has length 1, which is `first_step` in these units.
        value, gradient = wall(origin + first_step * step)
        return value, first_step * gradient

    scipy.optimize.minimize(
        scaled,
        np.zeros_like(origin),
        jac=True,
        method="L-BFGS-B",
        callback=report,
        options={
            "ftol": 1e-15,
            "gtol": 0.1 * tolerance * first_step,
            "maxcor": _MEMORY,
            "maxiter": _MAX_ITERATIONS,
        },
    )
