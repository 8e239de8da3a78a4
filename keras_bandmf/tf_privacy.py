"""A query for TF Privacy's aggregation code, with banded noise. It needs the extra `tf-privacy`.

It is imported when it is asked for: `keras_bandmf.tf_privacy.BandMFSumQuery`.
"""

from __future__ import annotations

import collections
import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import dp_accounting
import numpy as np
import tensorflow as tf

from keras_bandmf._checks import PrivacyError, checked_float, checked_int
from keras_bandmf._environment import refuse_loose_arithmetic
from keras_bandmf.clipping.norms import checked_clip_norm
from keras_bandmf.noise import lattice, normals
from keras_bandmf.noise.taps import NoiseTaps, checked_taps
from keras_bandmf.planning import tf_privacy as _installed
from keras_bandmf.planning.plan import TrainingPlan

__all__ = ["BandMFSumQuery", "BandMFSumState"]

_dp_query: Any = _installed.load("tensorflow_privacy.privacy.dp_query.dp_query")
if _dp_query is None:
    raise ImportError(
        "`keras_bandmf.tf_privacy` needs TF Privacy, which is not installed. Install the extra: "
        "`pip install 'keras_bandmf[tf-privacy]'` (Python below 3.12), or "
        "`pip install --no-deps tensorflow-privacy==0.9.0`."
    )

#: A record that is clipped gets a norm below the clip norm by this factor, so that rounding its
#: values to float32 does not take the norm above it again.
_SHRINK = 1.0 - 2.0**-23


class BandMFSumState(NamedTuple):
    """What a `BandMFSumQuery` keeps between rounds.

    Attributes:
        round: The number of rounds that were released, a scalar int64.
        key: The secret key of all noise, of shape (2,), int64.
        run: What the query and the shapes of the records were, as a number; 0 before round 0.

    Example:
        >>> from keras_bandmf.tf_privacy import BandMFSumState
        >>> BandMFSumState._fields
        ('round', 'key', 'run')
    """

    round: tf.Tensor
    key: tf.Tensor
    run: tf.Tensor


