"""Strategies that are not banded, for comparison: what they share.

None has a number of bands: an example's participations reach over each other's rows, so no
accounting of amplified sampling holds for them, and a `TrainingPlan` refuses them.
"""

from __future__ import annotations

import abc
import dataclasses

import numpy as np

from keras_bandmf._checks import checked_choice, checked_int
from keras_bandmf.strategies.arguments import (
    config_of,
    participation_schema,
)
from keras_bandmf.strategies.errors.toeplitz import MAX_VECTOR_STEPS
from keras_bandmf.strategies.sensitivity import banded_toeplitz, toeplitz_sensitivity
from keras_bandmf.strategies.toeplitz import ERRORS, MAX_MATERIALIZED_STEPS


class UnbandedStrategy(abc.ABC):
    """A strategy C for prefix sums A, scaled to largest column norm 1.

    Subclasses are frozen dataclasses made with `eq=False`; their fields are the config.
    """

    num_steps: int

    @abc.abstractmethod
    def per_step_error(self) -> np.ndarray:
        """Returns the variance of each prefix sum at unit noise.

        Returns:
          `(n,)` float64: the squared row norms of B, with `A = B C`.
        """

    def loss(self, error: str = "mean") -> float:
        """Returns the mean or the largest entry of `per_step_error()`.

        Args:
          error: "mean" or "max".

        Returns:
          The loss at largest column norm 1. The expected RMSE at noise multiplier sigma and unit
          sensitivity is `sigma * sqrt(loss)`.

        Raises:
          ValueError: unknown `error`.
        """
        checked_choice("error", error, ERRORS)
        errors = self.per_step_error()
        return float(np.mean(errors) if error == "mean" else np.max(errors))

    @abc.abstractmethod
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
          fixed_order: whether they are exactly that far apart.

        Returns:
          The sensitivity, or an upper bound on it: the class says which.

        Raises:
          ValueError: an argument is out of its range.

        Formal guarantees:
          Never below the largest norm of `sum_{i in pattern} C[:, i] u_i'` with every u_i of norm
          at most 1, over all patterns the schema allows.
        """

    @abc.abstractmethod
    def materialize(self) -> np.ndarray:
        """Returns C as a dense float64 matrix with n columns, for tests and pictures.

        Raises:
          ValueError: n is above 10,000.
        """

    def get_config(self) -> dict:
        """Returns a dict for JSON from which `from_config` restores the strategy exactly."""
        config = {"class_name": type(self).__name__}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            config[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
        return config

    @classmethod
    def from_config(cls, config: dict) -> UnbandedStrategy:
        """Restores a strategy from `get_config()`.

        Args:
          config: the dict, perhaps through JSON.

        Returns:
          An equal strategy.

        Raises:
          ValueError: a field is missing, unknown, or out of its range.
        """
        fields = tuple(field.name for field in dataclasses.fields(cls))
        config = config_of(config, cls.__name__, fields)
        return cls(**{name: config[name] for name in fields})

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash((type(self).__name__, self.num_steps))


class UnbandedToeplitz(UnbandedStrategy):
    """A lower-triangular Toeplitz C, divided by the norm of its first column, the largest."""

    @abc.abstractmethod
    def first_column(self) -> np.ndarray:
        """Returns the first column of C before scaling: `(n,)` float64, the first entry 1."""

    @abc.abstractmethod
    def _running_inverse(self) -> np.ndarray:
        """The running sum of the first column of C^-1 before scaling, `(n,)`."""

    def per_step_error(self) -> np.ndarray:
        """Returns the squared row norms of `A C^-1`.

        Returns:
          `(n,)` float64: the variance of the i-th prefix sum at unit noise.
        """
        column = self.first_column()
        squares = np.square(self._running_inverse())
        # In extended precision where there is one: a million equal terms round the same way.
        errors = np.cumsum(squares, dtype=np.longdouble).astype(np.float64)
        return errors * float(column @ column)

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
          fixed_order: whether they are exactly that far apart.

        Returns:
          The sensitivity, exactly, if the first column of C is non-negative and non-increasing,
          when participations as early and as near as allowed are the worst; else an upper bound.

        Raises:
          ValueError: an argument is out of its range.

        Formal guarantees:
          Never below the largest norm of `sum_{i in pattern} C[:, i] u_i'` with every u_i of norm
          at most 1, over all patterns the schema allows.
        """
        schema = participation_schema(max_participations, min_separation, fixed_order)
        column = self.first_column()
        column = column / np.sqrt(column @ column)
        return toeplitz_sensitivity(column, self.num_steps, False, *schema)

    def materialize(self) -> np.ndarray:
        """Returns C as a dense matrix, for tests and pictures.

        Returns:
          `(n, n)` float64.

        Raises:
          ValueError: n is above 10,000.
        """
        check_materialized(self.num_steps)
        column = self.first_column()
        return banded_toeplitz(column / np.sqrt(column @ column), self.num_steps, False)


def checked_steps(num_steps: object) -> int:
    """Returns `num_steps` as an int, or raises `ValueError`: there is a vector entry a step."""
    num_steps = checked_int("num_steps", num_steps)
    if num_steps > MAX_VECTOR_STEPS:
        raise ValueError(
            f"`num_steps` must be at most {MAX_VECTOR_STEPS} for a strategy that is not banded. "
            f"Received: num_steps={num_steps}. Use a `ToeplitzStrategy`."
        )
    return num_steps


def check_materialized(num_steps: int) -> None:
    """Refuses, by a `ValueError`, to form C for too many steps."""
    if num_steps > MAX_MATERIALIZED_STEPS:
        raise ValueError(
            f"C is materialised for at most {MAX_MATERIALIZED_STEPS} steps. Received: "
            f"num_steps={num_steps}. Use a strategy with fewer steps."
        )
