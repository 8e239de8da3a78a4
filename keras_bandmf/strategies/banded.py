"""Banded strategies whose columns are all their own: the exact optimum for a number of bands."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable

import numpy as np

from keras_bandmf._checks import checked_choice, checked_float, checked_function, checked_int
from keras_bandmf.strategies.arguments import (
    check_shape,
    config_of,
    participation_schema,
)
from keras_bandmf.strategies.errors.banded import BandedErrors, block_size
from keras_bandmf.strategies.long_start import is_long, long_start
from keras_bandmf.strategies.search.banded import normalize_columns, search
from keras_bandmf.strategies.search.cache import Record, Store, digest
from keras_bandmf.strategies.search.checkpoints import Checkpoints
from keras_bandmf.strategies.search.scipy_lbfgs import Progress
from keras_bandmf.strategies.sensitivity import banded_sensitivity
from keras_bandmf.strategies.toeplitz import ERRORS, MAX_MATERIALIZED_STEPS, ToeplitzStrategy
from keras_bandmf.strategies.workload import (
    Workload,
    blocks_of,
    checked_workload,
    workload_config,
    workload_of,
)

_FIELDS = ("num_steps", "num_bands", "columns", "sha256")


@dataclasses.dataclass(frozen=True, eq=False)
class BandedStrategy:
    """A lower-triangular, banded strategy C with columns of norm 1, for a workload A.

    Instances are immutable and compare by value. (McKenna, arXiv 2405.15913, section 3.1.)

    Attributes:
      columns: `(n, b)` float64, read-only: row j is column j of C from its diagonal down, scaled
        to norm 1; the diagonal is positive, and entries below row n - 1 of C are zero.
      workload: A, of n steps; None for prefix sums.

    Formal guarantees:
      `C[i, j] = 0` for `i < j` and for `i - j >= num_bands`, and every column of C has norm 1 (to
      rounding): a contribution of norm zeta at one step moves C X by at most zeta.
    """

    columns: np.ndarray
    workload: Workload | None = None

    def __post_init__(self):
        object.__setattr__(self, "columns", _checked_columns(self.columns))
        checked_workload(self.workload, self.num_steps)

    @classmethod
    def optimize(
        cls,
        num_steps: int,
        num_bands: int,
        error: str = "mean",
        callback: Callable[[Progress], object] | None = None,
        start: BandedStrategy | ToeplitzStrategy | None = None,
        gain: float = 1e-9,
        max_iterations: int = 2000,
        workload: Workload | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        checkpoint_seconds: float = 300.0,
    ) -> BandedStrategy:
        """Finds the columns with the lowest error, by L-BFGS from one no worse than Toeplitz.

        One iteration costs O(n b^2) and about 20 n b numbers are kept. What is found is an upper
        bound on the optimum of all strategies with these bands; how far above it, is estimated in
        the warning of a search that did not end, never bounded.

        With `cache_dir`, the result is kept in a file named by the SHA-256 of the request (all the
        arguments that the result depends on), and the same request returns it without a search.
        Until then the search itself is kept there: when it was stopped, in whatever way, the same
        request goes on from the last checkpoint and ends, on the same machine, with the same bits
        as if it had not been. One that ran out of `max_iterations` goes on when called with more.
        Files that are cut short, damaged or edited are reported, not used, and written anew.

        Args:
          num_steps: n.
          num_bands: b, from 1 to n. 1 gives the identity.
          error: "mean" or "max" of the squared row norms of `A C^-1`. The largest is approached
            through power means of rising order.
          callback: called after every iteration with a `Progress` whose `value` is the logarithm
            of the loss (of the power mean, for "max").
          start: where to begin, of the same n and b, for instance what an earlier search found;
            by default the column-normalised Toeplitz optimum or, for the mean error of many prefix
            sums, what three short problems make of it, whichever is better.
          gain: ends where an iteration lowers the loss by less than this share of it ("max": by
            less than a hundred times that share).
          max_iterations: iterations after which the best strategy so far is returned, with a
            warning.
          workload: A, of n steps; None for prefix sums.
          cache_dir: directory of results and checkpoints; None writes nothing. A result takes
            8 n b bytes, a checkpoint up to 25 times that.
          checkpoint_seconds: least time between two checkpoints; infinity for none.

        Returns:
          The strategy: never of a larger error than the start.

        Raises:
          ValueError: an argument is out of its range.
          OSError: `cache_dir` cannot be made.

        Warns:
          RuntimeWarning: `max_iterations` were not enough; a file in `cache_dir` cannot be trusted
            or written.
        """
        num_steps = checked_int("num_steps", num_steps)
        num_bands = checked_int("num_bands", num_bands)
        max_iterations = checked_int("max_iterations", max_iterations)
        checked_choice("error", error, ERRORS)
        check_shape(num_steps, num_bands)
        gain = checked_float("gain", gain, above=0.0, below=1.0)
        if checkpoint_seconds != math.inf:
            checkpoint_seconds = checked_float(
                "checkpoint_seconds", checkpoint_seconds, minimum=0.0
            )
        checked_function("callback", callback, "It takes a `Progress`.")
        checked_workload(workload, num_steps)
        if start is not None:
            start = _start_columns(start, num_steps, num_bands)
        store = checkpoints = None
        if cache_dir is not None:
            request = {
                "class_name": cls.__name__,
                "num_steps": num_steps,
                "num_bands": num_bands,
                "error": error,
                "gain": gain,
                "start": None if start is None else digest(start),
                **workload_config(workload),
            }
            store = Store(cache_dir, request)
            if (kept := store.load("result")) is not None:
                return cls(kept.arrays["columns"], workload)
            checkpoints = Checkpoints(store, checkpoint_seconds)
            start = start if checkpoints.start is None else checkpoints.start
        if start is None:
            start = _default_start(num_steps, num_bands, error, workload, gain)
        if num_bands == 1:
            return cls(start, workload)
        blocks = blocks_of(workload, num_steps, block_size(num_bands))
        columns, converged = search(
            start, blocks, error, gain, max_iterations, callback, checkpoints
        )
        if store is not None and converged:
            store.save("result", Record({}, {"columns": columns}))
            checkpoints.remove()
        return cls(columns, workload)

    @property
    def num_steps(self) -> int:
        """n."""
        return self.columns.shape[0]

    @property
    def num_bands(self) -> int:
        """b, the number of bands of C, its diagonal included."""
        return self.columns.shape[1]

    def per_step_error(self) -> np.ndarray:
        """Returns the squared row norms of `A C^-1`.

        Returns:
          `(n,)` float64: the variance of the i-th output of the workload at unit noise. Columns
          whose inverse overflows give `inf`.
        """
        n, b = self.columns.shape
        blocks = blocks_of(self.workload, n, block_size(b))
        errors = BandedErrors(n, b, blocks).evaluate(self.columns)
        return np.where(np.isnan(errors), np.inf, errors)

    def loss(self, error: str = "mean") -> float:
        """Returns the mean or the largest squared row norm of `A C^-1`.

        Args:
          error: "mean" or "max".

        Returns:
          The loss at column norm 1; `inf` where the inverse of C overflows. The expected RMSE at
          noise multiplier sigma and unit sensitivity is `sigma * sqrt(loss)`.

        Raises:
          ValueError: unknown `error`.
        """
        checked_choice("error", error, ERRORS)
        errors = self.per_step_error()
        return float(np.mean(errors) if error == "mean" else np.max(errors))

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
          The sensitivity: 1 for one participation, `sqrt(k)` when the bands do not exceed the
          separation (k participations fit). With more bands it is exact if C has no negative entry,
          in fixed order, and without it for few bands or far participations
          (`participation.is_affordable`); an upper bound for everything else.

        Raises:
          ValueError: an argument is out of its range.

        Formal guarantees:
          Never below the largest norm of `sum_{i in pattern} C[:, i] u_i'` with every u_i of norm
          at most 1, over all patterns the schema allows.
        """
        schema = participation_schema(max_participations, min_separation, fixed_order)
        return banded_sensitivity(self.columns, *schema)

    def materialize(self) -> np.ndarray:
        """Returns C as a dense matrix, for tests and pictures.

        Returns:
          `(n, n)` float64.

        Raises:
          ValueError: n is above 10,000.
        """
        n, b = self.columns.shape
        if n > MAX_MATERIALIZED_STEPS:
            raise ValueError(
                f"C is materialised for at most {MAX_MATERIALIZED_STEPS} steps. Received: "
                f"num_steps={n}. Use `columns`, which define C."
            )
        matrix = np.zeros((n, n))
        steps = np.arange(n)
        for lag in range(b):
            matrix[steps[lag:], steps[: n - lag]] = self.columns[: n - lag, lag]
        return matrix

    def noise_rows(self) -> np.ndarray:
        """Returns the recurrence of the correlated noise.

        Returns:
          `(n, b)` float64, row i of which is r with `x_i = (z_i - sum_k r[k] x_{i-k}) / r[0]` over
          `1 <= k <= min(i, b - 1)`, i.e. `x = C^-1 z`; entries with k > i are zero.
        """
        rows = np.zeros_like(self.columns)
        for lag in range(self.num_bands):
            rows[lag:, lag] = self.columns[: self.num_steps - lag, lag]
        return rows

    def tail_scale(self) -> np.ndarray:
        """Returns an empty `(0,)` float64 array: noise rows are released as they are."""
        return np.zeros(0)

    def get_config(self) -> dict:
        """Returns a dict for JSON from which `from_config` restores the strategy exactly.

        The n b numbers are base64 of little-endian float64, with a SHA-256 that `from_config`
        checks: as decimal numbers they would take twice the space and minutes to read.
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
    def from_config(cls, config: dict) -> BandedStrategy:
        """Restores a strategy from `get_config()`.

        Args:
          config: the dict, perhaps through JSON.

        Returns:
          An equal strategy, its columns the same to the last bit.

        Raises:
          ValueError: a field is missing, unknown, or out of its range; the columns are damaged.
        """
        config = config_of(config, cls.__name__, _FIELDS, optional=("workload",))
        num_steps = checked_int("num_steps", config["num_steps"])
        num_bands = checked_int("num_bands", config["num_bands"])
        check_shape(num_steps, num_bands)
        try:
            content = base64.b64decode(config["columns"], validate=True)
        except (TypeError, ValueError, binascii.Error):
            content = b""
        digest = hashlib.sha256(content).hexdigest()
        if len(content) != 8 * num_steps * num_bands or digest != config["sha256"]:
            raise ValueError(
                f"'columns' must be the base64 of {num_steps} x {num_bands} float64 numbers whose "
                f"SHA-256 is in 'sha256'. Received: {len(content)} bytes with sha256={digest}. The "
                "config is damaged or was edited; optimise the strategy again."
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
    """The columns of a strategy of this shape, of norm 1."""
    if not isinstance(start, (BandedStrategy, ToeplitzStrategy)) or (
        (start.num_steps, start.num_bands) != (num_steps, num_bands)
    ):
        raise ValueError(
            f"`start` must be a strategy of {num_steps} steps and {num_bands} bands, or None. "
            f"Received: start={start!r}. Leave it out to start from the Toeplitz optimum."
        )
    if isinstance(start, BandedStrategy):
        return start.columns
    return normalize_columns(np.tile(start.coefficients, (num_steps, 1)))


def _default_start(
    num_steps: int, num_bands: int, error: str, workload: Workload | None, gain: float
) -> np.ndarray:
    toeplitz = ToeplitzStrategy.optimize(num_steps, num_bands, error, workload=workload)
    start = _start_columns(toeplitz, num_steps, num_bands)
    if error != "mean" or workload is not None or not is_long(num_steps, num_bands):
        return start
    composed = long_start(num_steps, num_bands, gain)
    return composed if BandedStrategy(composed).loss() < BandedStrategy(start).loss() else start


def _checked_columns(columns: object) -> np.ndarray:
    """The columns as a read-only `(n, b)` float64 array of unit rows."""
    try:
        array = np.array(columns)
    except (TypeError, ValueError):  # ragged: judged below like any other non-matrix
        array = np.array(None)
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.size == 0:
        raise ValueError(
            "`columns` must be an (n, b) array of real numbers. Received: an array of shape "
            f"{array.shape} and dtype {array.dtype}. Row j is column j of C from its diagonal down."
        )
    check_shape(*array.shape)
    array = array.astype(np.float64)
    bad = ~np.all(np.isfinite(array), axis=1) | ~(array[:, 0] > 0.0)
    if np.any(bad):
        where = int(np.argmax(bad))
        raise ValueError(
            "`columns` must be finite and its first entries, the diagonal of C, positive. "
            f"Received: columns[{where}]={array[where]}. Change the sign of a column whose "
            "diagonal is negative; C must be invertible."
        )
    array = normalize_columns(array)
    array.flags.writeable = False
    return array
