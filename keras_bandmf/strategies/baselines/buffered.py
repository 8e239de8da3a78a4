"""Buffered linear Toeplitz strategies: coefficients that are a sum of a few geometric sequences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy.signal
import scipy.special

from keras_bandmf._checks import checked_choice, checked_int
from keras_bandmf.strategies.arguments import participation_schema
from keras_bandmf.strategies.baselines.unbanded import UnbandedToeplitz, checked_steps
from keras_bandmf.strategies.participation import participations
from keras_bandmf.strategies.search.scipy_lbfgs import Minimum, Progress, minimize
from keras_bandmf.strategies.toeplitz import ERRORS

MAX_BUFFERS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class BufferedToeplitzStrategy(UnbandedToeplitz):
    """C is Toeplitz with coefficients 1 and `c_t = sum_j output_scale_j buffer_decay_j^(t-1)`.

    C^-1 has the same form, with as many terms. For comparison: C is not banded, so a
    `TrainingPlan` refuses it. Its sensitivity is exact if the output scales sum to at most 1, when
    no coefficient is above the one before. (Dvijotham et al., arXiv 2404.16706; McMahan et al.,
    arXiv 2408.08868.)

    Attributes:
      buffer_decay: `(d,)` float64, read-only, each at least 0 and below 1.
      output_scale: `(d,)` float64, read-only, not negative; the sum of
        `output_scale / (1 + buffer_decay)` is below 1, which keeps C^-1 bounded.
      num_steps: n, up to 10^8.
    """

    buffer_decay: np.ndarray
    output_scale: np.ndarray
    num_steps: int

    def __post_init__(self):
        object.__setattr__(self, "num_steps", checked_steps(self.num_steps))
        for name in ("buffer_decay", "output_scale"):
            object.__setattr__(self, name, _checked_vector(name, getattr(self, name)))
        decay, scale = self.buffer_decay, self.output_scale
        if len(decay) != len(scale):
            raise ValueError(
                "`output_scale` must have an entry for each of `buffer_decay`. Received: "
                f"{len(scale)} and {len(decay)} entries. Pass both per buffer."
            )
        if np.any(decay >= 1.0) or np.sum(scale / (1.0 + decay)) >= 1.0:
            raise ValueError(
                "`buffer_decay` must be below 1 and the sum of output_scale / (1 + buffer_decay) "
                f"too, or C^-1 grows without bound. Received: buffer_decay={decay}, "
                f"output_scale={scale}. Use smaller ones."
            )

    @classmethod
    def optimize(
        cls,
        num_steps: int,
        num_buffers: int,
        error: str = "mean",
        max_participations: int = 1,
        min_separation: int | None = None,
        callback: Callable[[Progress], object] | None = None,
    ) -> BufferedToeplitzStrategy:
        """Finds the buffers with the lowest error at unit sensitivity.

        The logarithm of the loss times the squared sensitivity is minimised by L-BFGS-B at a cost
        of O(n d) an evaluation, over output scales that sum to less than 1, where the sensitivity
        is exact.

        Args:
          num_steps: n.
          num_buffers: d, from 1 to 8.
          error: "mean" or "max" of the squared row norms of `A C^-1`.
          max_participations: most steps an example takes part in.
          min_separation: least distance, in steps, between two of them; needed when
            `max_participations` is above 1.
          callback: called after every iteration with a `Progress` whose `value` is the logarithm
            minimised.

        Returns:
          The strategy.

        Raises:
          ValueError: an argument is out of its range.
          RuntimeError: no search ended in a minimum.
        """
        num_steps = checked_steps(num_steps)
        num_buffers = checked_int("num_buffers", num_buffers)
        if num_buffers > MAX_BUFFERS:
            raise ValueError(
                f"`num_buffers` must be at most {MAX_BUFFERS}. Received: num_buffers={num_buffers}."
                " More than 4 hardly lower the error."
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
        """d, how many numbers a coordinate the noise of a step remembers."""
        return len(self.buffer_decay)

    def first_column(self) -> np.ndarray:
        """Returns the first column of C before scaling: `(n,)` float64, the first entry 1."""
        impulse = np.append(1.0, np.zeros(self.num_steps - 1))
        return _apply(self.buffer_decay, self.output_scale, impulse)

    def _running_inverse(self) -> np.ndarray:
        decay, scale = inverse_buffers(self.buffer_decay, self.output_scale)
        return _apply(decay, -scale, np.ones(self.num_steps))


def inverse_buffers(decay: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the buffers of C^-1: its coefficients are 1 and `-sum_j scale_j decay_j^(t-1)`.

    With D = diag(decay), v = sqrt(scale): C(z) = 1 + z v' (I - z D)^-1 v has the inverse
    1 - z v' (I - z (D - v v'))^-1 v, and D - v v' is symmetric: real decays, scales not negative.

    Args:
      decay: `(d,)` float64.
      scale: `(d,)` float64, not negative.

    Returns:
      Decays and scales of the inverse, each `(d,)` float64.
    """
    root = np.sqrt(scale)
    # Of I - D + v v', whose small eigenvalues matter: 1 - decay of the slowest buffers.
    gaps, vectors = np.linalg.eigh(np.diag(1.0 - decay) + np.outer(root, root))
    return 1.0 - gaps, np.square(root @ vectors)


