"""The correlated noise `C^-1 Z`, one row a step, each replica its share."""

from __future__ import annotations

import concurrent.futures
import numbers
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tensorflow as tf

from keras_bandmf.noise import normals, workers
from keras_bandmf.noise.shards import ShardLayout

# A sum of so few rows is part of one loop with all that follows; of more, a product is faster.
_FUSED_SLOTS = 16


class NoiseRows(Protocol):
    """What the noise needs to know of a strategy `C` for `n` steps with `b` bands.

    `C^-1 Z` is computed a row at a time: `x_i = (z_i - sum_k r_{i,k} x_{i-k}) / r_{i,0}`, and
    `scale_i * x_i` is released.
    """

    num_steps: int
    num_bands: int

    def noise_rows(self) -> np.ndarray:
        """Returns `r`: shape (1, b) where all rows are equal, else (n, b), float64."""

    def tail_scale(self) -> np.ndarray:
        """Returns the scale of the last rows, shape (t,), float64; earlier rows have scale 1."""


class CorrelatedNoise:
    """A stream of rows of `C^-1 Z`, `Z` independent normals of standard deviation `stddev`.

    The state is a ring of the last `b - 1` rows in `tf.Variable`s, so that a compiled training
    loop advances it. Under a `tf.distribute` strategy each replica keeps, and draws, only its own
    run of the flat gradient vector; the sum of all shares is the row. (Under a central storage the
    first replica has it all.)

    Formal guarantees:
        The rows `0 .. n-1` are, up to float32 rounding, `C^-1 Z` with `Z[i, j] ~ N(0, stddev^2)`
        independent over steps, elements and replicas. Each row is given out once and in order:
        the noise owns its position, and any other row is all NaN, for the same noise on two
        gradients would cancel. The key is secret: who knows it, or the ring, can subtract the
        noise.

    Args:
        strategy: the strategy whose `noise_rows` and `tail_scale` define `C`.
        stddev: standard deviation of `Z`: noise multiplier times sensitivity times clip norm.
        shapes: the shapes of the gradients.
        seed: an integer for tests only. By default the key comes from the operating system.

    Raises:
        ValueError: if an argument is out of range, or a replica would draw 2**31 values or more.
    """

    def __init__(
        self,
        strategy: NoiseRows,
        stddev: float,
        shapes: Sequence[Sequence[int]],
        seed: int | None = None,
    ):
        if not isinstance(stddev, numbers.Real) or not 0 <= stddev < np.inf:
            raise ValueError(
                "Argument `stddev` must be a finite number that is not negative. "
                f"Received: stddev={stddev!r}"
            )
        self.strategy = strategy
        self.stddev = float(stddev)
        self.num_steps = strategy.num_steps
        self.num_slots = strategy.num_bands - 1
        distribution = tf.distribute.get_strategy()
        self.num_replicas = distribution.num_replicas_in_sync
        # A central storage has one place for state: the first replica draws the whole row.
        central = isinstance(distribution, tf.distribute.experimental.CentralStorageStrategy)
        self.layout = ShardLayout(shapes, 1 if central else self.num_replicas)
        if self.layout.shard_size >= 2**31:
            raise ValueError(
                "A replica can draw the noise of fewer than 2**31 parameters. Received: a model of "
                f"{self.layout.size} parameters on {self.layout.num_shards} replicas. Train on "
                "more replicas (a central storage counts as one), or fewer of its variables."
            )
        self._distribution = distribution
        self._first_replica = workers.local_replicas(distribution)[0]
        if central:
            # Its variables combine what all replicas assign. A new thread is in no scope.
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                thread.submit(self._make_variables).result()
        else:
            with tf.init_scope(), distribution.scope():
                self._make_variables()
        self._tail = np.asarray(strategy.tail_scale(), np.float32)
        self._next_row = tf.function(self._draw_and_pass, jit_compile=True, autograph=False)
        self.set_key(normals.fresh_key() if seed is None else normals.key_from_seed(seed))

    def _make_variables(self) -> None:
        rows = np.asarray(self.strategy.noise_rows(), np.float32)
        self._key = tf.Variable(np.zeros(2, np.int64), trainable=False, name="noise_key")
        # A table of n rows must not become a constant of the graph.
        self._rows = tf.Variable(rows, trainable=False, name="noise_rows")
        self._ring = None
        if self.num_slots:
            self._ring = self._per_replica(
                tf.zeros((self.num_slots, self.layout.shard_size)), "noise_ring"
            )
        self._position = self._per_replica(tf.zeros([], tf.int64), "noise_position")

    def _per_replica(self, value: tf.Tensor, name: str) -> tf.Variable:
        """Makes a variable of which each replica has, and updates, its own."""
        return tf.Variable(
            value,
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.NONE,
            name=name,
        )

    def _local(self, variable: tf.Variable) -> list[tf.Variable]:
        """Returns the variables of the replicas of this process."""
        return list(self._distribution.experimental_local_results(variable))

    @property
    def position(self) -> int:
        """The next row to give out."""
        return max(int(local.numpy()) for local in self._local(self._position))

    @position.setter
    def position(self, step: int) -> None:
        for local in self._local(self._position):
            local.assign(step)

    @property
    def counters(self) -> list[tf.Variable]:
        """The variables of this process that count the rows given out; `position` is the most."""
        return self._local(self._position)

    @property
    def state_bytes(self) -> int:
        """Bytes of the ring on each replica."""
        return 4 * self.num_slots * self.layout.shard_size

    def set_key(self, key: np.ndarray) -> None:
        """Replaces the key of all rows to come: shape (2,), uint64. The chief's key counts."""
        key = np.asarray(key, np.uint64).view(np.int64)
        self._process = os.getpid()
        self._key.assign(workers.from_chief(self._distribution, key))

    def check_process(self) -> None:
        """Refuses to draw in another process than the key was set in.

        After a fork both processes hold the key, and the same noise on two gradients cancels.

        Raises:
            ValueError: in the other process, until it sets a key.
        """
        if os.getpid() != self._process:
            raise ValueError(
                f"The noise key belongs to process {self._process}, and a fork copied it here: the "
                "same noise on two gradients would cancel. Received: a step in process "
                f"{os.getpid()}. Make the optimizer after the fork, or restore a checkpoint here."
            )

    def get_key(self) -> np.ndarray:
        """Returns the secret key, shape (2,), uint64, to be saved beside the ring."""
        return self._key.numpy().view(np.uint64)

    def get_ring(self) -> np.ndarray:
        """Returns the secret ring of all replicas, shape (b - 1, d), float32.

        With several worker processes all of them must call it: each sends its share.
        """
        if not self.num_slots:
            return np.zeros((0, self.layout.size), np.float32)
        rings = [ring.numpy() for ring in self._local(self._ring)]
        return self.layout.gather(workers.gather_parts(self._distribution, rings))

    def set_ring(self, ring: np.ndarray) -> None:
        """Restores what `get_ring` returned, on any number of replicas.

        Raises:
            ValueError: if the shape or dtype differs, or a value is not finite.
        """
        ring = np.asarray(ring)
        expected = (self.num_slots, self.layout.size)
        if ring.shape != expected or ring.dtype != np.float32 or not np.isfinite(ring).all():
            raise ValueError(
                f"The saved noise ring must be finite float32 of shape {expected}. Received: an "
                f"array of dtype {ring.dtype} and shape {ring.shape}. It belongs to another model, "
                "plan or number of bands, or the file is damaged; the run cannot go on from it."
            )
        if self.num_slots:
            parts = self.layout.scatter(ring)[self._first_replica :]
            local = self._local(self._ring)
            for variable, part in zip(local, parts[: len(local)], strict=True):
                variable.assign(part)

    def next(self) -> list[tf.Tensor]:
        """Advances by one row and returns it, float32, in the shapes given.

        For use outside a `tf.distribute` strategy; an optimizer calls `share`, whose step is its
        own counter.

        Raises:
            ValueError: under a strategy with several replicas, or (eagerly) after `n` rows.
        """
        if self.num_replicas > 1:
            raise ValueError(
                "`next()` returns whole rows and needs a noise made outside a strategy scope. "
                f"Received: a noise over {self.num_replicas} replicas. Call `share(step)`."
            )
        self.check_process()
        step = self._local(self._position)[0].read_value()
        if tf.executing_eagerly() and int(step) >= self.num_steps:
            raise ValueError(f"All {self.num_steps} rows of the noise have been drawn.")
        return [
            tf.zeros(shape) if share is None else share
            for shape, share in zip(self.layout.shapes, self.share(step), strict=True)
        ]

    def share(self, step: tf.Tensor, replica: int = 0) -> list[tf.Tensor | None]:
        """Advances one replica's ring to row `step` and returns its share of that row.

        Args:
            step: scalar integer, equal to `position`.
            replica: the replica in whose context this is called, a Python integer; with several
                worker processes its number among all of them.

        Returns:
            For each shape a float32 tensor, zero where another replica owns the elements, or
            None where this replica owns none of them. All NaN for a step of `n` or more, or
            another than `position`; the position does not move then.
        """
        self.check_process()
        if replica >= self.layout.num_shards:
            return [None] * len(self.layout.shapes)
        step = tf.cast(step, tf.int64)
        local = replica - self._first_replica
        position = self._local(self._position)[local]
        expected = position.read_value()
        allowed = tf.equal(step, expected) & (step < self.num_steps)
        position.assign(tf.where(allowed, step + 1, expected))
        return self.layout.split(self._next_row(step, allowed, replica), replica)

    def _release_scale(self, step: tf.Tensor) -> tf.Tensor:
        scale = tf.constant(self.stddev, tf.float32)
        if self._tail.size:
            position = step - (self.num_steps - self._tail.size)
            tail = tf.gather(self._tail, tf.clip_by_value(position, 0, self._tail.size - 1))
            scale *= tf.where(position >= 0, tail, 1.0)
        return scale

    def _draw_and_pass(self, step: tf.Tensor, allowed: tf.Tensor, replica: int) -> tf.Tensor:
        """A replica's part of the row, drawn and passed through the ring: one XLA program."""
        z = normals.standard_normals(
            self._key.read_value(),
            step,
            self.layout.first_chunk(replica),
            self.layout.chunks_per_shard,
        )
        row = self._ring_pass(z, step, allowed, replica - self._first_replica)
        return row * tf.where(allowed, self._release_scale(step), np.nan)

    def _ring_pass(
        self, z: tf.Tensor, step: tf.Tensor, allowed: tf.Tensor, local: int
    ) -> tf.Tensor:
        """Computes `x_i` from `z_i` and the ring, and puts it into the ring if that is allowed."""
        last = tf.shape(self._rows, out_type=tf.int64)[0] - 1
        coefficients = tf.gather(self._rows, tf.minimum(step, last))
        if not self.num_slots:
            return z / coefficients[0]
        ring = self._local(self._ring)[local]
        slot = step % self.num_slots
        # Slot s holds x_{i-k} for the k in 1 .. b-1 with s = i - k modulo b - 1.
        lags = (slot - 1 - tf.range(self.num_slots, dtype=tf.int64)) % self.num_slots
        weights = tf.gather(coefficients[1:], lags)
        if self.num_slots <= _FUSED_SLOTS:
            past = tf.add_n([ring[k] * weights[k] for k in range(self.num_slots)])
        else:
            past = tf.linalg.matvec(ring, weights, transpose_a=True)
        row = (z - past) / coefficients[0]
        kept = tf.where(allowed, row, tf.gather(ring, slot))
        ring.scatter_nd_update([[slot]], kept[tf.newaxis])
        return row
