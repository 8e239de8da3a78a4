"""What the strategies that are not banded share.

The noise of an example's participations overlaps over the whole run, so the accounting of amplified
sampling does not hold for them. A `TrainingPlan` takes only `BandedInverseStrategy`, in a fixed
order; the others are for comparison.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import numpy as np

from keras_bandmf._checks import checked_int
from keras_bandmf.strategies.arguments import config_of
from keras_bandmf.strategies.base import Strategy
from keras_bandmf.strategies.errors.toeplitz import MAX_VECTOR_STEPS
from keras_bandmf.strategies.sensitivity import banded_toeplitz, toeplitz_sensitivity


@dataclasses.dataclass(frozen=True, eq=False)
class UnbandedStrategy(Strategy):
    """A strategy C for prefix sums A that has no bands, scaled to largest column norm 1.

    Subclasses are frozen dataclasses made with `eq=False`. Their fields are the config.
    """

    def get_config(self) -> dict[str, Any]:
        """Returns a dict for JSON from which `from_config` restores the strategy exactly."""
        config: dict[str, Any] = {"class_name": type(self).__name__}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            config[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> UnbandedStrategy:
        """Restores a strategy from what `get_config()` returned.

        Args:
          config: the dict, perhaps through JSON.

        Returns:
          An equal strategy.

        Raises:
          TypeError: if a field has the wrong type.
          ValueError: if a field is missing, unknown, or out of its range.
        """
        fields = tuple(field.name for field in dataclasses.fields(cls))
        config = config_of(config, cls.__name__, fields)
        return cls(**{name: config[name] for name in fields})


@dataclasses.dataclass(frozen=True, eq=False)
class UnbandedToeplitz(UnbandedStrategy):
    """A lower-triangular Toeplitz C, divided by the norm of its first column, the largest.

    `sensitivity` is exact if the first column of C is non-negative and non-increasing, because then
    the worst participations are as early and as close together as the schema allows. Otherwise it
    is an upper bound.
    """

    @abc.abstractmethod
    def first_column(self) -> np.ndarray:
        """Returns the first column of C before scaling.

        Returns:
          `(n,)` float64, the first entry 1.
        """

    @abc.abstractmethod
    def _running_inverse(self) -> np.ndarray:
        """Returns the running sum of the first column of C^-1 before scaling, `(n,)` float64."""

    def per_step_error(self) -> np.ndarray:
        """Returns the squared row norms of `A C^-1`.

        Returns:
          `(n,)` float64: the variance of the i-th prefix sum at unit noise.
        """
        column = self.first_column()
        squares = np.square(self._running_inverse())
        # The sum uses extended precision where the machine has it, because a million equal terms in
        # a row all round in the same direction.
        errors = np.cumsum(squares, dtype=np.longdouble).astype(np.float64)
        return errors * float(column @ column)

    def _sensitivity(
        self, max_participations: int, min_separation: int, fixed_order: bool
    ) -> float:
        column = self.first_column()
        column = column / np.sqrt(column @ column)
        return toeplitz_sensitivity(
            column, self.num_steps, False, max_participations, min_separation, fixed_order
        )

    def _matrix(self) -> np.ndarray:
        column = self.first_column()
        return banded_toeplitz(column / np.sqrt(column @ column), self.num_steps, False)


def checked_steps(num_steps: object) -> int:
    """Returns `num_steps` as an int if vectors with an entry for each step are possible.

    Args:
      num_steps: n.

    Returns:
      n, from 1 to `MAX_VECTOR_STEPS`.

    Raises:
      TypeError: if it is not an integer.
      ValueError: if it is out of its range.
    """
    steps = checked_int("num_steps", num_steps)
    if steps > MAX_VECTOR_STEPS:
        raise ValueError(
            f"Expected `num_steps` to be at most {MAX_VECTOR_STEPS} for a strategy that is not "
            f"banded. Received: num_steps={steps}. Use a `ToeplitzStrategy`."
        )
    return steps
