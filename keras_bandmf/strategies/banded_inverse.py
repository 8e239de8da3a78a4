"""Strategies whose inverse is banded, so that the noise of a step is a moving average."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import scipy.optimize

from keras_bandmf._checks import checked_choice, checked_int
from keras_bandmf.strategies.arguments import (
    ERRORS,
    ErrorMeasure,
    check_bands,
    participation_schema,
)
from keras_bandmf.strategies.coefficients import fractional_coefficients
from keras_bandmf.strategies.errors import toeplitz
from keras_bandmf.strategies.unbanded import UnbandedToeplitz, checked_steps

# How far the first column of C, of first entry 1, may be from one that does not increase.
_ROUNDING = 1e-14
# Where the search of `optimize` starts: gamma and lambda.
_STARTS = ((0.5, 0.97), (0.5, 0.999), (0.85, 0.97), (0.95, 0.999))
_REFUSED = 1e9


@dataclasses.dataclass(frozen=True, eq=False)
class BandedInverseStrategy(UnbandedToeplitz):
    """C^-1 is Toeplitz with p bands: row i of the noise is `sum_k d_k z_(i-k)` over p taps d.

    C itself has no bands, so training takes it in a fixed order only, where its sensitivity under
    the participations of the plan is known. Its noise needs no memory: see
    `noise.RegeneratedNoise`. `optimize` finds the taps for a run, and `square_root` makes those of
    the banded inverse square root (BISR: Kalinin et al., arXiv 2505.12128).

    Attributes:
      inverse_coefficients: `(p,)` float64, read-only: the first column of C^-1 down to its last
        band, divided by its first entry, which must be positive. The argument may be any sequence
        of numbers.
      num_steps: n, up to 10^8; at least p.

    Formal guarantees:
      The first column of C is not negative and does not increase (computed when an instance is
      made, to 1e-14 of its first entry; anything else is refused). So `sensitivity` is exact under
      every schema: the products of columns are not negative and fall with their distance and with
      their start, so the worst participations are as early and as close together as the schema
      allows (Kalinin and Lampert, arXiv 2405.13763, theorem 2).

    Example:
      >>> import keras_bandmf as bandmf
      >>> strategy = bandmf.strategies.BandedInverseStrategy.square_root(100, num_inverse_bands=4)
      >>> strategy.inverse_coefficients
      array([ 1.    , -0.5   , -0.125 , -0.0625])
      >>> round(strategy.loss(), 2)
      9.78
    """

    inverse_coefficients: np.ndarray
    num_steps: int

    def __post_init__(self) -> None:
        num_steps = checked_steps(self.num_steps)
        taps = _checked_taps(self.inverse_coefficients)
        check_bands(len(taps), num_steps)
        object.__setattr__(self, "num_steps", num_steps)
        object.__setattr__(self, "inverse_coefficients", taps)
        if not _falls(self._column):
            raise ValueError(
                "Expected the first column of C, the inverse, not to be negative and not to "
                "increase: otherwise its sensitivity is not known. Received: "
                f"inverse_coefficients={self.inverse_coefficients!r}. Use `optimize`, or negative "
                "taps that approach 0 and sum to at least -1."
            )

    @classmethod
    def square_root(cls, num_steps: int, num_inverse_bands: int) -> BandedInverseStrategy:
        """Makes the banded inverse square root: the first terms of `(1 - z)^(1/2)`.

        Args:
          num_steps: n.
          num_inverse_bands: p, the number of bands of C^-1, its diagonal included. n gives the
            square root of prefix sums, 1 the identity.

        Returns:
          The strategy.

        Raises:
          TypeError: if an argument has the wrong type.
          ValueError: if an argument is out of its range.

        Example:
          >>> import keras_bandmf as bandmf
          >>> strategy = bandmf.strategies.BandedInverseStrategy.square_root(1000, 16)
          >>> round(strategy.loss() ** 0.5, 1)
          5.0
        """
        return cls(_damped(0.5, 1.0, _checked_count(num_steps, num_inverse_bands)), num_steps)

    @classmethod
    def optimize(
        cls,
        num_steps: int,
        num_inverse_bands: int,
        max_participations: int = 1,
        min_separation: int | None = None,
        error: ErrorMeasure = "mean",
    ) -> BandedInverseStrategy:
        """Finds the best taps of `(1 - lambda z)^gamma` for the participations of a run.

        The loss times the squared sensitivity is minimized over gamma and lambda in (0, 1), without
        gradients (Nelder and Mead). An evaluation costs O(n p). (The families of arXiv 2601.22334
        and 2605.18379 have one of the two.)

        Args:
          num_steps: n.
          num_inverse_bands: p, the number of bands of C^-1, its diagonal included.
          max_participations: the most steps in which an example takes part: the epochs.
          min_separation: the least distance, in steps, between two of them: the steps of an epoch.
            It is needed when `max_participations` is above 1.
          error: "mean" or "max" of the squared row norms of `A C^-1`.

        Returns:
          The strategy. It is no worse than `square_root` of as many bands.

        Raises:
          TypeError: if an argument has the wrong type.
          ValueError: if an argument is out of its range.

        Example:
          >>> import keras_bandmf as bandmf
          >>> strategy = bandmf.strategies.BandedInverseStrategy.optimize(1000, 4, 10, 100)
          >>> root = bandmf.strategies.BandedInverseStrategy.square_root(1000, 4)
          >>> [round(s.loss() ** 0.5 * s.sensitivity(10, 100), 1) for s in (strategy, root)]
          [14.7, 28.5]
        """
        bands = _checked_count(num_steps, num_inverse_bands)
        checked_choice("error", error, ERRORS)
        participation_schema(max_participations, min_separation)
        root = cls.square_root(num_steps, bands)
        if bands == 1:
            return root

        def value(strategy: BandedInverseStrategy) -> float:
            sensitivity = strategy.sensitivity(max_participations, min_separation)
            return 0.5 * math.log(strategy.loss(error)) + math.log(sensitivity)

        def objective(point: np.ndarray) -> float:
            try:
                return value(cls(_damped(*_from_free(point), bands), num_steps))
            except ValueError:  # C increases somewhere
                return _REFUSED

        options = {"xatol": 1e-3, "fatol": 1e-6, "maxiter": 200}
        points = [np.log(start) - np.log1p(-np.array(start)) for start in _STARTS]
        found = min(
            (
                scipy.optimize.minimize(objective, point, method="Nelder-Mead", options=options)
                for point in points
            ),
            key=lambda result: result.fun,
        )
        if found.fun >= value(root):
            return root
        return cls(_damped(*_from_free(found.x), bands), num_steps)

    @property
    def num_inverse_bands(self) -> int:
        """The number of bands p of C^-1, its diagonal included: the taps of the noise."""
        return len(self.inverse_coefficients)

    @property
    def num_bands(self) -> int:
        """The number of bands of C: all n of them, or 1 for the identity."""
        return 1 if self.num_inverse_bands == 1 else self.num_steps

    def noise_taps(self) -> np.ndarray:
        """Returns d, the first column of C^-1 down to its last band.

        Returns:
          `(p,)` float64: row i of the noise is `sum_k d_k z_(i-k)` over `0 <= k <= min(i, p - 1)`.
        """
        return self.inverse_coefficients * math.sqrt(float(self._column @ self._column))

    def first_column(self) -> np.ndarray:
        """Returns the first column of C before scaling.

        Returns:
          `(n,)` float64, the first entry 1.
        """
        return self._column.copy()

    @functools.cached_property
    def _column(self) -> np.ndarray:
        bands = self.num_inverse_bands
        if bands == 1:
            return np.append(1.0, np.zeros(self.num_steps - 1))
        route: toeplitz.ResponseRoute = "scan" if bands <= 256 else "fft"
        return toeplitz.impulse_response(self.inverse_coefficients, self.num_steps, route).numpy()

    def _running_inverse(self) -> np.ndarray:
        # After the last band the sums are constant.
        sums = np.cumsum(self.inverse_coefficients, dtype=np.longdouble).astype(np.float64)
        return np.append(sums, np.full(self.num_steps - len(sums), sums[-1]))

    def __repr__(self) -> str:
        return (
            f"BandedInverseStrategy(num_steps={self.num_steps}, "
            f"num_inverse_bands={self.num_inverse_bands})"
        )


def _checked_count(num_steps: object, num_inverse_bands: object) -> int:
    """Returns p, if n and p are integers in range."""
    bands = checked_int("num_inverse_bands", num_inverse_bands)
    check_bands(bands, checked_steps(num_steps))
    return bands


def _checked_taps(taps: object) -> np.ndarray:
    """Returns taps as a read-only float64 vector whose first entry is 1."""
    try:
        vector = np.array(taps)
    except (TypeError, ValueError):  # Ragged input is refused below, like any other non-vector.
        vector = np.array(None)
    if (
        vector.dtype.kind not in "fiu"
        or vector.ndim != 1
        or vector.size == 0
        or not np.all(np.isfinite(vector))
        or vector[0] <= 0
    ):
        raise ValueError(
            "Expected `inverse_coefficients` to be a vector of finite real numbers, the first "
            f"above 0. Received: inverse_coefficients={taps!r}. Pass the first column of C^-1, "
            "from its diagonal down to its last band."
        )
    vector = vector.astype(np.float64)
    vector = vector / vector[0]
    vector.flags.writeable = False
    return vector


def _falls(column: np.ndarray) -> bool:
    """Returns whether a column is finite, not negative, and does not increase, but for rounding."""
    if not np.all(np.isfinite(column)):
        return False
    # The least sequence that does not increase and is nowhere below the absolute values.
    above = np.maximum.accumulate(np.abs(column)[::-1])[::-1]
    return bool(np.max(above - column) <= _ROUNDING)


def _damped(exponent: float, damping: float, num_inverse_bands: int) -> np.ndarray:
    """Returns the first terms of `(1 - damping z)^exponent`."""
    # (1 - z)^gamma = (1 - z) (1 - z)^(gamma - 1), and the terms of the second factor are s_k. The
    # difference s_k - s_(k-1) is written as -s_k gamma / (k - gamma), which does not cancel.
    k = np.arange(num_inverse_bands)
    s = fractional_coefficients(1.0 - exponent, num_inverse_bands)
    return np.append(1.0, -exponent / (k[1:] - exponent) * s[1:]) * damping**k


def _from_free(point: np.ndarray) -> tuple[float, float]:
    """Returns gamma and lambda in (0, 1) from free numbers."""
    # 1e-6 from the ends, where terms vanish.
    gamma, damping = 1e-6 + (1.0 - 2e-6) / (1.0 + np.exp(-np.clip(point, -50.0, 50.0)))
    return float(gamma), float(damping)
