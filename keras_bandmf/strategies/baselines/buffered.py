"""Buffered linear Toeplitz strategies: the coefficients are a sum of a few geometric sequences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy.signal
import scipy.special

from keras_bandmf._checks import checked_choice, checked_int
from keras_bandmf.strategies.arguments import ERRORS, ErrorMeasure, participation_schema
from keras_bandmf.strategies.participation import participations
from keras_bandmf.strategies.search.scipy_lbfgs import Minimum, Progress, minimize
from keras_bandmf.strategies.unbanded import UnbandedToeplitz, checked_steps

MAX_BUFFERS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class BufferedToeplitzStrategy(UnbandedToeplitz):
    """C is Toeplitz with coefficients 1 and `c_t = sum_j output_scale_j buffer_decay_j^(t-1)`.

    C^-1 has the same form with the same number of terms. This strategy is for comparison only: C is
    not banded, so a `TrainingPlan` refuses it. `sensitivity` is exact if the output scales sum to
    at most 1, because then the coefficients do not increase; else it is an upper bound. (Dvijotham
    et al., arXiv 2404.16706; McMahan et al., arXiv 2408.08868.)

    Attributes:
      buffer_decay: `(d,)` float64, read-only, each at least 0 and below 1.
      output_scale: `(d,)` float64, read-only, not negative. The sum of
        `output_scale / (1 + buffer_decay)` is below 1, which keeps C^-1 bounded.
      num_steps: n, up to 10^8.

    Example:
      >>> import numpy as np
      >>> import keras_bandmf as bandmf
      >>> strategy = bandmf.strategies.BufferedToeplitzStrategy(
      ...     buffer_decay=np.array([0.5]), output_scale=np.array([0.5]), num_steps=4)
      >>> strategy.first_column()
      array([1.   , 0.5  , 0.25 , 0.125])
    """

    buffer_decay: np.ndarray
    output_scale: np.ndarray
    num_steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", checked_steps(self.num_steps))
        for name in ("buffer_decay", "output_scale"):
            object.__setattr__(self, name, _checked_vector(name, getattr(self, name)))
        decay, scale = self.buffer_decay, self.output_scale
        if len(decay) != len(scale):
            raise ValueError(
                "Expected `output_scale` to have as many entries as `buffer_decay`. Received: "
                f"{len(scale)} and {len(decay)} entries. Pass one of each per buffer."
            )
        if np.any(decay >= 1.0) or np.sum(scale / (1.0 + decay)) >= 1.0:
            raise ValueError(
                "Expected `buffer_decay` to be below 1, and the sum of output_scale / (1 + "
                "buffer_decay) too: otherwise C^-1 grows without bound. Received: "
                f"buffer_decay={decay}, output_scale={scale}. Use smaller values."
            )

    @classmethod
    def optimize(
        cls,
        num_steps: int,
        num_buffers: int,
        error: ErrorMeasure = "mean",
        max_participations: int = 1,
        min_separation: int | None = None,
        callback: Callable[[Progress], object] | None = None,
    ) -> BufferedToeplitzStrategy:
        """Finds the buffers with the lowest error at unit sensitivity.

        L-BFGS-B minimizes the logarithm of the loss times the squared sensitivity, over output
        scales that sum to less than 1, where the sensitivity is exact. An evaluation costs O(n d).

        Args:
          num_steps: n.
          num_buffers: d, from 1 to 8.
          error: "mean" or "max" of the squared row norms of `A C^-1`.
          max_participations: the most steps in which an example takes part.
          min_separation: the least distance, in steps, between two of them. It is needed when
            `max_participations` is above 1.
          callback: called after every iteration with a `Progress` whose `value` is the logarithm
            that is minimized.

        Returns:
          The strategy.

        Raises:
          TypeError: if an argument has the wrong type.
          ValueError: if an argument is out of its range.
          RuntimeError: if no search ended in a minimum.

        Example:
          >>> import keras_bandmf as bandmf
          >>> strategy = bandmf.strategies.BufferedToeplitzStrategy.optimize(
          ...     num_steps=50, num_buffers=2)
          >>> strategy.num_buffers
          2
        """
        num_steps = checked_steps(num_steps)
        num_buffers = checked_int("num_buffers", num_buffers)
        if num_buffers > MAX_BUFFERS:
            raise ValueError(
                f"Expected `num_buffers` to be at most {MAX_BUFFERS}. Received: num_buffers="
                f"{num_buffers}. Use fewer: more than 4 hardly lower the error."
            )
        checked_choice("error", error, ERRORS)
        count, separation, _ = participation_schema(max_participations, min_separation)
        fits = participations(num_steps, count, separation)
        objective = _Objective(num_steps, error, fits, separation)
        found = _search(objective, num_buffers, callback)
        decay, scale = _from_free(found.point)
        return cls(decay, scale, num_steps)

    @property
    def num_buffers(self) -> int:
        """The number of buffers d: how many numbers for each coordinate the noise must remember."""
        return len(self.buffer_decay)

    def first_column(self) -> np.ndarray:
        """Returns the first column of C before scaling.

        Returns:
          `(n,)` float64, the first entry 1.
        """
        impulse = np.append(1.0, np.zeros(self.num_steps - 1))
        return _apply(self.buffer_decay, self.output_scale, impulse)

    def _running_inverse(self) -> np.ndarray:
        decay, scale = inverse_buffers(self.buffer_decay, self.output_scale)
        return _apply(decay, -scale, np.ones(self.num_steps))


def inverse_buffers(decay: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the buffers of C^-1: its coefficients are 1 and `-sum_j scale_j decay_j^(t-1)`.

    With D = diag(decay) and v = sqrt(scale), C(z) = 1 + z v' (I - z D)^-1 v has the inverse
    1 - z v' (I - z (D - v v'))^-1 v. D - v v' is symmetric, so the decays of the inverse are real
    and its scales are not negative.

    Args:
      decay: `(d,)` float64.
      scale: `(d,)` float64, not negative.

    Returns:
      The decays and the scales of the inverse, each `(d,)` float64.
    """
    root = np.sqrt(scale)
    # The eigenvalues of I - D + v v' are computed instead, because the small ones matter: they are
    # 1 - decay for the slowest buffers.
    gaps, vectors = np.linalg.eigh(np.diag(1.0 - decay) + np.outer(root, root))
    return 1.0 - gaps, np.square(root @ vectors)


