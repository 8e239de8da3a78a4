"""Block-diagonal strategies: noise is correlated within blocks of steps but not across them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from keras_bandmf._checks import checked_choice, checked_int
from keras_bandmf.strategies.arguments import (
    ERRORS,
    ErrorMeasure,
    check_bands,
    check_shape,
    config_of,
    reduced,
)
from keras_bandmf.strategies.banded import BandedStrategy
from keras_bandmf.strategies.base import Strategy
from keras_bandmf.strategies.errors.banded import BandedErrors, block_size
from keras_bandmf.strategies.search.banded import normalize_columns, power_mean
from keras_bandmf.strategies.search.staged import descend_in_stages
from keras_bandmf.strategies.sensitivity import banded_sensitivity
from keras_bandmf.strategies.toeplitz import ToeplitzStrategy
from keras_bandmf.strategies.toeplitz_workload import constant_rate_coefficients
from keras_bandmf.strategies.workload import (
    Workload,
    blocks_of,
    checked_workload,
    num_curvatures,
    workload_config,
    workload_of,
)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockDiagonalStrategy(Strategy):
    """A matrix C whose blocks on the diagonal are all the same banded matrix, for a workload A.

    Training with low-rank carriers needs such a strategy: the carriers change between blocks, and
    noise cancels only while they stay the same. If the steps end within a block, the last block is
    cut there and its columns are scaled to norm 1 again. `sensitivity` is exact or an upper bound
    under the same conditions as that of a `BandedStrategy`.

    Attributes:
      block: the strategy of one block. Its number of steps is the length of the blocks.
      num_steps: n, at least the length of a block.
      workload: A, of n steps. None stands for prefix sums.

    Formal guarantees:
      `C[i, j] = 0` unless i and j lie in one block and `0 <= i - j < num_bands`, and every column
      of C has norm 1 (to rounding): a contribution of norm zeta at one step moves C X by at most
      zeta.

    Example:
      >>> import numpy as np
      >>> import keras_bandmf as bandmf
      >>> block = bandmf.strategies.BandedStrategy(np.array([[4.0, 3.0], [1.0, 0.0]]))
      >>> bandmf.strategies.BlockDiagonalStrategy(block, num_steps=4).materialize()
      array([[0.8, 0. , 0. , 0. ],
             [0.6, 1. , 0. , 0. ],
             [0. , 0. , 0.8, 0. ],
             [0. , 0. , 0.6, 1. ]])
    """

    block: BandedStrategy
    num_steps: int
    workload: Workload | None = None
    # The same C as one banded strategy of n steps.
    _whole: BandedStrategy = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.block, BandedStrategy):
            raise TypeError(
                "Expected `block` to be a BandedStrategy for the steps of one block. Received: "
                f"block={self.block!r}. `BlockDiagonalStrategy.optimize` finds one."
            )
        num_steps = checked_int("num_steps", self.num_steps)
        check_bands(self.block.num_steps, num_steps)
        checked_workload(self.workload, num_steps)
        columns = _tiled(self.block.columns, num_steps)
        object.__setattr__(self, "num_steps", num_steps)
        object.__setattr__(self, "_whole", BandedStrategy(columns, self.workload))

    @classmethod
    def optimize(
        cls,
        num_steps: int,
        num_bands: int,
        block_steps: int,
        error: ErrorMeasure = "mean",
        max_iterations: int = 500,
        workload: Workload | None = None,
    ) -> BlockDiagonalStrategy:
        """Finds the block with the lowest error over all steps, by L-BFGS.

        The error of a step consists of the error of its own block and of those of all earlier
        blocks. Over many blocks, the noise in the sum over a whole block counts most. The best
        block is therefore not the best strategy for its steps alone. An iteration costs O(n b^2).

        Args:
          num_steps: n.
          num_bands: b, at most `block_steps`. 1 gives the identity.
          block_steps: the number of steps in a block: `refresh_every` of the carriers.
          error: "mean" or "max" of the squared row norms of `A C^-1`. The largest is approached
            through power means of rising order.
          max_iterations: the number of iterations (for "max", for each power mean) after which the
            best block so far is returned.
          workload: A, of n steps. None stands for prefix sums.

        Returns:
          The strategy. Its error is never larger than that of independent noise.

        Raises:
          TypeError: if an argument has the wrong type.
          ValueError: if an argument is out of its range.

        Example:
          >>> import keras_bandmf as bandmf
          >>> strategy = bandmf.strategies.BlockDiagonalStrategy.optimize(
          ...     num_steps=40, num_bands=3, block_steps=10)
          >>> identity = bandmf.strategies.ToeplitzStrategy.optimize(num_steps=40, num_bands=1)
          >>> strategy.loss() < identity.loss()
          True
        """
        num_steps = checked_int("num_steps", num_steps)
        num_bands = checked_int("num_bands", num_bands)
        block_steps = checked_int("block_steps", block_steps)
        max_iterations = checked_int("max_iterations", max_iterations)
        checked_choice("error", error, ERRORS)
        if num_bands > block_steps or block_steps > num_steps:
            raise ValueError(
                "Expected num_bands <= block_steps <= num_steps. Received: "
                f"num_bands={num_bands}, block_steps={block_steps}, num_steps={num_steps}. Use "
                "fewer bands or shorter blocks."
            )
        checked_workload(workload, num_steps)
        check_shape(num_steps, num_bands, num_curvatures(workload))
        starts = [np.eye(1, num_bands).repeat(block_steps, axis=0)]
        if num_bands > 1:
            starts.append(_toeplitz_start(block_steps, num_bands, None))
            if workload is not None and workload.is_curved:
                starts.append(_toeplitz_start(block_steps, num_bands, workload))
        errors = _BlockErrors(num_steps, num_bands, workload)

        def loss(point: np.ndarray) -> float:
            return reduced(errors.evaluate(point), error)

        found = min((columns.reshape(-1) for columns in starts), key=loss)
        if num_bands > 1:
            found = descend_in_stages(errors.log_mean, loss, found, error, max_iterations)
        block = normalize_columns(found.reshape(block_steps, num_bands))
        return cls(BandedStrategy(block), num_steps, workload)

    @property
    def block_steps(self) -> int:
        """The number of steps in a block."""
        return self.block.num_steps

    @property
    def num_bands(self) -> int:
        """The number of bands b of C, its diagonal included."""
        return self.block.num_bands

    def per_step_error(self) -> np.ndarray:
        """Returns the squared row norms of `A C^-1`; see `BandedStrategy.per_step_error`."""
        return self._whole.per_step_error()

    def _sensitivity(
        self, max_participations: int, min_separation: int, fixed_order: bool
    ) -> float:
        columns = self._whole.columns
        return banded_sensitivity(columns, max_participations, min_separation, fixed_order)

    def _matrix(self) -> np.ndarray:
        return self._whole.materialize()

    def noise_rows(self) -> np.ndarray:
        """Returns the recurrence of the correlated noise; see `BandedStrategy.noise_rows`.

        Coefficients of rows before the block are zero: each block begins without a past.
        """
        return self._whole.noise_rows()

    def tail_scale(self) -> np.ndarray:
        """Returns an empty `(0,)` float64 array: noise rows are released as they are."""
        return np.zeros(0)

    def get_config(self) -> dict[str, Any]:
        """Returns a dict for JSON from which `from_config` restores the strategy exactly."""
        return {
            "class_name": type(self).__name__,
            "num_steps": self.num_steps,
            "block": self.block.get_config(),
            **workload_config(self.workload),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BlockDiagonalStrategy:
        """Restores a strategy from what `get_config()` returned.

        Args:
          config: the dict, perhaps through JSON.

        Returns:
          An equal strategy, with the same columns to the last bit.

        Raises:
          TypeError: if a field has the wrong type.
          ValueError: if a field is missing, unknown, or out of its range, or if the columns are
            damaged.
        """
        config = config_of(config, cls.__name__, ("num_steps", "block"), optional=("workload",))
        block = BandedStrategy.from_config(config["block"])
        return cls(block, config["num_steps"], workload_of(config))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockDiagonalStrategy):
            return False
        mine = (self.block, self.num_steps, self.workload)
        return mine == (other.block, other.num_steps, other.workload)

    def __hash__(self) -> int:
        return hash((self.block, self.num_steps))

    def __repr__(self) -> str:
        return (
            f"BlockDiagonalStrategy(num_steps={self.num_steps}, num_bands={self.num_bands}, "
            f"block_steps={self.block_steps})"
        )


class _BlockErrors:
    """The errors of all steps as a function of the columns of one block.

    Columns are divided by their norms here, so a point need not have columns of norm 1.

    Args:
      num_steps: n.
      num_bands: b.
      workload: A, of n steps. None stands for prefix sums.
    """

    def __init__(self, num_steps: int, num_bands: int, workload: Workload | None):
        blocks = blocks_of(workload, num_steps, block_size(num_bands))
        self._errors = BandedErrors(num_steps, num_bands, blocks)
        self._shape = (num_steps, num_bands)

    def evaluate(self, point: np.ndarray) -> np.ndarray:
        """Returns the errors.

        Args:
          point: `(block_steps * b,)` float64, the columns of the block one after the other.

        Returns:
          `(n,)` float64; `inf` where the diagonal is not positive or the inverse overflows.
        """
        n, b = self._shape
        if not np.min(point[::b]) > 0.0:
            return np.full(n, np.inf)
        columns, norms = self._columns(point)
        errors = self._errors.evaluate(columns / norms)
        return errors if np.all(np.isfinite(errors)) else np.full(n, np.inf)

    def log_mean(self, point: np.ndarray, power: float) -> tuple[float, np.ndarray]:
        """Returns the logarithm of a power mean of the errors, and its gradient.

        Args:
          point: as in `evaluate`.
          power: the order of the mean.

        Returns:
          The logarithm, `inf` where the errors are, and a float64 gradient of the shape of `point`.
        """
        errors = self.evaluate(point)
        if not 0.0 < np.max(errors) < np.inf:
            return np.inf, np.zeros_like(point)
        n, b = self._shape
        columns, norms = self._columns(point)
        columns /= norms
        value, weights = power_mean(errors, power)
        gradient = self._errors.gradient(weights)
        # Along a column nothing changes, because its norm is divided out.
        gradient = (gradient - columns * np.sum(gradient * columns, axis=1, keepdims=True)) / norms
        gradient *= _within(n, b)
        length = len(point) // b
        padded = np.zeros((-(-n // length) * length, b))
        padded[:n] = gradient
        by_block = padded.reshape(-1, length, b).sum(axis=0) * _within(length, b)
        return value, by_block.reshape(-1)

    def _columns(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the columns of C, `(n, b)`, before scaling, and their norms, `(n, 1)`."""
        n, b = self._shape
        block = point.reshape(-1, b)
        columns = _repeated(block * _within(len(block), b), n) * _within(n, b)
        return columns, np.linalg.norm(columns, axis=1, keepdims=True)


def _toeplitz_start(block_steps: int, num_bands: int, workload: Workload | None) -> np.ndarray:
    """Returns the columns of a block from the Toeplitz optimum, near that of a workload if any."""
    if workload is None:
        coefficients = ToeplitzStrategy.optimize(block_steps, num_bands).coefficients
    else:
        coefficients = constant_rate_coefficients(workload, num_bands, "mean")
    return normalize_columns(np.tile(coefficients, (block_steps, 1)))


def _repeated(block: np.ndarray, num_steps: int) -> np.ndarray:
    """Returns `num_steps` columns: those of the block over and over."""
    return np.tile(block, (-(-num_steps // len(block)), 1))[:num_steps]


def _within(steps: int, bands: int) -> np.ndarray:
    """Returns 1 where an entry of a column lies within a matrix of `steps` rows, else 0."""
    return (np.arange(bands) < np.arange(steps, 0, -1)[:, None]).astype(np.float64)


def _tiled(block: np.ndarray, num_steps: int) -> np.ndarray:
    """Returns the columns of C, `(n, b)`, of norm 1."""
    return normalize_columns(_repeated(block, num_steps))
