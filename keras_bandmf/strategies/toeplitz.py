"""Banded Toeplitz strategies: one column of coefficients defines C for any number of steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_bandmf._checks import checked_bool, checked_choice, checked_function, checked_int
from keras_bandmf.strategies.arguments import (
    ERRORS,
    ErrorMeasure,
    check_bands,
    check_shape,
    config_of,
    reduced,
)
from keras_bandmf.strategies.base import Strategy
from keras_bandmf.strategies.coefficients import checked_coefficients, square_root_coefficients
from keras_bandmf.strategies.errors import normalized, toeplitz
from keras_bandmf.strategies.search.scipy_lbfgs import Progress, minimize
from keras_bandmf.strategies.sensitivity import banded_toeplitz, toeplitz_sensitivity
from keras_bandmf.strategies.toeplitz_workload import (
    constant_rate_coefficients,
    optimal_for_workload,
    workload_errors,
)
from keras_bandmf.strategies.workload import (
    Workload,
    checked_workload,
    workload_config,
    workload_of,
)

# Up to here float64 holds step counts exactly, and the search has been tested.
MAX_STEPS = 10**12
# Where a route forms vectors over the steps, a longer problem starts from a shorter one's optimum.
_WARM_START_STEPS = 10**5


@dataclasses.dataclass(frozen=True, eq=False)
class ToeplitzStrategy(Strategy):
    """A lower-triangular, banded Toeplitz matrix C for `num_steps` steps.

    T has `T[i, j] = coefficients[i - j]` for `0 <= i - j < b`. C is T, or, with
    `column_normalize=True`, T with each column divided by its norm. That changes only the last
    b - 1 columns and lowers the error. (McKenna, arXiv 2405.15913.)

    With k participations that fit into the run, `sensitivity` is exact where b does not exceed the
    separation. It is then `sqrt(k)` with `column_normalize`, and at most that without. With more
    bands it is exact for non-negative, non-increasing coefficients without `column_normalize`. For
    all non-negative coefficients it is exact in fixed order, and without it if there are few bands
    or participations are far apart. Everywhere else it is an upper bound. With `column_normalize`
    that bound needs memory that grows with b^2, and too many bands raise a `ValueError`.

    Attributes:
      coefficients: `(b,)` float64, read-only, scaled to norm 1. The first is positive. The argument
        may be any sequence of numbers.
      num_steps: n, from 1 to 10^12.
      column_normalize: whether every column of C has norm 1.
      workload: A, of n steps. None stands for prefix sums.

    Formal guarantees:
      `C[i, j] = 0` for `i < j` and for `i - j >= num_bands`, and the largest column norm of C is 1
      (to rounding): a contribution of norm zeta at one step moves C X by at most zeta.

    Example:
      >>> import numpy as np
      >>> import keras_bandmf as bandmf
      >>> strategy = bandmf.strategies.ToeplitzStrategy(np.array([1.0, 0.5]), num_steps=3)
      >>> strategy.materialize().round(3)
      array([[0.894, 0.   , 0.   ],
             [0.447, 0.894, 0.   ],
             [0.   , 0.447, 1.   ]])
      >>> round(strategy.sensitivity(max_participations=2, min_separation=2), 6)
      1.414214
    """

    coefficients: np.ndarray
    num_steps: int
    column_normalize: bool = True
    workload: Workload | None = None

    def __post_init__(self) -> None:
        num_steps = _checked_steps(self.num_steps)
        coefficients = checked_coefficients(self.coefficients)
        check_bands(len(coefficients), num_steps)
        object.__setattr__(self, "num_steps", num_steps)
        object.__setattr__(self, "coefficients", coefficients)
        normalize = checked_bool("column_normalize", self.column_normalize)
        object.__setattr__(self, "column_normalize", normalize)
        checked_workload(self.workload, num_steps)

    @classmethod
    def optimize(
        cls,
        num_steps: int,
        num_bands: int,
        error: ErrorMeasure = "mean",
        column_normalize: bool = True,
        callback: Callable[[Progress], object] | None = None,
        workload: Workload | None = None,
    ) -> ToeplitzStrategy:
        """Finds the coefficients with the lowest error at norm 1.

        L-BFGS-B minimizes the logarithm of the error of the raw Toeplitz matrix, starting from the
        square-root coefficients. Normalizing the columns afterwards never makes it worse.

        Args:
          num_steps: n, from 1 to 10^12.
          num_bands: b, from 1 to n. 1 gives the identity.
          error: "mean" or "max" of the squared row norms of `A C^-1`.
          column_normalize: whether every column of C gets norm 1.
          callback: called after every iteration with a `Progress` whose `value` is the logarithm
            of the raw loss.
          workload: A, of n steps. None stands for prefix sums. For any other workload, the loss of
            C itself is minimized, starting from the optimum for prefix sums (with curvatures, from
            that for a constant learning rate), and an iteration costs O(n b^2).

        Returns:
          The strategy.

        Raises:
          TypeError: if an argument has the wrong type.
          ValueError: if an argument is out of its range.
          RuntimeError: if the search did not end in a minimum.

        Example:
          >>> import keras_bandmf as bandmf
          >>> strategy = bandmf.strategies.ToeplitzStrategy.optimize(num_steps=1000, num_bands=16)
          >>> identity = bandmf.strategies.ToeplitzStrategy.optimize(num_steps=1000, num_bands=1)
          >>> round(strategy.loss(), 1), round(identity.loss(), 1)
          (39.4, 500.5)
        """
        num_steps = _checked_steps(num_steps)
        num_bands = checked_int("num_bands", num_bands)
        check_bands(num_bands, num_steps)
        checked_choice("error", error, ERRORS)
        column_normalize = checked_bool("column_normalize", column_normalize)
        checked_function("callback", callback, "It takes a `Progress`.")
        checked_workload(workload, num_steps)
        if workload is not None and workload.is_curved:
            check_shape(num_steps, num_bands, len(workload.curvatures))
            coefficients = constant_rate_coefficients(workload, num_bands, error)
        else:
            coefficients = _optimal_coefficients(num_steps, num_bands, error, callback)
        if workload is not None and num_bands > 1:
            coefficients = optimal_for_workload(
                coefficients, workload, error, column_normalize, callback
            )
        return cls(coefficients, num_steps, column_normalize, workload)

    @classmethod
    def square_root(
        cls,
        num_steps: int,
        num_bands: int | None = None,
        column_normalize: bool = True,
        workload: Workload | None = None,
    ) -> ToeplitzStrategy:
        """Makes the square root of prefix sums, with which optimized strategies are compared.

        Args:
          num_steps: n.
          num_bands: b, the number of coefficients that are kept. None keeps all n, and 1 gives the
            identity.
          column_normalize: whether every column of C gets norm 1.
          workload: A, of n steps. None stands for prefix sums. It does not change C.

        Returns:
          The strategy. (Fichtenberger, Henzinger, Upadhyay, arXiv 2202.11205; with b coefficients:
          Kalinin and Lampert, arXiv 2405.13763.)

        Raises:
          TypeError: if an argument has the wrong type.
          ValueError: if an argument is out of its range.

        Example:
          >>> import keras_bandmf as bandmf
          >>> root = bandmf.strategies.ToeplitzStrategy.square_root(num_steps=1000, num_bands=16)
          >>> best = bandmf.strategies.ToeplitzStrategy.optimize(num_steps=1000, num_bands=16)
          >>> best.loss() < root.loss()
          True
        """
        num_steps = _checked_steps(num_steps)
        if num_bands is None:
            num_bands = num_steps
        num_bands = checked_int("num_bands", num_bands)
        check_bands(num_bands, num_steps)
        return cls(square_root_coefficients(num_bands), num_steps, column_normalize, workload)

    @property
    def num_bands(self) -> int:
        """The number of bands b of C, its diagonal included."""
        return len(self.coefficients)

    def per_step_error(self) -> np.ndarray:
        """Returns the squared row norms of `A C^-1`.

        Returns:
          `(n,)` float64: the variance of the i-th output of the workload at unit noise. An entry
          is `inf` where C^-1 overflows.

        Raises:
          ValueError: if n is above 10^8, or if C has too many entries for a `workload`.
        """
        n, b = self.num_steps, self.num_bands
        if self.workload is not None:
            return workload_errors(self.coefficients, self.workload, self.column_normalize)
        if n > toeplitz.MAX_VECTOR_STEPS:
            raise ValueError(
                f"Expected at most {toeplitz.MAX_VECTOR_STEPS} steps for the error of each step. "
                f"Received: num_steps={n}. Use `loss()`, which works for any number of steps."
            )
        if b == 1:
            return np.arange(1.0, n + 1.0)
        route: toeplitz.ResponseRoute = "scan" if b <= 256 else "fft"
        response = toeplitz.impulse_response(self.coefficients, n, route).numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            sums = np.cumsum(response)
            # The sum uses extended precision where the machine has it, because a million equal
            # terms in a row all round in the same direction.
            errors = np.cumsum(np.square(sums), dtype=np.longdouble).astype(np.float64)
            if self.column_normalize:
                m = n - b + 1
                window = np.concatenate([np.zeros(max(0, b - 1 - m)), sums[max(0, m - b + 1) :]])
                lagged = normalized.lagged_products(sums[:m], b)
                errors[m:] = normalized.tail_errors(self.tail_scale(), window, lagged)
        return np.where(np.isnan(errors), np.inf, errors)

    def loss(self, error: ErrorMeasure = "mean") -> float:
        """Returns the mean or the largest entry of `per_step_error()`.

        For prefix sums it works for any number of steps, also where `per_step_error` does not.

        Args:
          error: "mean" or "max".

        Returns:
          The loss at largest column norm 1; `inf` where C^-1 overflows. The expected root mean
          squared error at noise multiplier sigma and sensitivity 1 is `sigma * sqrt(loss)`.

        Raises:
          TypeError: if `error` is not a string.
          ValueError: if `error` is unknown, or if C has too many entries for a `workload`.
        """
        checked_choice("error", error, ERRORS)
        n, b = self.num_steps, self.num_bands
        if b == 1 and self.workload is None:
            return (n + 1) / 2.0 if error == "mean" else float(n)
        if self.workload is not None or toeplitz.cheapest_route(n, b) != "doubling":
            return reduced(self.per_step_error(), error)
        raw_rows = n - b + 1 if self.column_normalize else n
        doubled = toeplitz.doubling(self.coefficients, toeplitz.step_bits(raw_rows), 0.0, 1.0)
        total, largest = float(doubled.summed), float(doubled.last)
        if self.column_normalize:
            tail = self._doubled_tail(doubled.state.numpy(), doubled.covariance.numpy())
            total, largest = total + float(np.sum(tail)), max(largest, float(np.max(tail)))
        loss = total / n if error == "mean" else largest
        return loss if math.isfinite(loss) else math.inf

    def _doubled_tail(self, state: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        """Returns the errors of the last b - 1 rows.

        Args:
          state: `(b,)` float64, from the doubling route at step n - b + 1.
          covariance: `(b,)` float64, likewise.
        """
        # sum x_t x_{t-k} = sum x_t (x_t - h_t - ... - h_{t-k+1}).
        lagged = covariance[0] - np.concatenate([[0.0], np.cumsum(covariance[1:])])
        with np.errstate(over="ignore", invalid="ignore"):
            window = normalized.extend_window(self.coefficients, state)
            return normalized.tail_errors(self.tail_scale(), window, lagged)

    def _sensitivity(
        self, max_participations: int, min_separation: int, fixed_order: bool
    ) -> float:
        return toeplitz_sensitivity(
            self.coefficients,
            self.num_steps,
            self.column_normalize,
            max_participations,
            min_separation,
            fixed_order,
        )

    def _matrix(self) -> np.ndarray:
        return banded_toeplitz(self.coefficients, self.num_steps, self.column_normalize)

    def noise_rows(self) -> np.ndarray:
        """Returns the recurrence of the correlated noise, which is the same for every step.

        Returns:
          `(1, b)` float64, the row r with `x_i = (z_i - sum_k r[k] x_{i-k}) / r[0]` over
          `1 <= k <= min(i, b - 1)`, i.e. `x = T^-1 z`.
        """
        return self.coefficients[None].copy()

    def tail_scale(self) -> np.ndarray:
        """Returns the factors by which the noise rows of the last steps are multiplied.

        Returns:
          `(t,)` float64 for the last t steps, in their order. Earlier rows are released as they
          are. t is b - 1 with `column_normalize`, else 0: `C^-1 = diag(scale) T^-1`.
        """
        if not self.column_normalize:
            return np.zeros(0)
        return normalized.tail_scale(self.coefficients)

    def get_config(self) -> dict[str, Any]:
        """Returns a dict for JSON from which `from_config` restores the strategy exactly."""
        return {
            "class_name": type(self).__name__,
            "num_steps": self.num_steps,
            "coefficients": self.coefficients.tolist(),
            "column_normalize": self.column_normalize,
            **workload_config(self.workload),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ToeplitzStrategy:
        """Restores a strategy from what `get_config()` returned.

        Args:
          config: the dict, perhaps through JSON.

        Returns:
          An equal strategy, with the same coefficients to the last bit.

        Raises:
          TypeError: if a field has the wrong type.
          ValueError: if a field is missing, unknown, or out of its range.
        """
        fields = ("num_steps", "coefficients", "column_normalize")
        config = config_of(config, cls.__name__, fields, optional=("workload",))
        coefficients, num_steps = config["coefficients"], config["num_steps"]
        return cls(coefficients, num_steps, config["column_normalize"], workload_of(config))

    def __hash__(self) -> int:
        return hash((self.num_steps, self.column_normalize, self.coefficients.tobytes()))

    def __repr__(self) -> str:
        return (
            f"ToeplitzStrategy(num_steps={self.num_steps}, num_bands={self.num_bands}, "
            f"column_normalize={self.column_normalize})"
        )


def _optimal_coefficients(
    num_steps: int,
    num_bands: int,
    error: ErrorMeasure,
    callback: Callable[[Progress], object] | None,
) -> np.ndarray:
    """Minimizes log(loss) over coefficients that begin with 1, which fixes their scale."""
    if num_bands == 1:
        return np.ones(1)
    route = toeplitz.cheapest_route(num_steps, num_bands)
    mean_weight, last_weight = (1.0 / num_steps, 0.0) if error == "mean" else (0.0, 1.0)

    def log_loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        coefficients = np.concatenate([[1.0], free])
        found = toeplitz.weighted_error(coefficients, num_steps, mean_weight, last_weight, route)
        value, gradient = float(found[0]), found[1].numpy()
        square = float(coefficients @ coefficients)
        if not (0.0 < value < math.inf):
            return math.inf, gradient[1:]
        gradient = gradient / value + 2.0 * coefficients / square
        return math.log(value) + math.log(square), gradient[1:]

    shorter = num_steps // 10
    if route != "doubling" and shorter >= max(_WARM_START_STEPS, num_bands):
        start = _optimal_coefficients(shorter, num_bands, error, callback)
    else:
        start = square_root_coefficients(num_bands)
    found = minimize(log_loss, start[1:] / start[0], callback=callback)
    return np.concatenate([[1.0], found.point])


def _checked_steps(num_steps: object) -> int:
    """Returns `num_steps` as an int if it is in its range."""
    steps = checked_int("num_steps", num_steps)
    if steps > MAX_STEPS:
        raise ValueError(
            f"Expected `num_steps` to be at most {MAX_STEPS}. Received: num_steps={steps}. "
            "Plan for fewer steps."
        )
    return steps