def _delayed(decay: float, values: np.ndarray) -> np.ndarray:
    """Returns what a buffer holds before each step: `z / (1 - decay z)` applied to `values`."""
    return scipy.signal.lfilter([0.0, 1.0], [1.0, -decay], values)


def _apply(decay: np.ndarray, scale: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns `1 + sum_j scale_j z / (1 - decay_j z)` applied to a sequence, in O(n d)."""
    total = np.array(values, np.float64)
    for theta, omega in zip(decay, scale, strict=True):
        total += omega * _delayed(theta, values)
    return total


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the inner product without BLAS, whose threads wait for each other on a busy core."""
    return float(np.sum(x * y))


def _from_free(point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns decays in (0, 1) and scales that sum to less than 1, from `(2 d,)` free numbers."""
    decay, scale = np.split(point, 2)
    return scipy.special.expit(decay), scipy.special.softmax(np.append(scale, 0.0))[:-1]


class _Objective:
    """The logarithm of error times squared sensitivity, and its gradient, in O(n d)."""

    def __init__(self, num_steps: int, error: ErrorMeasure, fits: int, separation: int):
        n = num_steps
        self.num_steps = n
        self.weights = (n - np.arange(n)) / n if error == "mean" else np.ones(n)
        self.pattern = np.zeros(n)
        self.pattern[: fits * separation : separation] = 1.0

    def __call__(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        decay, scale = _from_free(point)
        inverse_decay, inverse_scale = inverse_buffers(decay, scale)
        sums = _apply(inverse_decay, -inverse_scale, np.ones(self.num_steps))
        weighted = self.weights * sums
        error = _dot(weighted, sums)
        # d sums = -C^-1 dC sums, so the adjoint is C^-T applied to twice the weighted sums.
        adjoint = _apply(inverse_decay, -inverse_scale, weighted[::-1])[::-1]
        # The coefficients do not increase, so the worst pattern is the earliest evenly spaced one.
        columns = _apply(decay, scale, self.pattern)
        square = _dot(columns, columns)
        by_decay, by_scale = np.empty(len(decay)), np.empty(len(decay))
        for j, (theta, omega) in enumerate(zip(decay, scale, strict=True)):
            of_sums = _delayed(theta, sums)
            of_pattern = _delayed(theta, self.pattern)
            by_scale[j] = _dot(columns, of_pattern) / square - _dot(adjoint, of_sums) / error
            twice = _dot(columns, _delayed(theta, of_pattern)) / square
            by_decay[j] = omega * (twice - _dot(adjoint, _delayed(theta, of_sums)) / error)
        by_free_decay = 2.0 * by_decay * decay * scipy.special.expit(-point[: len(decay)])
        by_free_scale = 2.0 * scale * (by_scale - scale @ by_scale)
        return math.log(error) + math.log(square), np.append(by_free_decay, by_free_scale)


def _search(
    objective: _Objective, num_buffers: int, callback: Callable[[Progress], object] | None
) -> Minimum:
    """Returns the better result of two starts.

    The buffers of the first start remember up to the square root of n steps, those of the second up
    to n steps.
    """
    found: list[Minimum] = []
    failures: list[RuntimeError] = []
    steps = max(2.0, float(objective.num_steps))
    for reach in (0.5, 1.0):
        gaps = steps ** (-reach * (np.arange(num_buffers) + 0.5) / num_buffers)
        start = np.append(np.log1p(-gaps) - np.log(gaps), 0.5 * np.log(gaps))
        try:
            found.append(minimize(objective, start, callback=callback))
        except RuntimeError as error:
            failures.append(error)
    if not found:
        raise failures[-1]
    return min(found, key=lambda minimum: minimum.value)


def _checked_vector(name: str, values: object) -> np.ndarray:
    """Returns the numbers of the buffers as a read-only float64 vector."""
    try:
        vector = np.array(values)
    except (TypeError, ValueError):  # Ragged input is refused below, like any other non-vector.
        vector = np.array(None)
    if (
        vector.dtype.kind not in "fiu"
        or vector.ndim != 1
        or not 1 <= vector.size <= MAX_BUFFERS
        or not np.all(np.isfinite(vector))
        or np.any(vector < 0)
    ):
        raise ValueError(
            f"Expected `{name}` to be a vector of 1 to {MAX_BUFFERS} finite numbers that are not "
            f"negative. Received: {name}={values!r}. Pass one number per buffer."
        )
    vector = vector.astype(np.float64)
    vector.flags.writeable = False
    return vector
