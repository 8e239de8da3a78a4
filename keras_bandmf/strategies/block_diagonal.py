"""Block-diagonal strategies: noise is correlated within blocks of steps and never across them."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.optimize

from keras_bandmf._checks import checked_choice, checked_int
from keras_bandmf.strategies.arguments import (
    check_bands,
    check_shape,
    config_of,
)
from keras_bandmf.strategies.banded import BandedStrategy
from keras_bandmf.strategies.errors.banded import BandedErrors, block_size
from keras_bandmf.strategies.search.banded import normalize_columns, power_mean
from keras_bandmf.strategies.toeplitz import ERRORS, ToeplitzStrategy
from keras_bandmf.strategies.workload import (
    Workload,
    blocks_of,
    checked_workload,
    workload_config,
    workload_of,
)

# Stands in for the largest error: its power mean of this order is within a few percent of it.
_MAX_ERROR_POWER = 64.0


@dataclasses.dataclass(frozen=True, eq=False)
class BlockDiagonalStrategy:
    """A strategy C whose blocks on the diagonal are all one banded matrix, for a workload A.

    For low-rank carriers, which are refreshed between blocks: noise cancels only in one basis. The
    last block is cut where the steps end, its columns scaled to norm 1 again.

    Attributes:
      block: the strategy of one block; its number of steps is the length of the blocks.
      num_steps: n, at least one block.
      workload: A, of n steps; None for prefix sums.

    Formal guarantees:
      `C[i, j] = 0` unless i and j lie in one block and `0 <= i - j < num_bands`, and every column
      of C has norm 1 (to rounding): a contribution of norm zeta at one step moves C X by at most
      zeta.
    """

    block: BandedStrategy
    num_steps: int
    workload: Workload | None = None

    def __post_init__(self):
        if not isinstance(self.block, BandedStrategy):
            raise ValueError(
                "`block` must be a BandedStrategy of the steps of one block. Received: "
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
        error: str = "mean",
        max_iterations: int = 500,
        workload: Workload | None = None,
    ) -> BlockDiagonalStrategy:
        """Finds the block with the lowest error over all steps, by L-BFGS.

        The error of a step is that of its own block and of all blocks before: over many blocks the
        sum of a whole block counts most, so the best block is not the best strategy of its steps
        alone. An iteration costs O(n b^2).

        Args:
          num_steps: n.
          num_bands: b, at most `block_steps`. 1 gives the identity.
          block_steps: the steps of a block: `refresh_every` of the carriers.
          error: "mean" or "max" of the squared row norms of `A C^-1`.
          max_iterations: of the search.
          workload: A, of n steps; None for prefix sums.

        Returns:
          The strategy: never of a larger error than independent noise.

        Raises:
          ValueError: an argument is out of its range.
        """
        num_steps = checked_int("num_steps", num_steps)
        num_bands = checked_int("num_bands", num_bands)
        block_steps = checked_int("block_steps", block_steps)
        max_iterations = checked_int("max_iterations", max_iterations)
        checked_choice("error", error, ERRORS)
        if num_bands > block_steps or block_steps > num_steps:
            raise ValueError(
                "Bands must fit into a block and a block into the run. Received: "
                f"num_bands={num_bands}, block_steps={block_steps}, num_steps={num_steps}."
            )
        check_shape(num_steps, num_bands)
        checked_workload(workload, num_steps)
        starts = [np.eye(1, num_bands).repeat(block_steps, axis=0)]
        if num_bands > 1:
            toeplitz = ToeplitzStrategy.optimize(block_steps, num_bands)
            starts.append(normalize_columns(np.tile(toeplitz.coefficients, (block_steps, 1))))
        loss = _BlockLoss(num_steps, num_bands, error, workload)
        start = min(starts, key=lambda columns: loss(columns.reshape(-1))[0])
        found = start
        if num_bands > 1:
            result = scipy.optimize.minimize(
                loss,
                start.reshape(-1),
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": max_iterations, "maxfun": 4 * max_iterations, "ftol": 1e-14},
            )
            if result.fun < loss(start.reshape(-1))[0]:
                found = normalize_columns(result.x.reshape(start.shape))
        return cls(BandedStrategy(found), num_steps, workload)

    @property
    def block_steps(self) -> int:
        """The steps of a block."""
        return self.block.num_steps

    @property
    def num_bands(self) -> int:
        """b, the number of bands of C, its diagonal included."""
        return self.block.num_bands

    def per_step_error(self) -> np.ndarray:
        """Returns the squared row norms of `A C^-1`, `(n,)` float64."""
        return self._whole.per_step_error()

    def loss(self, error: str = "mean") -> float:
        """Returns the mean or the largest squared row norm of `A C^-1`.

        Args:
          error: "mean" or "max".

        Raises:
          ValueError: unknown `error`.
        """
        return self._whole.loss(error)

    def sensitivity(
        self,
        max_participations: int = 1,
        min_separation: int | None = None,
        fixed_order: bool = False,
    ) -> float:
        """Returns the sensitivity of C under a participation schema; see `BandedStrategy`."""
        return self._whole.sensitivity(max_participations, min_separation, fixed_order)

    def materialize(self) -> np.ndarray:
        """Returns C as a dense `(n, n)` float64 matrix, for tests and pictures."""
        return self._whole.materialize()

    def noise_rows(self) -> np.ndarray:
        """Returns the recurrence of the correlated noise; see `BandedStrategy.noise_rows`.

        Coefficients of rows before the block are zero: the ring starts anew with every block.
        """
        return self._whole.noise_rows()

    def tail_scale(self) -> np.ndarray:
        """Returns an empty `(0,)` float64 array: noise rows are released as they are."""
        return np.zeros(0)

    def get_config(self) -> dict:
        """Returns a dict for JSON from which `from_config` restores the strategy exactly."""
        return {
            "class_name": type(self).__name__,
            "num_steps": self.num_steps,
            "block": self.block.get_config(),
            **workload_config(self.workload),
        }

    @classmethod
    def from_config(cls, config: dict) -> BlockDiagonalStrategy:
        """Restores a strategy from `get_config()`.

        Args:
          config: the dict, perhaps through JSON.

        Returns:
          An equal strategy.

        Raises:
          ValueError: a field is missing, unknown, or out of its range; the columns are damaged.
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


