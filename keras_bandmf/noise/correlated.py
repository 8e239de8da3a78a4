"""The correlated noise `C^-1 Z`: one row for each step, of which each replica draws its share."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_bandmf import _distribution
from keras_bandmf._checks import PrivacyError, checked_bool, checked_float, checked_int
from keras_bandmf._environment import refuse_loose_arithmetic
from keras_bandmf.noise import exact, lattice, normals
from keras_bandmf.noise.lattice import NoiseRows
from keras_bandmf.noise.shards import ShardLayout

_INT32 = 2.0**31
#: Added to a float64 below 2^51, it leaves the nearest integer in the lower bits of the sum.
_ROUNDER = 1.5 * 2.0**52
#: Partial sums of replicas are clipped to this size, so that float64 adds them exactly.
_LARGEST_SUM = 2.0**51


class CorrelatedNoise:
    """A stream of rows of `C^-1 Z`, where `Z` is independent Gaussian noise.

    The state is a ring buffer of the last `b - 1` rows in `tf.Variable`s, so that a compiled
    training loop advances it. Under a `tf.distribute` strategy, each replica keeps and draws only
    its own part of the flat gradient vector, and the sum of all parts is the row. (Under a central
    storage the first replica has all of it.)

    A row consists of whole multiples `n_i` (int32) of the lattice step 2^exponent:
    `n_i = rint(a_i z_i - sum_k c_{i,k} n_{i-k})`. The rounding errors do not accumulate over rows,
    because each row is computed from the rows that were released.

    Formal guarantees:
        *Lattice.* What `noisy_sums` returns is a function of the integers `w_i = G_i + n_i`, `G_i`
        the clipped sum rounded to the lattice, added exactly (of replicas: partial sums rounded to
        a finer lattice, added exactly in any order, and their sum rounded to this one). Since
        `n_j = w_j - G_j`, in exact arithmetic `w_i` is
        `rint(a_i (z_i + (C G)_i) - sum_k c_{i,k} w_{i-k})`: a function of `(C G)_i + z_i` and of
        earlier `w`, so all of them are a post-processing of the matrix mechanism `C G + Z`. Which
        values can appear does not depend on `G`. What the rounding of `G`, and float64 in the
        sum over k, add to the sensitivity is in `lattice.charged_norm`: `stddev` must be scaled
        to it. A step compiled with all that surrounds it may compute a row twice; then both
        differ, rarely, by the rounding that is charged there.
        *Tail.* `finite.tail_total_variation` of all values adds to delta.
        *Normals: a numerical assumption.* `z` is a float64 Box-Muller of 88 + 40 bits, off by
        2^-33 of the radius from exact arithmetic: smooth errors, as of a slightly other deviation,
        which change the density of a pair by 2^-28 of it (`normals.FAST`).
        A lattice cell is 2^-22 deviations wide and holds 2^30 of them, or 2^16 directions of a
        pair: its probability is that of the ideal noise times 1 +- 2^-24 (root mean square over
        cells, as of a trapezoid sum of 2^16 terms). If these factors are as good as independent,
        over d coordinates and n steps they move the privacy loss by 2^-24 sqrt(d n): 0.002 at
        d n = 10^9. With `exact` there is no such assumption: each value is the rounding of a
        real normal, given ideal random words and float64 arithmetic of IEEE 754 in XLA
        (`exact.doubtful`, `exact.rounded_pairs`; the 2^-46 are tested, not proved).
        *Once.* Each row is given out once and in order: the noise owns its position, and any other
        row is all NaN, for the same noise on two gradients would cancel. The key is secret: who
        knows it, or the ring, can subtract the noise.

    Args:
        strategy: The strategy, whose `noise_rows` and `tail_scale` define `C`.
        stddev: The standard deviation of `Z`: noise multiplier times sensitivity times clip norm.
        shapes: The shapes of the gradients.
        seed: An integer, for tests only. By default the key comes from the operating system.
        exact: Whether to round each value as the real number that float64 approximates would be
            rounded. It is refused in a program that XLA compiles.

    Raises:
        ValueError: If an argument is out of range, a replica would draw 2**31 values or more, or
            flags of XLA make its arithmetic too loose.

    Example:
        >>> import keras_bandmf as bandmf
        >>> strategy = bandmf.strategies.ToeplitzStrategy([0.8, 0.6], num_steps=4)
        >>> noise = bandmf.noise.CorrelatedNoise(strategy, stddev=1.0, shapes=[(2, 3), (3,)])
        >>> [tuple(part.shape) for part in noise.next()]
        [(2, 3), (3,)]
        >>> noise.position, noise.num_steps, noise.num_slots
        (1, 4, 1)
    """

    def __init__(
        self,
        strategy: NoiseRows,
        stddev: float,
        shapes: Sequence[Sequence[int]],
        seed: int | None = None,
        exact: bool = False,
    ):
        refuse_loose_arithmetic()
        if not hasattr(strategy, "num_steps"):
            raise TypeError(
                "Expected `strategy` to be a strategy of `keras_bandmf.strategies`. Received: "
                f"strategy={strategy!r}."
            )
        if seed is not None:
            checked_int("seed", seed, 0, "None draws a secret key.")
        self.strategy = strategy
        self.stddev = checked_float("stddev", stddev, minimum=0.0)
        self.exact = checked_bool("exact", exact)
        #: The lattice step is 2^exponent; None without noise.
        self.exponent: int | None = None
        if self.stddev:
            self.exponent = lattice.step_exponent(self.stddev, lattice.largest_row_norm(strategy))
        self.num_steps = strategy.num_steps
        self.num_slots = self._count_slots()
        distribution = tf.distribute.get_strategy()
        self.num_replicas = distribution.num_replicas_in_sync
        # Partial sums are rounded to this many more bits than the whole: see `lattice`.
        self._finer = lattice.finer_bits(self.num_replicas)
        # A central storage has only one place for state, so the first replica draws the whole row.
        central = isinstance(distribution, tf.distribute.experimental.CentralStorageStrategy)
        self.layout = ShardLayout(shapes, 1 if central else self.num_replicas)
        if self.layout.shard_size >= 2**31:
            raise ValueError(
                "A replica can draw the noise of fewer than 2**31 parameters. Received: a model of "
                f"{self.layout.size} parameters on {self.layout.num_shards} replicas. Train on "
                "more replicas (a central storage counts as one), or fewer of its variables."
            )
        self._distribution = distribution
        self._first_replica = _distribution.local_replicas(distribution)[0]
        if central:
            # Variables made in its scope combine what all replicas assign, so these are made in a
            # new thread, which is in no scope. The thread has no device either, but a program of
            # XLA takes variables of its own device only.
            def make() -> None:
                with tf.device(distribution.extended.worker_devices[0]):
                    self._make_variables()

            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                thread.submit(make).result()
        else:
            with tf.init_scope(), distribution.scope():
                self._make_variables()
        # Separate programs: XLA computes a row again for each array that is made from it.
        self._row = tf.function(self._draw_and_pass, jit_compile=True, autograph=False)
        self._doubtful = tf.function(self._doubtful_pairs, jit_compile=True, autograph=False)
        self._meet = tf.function(self._keep_and_add, jit_compile=True, autograph=False)
        self.set_key(normals.fresh_key() if seed is None else normals.key_from_seed(seed))

    def _count_slots(self) -> int:
        return self.strategy.num_bands - 1

    def _make_variables(self) -> None:
        table = lattice.recurrence(self.strategy)
        table[:, 0] *= self.stddev / self.step
        self._key = tf.Variable(np.zeros(2, np.int64), trainable=False, name="noise_key")
        # A table of n rows must not become a constant of the graph.
        self._table = tf.Variable(table, trainable=False, name="noise_table")
        self._ring: tf.Variable | None = None
        if self.num_slots:
            self._ring = _distribution.own_variable(
                # Two int32 in each element: a pair of normals comes from one counter.
                tf.zeros((self.num_slots, self.layout.shard_size // 2), tf.int64),
                "noise_ring",
            )
        self._position = _distribution.own_variable(tf.zeros([], tf.int64), "noise_position")

    def _local(self, variable: tf.Variable) -> list[tf.Variable]:
        """Returns the copies of a variable that the replicas of this process have."""
        return list(self._distribution.experimental_local_results(variable))

    def _ring_of(self, replica: int) -> tf.Variable:
        """Returns the ring of a replica of this process. There is one if there are slots."""
        return self._local(self._ring)[replica - self._first_replica]

    @property
    def position(self) -> int:
        """The number of the next row."""
        return max(int(local.numpy()) for local in self._local(self._position))

    @position.setter
    def position(self, step: int) -> None:
        for local in self._local(self._position):
            local.assign(step)

    @property
    def counters(self) -> list[tf.Variable]:
        """The variables of this process that count the rows drawn. `position` is the largest."""
        return self._local(self._position)

    @property
    def step(self) -> float:
        """The lattice step. It is 1 without noise."""
        return 1.0 if self.exponent is None else 2.0**self.exponent

    @property
    def state_bytes(self) -> int:
        """The size of the ring on each replica, in bytes."""
        return 4 * self.num_slots * self.layout.shard_size

    def set_key(self, key: np.ndarray) -> None:
        """Replaces the key of all rows to come.

        Args:
            key: The key, of shape (2,), uint64. With several worker processes, that of the chief is
                taken.
        """
        key = np.asarray(key, np.uint64).view(np.int64)
        self._process = os.getpid()
        self._key.assign(_distribution.from_chief(self._distribution, key))

    def check_process(self) -> None:
        """Refuses to draw in a process other than the one that set the key.

        After a fork both processes hold the key, and the same noise on two gradients cancels out.

        Raises:
            PrivacyError: In the other process, until it sets a key.
        """
        if os.getpid() != self._process:
            raise PrivacyError(
                f"The noise key belongs to process {self._process}, and a fork copied it here: the "
                "same noise on two gradients would cancel out. Received: a step in process "
                f"{os.getpid()}. Make the optimizer after the fork, or restore a checkpoint here."
            )

    def get_key(self) -> np.ndarray:
        """Returns the secret key, of shape (2,), uint64, to be saved beside the ring."""
        return self._key.numpy().view(np.uint64)

    def get_ring(self) -> np.ndarray:
        """Returns the secret ring of all replicas.

        With several worker processes all of them must call it: each sends its share.

        Returns:
            Multiples of `step`, of shape (b - 1, d), int32.
        """
        if self._ring is None:
            return np.zeros((0, self.layout.size), np.int32)
        rings = [ring.numpy().view(np.int32) for ring in self._local(self._ring)]
        return self.layout.gather(_distribution.gather_parts(self._distribution, rings))

    def set_ring(self, ring: np.ndarray, position: int | None = None) -> None:
        """Restores what `get_ring` returned, on any number of replicas.

        Args:
            ring: Multiples of `step`, of shape (b - 1, d), int32.
            position: The number of the next row; None leaves it as it is.

        Raises:
            ValueError: If the shape or dtype differs.
        """
        ring = np.asarray(ring)
        expected = (self.num_slots, self.layout.size)
        if ring.shape != expected or ring.dtype != np.int32:
            raise ValueError(
                f"The saved noise ring must be int32 of shape {expected}. Received: an "
                f"array of dtype {ring.dtype} and shape {ring.shape}. It belongs to another model, "
                "plan or number of bands, or the file is damaged. The run cannot continue from it."
            )
        if self._ring is not None:
            parts = self.layout.scatter(ring)[self._first_replica :]
            local = self._local(self._ring)
            for variable, part in zip(local, parts[: len(local)], strict=True):
                variable.assign(np.ascontiguousarray(part).view(np.int64))
        if position is not None:
            self.position = position

    def next(self) -> list[tf.Tensor]:
        """Advances by one row and returns it.

        It is for use outside a `tf.distribute` strategy. An optimizer calls `noisy_sums`, with its
        own step counter.

        Returns:
            A float32 tensor for each of the shapes.

        Raises:
            ValueError: If there are several replicas, or (only eagerly) after `n` rows.
        """
        if self.num_replicas > 1:
            raise ValueError(
                "`next()` returns whole rows, and needs noise made outside of a distribution's "
                f"scope. Received: noise over {self.num_replicas} replicas. Call `noisy_sums`."
            )
        self.check_process()
        step = self._local(self._position)[0].read_value()
        if tf.executing_eagerly() and int(step) >= self.num_steps:
            raise PrivacyError(f"All {self.num_steps} rows of the noise have been drawn.")
        return self.noisy_sums([tf.zeros(shape) for shape in self.layout.shapes], step)

    def noisy_sums(
        self,
        sums: Sequence[tf.Tensor],
        step: tf.Tensor,
        replica: int = 0,
        scale: float | tf.Tensor = 1.0,
        usable: bool | tf.Tensor = True,
    ) -> list[tf.Tensor]:
        """Advances the ring to row `step` and adds that row to clipped sums.

        With several replicas all of them must call it, each with its partial sums, which this adds
        up. No other sum over replicas may follow.

        Args:
            sums: The clipped sums of this replica, float32 or float64, in the shapes given.
            step: The step, a scalar integer equal to `position`.
            replica: The number of the replica in whose context this is called, a Python integer.
                With several worker processes it is the number among all of them.
            scale: A public factor of the result, such as 1 / batch size.
            usable: Whether the sums of this replica may be used. If not, the result is all NaN.

        Returns:
            For each shape the whole noisy sum times `scale`, float32, the same on all replicas. It
            is all NaN if the step is `n` or more, or differs from `position`, and then the position
            does not move.
        """
        self.check_process()
        step = tf.cast(step, tf.int64)
        unit = tf.cast(scale, tf.float64) * self.step
        row = flat = None
        allowed = tf.constant(True)
        local = replica - self._first_replica
        if replica < self.layout.num_shards:
            position = self._local(self._position)[local]
            expected = position.read_value()
            allowed = tf.equal(step, expected) & (step < self.num_steps)
            position.assign(tf.where(allowed, step + 1, expected))
            row = self._row(step, replica)
            if self.exact and self.exponent is not None:
                row = self._settled(row, step, replica)
            # The bits alone: TensorFlow keeps int32 in the memory of the host, also beside a GPU.
            flat = tf.reshape(tf.bitcast(row, tf.float32), [-1])
        # A step that is not allowed makes the partial sum NaN, and with it the whole one.
        first = tf.where(allowed & usable, tf.constant(1.0, tf.float64), np.nan)
        if self.num_replicas == 1:
            return self._meet(list(sums), row, flat, step, allowed, first * unit, replica)
        partial = self._meet(list(sums), row, flat, step, allowed, first, replica)
        total = tf.distribute.get_replica_context().all_reduce("SUM", partial)
        if self.exponent is not None:
            # Exact: the noise is whole, so this rounds only the sum of the clipped sums.
            total = [tf.floor(part * 2.0**-self._finer + 0.5) for part in total]
        return [tf.cast(part * unit, tf.float32) for part in total]

    def _draw_and_pass(self, step: tf.Tensor, replica: int) -> tf.Tensor:
        """Returns a replica's part of row `step`, two int32 in each int64, in one XLA program."""
        pair, coefficients, terms = self._row_parts(step, replica)
        return packed(*_values(pair, coefficients, terms))

    def _doubtful_pairs(self, step: tf.Tensor, replica: int) -> tf.Tensor:
        """Returns which pairs of that part to compute exactly, bool, of shape (shard_size / 2,)."""
        pair, coefficients, terms = self._row_parts(step, replica)
        sizes = tf.constant(0.0, tf.float64)
        if self.num_slots:
            sizes = tf.add_n([tf.abs(term) for half in terms for term in half])
        sizes *= (self.num_slots + 4) * 2.0**-52
        values = _values(pair, coefficients, terms)
        return exact.doubtful(pair, coefficients[0], values, sizes)

    def _row_parts(
        self, step: tf.Tensor, replica: int
    ) -> tuple[tuple[tf.Tensor, tf.Tensor], tf.Tensor, list[list[tf.Tensor]]]:
        """Returns standard normals, the coefficients, and the terms of the sums over k."""
        pair = normals.standard_normals(
            self._key.read_value(),
            step,
            self.layout.first_chunk(replica),
            self.layout.chunks_per_shard,
            normals.FINE if self.exact else normals.FAST,
        )
        coefficients = self._coefficients(step)
        terms: list[list[tf.Tensor]] = [[], []]
        for slot in range(self.num_slots):
            ring = self._ring_of(replica)
            for half, value in enumerate(_halves(ring[slot])):
                terms[half].append(value * coefficients[1 + slot])
        return pair, coefficients, terms

    def _coefficients(self, step: tf.Tensor) -> tf.Tensor:
        """Returns `a` of row `step` in lattice steps, then `c` of each slot: (b,), float64."""
        count = self._table.shape[0]
        index = tf.clip_by_value(step - (self.num_steps - count), 0, count - 1)
        coefficients = tf.gather(self._table, index)
        if not self.num_slots:
            return coefficients
        # Slot s holds row i - k for the k in 1, .., b - 1 with s = i - k modulo b - 1.
        lags = (step - 1 - tf.range(self.num_slots, dtype=tf.int64)) % self.num_slots
        return tf.concat([coefficients[:1], tf.gather(coefficients[1:], lags)], axis=0)

    def _settled(self, row: tf.Tensor, step: tf.Tensor, replica: int) -> tf.Tensor:
        """Returns a row whose doubtful values are rounded as real numbers are."""
        exact.check_not_compiled()
        indices = tf.where(self._doubtful(step, replica))[:, 0]
        first = self.layout.first_chunk(replica) * normals.COUNTERS_PER_CHUNK

        def anew() -> tf.Tensor:
            past = tf.zeros([0, tf.size(indices)], tf.int64)
            if self.num_slots:
                ring = self._ring_of(replica)
                past = tf.gather(ring.read_value(), indices, axis=1)
            inputs = [self._key.read_value(), step, indices + first]
            inputs += [self._coefficients(step), tf.bitcast(past, tf.int32)]
            pairs = tf.numpy_function(exact.rounded_pairs, inputs, tf.int32)
            packed = tf.bitcast(tf.ensure_shape(pairs, [None, 2]), tf.int64)
            return tf.tensor_scatter_nd_update(row, indices[:, tf.newaxis], packed)

        return tf.cond(tf.size(indices) > 0, anew, lambda: row)

    def _keep_and_add(
        self,
        sums: list[tf.Tensor],
        row: tf.Tensor | None,
        flat: tf.Tensor | None,
        step: tf.Tensor,
        allowed: tf.Tensor,
        unit: tf.Tensor,
        replica: int,
    ) -> list[tf.Tensor]:
        """Puts a row into the ring, and adds it to sums on the lattice, times `unit`.

        `flat` has the bits of the same row: an int32 in each float32.
        """
        if row is not None and self._ring is not None:
            ring = self._ring_of(replica)
            # XLA drops what is scattered beyond the end.
            slot = tf.where(allowed, step % self.num_slots, self.num_slots)
            ring.scatter_nd_update([[slot]], row[tf.newaxis])
        shares: list[tf.Tensor | None] = [None] * len(sums)
        if flat is not None:
            shares = self.layout.split(tf.bitcast(flat, tf.int32), replica)
        found = []
        for total, share in zip(sums, shares, strict=True):
            total = tf.cast(total, tf.float64)
            if self.exponent is not None:
                total = tf.round(total * 2.0 ** (self._finer - self.exponent))
                if self.num_replicas > 1:
                    limit = _LARGEST_SUM / self.num_replicas
                    total = tf.clip_by_value(total, -limit, limit)
            if share is not None:
                total += tf.cast(share, tf.float64) * 2.0**self._finer
            total *= unit
            found.append(total if self.num_replicas > 1 else tf.cast(total, tf.float32))
        return found


