"""SciPy's L-BFGS-B, made safe for objectives that explode, with a checked end and progress."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.optimize

# Length of the first step. From the square-root coefficients L-BFGS-B's own first step (up to 1)
# jumps to where C^-1 explodes, and the line search then ends silently after one iteration.
FIRST_STEP = 0.01
_MEMORY = 10
_MAX_ROUNDS = 5
_MAX_ITERATIONS = 500


class Progress(NamedTuple):
    """One iteration of the search, as handed to a progress callback.

    Attributes:
      evaluations: values and gradients computed so far.
      value: the lowest value so far.
      gradient_norm: the largest entry of the gradient there, in absolute value, in the variables of
        the search.
      iteration: iterations so far.
      gain: by how much an iteration lowered the value, on average over the last few; NaN where the
        search does not end by it.
      target_gain: the gain below which the search ends; NaN likewise.
    """

    evaluations: int
    value: float
    gradient_norm: float
    iteration: int
    gain: float = math.nan
    target_gain: float = math.nan


class Minimum(NamedTuple):
    """What the search found.

    Attributes:
      point: `(k,)` float64.
      value: the value at `point`.
      gradient_norm: the largest entry of the gradient at `point`, in absolute value.
      evaluations: values and gradients computed.
    """

    point: np.ndarray
    value: float
    gradient_norm: float
    evaluations: int


class _Wall:
    """The objective as the line search sees it: best point remembered, +inf made climbable.

    A step that overflows reads as +inf, from which a line search that interpolates learns
    nothing. It is shown instead a value above the best one that grows away from the best point, so
    the next step it tries is a shorter one. Steps are accepted only where the objective is finite.
    """

    def __init__(self, objective: Callable, start: np.ndarray):
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
    """Minimises a smooth function that may be infinite in parts of the space.

    "Converged" is never taken from SciPy: whatever it says, the end is judged by the gradient at
    the best point, and a round that ends with more than `tolerance` is followed by another one from
    there, with a ten times shorter first step. Each round aims ten times below `tolerance`, where
    rounding may not let it arrive.

    Args:
      objective: point `(k,)` float64 -> (value, gradient `(k,)`); a value that is not finite, or a
        gradient that is not, means +inf. The value should be of order one (a logarithm).
      start: `(k,)` float64, where the objective is finite; not changed.
      tolerance: largest gradient entry at a minimum; the value is then right to about its square.
      callback: called with a `Progress` after every iteration; what it returns is ignored.

    Returns:
      A `Minimum`, the best point met.

    Raises:
      ValueError: the objective is not finite at `start`.
      RuntimeError: after the last round, the gradient at the best point exceeds `tolerance`.
    """
    wall = _Wall(objective, np.array(start, np.float64))
    wall(wall.point)
    if not np.isfinite(wall.value):
        raise ValueError(
            "The objective must be finite where the search starts. "
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
            f"The search must end with a gradient of at most {tolerance}, or it has not found a "
            f"minimum. Received: gradient_norm={wall.gradient_norm} after "
            f"{wall.evaluations} evaluations. Start from a point nearer to the minimum."
        )
    return Minimum(wall.point, wall.value, wall.gradient_norm, wall.evaluations)


def _search(
    wall: _Wall, first_step: float, tolerance: float, report: Callable[[np.ndarray], None]
) -> None:
    """One run of L-BFGS-B from the best point; its findings are left in `wall`."""
    origin = wall.point.copy()

    def scaled(step: np.ndarray) -> tuple[float, np.ndarray]:
        # In units of `first_step`, SciPy's unit first step is as short as we want it.
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
