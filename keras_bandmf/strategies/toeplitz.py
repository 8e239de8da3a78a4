"""Banded Toeplitz strategies: one column of coefficients says it all, for any number of steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from keras_bandmf._checks import checked_bool, checked_choice, checked_function, checked_int
from keras_bandmf.strategies.arguments import (
    check_bands,
    config_of,
    participation_schema,
)
from keras_bandmf.strategies.coefficients import checked_coefficients, square_root_coefficients
from keras_bandmf.strategies.errors import normalized, toeplitz
from keras_bandmf.strategies.search.scipy_lbfgs import Progress, minimize
from keras_bandmf.strategies.sensitivity import banded_toeplitz, toeplitz_sensitivity
from keras_bandmf.strategies.toeplitz_workload import optimal_for_workload, workload_errors
from keras_bandmf.strategies.workload import (
    Workload,
    checked_workload,
    workload_config,
    workload_of,
)

ERRORS = ("mean", "max")
# Step counts are kept exactly in float64, and the search is tried, up to here.
MAX_STEPS = 10**12
MAX_MATERIALIZED_STEPS = 10_000
# Longer problems of the routes that form vectors over the steps start from a shorter one's optimum.
_WARM_START_STEPS = 10**5


@dataclasses.dataclass(frozen=True, eq=False)
class ToeplitzStrategy:
    """A lower-triangular, banded Toeplitz strategy C over `num_steps` steps.

    T has `T[i, j] = coefficients[i - j]` for `0 <= i - j < b`. C is T, or with
    `column_normalize=True` T with each column divided by its norm, which changes the last b - 1
    columns only and lowers the error. Instances are immutable and compare by value.
    (McKenna, arXiv 2405.15913.)

    Attributes:
      coefficients: `(b,)` float64, read-only, scaled to norm 1; the first is positive.
      num_steps: n.
      column_normalize: whether every column of C has norm 1.
      workload: A, of n steps; None for prefix sums.

    Formal guarantees:
      `C[i, j] = 0` for `i < j` and for `i - j >= num_bands`, and the largest column norm of C is 1
      (to rounding): a contribution of norm zeta at one step moves C X by at most zeta.
    """

    coefficients: np.ndarray
    num_steps: int
    column_normalize: bool = True
    workload: Workload | None = None

    def __post_init__(self):
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
        error: str = "mean",
        column_normalize: bool = True,
        callback: Callable[[Progress], object] | None = None,
        workload: Workload | None = None,
    ) -> ToeplitzStrategy:
        """Finds the coefficients with the lowest error at norm 1.

        The raw Toeplitz loss is minimised (its logarithm, by L-BFGS-B, from the square-root
        coefficients); normalising the columns afterwards never makes it worse.

        Args:
          num_steps: n, from 1 to 10^12.
          num_bands: b, from 1 to n. 1 gives the identity.
          error: "mean" or "max" of the squared row norms of `A C^-1`.
          column_normalize: whether C gets columns of norm 1.
          callback: called after every iteration with a `Progress` whose `value` is the logarithm
            of the raw loss.
          workload: A, of n steps; None for prefix sums. For any other the loss of C itself is
            minimised, from the optimum for prefix sums, at a cost of O(n b^2) an iteration.

        Returns:
          The strategy.

        Raises:
          ValueError: an argument is out of its range.
          RuntimeError: the search did not end in a minimum.
        """
        num_steps = _checked_steps(num_steps)
        num_bands = checked_int("num_bands", num_bands)
        check_bands(num_bands, num_steps)
        checked_choice("error", error, ERRORS)
        column_normalize = checked_bool("column_normalize", column_normalize)
        checked_function("callback", callback, "It takes a `Progress`.")
        checked_workload(workload, num_steps)
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
        """Makes the square root of prefix sums, the strategy to compare an optimised one with.

        Args:
          num_steps: n.
          num_bands: b, after which its coefficients are cut; None for all n of them. 1 gives the
            identity.
          column_normalize: whether C gets columns of norm 1.
          workload: A, of n steps; None for prefix sums. It does not change C.

        Returns:
          The strategy. (Fichtenberger, Henzinger, Upadhyay, arXiv 2202.11205; cut after b: Kalinin
          and Lampert, arXiv 2405.13763.)

        Raises:
          ValueError: an argument is out of its range.
        """
        num_steps = _checked_steps(num_steps)
        if num_bands is None:
            num_bands = num_steps
        num_bands = checked_int("num_bands", num_bands)
        check_bands(num_bands, num_steps)
        return cls(square_root_coefficients(num_bands), num_steps, column_normalize, workload)

    @property
    def num_bands(self) -> int:
        """b, the number of bands of C, its diagonal included."""
        return len(self.coefficients)

    def per_step_error(self) -> np.ndarray:
        """Returns the squared row norms of `A C^-1`.

        Returns:
          `(n,)` float64: the variance of the i-th prefix sum at unit noise. Coefficients whose
          inverse overflows give `inf`.

        Raises:
          ValueError: n is above 10^8.
        """
        n, b = self.num_steps, self.num_bands
        if self.workload is not None:
            return workload_errors(self.coefficients, self.workload, self.column_normalize)
        if n > toeplitz.MAX_VECTOR_STEPS:
            raise ValueError(
                "The error of each step is computed for at most "
                f"{toeplitz.MAX_VECTOR_STEPS} steps. Received: num_steps={n}. Use `loss()`, "
                "which works for any number of steps."
            )
        if b == 1:
            return np.arange(1.0, n + 1.0)
        route = "scan" if b <= 256 else "fft"
        response = toeplitz.impulse_response(self.coefficients, n, route).numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            sums = np.cumsum(response)
            # Summed in extended precision where there is one: a million equal terms in a row
            # round the same way.
            errors = np.cumsum(np.square(sums), dtype=np.longdouble).astype(np.float64)
            if self.column_normalize:
                m = n - b + 1
                window = np.concatenate([np.zeros(max(0, b - 1 - m)), sums[max(0, m - b + 1) :]])
                lagged = normalized.lagged_products(sums[:m], b)
                errors[m:] = normalized.tail_errors(self.tail_scale(), window, lagged)
        return np.where(np.isnan(errors), np.inf, errors)

    def loss(self, error: str = "mean") -> float:
        """Returns the mean or the largest squared row norm of `A C^-1`.

        Args:
          error: "mean" or "max".

        Returns:
          The loss at largest column norm 1; `inf` where the inverse of C overflows. The expected
          RMSE at noise multiplier sigma and unit sensitivity is `sigma * sqrt(loss)`.

        Raises:
          ValueError: unknown `error`.
        """
        checked_choice("error", error, ERRORS)
        n, b = self.num_steps, self.num_bands
        if b == 1 and self.workload is None:
            return (n + 1) / 2.0 if error == "mean" else float(n)
        if self.workload is not None or toeplitz.cheapest_route(n, b) != "doubling":
            errors = self.per_step_error()
            return float(np.mean(errors) if error == "mean" else np.max(errors))
        raw_rows = n - b + 1 if self.column_normalize else n
        doubled = toeplitz.doubling(self.coefficients, toeplitz.step_bits(raw_rows), 0.0, 1.0)
        total, largest = float(doubled.summed), float(doubled.last)
        if self.column_normalize:
            tail = self._doubled_tail(doubled.state.numpy(), doubled.covariance.numpy())
            total, largest = total + float(np.sum(tail)), max(largest, float(np.max(tail)))
        loss = total / n if error == "mean" else largest
        return loss if math.isfinite(loss) else math.inf

    def _doubled_tail(self, state: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        """Errors of the last b - 1 rows from what the doubling route knows at step n - b + 1."""
        # sum x_t x_{t-k} = sum x_t (x_t - h_t - ... - h_{t-k+1}).
        lagged = covariance[0] - np.concatenate([[0.0], np.cumsum(covariance[1:])])
        with np.errstate(over="ignore", invalid="ignore"):
            window = normalized.extend_window(self.coefficients, state)
            return normalized.tail_errors(self.tail_scale(), window, lagged)

    def sensitivity(
        self,
        max_participations: int = 1,
        min_separation: int | None = None,
        fixed_order: bool = False,
    ) -> float:
        """Returns the sensitivity of C under a participation schema, or an upper bound on it.

        Args:
          max_participations: most steps an example takes part in.
          min_separation: least distance, in steps, between two of them; needed when
            `max_participations` is above 1.
          fixed_order: whether they are exactly that far apart, as when examples keep their place
            in every epoch.

        Returns:
          The sensitivity: 1 for one participation, `sqrt(k)` times the column norm when the bands
          do not exceed the separation (k participations fit). With more bands it is exact for raw,
          non-negative, non-increasing coefficients; for other non-negative ones in fixed order, and
          without it for few bands or far participations (`participation.is_affordable`). It is an
          upper bound for everything else.

        Raises:
          ValueError: an argument is out of its range, or a bound would need too many bands.

        Formal guarantees:
          Never below the largest norm of `sum_{i in pattern} C[:, i] u_i'` with every u_i of norm
          at most 1, over all patterns the schema allows.
        """
        schema = participation_schema(max_participations, min_separation, fixed_order)
        return toeplitz_sensitivity(
            self.coefficients, self.num_steps, self.column_normalize, *schema
        )

    def materialize(self) -> np.ndarray:
        """Returns C as a dense matrix, for tests and pictures.

        Returns:
          `(n, n)` float64.

        Raises:
          ValueError: n is above 10,000.
        """
        if self.num_steps > MAX_MATERIALIZED_STEPS:
            raise ValueError(
                f"C is materialised for at most {MAX_MATERIALIZED_STEPS} steps. Received: "
                f"num_steps={self.num_steps}. Use `noise_rows()` and `tail_scale()`, which define "
                "C^-1, or a strategy with fewer steps."
            )
        return banded_toeplitz(self.coefficients, self.num_steps, self.column_normalize)

    def noise_rows(self) -> np.ndarray:
        """Returns the recurrence of the correlated noise.

        Returns:
          `(1, b)` float64, one row r for every step: `x_i = (z_i - sum_k r[k] x_{i-k}) / r[0]`
          over `1 <= k <= min(i, b - 1)`, i.e. `x = T^-1 z`.
        """
        return self.coefficients[None].copy()

    def tail_scale(self) -> np.ndarray:
        """Returns what multiplies the released noise rows of the last steps.

        Returns:
          `(t,)` float64 for the last t steps, in order; earlier rows are released as they are.
          t = b - 1 with column normalisation, else 0. `C^-1 = diag(scale) T^-1`.
        """
        if not self.column_normalize:
            return np.zeros(0)
        return normalized.tail_scale(self.coefficients)

    def get_config(self) -> dict:
        """Returns a dict for JSON from which `from_config` restores the strategy exactly."""
        return {
            "class_name": type(self).__name__,
            "num_steps": self.num_steps,
            "coefficients": self.coefficients.tolist(),
            "column_normalize": self.column_normalize,
            **workload_config(self.workload),
        }

    @classmethod
    def from_config(cls, config: dict) -> ToeplitzStrategy:
        """Restores a strategy from `get_config()`.

        Args:
          config: the dict, perhaps through JSON.

        Returns:
          An equal strategy, its coefficients the same to the last bit.

        Raises:
          ValueError: a field is missing, unknown, or out of its range.
        """
        fields = ("num_steps", "coefficients", "column_normalize")
        config = config_of(config, cls.__name__, fields, optional=("workload",))
        coefficients, num_steps = config["coefficients"], config["num_steps"]
        return cls(coefficients, num_steps, config["column_normalize"], workload_of(config))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ToeplitzStrategy) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash((self.num_steps, self.column_normalize, self.coefficients.tobytes()))

    def __repr__(self) -> str:
        return (
            f"ToeplitzStrategy(num_steps={self.num_steps}, num_bands={self.num_bands}, "
            f"column_normalize={self.column_normalize})"
        )


def _optimal_coefficients(
    num_steps: int, num_bands: int, error: str, callback: Callable[[Progress], object] | None
) -> np.ndarray:
    """Minimises log(loss) over coefficients with leading 1, which removes their scale."""
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
    """`num_steps` as an int in its range."""
    num_steps = checked_int("num_steps", num_steps)
    if num_steps > MAX_STEPS:
        raise ValueError(
            f"`num_steps` must be at most {MAX_STEPS}. Received: num_steps={num_steps}. "
            "Plan for fewer steps."
        )
    return num_steps