def _delayed(decay: float, values: np.ndarray) -> np.ndarray:
    """`z / (1 - decay z)` applied: what a buffer holds before each step."""
    return scipy.signal.lfilter([0.0, 1.0], [1.0, -decay], values)


def _apply(decay: np.ndarray, scale: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`1 + sum_j scale_j z / (1 - decay_j z)` applied to a sequence, in O(n d)."""
    total = np.array(values, np.float64)
    for theta, omega in zip(decay, scale, strict=True):
        total += omega * _delayed(theta, values)
    return total


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    """The inner product, without BLAS, whose threads wait for each other where a core is busy."""
    return float(np.sum(x * y))


def _from_free(point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decays in (0, 1) and scales that sum to less than 1, from `(2 d,)` numbers without bounds."""
    decay, scale = np.split(point, 2)
    return scipy.special.expit(decay), scipy.special.softmax(np.append(scale, 0.0))[:-1]


class _Objective:
    """The logarithm of error times squared sensitivity, and its gradient, in O(n d)."""

    def __init__(self, num_steps: int, error: str, fits: int, separation: int):
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
        # d sums = -C^-1 dC sums, so the adjoint is C^-T of twice the weighted sums.
        adjoint = _apply(inverse_decay, -inverse_scale, weighted[::-1])[::-1]
        # The worst pattern is the earliest, evenly spaced one, as the coefficients do not increase.
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
    """The better of what is found from two starts: memories of up to the root of n steps, or n."""
    found, failure = [], None
    steps = max(2.0, float(objective.num_steps))
    for reach in (0.5, 1.0):
        gaps = steps ** (-reach * (np.arange(num_buffers) + 0.5) / num_buffers)
        start = np.append(np.log1p(-gaps) - np.log(gaps), 0.5 * np.log(gaps))
        try:
            found.append(minimize(objective, start, callback=callback))
        except RuntimeError as error:
            failure = error
    if not found:
        raise failure
    return min(found, key=lambda minimum: minimum.value)


def _checked_vector(name: str, values: object) -> np.ndarray:
    """The buffers' numbers as a read-only float64 vector."""
    try:
        vector = np.array(values)
    except (TypeError, ValueError):  # ragged: judged below like any other non-vector
        vector = np.array(None)
    if (
        vector.dtype.kind not in "fiu"
        or vector.ndim != 1
        or not 1 <= vector.size <= MAX_BUFFERS
        or not np.all(np.isfinite(vector))
        or np.any(vector < 0)
    ):
        raise ValueError(
            f"`{name}` must be a vector of 1 to {MAX_BUFFERS} finite numbers that are not negative."
            f" Received: {name}={values!r}. Pass one per buffer."
        )
    vector = vector.astype(np.float64)
    vector.flags.writeable = False
    return vector
