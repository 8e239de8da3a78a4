"""The search for the columns of a banded strategy, by L-BFGS from a given start."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np

from keras_bandmf.strategies.arguments import ErrorMeasure, reduced
from keras_bandmf.strategies.errors.banded import BandedErrors, WorkloadBlocks
from keras_bandmf.strategies.errors.banded_graph import GraphErrors
from keras_bandmf.strategies.search.checkpoints import Checkpoints, SearchState
from keras_bandmf.strategies.search.lbfgs import DescentState, descend
from keras_bandmf.strategies.search.preconditioner import Preconditioner, preconditioner_of
from keras_bandmf.strategies.search.scipy_lbfgs import Progress

# The largest error has kinks where two rows are equal, so power means of rising order replace it.
# The last stage ends at a hundred times the gain of the mean, because its power mean differs from
# the largest error by more than that.
_MAX_ERROR_POWERS = (16.0, 256.0, 4096.0)
_GAIN_ON_THE_WAY = 1e-6
_MAX_ERROR_GAIN = 100.0
FIRST_STEP = 0.3
# How many pairs of vectors the search keeps, and how many where a vector is long.
MEMORY, _SHORT_MEMORY, _LONG_VECTOR = 10, 5, 4_000_000

#: What computes errors and gradients.
Solver = Literal["blocks", "graph"]
SOLVERS: dict[Solver, type[BandedErrors] | type[GraphErrors]] = {
    "blocks": BandedErrors,
    "graph": GraphErrors,
}


def normalize_columns(columns: np.ndarray) -> np.ndarray:
    """Returns the columns without entries below row n - 1 of C, divided by their norms.

    Args:
      columns: `(n, b)` float64. Row j is column j of C from its diagonal down.

    Returns:
      `(n, b)` float64, a new array. A column whose norm is 1 to rounding keeps all its bits.
    """
    n, b = columns.shape
    kept = np.array(columns, np.float64)
    for lag in range(1, b):
        kept[n - lag :, lag] = 0.0
    # The squares of very large or small entries would overflow or vanish.
    largest = np.max(np.abs(kept), axis=1, keepdims=True)
    kept /= np.where((largest > 0.5 / b) & (largest <= 1.0), 1.0, largest)
    norm = np.sqrt(np.einsum("ij,ij->i", kept, kept))[:, None]
    kept /= np.where(np.abs(norm - 1.0) > 8.0 * np.finfo(np.float64).eps, norm, 1.0)
    return kept


def power_mean(errors: np.ndarray, power: float) -> tuple[float, np.ndarray]:
    """Returns the logarithm of a power mean and its gradient.

    Args:
      errors: `(n,)` float64, not negative, not all zero, finite.
      power: the order. 1 is the mean; the limit at infinity is the largest.

    Returns:
      The logarithm, and its `(n,)` gradient with respect to `errors`.
    """
    largest = float(np.max(errors))
    shares = errors / largest
    powers = shares ** (power - 1.0)
    total = float(powers @ shares)
    value = np.log(largest) + np.log(total / len(errors)) / power
    return float(value), powers / (total * largest)


def weighted_mean(errors: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the logarithm of a weighted mean and its gradient.

    Args:
      errors: `(n,)` float64, not negative, not all zero, finite.
      weights: `(n,)` float64, positive. Their sum does not matter.

    Returns:
      The logarithm, and its `(n,)` gradient with respect to `errors`.
    """
    total = float(weights @ errors)
    return float(np.log(total / np.sum(weights))), weights / total


def stages(error: ErrorMeasure, gain: float) -> list[tuple[float, float]]:
    """Returns the orders of the power means to minimize in turn, each with the gain to end at."""
    if error == "mean":
        return [(1.0, gain)]
    *way, last = _MAX_ERROR_POWERS
    early = [(power, max(gain, _GAIN_ON_THE_WAY)) for power in way]
    return [*early, (last, _MAX_ERROR_GAIN * gain)]


