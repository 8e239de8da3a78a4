"""The contract that every strategy fulfills."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np

from keras_bandmf._checks import checked_choice
from keras_bandmf._html import facts
from keras_bandmf._printed import rounded_up
from keras_bandmf.strategies.arguments import (
    ERRORS,
    ErrorMeasure,
    check_materialized,
    participation_schema,
    reduced,
)
from keras_bandmf.strategies.workload import Workload

# Up to so many, the error takes no time that one would notice in a notebook.
_FEW_STEPS = 100_000


class Strategy(abc.ABC):
    """A matrix C that says how the noise of different steps is correlated, for a workload A.

    Step i of a run releases row i of `G + C^-1 Z`, where row i of G is the sum of the clipped
    gradients of that step and the entries of Z are independent normals. C is scaled to largest
    column norm 1, so one contribution of an example changes C G by at most its clip norm.

    Instances are immutable, compare by value, and go through JSON without a change of a single bit
    (`get_config`, `from_config`). Training accepts the banded classes of this package, because its
    accounting needs `C[i, j] = 0` for `i < j` and for `i - j >= num_bands`; and, in a fixed order,
    `BandedInverseStrategy`. Other strategies without bands serve for comparison only: they have no
    `num_bands`, their `noise_rows` and `tail_scale` raise `NotImplementedError`, and a
    `TrainingPlan` refuses them.

    A subclass is a frozen dataclass made with `eq=False`. It defines `per_step_error`,
    `_sensitivity`, `_matrix`, `get_config` and `from_config`, and, if it is banded, `num_bands`,
    `noise_rows` and `tail_scale`.

    Attributes:
      num_steps: n, the number of steps of the run.
      workload: A, of n steps. None stands for prefix sums.

    Example:
      >>> import keras_bandmf as bandmf
      >>> strategy = bandmf.strategies.ToeplitzStrategy.optimize(num_steps=100, num_bands=4)
      >>> isinstance(strategy, bandmf.strategies.Strategy)
      True
      >>> strategy.num_steps, strategy.num_bands, strategy.workload
      (100, 4, None)
      >>> bandmf.strategies.from_config(strategy.get_config()) == strategy
      True
    """

    num_steps: int
    workload: Workload | None = None

    @property
    def num_bands(self) -> int:
        """The number of bands b of C, its diagonal included.

        Raises:
          AttributeError: if C is not banded, so that `hasattr` tells banded strategies from others.
        """
        raise AttributeError(self._not_banded("num_bands"))

    def _repr_html_(self) -> str:
        rows = [("steps", str(self.num_steps))]
        if hasattr(self, "num_bands"):
            rows.append(("bands", str(self.num_bands)))
        rows.append(("workload", "prefix sums" if self.workload is None else repr(self.workload)))
        if self.num_steps <= _FEW_STEPS:
            of_steps = self.per_step_error()
            rows.append(("RMSE at unit noise", rounded_up(float(np.mean(of_steps)) ** 0.5, 6)))
        return facts(type(self).__name__, rows)

    @abc.abstractmethod
    def per_step_error(self) -> np.ndarray:
        """Returns the variance of each output of the workload at unit noise.

        Returns:
          `(n,)` float64: the squared norms of the rows of `A C^-1`, or, where C is not square, of
          the rows of the decoder B with `A = B C`. An entry is `inf` where C^-1 overflows.
        """

    def loss(self, error: ErrorMeasure = "mean") -> float:
        """Returns the mean or the largest entry of `per_step_error()`.

        Args:
          error: "mean" or "max".

        Returns:
          The loss at largest column norm 1; `inf` where C^-1 overflows. The expected root mean
          squared error at noise multiplier sigma and sensitivity 1 is `sigma * sqrt(loss)`.

        Raises:
          TypeError: if `error` is not a string.
          ValueError: if `error` is unknown.
        """
        checked_choice("error", error, ERRORS)
        return reduced(self.per_step_error(), error)

    def sensitivity(
        self,
        max_participations: int = 1,
        min_separation: int | None = None,
        fixed_order: bool = False,
    ) -> float:
        """Returns the sensitivity of C under a participation schema, or an upper bound on it.

        Args:
          max_participations: the most steps in which an example takes part.
          min_separation: the least distance, in steps, between two of them. It is needed when
            `max_participations` is above 1.
          fixed_order: whether they are exactly that far apart, as when examples keep their place
            in every epoch.

        Returns:
          The sensitivity for contributions of norm 1 (algorithms: Choquette-Choo et al., arXiv
          2306.08153). It is 1 for one participation. The docstring of the class says when it is
          exact for more.

        Raises:
          TypeError: if an argument has the wrong type.
          ValueError: if an argument is out of its range, or if a bound would need too much memory.

        Formal guarantees:
          Never below the largest norm of `sum_{i in pattern} C[:, i] u_i'` with every u_i of norm
          at most 1, over all patterns the schema allows.
        """
        schema = participation_schema(max_participations, min_separation, fixed_order)
        return self._sensitivity(*schema)

    @abc.abstractmethod
    def _sensitivity(
        self, max_participations: int, min_separation: int, fixed_order: bool
    ) -> float:
        """Returns the sensitivity for a checked schema, with the guarantee of `sensitivity`."""

    def materialize(self) -> np.ndarray:
        """Returns C as a dense matrix, for tests and pictures.

        Returns:
          `(n, n)` float64. The C of a `TreeStrategy` has more rows than columns.

        Raises:
          ValueError: if n is above 10,000.
        """
        check_materialized(self.num_steps)
        return self._matrix()

    @abc.abstractmethod
    def _matrix(self) -> np.ndarray:
        """Returns C as a dense matrix with n columns, without a limit on n."""

    def noise_rows(self) -> np.ndarray:
        """Returns the recurrence of the correlated noise.

        Returns:
          `(n, b)` float64, row i of which is r with `x_i = (z_i - sum_k r[k] x_{i-k}) / r[0]` over
          `1 <= k <= min(i, b - 1)`; or `(1, b)` if the row is the same for every step. What is
          released for step i is `x_i`, or a multiple of it where `tail_scale` says so.

        Raises:
          NotImplementedError: if C is not banded.
        """
        raise NotImplementedError(self._not_banded("noise_rows()"))

    def tail_scale(self) -> np.ndarray:
        """Returns the factors by which the noise rows of the last steps are multiplied.

        Returns:
          `(t,)` float64 for the last t steps, in their order. Earlier rows are released as they
          are.

        Raises:
          NotImplementedError: if C is not banded.
        """
        raise NotImplementedError(self._not_banded("tail_scale()"))

    @abc.abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Returns a dict for JSON from which `from_config` restores the strategy exactly.

        Returns:
          The dict. Its "class_name" is the name of the class.
        """

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Strategy:
        """Restores a strategy from what `get_config()` returned, perhaps through JSON.

        Args:
          config: the dict.

        Returns:
          A strategy that equals the one that wrote `config`, to the last bit of its numbers.

        Raises:
          TypeError: if a field has the wrong type.
          ValueError: if a field is missing, unknown, damaged, or out of its range.
        """

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Strategy)
            and type(other) is type(self)
            and self.get_config() == other.get_config()
        )

    def __hash__(self) -> int:
        return hash((type(self).__name__, self.num_steps))

    def _not_banded(self, what: str) -> str:
        return (
            f"Expected a banded strategy: no other one has `{what}`. Received: strategy={self!r}. "
            "Use a `ToeplitzStrategy`, a `BandedStrategy` or a `BlockDiagonalStrategy`."
        )