def _values(
    pair: Sequence[tf.Tensor], coefficients: tf.Tensor, terms: Sequence[Sequence[tf.Tensor]]
) -> list[tf.Tensor]:
    """Returns the values of a row before they are rounded."""
    values = [z * coefficients[0] for z in pair]
    return [v - tf.add_n(t) if t else v for v, t in zip(values, terms, strict=True)]


def packed(low: tf.Tensor, high: tf.Tensor) -> tf.Tensor:
    """Rounds two float64 tensors to int32, and returns them as the halves of int64 values.

    Args:
        low: The lower halves.
        high: The upper halves, of the same shape.
    """
    words = []
    for value in (low, high):
        value = tf.clip_by_value(value, -_INT32, _INT32 - 1.0) + _ROUNDER
        words.append(tf.bitcast(value, tf.uint64))
    lower = tf.bitwise.bitwise_and(words[0], tf.constant(2**32 - 1, tf.uint64))
    upper = tf.bitwise.left_shift(words[1], tf.constant(32, tf.uint64))
    return tf.bitcast(tf.bitwise.bitwise_or(lower, upper), tf.int64)


def _halves(packed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the int32 halves of int64 values, as float64."""
    upper = tf.bitwise.right_shift(packed, tf.constant(32, tf.int64))
    low, high = (tf.cast(tf.cast(half, tf.int32), tf.float64) for half in (packed, upper))
    return low, high