class _BlockLoss:
    """log of the mean error (or of its power mean) as a function of one block's columns."""

    def __init__(self, num_steps: int, num_bands: int, error: str, workload: Workload | None):
        blocks = blocks_of(workload, num_steps, block_size(num_bands))
        self._errors = BandedErrors(num_steps, num_bands, blocks)
        self._shape = (num_steps, num_bands)
        self._power = 1.0 if error == "mean" else _MAX_ERROR_POWER

    def __call__(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        n, b = self._shape
        block = point.reshape(-1, b)
        length = len(block)
        inside, kept = _within(n, b), _within(length, b)
        tiled = _repeated(block * kept, n) * inside
        norms = np.linalg.norm(tiled, axis=1, keepdims=True)
        if not np.min(block[:, 0]) > 0.0:
            return np.inf, np.zeros_like(point)
        columns = tiled / norms
        errors = self._errors.evaluate(columns)
        if not np.isfinite(errors).all():
            return np.inf, np.zeros_like(point)
        value, weights = power_mean(errors, self._power)
        gradient = self._errors.gradient(weights)
        gradient = (gradient - columns * np.sum(gradient * columns, axis=1, keepdims=True)) / norms
        gradient *= inside
        padded = np.zeros((-(-n // length) * length, b))
        padded[:n] = gradient
        return value, (padded.reshape(-1, length, b).sum(axis=0) * kept).reshape(-1)


def _repeated(block: np.ndarray, num_steps: int) -> np.ndarray:
    return np.tile(block, (-(-num_steps // len(block)), 1))[:num_steps]


def _within(steps: int, bands: int) -> np.ndarray:
    """1 where an entry of a column lies within a matrix of this many rows, else 0."""
    return (np.arange(bands) < np.arange(steps, 0, -1)[:, None]).astype(np.float64)


def _tiled(block: np.ndarray, num_steps: int) -> np.ndarray:
    """The columns of C, `(n, b)`, of norm 1; those of a `BandedStrategy` end with its steps."""
    return normalize_columns(_repeated(block, num_steps))
