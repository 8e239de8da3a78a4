"""Banded strategies whose columns may all differ, and the search for the best of them."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_bandmf._checks import checked_choice, checked_float, checked_function, checked_int
from keras_bandmf.strategies.arguments import (
    ERRORS,
    ErrorMeasure,
    check_shape,
    config_of,
)
from keras_bandmf.strategies.base import Strategy
from keras_bandmf.strategies.errors.banded import BandedErrors, block_size
from keras_bandmf.strategies.long_start import is_long, long_start
from keras_bandmf.strategies.search.banded import SOLVERS, Solver, normalize_columns, search
from keras_bandmf.strategies.search.cache import Record, Store, digest
from keras_bandmf.strategies.search.checkpoints import Checkpoints
from keras_bandmf.strategies.search.scipy_lbfgs import Progress
from keras_bandmf.strategies.sensitivity import banded_sensitivity
from keras_bandmf.strategies.toeplitz import ToeplitzStrategy
from keras_bandmf.strategies.workload import (
    Workload,
    blocks_of,
    checked_workload,
    num_curvatures,
    workload_config,
    workload_of,
)

_FIELDS = ("num_steps", "num_bands", "columns", "sha256")


@dataclasses.dataclass(frozen=True, eq=False)
class BandedStrategy(Strategy):
    """A lower-triangular, banded matrix C with columns of norm 1, for a workload A.

    Its columns may all differ, so the best of these strategies is the optimum for a number of
    bands. (McKenna, arXiv 2405.15913, section 3.1.)

    With k participations that fit into the run, `sensitivity` is `sqrt(k)` where b does not exceed
    the separation. With more bands and no negative entry of C it is exact in fixed order, and
    without it if there are few bands or participations are far apart. Everywhere else it is an
    upper bound.

    Attributes:
      columns: `(n, b)` float64, read-only. Row j is column j of C from its diagonal down, scaled
        to norm 1. The diagonal is positive, and entries that would lie below row n - 1 of C are
        zero.
      workload: A, of n steps. None stands for prefix sums.
      num_steps: n, the number of columns.

    Formal guarantees:
      `C[i, j] = 0` for `i < j` and for `i - j >= num_bands`, and every column of C has norm 1 (to
      rounding): a contribution of norm zeta at one step moves C X by at most zeta.

    Example:
      >>> import numpy as np
      >>> import keras_bandmf as bandmf
      >>> strategy = bandmf.strategies.BandedStrategy(np.array([[4.0, 3.0], [1.0, 0.0]]))
      >>> strategy.materialize()
      array([[0.8, 0. ],
             [0.6, 1. ]])
      >>> strategy.per_step_error().round(4)
      array([1.5625, 1.25  ])
    """

    columns: np.ndarray
    workload: Workload | None = None
    num_steps: int = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", _checked_columns(self.columns))
        object.__setattr__(self, "num_steps", len(self.columns))
        checked_workload(self.workload, self.num_steps)
        check_shape(self.num_steps, self.num_bands, num_curvatures(self.workload))

    @classmethod
    def optimize(
        cls,
        num_steps: int,
        num_bands: int,
        error: ErrorMeasure = "mean",
        callback: Callable[[Progress], object] | None = None,
        start: BandedStrategy | ToeplitzStrategy | None = None,
        gain: float = 1e-9,
        max_iterations: int = 2000,
        workload: Workload | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        checkpoint_seconds: float = 300.0,
        solver: Solver = "blocks",
    ) -> BandedStrategy:
        """Finds the columns with the lowest error, by L-BFGS.

        An iteration costs O(n b^2), and the search keeps about 20 n b numbers. The error of the
        result is an upper bound on the optimum over all strategies with these bands. The warning of
        a search that stopped too early estimates how far above the optimum the result is; it does
        not bound it.

        With `cache_dir`, the result is stored in a file named after the SHA-256 of the request,
        which consists of all arguments that the result depends on. The same request then returns
        the stored result without a search. While the search runs, its state is stored there, too.
        After an interruption of any kind, the same request continues from the last checkpoint and
        ends, on the same machine, with the same bits as an uninterrupted search. A search that ran
        out of `max_iterations` continues when it is called with more. Files that are cut short,
        damaged or edited cause a warning, are not used, and are written again.

        Args:
          num_steps: n.
          num_bands: b, from 1 to n. 1 gives the identity.
          error: "mean" or "max" of the squared row norms of `A C^-1`. The largest is approached
            through power means of rising order.
          callback: called after every iteration with a `Progress` whose `value` is the logarithm
            of the loss (of the power mean, for "max").
          start: where to begin, with the same n and b; for instance, the result of an earlier
            search. By default the search begins at the column-normalized Toeplitz optimum. For the
            mean error of many prefix sums it begins at what three short problems make of that, if
            this is better.
          gain: the search ends when an iteration lowers the loss by less than this share of it
            (for "max", by less than a hundred times that share).
          max_iterations: the number of iterations after which the best strategy so far is returned
            with a warning.
          workload: A, of n steps. None stands for prefix sums.
          cache_dir: the directory of results and checkpoints. None writes no files. A result takes
            8 n b bytes, a checkpoint up to 25 times that.
          checkpoint_seconds: the least time between two checkpoints; infinity for none.
          solver: what computes errors and gradients: "blocks" is NumPy code, the faster one on
            processors; "graph" is a TensorFlow graph, which runs on the device of
            `tf.device(...)`. Both find the same strategy, up to rounding.

        Returns:
          The strategy. Its error is never larger than that of the start.

        Raises:
          TypeError: if an argument has the wrong type.
          ValueError: if an argument is out of its range.
          OSError: if `cache_dir` cannot be made.

        Warns:
          RuntimeWarning: if `max_iterations` were not enough, or a file in `cache_dir` cannot be
            trusted or written.

        Example:
          >>> import keras_bandmf as bandmf
          >>> banded = bandmf.strategies.BandedStrategy.optimize(num_steps=50, num_bands=4)
          >>> toeplitz = bandmf.strategies.ToeplitzStrategy.optimize(num_steps=50, num_bands=4)
          >>> banded.loss() < toeplitz.loss()
          True
        """
        num_steps = checked_int("num_steps", num_steps)
        num_bands = checked_int("num_bands", num_bands)
        max_iterations = checked_int("max_iterations", max_iterations)
        checked_choice("error", error, ERRORS)
        checked_choice("solver", solver, tuple(SOLVERS))
        gain = checked_float("gain", gain, above=0.0, below=1.0)
        if not isinstance(checkpoint_seconds, float) or checkpoint_seconds != math.inf:
            checkpoint_seconds = checked_float(
                "checkpoint_seconds", checkpoint_seconds, minimum=0.0
            )
        checked_function("callback", callback, "It takes a `Progress`.")
        checked_workload(workload, num_steps)
        check_shape(num_steps, num_bands, num_curvatures(workload))
        first = None if start is None else _start_columns(start, num_steps, num_bands)
        store = checkpoints = None
        if cache_dir is not None:
            request = {
                "class_name": cls.__name__,
                "num_steps": num_steps,
                "num_bands": num_bands,
                "error": error,
                "gain": gain,
                "start": None if first is None else digest(first),
                **workload_config(workload),
                # Results of the default keep the names that they always had.
                **({} if solver == "blocks" else {"solver": solver}),
            }
            store = Store(cache_dir, request)
            if (kept := store.load("result")) is not None:
                return cls(kept.arrays["columns"], workload)
            checkpoints = Checkpoints(store, checkpoint_seconds)
            first = first if checkpoints.start is None else checkpoints.start
        if first is None:
            first = _default_start(num_steps, num_bands, error, workload, gain)
        if num_bands == 1:
            return cls(first, workload)
        blocks = blocks_of(workload, num_steps, block_size(num_bands))
        columns, converged = search(
            first, blocks, error, gain, max_iterations, callback, checkpoints, solver
        )
        if store is not None and checkpoints is not None and converged:
            store.save("result", Record({}, {"columns": columns}))
            checkpoints.remove()
        return cls(columns, workload)

    @property
    def num_bands(self) -> int:
        """The number of bands b of C, its diagonal included."""
        return self.columns.shape[1]

    def per_step_error(self) -> np.ndarray:
        """Returns the squared row norms of `A C^-1`, in O(n b^2).

        Returns:
          `(n,)` float64: the variance of the i-th output of the workload at unit noise. An entry
          is `inf` where C^-1 overflows.
        """
        n, b = self.columns.shape
        blocks = blocks_of(self.workload, n, block_size(b))
        errors = BandedErrors(n, b, blocks).evaluate(self.columns)
        return np.where(np.isnan(errors), np.inf, errors)

    def _sensitivity(
        self, max_participations: int, min_separation: int, fixed_order: bool
    ) -> float:
        return banded_sensitivity(self.columns, max_participations, min_separation, fixed_order)

    def _matrix(self) -> np.ndarray:
        n, b = self.columns.shape
        matrix = np.zeros((n, n))
        steps = np.arange(n)
        for lag in range(b):
            matrix[steps[lag:], steps[: n - lag]] = self.columns[: n - lag, lag]
        return matrix

    def noise_rows(self) -> np.ndarray:
        """Returns the recurrence of the correlated noise, one row for each step.

        Returns:
          `(n, b)` float64, row i of which is r with `x_i = (z_i - sum_k r[k] x_{i-k}) / r[0]` over
          `1 <= k <= min(i, b - 1)`, i.e. `x = C^-1 z`. Entries with k > i are zero.
        """
        rows = np.zeros_like(self.columns)
        for lag in range(self.num_bands):
            rows[lag:, lag] = self.columns[: self.num_steps - lag, lag]
        return rows

    def tail_scale(self) -> np.ndarray:
        """Returns an empty `(0,)` float64 array: noise rows are released as they are."""
        return np.zeros(0)

    def get_config(self) -> dict[str, Any]:
        """Returns a dict for JSON from which `from_config` restores the strategy exactly.

        The n b numbers are stored as base64 of little-endian float64, with a SHA-256 that
        `from_config` checks. As decimal numbers they would take twice the space and minutes to
        read.
        """
        content = self.columns.astype("<f8").tobytes()
        return {
            "class_name": type(self).__name__,
            "num_steps": self.num_steps,
            "num_bands": self.num_bands,
            "columns": base64.b64encode(content).decode("ascii"),
            "sha256": hashlib.sha256(content).hexdigest(),
            **workload_config(self.workload),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BandedStrategy:
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
        config = config_of(config, cls.__name__, _FIELDS, optional=("workload",))
        num_steps = checked_int("num_steps", config["num_steps"])
        num_bands = checked_int("num_bands", config["num_bands"])
        check_shape(num_steps, num_bands)
        try:
            content = base64.b64decode(config["columns"], validate=True)
        except (TypeError, ValueError, binascii.Error):
            content = b""
        checksum = hashlib.sha256(content).hexdigest()
        if len(content) != 8 * num_steps * num_bands or checksum != config["sha256"]:
            raise ValueError(
                f"Expected 'columns' to be the base64 of {num_steps} x {num_bands} float64 numbers "
                f"whose SHA-256 is in 'sha256'. Received: {len(content)} bytes with sha256="
                f"{checksum}. The config is damaged or was edited: optimize the strategy again."
            )
        columns = np.frombuffer(content, "<f8").reshape(num_steps, num_bands)
        return cls(columns, workload_of(config))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BandedStrategy) or self.workload != other.workload:
            return False
        return np.array_equal(self.columns, other.columns)

    def __hash__(self) -> int:
        return hash((self.columns.shape, self.columns[-1].tobytes(), self.columns[0].tobytes()))

    def __repr__(self) -> str:
        return f"BandedStrategy(num_steps={self.num_steps}, num_bands={self.num_bands})"


def _start_columns(start: object, num_steps: int, num_bands: int) -> np.ndarray:
    """Returns the columns, of norm 1, of a strategy of this shape, and refuses anything else."""
    message = (
        f"Expected `start` to be a banded or Toeplitz strategy of {num_steps} steps and "
        f"{num_bands} bands, or None. Received: start={start!r}. Leave it out to start from "
        "the Toeplitz optimum."
    )
    if not isinstance(start, (BandedStrategy, ToeplitzStrategy)):
        raise TypeError(message)
    if (start.num_steps, start.num_bands) != (num_steps, num_bands):
        raise ValueError(message)
    if isinstance(start, BandedStrategy):
        return start.columns
    return normalize_columns(np.tile(start.coefficients, (num_steps, 1)))


def _default_start(
    num_steps: int, num_bands: int, error: ErrorMeasure, workload: Workload | None, gain: float
) -> np.ndarray:
    """Returns the columns of the Toeplitz optimum, or better ones where those are known."""
    toeplitz = ToeplitzStrategy.optimize(num_steps, num_bands, error, workload=workload)
    start = _start_columns(toeplitz, num_steps, num_bands)
    if error != "mean" or workload is not None or not is_long(num_steps, num_bands):
        return start
    composed = long_start(num_steps, num_bands, gain)
    return composed if BandedStrategy(composed).loss() < BandedStrategy(start).loss() else start


def _checked_columns(columns: object) -> np.ndarray:
    """Returns the columns as a read-only `(n, b)` float64 array with rows of norm 1."""
    try:
        array = np.array(columns)
    except (TypeError, ValueError):  # Ragged input is refused below, like any other non-matrix.
        array = np.array(None)
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.size == 0:
        raise ValueError(
            "Expected `columns` to be an (n, b) array of real numbers. Received: columns of shape "
            f"{array.shape} and dtype {array.dtype}. Pass column j of C, from its diagonal down, "
            "as row j."
        )
    check_shape(*array.shape)
    array = array.astype(np.float64)
    bad = ~np.all(np.isfinite(array), axis=1) | ~(array[:, 0] > 0.0)
    if np.any(bad):
        where = int(np.argmax(bad))
        raise ValueError(
            "Expected `columns` to be finite and its first entries, the diagonal of C, positive. "
            f"Received: columns[{where}]={array[where]}. Change the sign of a column whose "
            "diagonal is negative. C must be invertible."
        )
    array = normalize_columns(array)
    array.flags.writeable = False
    return array