class BandMFSumQuery(_dp_query.SumAggregationDPQuery):  # type: ignore[misc, name-defined]
    """A sum of clipped records plus correlated noise, as a query of TF Privacy.

    It stands where a `GaussianSumQuery` stands: in `NormalizedQuery`, `NestedSumQuery`, and
    aggregations of federated learning. Round t releases the sum of the clipped records plus row t
    of `stddev * C^-1 Z`, where stddev is `noise_multiplier * l2_norm_clip`. With one band and
    columns of norm 1 that is the distribution of `GaussianSumQuery(l2_norm_clip, stddev)`.

    Row t is made of a key and of t alone. So the state is three small tensors, whatever the model
    and the number of bands, and a round takes the time of as many draws as row t of C^-1 has
    entries that matter: p for a `BandedInverseStrategy` of p taps, at most those of a block and
    b - 1 more for a `BlockDiagonalStrategy`, one for b = 1, and t + 1 for other banded strategies.

    Formal guarantees:
        *What holds.* In real numbers, and given ideal normals, the released rows are
        `G + stddev * C^-1 Z`: a Gaussian mechanism on `C G`, post-processed. A record that went
        through `preprocess_record` has a norm of at most `l2_norm_clip`, in float32 as well (of up
        to 2^28 values), whatever is in it: one with a value that is not finite becomes zero. A
        round of `num_steps` or later, and one whose state is from another query or from records of
        other shapes, is refused; where compilers leave assertions out, its result is all NaN.
        *What does not.* (1) Sums and noise are floating-point numbers here. The lattice of
        `BandMFOptimizer`, which makes its guarantee one about what is really released, is absent:
        the low bits of a sum of floats may tell more than the theorem says, as in every Gaussian
        query of TF Privacy. (2) No epsilon follows from the query. It depends on how records are
        sampled and how often one takes part, which the caller's aggregation decides: it must do
        what the plan says (`plan.sampling`, with the batches, clients or users it counts), or the
        caller must account for what it does. The event of a round is therefore
        `dp_accounting.UnsupportedDpEvent`, except for one band; `plan.dp_event(rounds)` is that of
        a run which follows its plan. (3) The query sees no records and cannot count them: what
        enters a sample state without `preprocess_record` is not clipped.
        *State.* It holds the secret key: who has it can subtract all noise. A state must not be
        used twice: two results of the same round have the same noise, and their difference has
        none. After a failure go on from the last state whose result nobody has seen, or start a new
        run and add up its privacy loss. Never train two runs from one initial state.

    Args:
        l2_norm_clip: The norm that each record is clipped to, over all its tensors together.
        noise_multiplier: The standard deviation of Z over the clip norm. 0 releases exact sums.
        strategy: A banded strategy, or a `BandedInverseStrategy`. Its C has columns of norm at
            most 1; for records that take part several times within its bands, or without limits,
            use `from_plan`, which knows the sensitivity.
        num_steps: The number of rounds that may be released. By default that of the strategy.
        seed: An integer, for tests only: who knows it knows the noise. By default each initial
            state has a key of its own from the operating system.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
        PrivacyError: If the clip norm is too small or large for float32, or flags of XLA make its
            arithmetic too loose.

    Example:
        >>> import tensorflow as tf
        >>> import keras_bandmf as bandmf
        >>> strategy = bandmf.strategies.ToeplitzStrategy.optimize(num_steps=100, num_bands=4)
        >>> query = bandmf.tf_privacy.BandMFSumQuery(
        ...     l2_norm_clip=1.0, noise_multiplier=0.5, strategy=strategy)
        >>> state = query.initial_global_state()
        >>> params = query.derive_sample_params(state)
        >>> sums = query.initial_sample_state(tf.zeros([3]))
        >>> for record in ([3.0, 0.0, 4.0], [0.1, 0.2, 0.3]):
        ...     sums = query.accumulate_record(params, sums, tf.constant(record))
        >>> result, state, _ = query.get_noised_result(sums, state)
        >>> result.shape, int(state.round)
        (TensorShape([3]), 1)
    """

    def __init__(
        self,
        l2_norm_clip: float,
        noise_multiplier: float,
        strategy: Any,
        num_steps: int | None = None,
        seed: int | None = None,
    ):
        refuse_loose_arithmetic()
        self._clip = checked_clip_norm(l2_norm_clip)
        multiplier = checked_float("noise_multiplier", noise_multiplier, minimum=0.0)
        self._stddev = checked_float("noise_multiplier * l2_norm_clip", multiplier * self._clip)
        self._multiplier = multiplier
        self._taps: np.ndarray | None = None
        if isinstance(strategy, NoiseTaps):
            self._taps = table = checked_taps(strategy)
        elif hasattr(strategy, "num_bands") and hasattr(strategy, "noise_rows"):
            table = lattice.recurrence(strategy)
        else:
            raise TypeError(
                "Expected `strategy` to be banded, or to have a banded inverse. Received: "
                f"strategy={strategy!r}. Use one of `keras_bandmf.strategies` or `plan.strategy`."
            )
        self._table = table
        most = int(strategy.num_steps)
        self._num_steps = most if num_steps is None else checked_int("num_steps", num_steps)
        if self._num_steps > most:
            raise ValueError(
                f"Expected `num_steps` to be at most the {most} steps of the strategy. Received: "
                f"num_steps={num_steps}. Optimize a strategy for as many rounds as you will run."
            )
        self._total_steps = most
        self._seed = None if seed is None else checked_int("seed", seed, minimum=0)
        # The loop over rows of Z and all draws, in one XLA program.
        self._row: Callable[..., Any] = tf.function(
            self._draw_row, jit_compile=True, autograph=False
        )

    @classmethod
    def from_plan(
        cls, plan: TrainingPlan, l2_norm_clip: float, seed: int | None = None
    ) -> BandMFSumQuery:
        """Makes the query of a plan: its strategy, its noise and its number of steps.

        The epsilon of the plan holds if the records of each round are those its sampling draws.

        Args:
            plan: The plan. Its "examples" are whatever one record stands for, such as clients.
            l2_norm_clip: The norm that each record is clipped to.
            seed: An integer, for tests only.

        Returns:
            A query whose `noise_stddev` is `plan.noise_stddev(l2_norm_clip)`.

        Raises:
            TypeError: If `plan` is not a plan.
            ValueError: If the clip norm is not finite and above 0.

        Example:
            >>> import keras_bandmf as bandmf
            >>> plan = bandmf.TrainingPlan(
            ...     num_examples=1_000, batch_size=50, epochs=3, num_bands=1,
            ...     noise_multiplier=1.5, delta=1e-5,
            ... )
            >>> query = bandmf.tf_privacy.BandMFSumQuery.from_plan(plan, l2_norm_clip=2.0)
            >>> query.noise_stddev, query.num_steps
            (3.0, 60)
        """
        if not isinstance(plan, TrainingPlan):
            raise TypeError(
                "Expected `plan` to be a `keras_bandmf.TrainingPlan`. Received: "
                f"plan={plan!r}. Without a plan, call `BandMFSumQuery(...)` with a strategy."
            )
        multiplier = plan.noise_multiplier * plan.sensitivity  # as `noise_stddev` multiplies
        return cls(l2_norm_clip, multiplier, plan.strategy, plan.num_steps, seed)

    @property
    def noise_stddev(self) -> float:
        """The standard deviation of the independent noise Z, before it is correlated."""
        return self._stddev

    @property
    def num_steps(self) -> int:
        """The number of rounds that may be released."""
        return self._num_steps

    # AutoGraph has nothing to convert in these, and would hide the types of their errors.

    @tf.autograph.experimental.do_not_convert
    def initial_global_state(self) -> BandMFSumState:
        """Returns the state before round 0, with a new key, also each time a graph is run."""
        if self._seed is not None:
            key = tf.constant(normals.key_from_seed(self._seed).view(np.int64))
        elif tf.executing_eagerly():
            key = tf.constant(_fresh_key())
        else:
            # A constant of the graph would give all its runs the same noise.
            key = tf.ensure_shape(tf.numpy_function(_fresh_key, [], tf.int64), [2])
        return BandMFSumState(tf.constant(0, tf.int64), key, tf.constant(0, tf.int64))

    @tf.autograph.experimental.do_not_convert
    def derive_sample_params(self, global_state: BandMFSumState) -> tf.Tensor:
        """Returns the clip norm, which is the same in all rounds, and which clients need.

        Args:
            global_state: The state.

        Returns:
            A scalar float64. The secret state is no part of it.
        """
        del global_state
        return tf.constant(self._clip, tf.float64)

    @tf.autograph.experimental.do_not_convert
    def preprocess_record(self, params: tf.Tensor, record: Any) -> Any:
        """Clips a record by the norm over all its tensors; one that is not finite becomes zero.

        Args:
            params: What `derive_sample_params` returned. A larger number has no effect.
            record: A structure of float32 or float64 tensors.

        Returns:
            The same structure.

        Raises:
            TypeError: If a tensor has another dtype.
            ValueError: If there is no tensor.
        """
        parts = _checked_parts("record", record)
        largest = tf.constant(self._clip, tf.float64)
        asked = tf.cast(params, tf.float64)
        clip = tf.maximum(tf.where(asked <= largest, asked, largest), 0.0)
        wide = [tf.cast(part, tf.float64) for part in parts]
        squares = tf.add_n([tf.reduce_sum(tf.square(part)) for part in wide])
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(part)) for part in wide])
        limit, norm = clip * _SHRINK, tf.sqrt(squares)
        scale = tf.where(norm > limit, limit / norm, tf.ones([], tf.float64))
        clipped = [
            tf.cast(tf.where(finite, part * scale, tf.zeros_like(part)), old.dtype)
            for part, old in zip(wide, parts, strict=True)
        ]
        return tf.nest.pack_sequence_as(record, clipped)

    @tf.autograph.experimental.do_not_convert
    def get_noised_result(
        self, sample_state: Any, global_state: BandMFSumState
    ) -> tuple[Any, BandMFSumState, dp_accounting.DpEvent]:
        """Returns the sum with the noise of this round, the next state, and the round's event.

        Args:
            sample_state: The sum of the preprocessed records, in static shapes.
            global_state: The state. It must not be used a second time.

        Returns:
            The noisy sum in the structure and dtypes of `sample_state`; the state of the next
            round; and `dp_accounting.UnsupportedDpEvent`, as no event of one round describes noise
            that rounds share. With one band it is a `GaussianDpEvent`.

        Raises:
            PrivacyError: If all rounds were released, or the state belongs to another query or to
                records of other shapes. In a graph, `tf.errors.InvalidArgumentError` at run time.
            TypeError: If a tensor is not float32 or float64.
            ValueError: If there is no tensor, or a shape is not static.
        """
        parts = _checked_parts("sample_state", sample_state)
        sizes = [_static_size(part) for part in parts]
        step = tf.convert_to_tensor(global_state.round, tf.int64)
        key = tf.convert_to_tensor(global_state.key, tf.int64)
        run = tf.constant(self._run_number(parts), tf.int64)
        in_time = (step >= 0) & (step < self._num_steps)
        same = tf.where(step == 0, tf.zeros([], tf.int64), run) == global_state.run
        with tf.control_dependencies(self._assertions(in_time, same)):
            unit = tf.where(in_time & same, tf.constant(self._stddev, tf.float64), math.nan)
        flat = tf.zeros([sum(sizes)], tf.float64) * unit
        if self._stddev and sum(sizes):
            chunks = -(-sum(sizes) // normals.CHUNK)
            flat = self._row(key, step, chunks)[: sum(sizes)] * unit
        noisy = [
            tf.cast(tf.cast(part, tf.float64) + tf.reshape(noise, part.shape), part.dtype)
            for part, noise in zip(parts, tf.split(flat, sizes), strict=True)
        ]
        result = tf.nest.pack_sequence_as(sample_state, noisy)
        return result, BandMFSumState(step + 1, key, run), self._event()

    @tf.autograph.experimental.do_not_convert
    def derive_metrics(self, global_state: BandMFSumState) -> collections.OrderedDict:
        """Returns the number of rounds released, the clip norm and the noise, which are public.

        Args:
            global_state: The state.
        """
        return collections.OrderedDict(
            round=tf.identity(global_state.round),
            l2_norm_clip=tf.constant(self._clip, tf.float64),
            noise_stddev=tf.constant(self._stddev, tf.float64),
        )

    def _event(self) -> dp_accounting.DpEvent:
        if not self._stddev:
            return dp_accounting.NonPrivateDpEvent()
        independent = self._table.shape[-1] == 1 and float(np.min(self._table)) >= 1.0
        if independent:
            return dp_accounting.GaussianDpEvent(self._multiplier)
        return dp_accounting.UnsupportedDpEvent()

    def _run_number(self, parts: list[tf.Tensor]) -> int:
        """Returns a number of this query and of the shapes of its records."""
        shapes = [(part.shape.as_list(), part.dtype.name) for part in parts]
        text = f"{self._clip.hex()} {self._stddev.hex()} {self._num_steps} {self._total_steps} "
        digest = hashlib.sha256(f"{text}{shapes}".encode() + self._table.tobytes()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    def _assertions(self, in_time: tf.Tensor, same: tf.Tensor) -> list[Any]:
        """Refuses a round: at once if it runs eagerly, and else when the graph is run."""
        late = (
            f"Expected at most the {self._num_steps} rounds of this query, which its privacy loss "
            "counts. Received: one more. Make a plan for more rounds, and a new query."
        )
        other = (
            "Expected `global_state` to be of this query, and records to keep their shapes and "
            "dtypes over the rounds: the noise of a round makes up for that of earlier ones, value "
            "by value. Received: a state of another run. Start from `initial_global_state()`."
        )
        if not tf.executing_eagerly():
            return [tf.debugging.Assert(in_time, [late]), tf.debugging.Assert(same, [other])]
        for holds, message in ((in_time, late), (same, other)):
            if not bool(holds):
                raise PrivacyError(message)
        return []

    def _draw_row(self, key: tf.Tensor, step: tf.Tensor, num_chunks: int) -> tf.Tensor:
        """Returns row `step` of C^-1 Z, float64: the sum of all rows of Z that matter, drawn anew.

        The coefficient of row j of Z is found from those after it. For a recurrence
        `w_i = a_i z_i - sum_k c_{i,k} w_{i-k}` it is `a_j u_j`, where u is 1 at `step` and before
        it `u_j = -sum_k c_{j+k,k} u_{j+k}`. Once b of them in turn are zero, so are all others.
        """
        window, coefficient, moved = self._taps_loop() if self._taps is not None else self._loop()
        zeros = tf.zeros(num_chunks * normals.COUNTERS_PER_CHUNK, tf.float64)

        def more(row: tf.Tensor, window: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
            return (row >= 0) & tf.reduce_any(window != 0.0)

        def add(row: tf.Tensor, window: tf.Tensor, even: tf.Tensor, odd: tf.Tensor) -> Any:
            drawn = normals.standard_normals(key, row, 0, num_chunks)
            factor = coefficient(row, window)
            even, odd = even + factor * drawn[0], odd + factor * drawn[1]
            return row - 1, moved(row, window), even, odd

        _, _, even, odd = tf.while_loop(more, add, (step, window, zeros, zeros))
        return tf.reshape(tf.stack([even, odd], axis=1), [-1])

    def _taps_loop(self) -> tuple[tf.Tensor, Callable, Callable]:
        """Returns the first window, the coefficient of a row of Z, and how the window moves."""
        zero = tf.zeros([1], tf.float64)
        return (
            tf.constant(self._taps, tf.float64),
            lambda row, window: window[0],
            lambda row, window: tf.concat([window[1:], zero], axis=0),
        )

    def _loop(self) -> tuple[tf.Tensor, Callable, Callable]:
        """The same for a recurrence. The window is u of a row and of the b - 1 rows after it."""
        count, bands = self._table.shape
        table = tf.constant(self._table, tf.float64)
        lags = tf.range(1, bands, dtype=tf.int64)

        def index(row: tf.Tensor) -> tf.Tensor:
            return tf.clip_by_value(row - (self._total_steps - count), 0, count - 1)

        def moved(row: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
            past = tf.gather_nd(table, tf.stack([index(row - 1 + lags), lags], axis=1))
            new = -tf.reduce_sum(past * window[: bands - 1])
            return tf.concat([new[None], window[: bands - 1]], axis=0)

        return (
            tf.one_hot(0, bands, dtype=tf.float64),
            lambda row, window: table[index(row), 0] * window[0],
            moved,
        )


def _fresh_key() -> np.ndarray:
    return normals.fresh_key().view(np.int64)


def _checked_parts(name: str, structure: Any) -> list[tf.Tensor]:
    """Returns the tensors of a structure, each float32 or float64."""
    parts = [tf.convert_to_tensor(part) for part in tf.nest.flatten(structure)]
    if not parts:
        raise ValueError(
            f"Expected `{name}` to have at least one tensor. Received: {name}={structure!r}."
        )
    for part in parts:
        if part.dtype not in (tf.float32, tf.float64):
            raise TypeError(
                f"Expected `{name}` to have tensors of float32 or float64. Received: "
                f"dtype={part.dtype.name}. Cast them: noise needs floats with room for small parts."
            )
    return parts


def _static_size(part: tf.Tensor) -> int:
    size = part.shape.num_elements()
    if size is None:
        raise ValueError(
            "Expected `sample_state` to have static shapes, as values keep their noise over "
            f"rounds. Received: shape={part.shape}. Use `tf.ensure_shape`."
        )
    return int(size)