class LogLoss:
    """The logarithm of a mean of the errors, as a function of the columns' distance from `origin`.

    Columns are divided by their norms here. The unknowns of column j are in units of
    `share^(-1/4)`, where share is the part of all errors, by weight, that the column can change:
    `(n - j) / n` if all have the same weight. With all columns in equal units, the search takes a
    quarter more iterations. A preconditioner is applied before that.

    Args:
      origin: `(n, b)` float64, columns of norm 1.
      errors: the errors for n steps and b bands.
      mean: errors `(n,)` -> (logarithm of a mean of them, its gradient `(n,)`).
      preconditioner: the change of variables, or None.
      weights: `(n,)` float64, the weights of the errors in the mean; None if all are equal.
    """

    def __init__(
        self,
        origin: np.ndarray,
        errors: BandedErrors | GraphErrors,
        mean: Callable[[np.ndarray], tuple[float, np.ndarray]],
        preconditioner: Preconditioner | None = None,
        weights: np.ndarray | None = None,
    ):
        n = len(origin)
        self._origin, self._errors, self._mean = origin, errors, mean
        self._preconditioner = preconditioner
        moved = n - np.arange(n) if weights is None else np.cumsum(weights[::-1])[::-1]
        self._units = ((moved[0] / moved) ** 0.25)[:, None]
        self._columns = np.empty_like(origin)

    def columns(self, point: np.ndarray) -> np.ndarray:
        """Returns the columns at a point, before they are scaled to norm 1.

        Args:
          point: `(n * b,)` float64.

        Returns:
          `(n, b)` float64, which the next call overwrites.
        """
        moved = self._preconditioned(point.reshape(self._origin.shape))
        np.multiply(moved, self._units, out=self._columns)
        np.add(self._columns, self._origin, out=self._columns)
        n, b = self._columns.shape
        for lag in range(1, b):
            self._columns[n - lag :, lag] = 0.0
        return self._columns

    def __call__(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Returns the logarithm and its gradient.

        Args:
          point: `(n * b,)` float64.

        Returns:
          The logarithm, and a `(n * b,)` float64 gradient. The logarithm is `inf` where the
          diagonal is not positive or C^-1 overflows; the gradient then has no meaning.
        """
        columns = self.columns(point)
        if not np.min(columns[:, 0]) > 0.0:
            return np.inf, point
        norm = np.sqrt(np.einsum("ij,ij->i", columns, columns))[:, None]
        columns /= norm
        errors = self._errors.evaluate(columns)
        if not 0.0 < np.max(errors) < np.inf:
            return np.inf, point
        value, weights = self._mean(errors)
        gradient = self._errors.gradient(weights)
        # Along a column nothing changes, because its norm is divided out.
        columns *= np.einsum("ij,ij->i", gradient, columns)[:, None]
        gradient -= columns
        gradient *= self._units / norm
        for lag in range(1, columns.shape[1]):
            gradient[len(columns) - lag :, lag] = 0.0
        return value, self._preconditioned(gradient).reshape(-1)

    def _preconditioned(self, columns: np.ndarray) -> np.ndarray:
        return columns if self._preconditioner is None else self._preconditioner(columns)


def search(
    start: np.ndarray,
    workload: WorkloadBlocks,
    error: ErrorMeasure,
    gain: float,
    max_iterations: int,
    callback: Callable[[Progress], object] | None = None,
    checkpoints: Checkpoints | None = None,
    solver: Solver = "blocks",
) -> tuple[np.ndarray, bool]:
    """Returns columns of norm 1 with a lower error than those of the start.

    Args:
      start: `(n, b)` float64, as `normalize_columns` returns it, with b at least 2.
      workload: A in blocks of `errors.banded.block_size(b)` steps.
      error: "mean" or "max".
      gain: the search ends when an iteration lowers the loss by less than this share (for "max", by
        less than a hundred times that share).
      max_iterations: the most iterations of the whole search.
      callback: called with a `Progress` after every iteration. Its value is the logarithm of the
        mean error, or of the power mean that stands in for the largest.
      checkpoints: where the state of the search is stored while it runs. If a state is there
        already, the search continues from it.
      solver: what computes errors and gradients: a key of `SOLVERS`.

    Returns:
      `(n, b)` float64, the best columns that were found, never with a larger error than `start`;
      and whether the search converged.

    Warns:
      RuntimeWarning: if `max_iterations` were not enough.
    """
    n, b = start.shape
    errors = SOLVERS[solver](n, b, workload)
    at = SearchState(0, 0, start, start, None)
    if checkpoints is not None:
        at = checkpoints.load(start) or at
    stage, before, origin, best, resume = at
    best_loss = reduced(errors.evaluate(best), error)
    preconditioner = preconditioner_of(start, workload)
    memory = MEMORY if start.size <= _LONG_VECTOR else _SHORT_MEMORY
    for power, enough in stages(error, gain)[stage:]:
        mean = functools.partial(power_mean, power=power)
        objective = LogLoss(origin, errors, mean, preconditioner)

        def report(progress: Progress, before: int = before) -> None:
            if callback is not None:
                callback(progress._replace(iteration=before + progress.iteration))

        begun = SearchState(stage, before, origin, best, None)

        def keep(state: DescentState, at: SearchState = begun) -> None:
            if checkpoints is not None:
                checkpoints.save_at_times(at._replace(descent=state))

        found = descend(
            objective,
            np.zeros(start.size),
            FIRST_STEP,
            enough,
            max_iterations - before,
            memory,
            report,
            keep,
            resume,
        )
        if checkpoints is not None and not found.converged:
            checkpoints.save(SearchState(stage, before, origin, best, found.state))
        resume = None
        origin = normalize_columns(objective.columns(found.point))
        loss = reduced(errors.evaluate(origin), error)
        if loss < best_loss:
            best, best_loss = origin, loss
        stage, before = stage + 1, before + len(found.state.values) - 1
        if not found.converged:
            warnings.warn(
                f"The search ended after max_iterations={max_iterations}, when an iteration still "
                f"lowered the loss by a share of {found.gain:.1e}, more than {enough}. The best "
                f"strategy so far is returned. Its {error} error is {best_loss}, which exceeds the "
                f"optimum by a share of a few times {found.gap:.1e} (an estimate from the "
                "quadratic model, not a bound). Pass it as `start` to continue from there, or "
                "raise `max_iterations`.",
                RuntimeWarning,
                stacklevel=3,
            )
            return best, False
    return best, True
