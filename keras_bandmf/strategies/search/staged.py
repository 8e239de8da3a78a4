"""A search in stages: power means of rising order stand in for the largest error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from keras_bandmf.strategies.arguments import ErrorMeasure
from keras_bandmf.strategies.search.banded import stages
from keras_bandmf.strategies.search.lbfgs import descend
from keras_bandmf.strategies.search.scipy_lbfgs import Progress

# A small problem is solved until rounding ends the descent.
_GAIN = 1e-14
_FIRST_STEP = 0.01


def descend_in_stages(
    objective: Callable[[np.ndarray, float], tuple[float, np.ndarray]],
    loss: Callable[[np.ndarray], float],
    start: np.ndarray,
    error: ErrorMeasure,
    max_iterations: int,
    callback: Callable[[Progress], object] | None = None,
) -> np.ndarray:
    """Minimizes the mean or the largest error of a strategy with few unknowns.

    Args:
      objective: (point `(k,)` float64, order) -> (logarithm of the power mean of the errors of that
        order, its gradient `(k,)`). A value or gradient that is not finite means +inf.
      loss: point `(k,)` -> the mean or the largest error itself, by which points are compared.
      start: `(k,)` float64, where the objective is finite.
      error: "mean" or "max". The largest error takes one stage for each of several orders.
      max_iterations: the most iterations of each stage.
      callback: called with a `Progress` after every iteration.

    Returns:
      `(k,)` float64: the best of the start and the ends of the stages, by `loss`.
    """
    best = point = start
    best_loss = loss(best)
    for power, gain in stages(error, _GAIN):

        def of_power(at: np.ndarray, power: float = power) -> tuple[float, np.ndarray]:
            return objective(at, power)

        point = descend(of_power, point, _FIRST_STEP, gain, max_iterations, callback=callback).point
        if (value := loss(point)) < best_loss:
            best, best_loss = point, value
    return best
