"""The errors of any banded strategy, and their gradient, as a compiled TensorFlow graph.

The same covariances of blocks as in `banded.py`, in O(n b^2), with the gradient from automatic
differentiation. The graph runs on whatever device TensorFlow places it on; on processors the
NumPy code of `banded.py` is faster, which is the default of the search.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from keras_bandmf._environment import refuse_loose_arithmetic
from keras_bandmf.strategies.errors.banded import WorkloadBlocks, block_size, maps_of


class GraphErrors:
    """The squared row norms of `A C^-1` as a function of C, as `banded.BandedErrors`.

    Args:
      num_steps: n.
      num_bands: b, at most n.
      workload: A in blocks of `block_size(b)` steps, at least n steps in all.
    """

    def __init__(self, num_steps: int, num_bands: int, workload: WorkloadBlocks):
        refuse_loose_arithmetic()
        self._num_steps, self._memory = num_steps, num_bands - 1
        self._block = m = block_size(num_bands)
        self._blocks = -(-num_steps // m)
        self._outputs = workload.outputs
        self._maps = tf.constant(maps_of(workload, self._memory))
        self._keep = tf.constant(workload.keep)
        self._read_state = tf.constant(workload.read_state)
        # Columns of the identity after the last step, on which nothing depends.
        tail = np.zeros((self._blocks * m - num_steps, num_bands))
        tail[:, 0] = 1.0
        self._tail = tf.constant(tail)
        self._places, self._in_band = _places(m, self._memory)
        self._columns = tf.zeros([num_steps, num_bands], tf.float64)
        self._value = tf.function(self._errors, autograph=False)
        self._pull = tf.function(self._pulled, autograph=False)

    def evaluate(self, columns: np.ndarray) -> np.ndarray:
        """Returns the errors, and keeps the columns for `gradient`.

        Args:
          columns: `(n, b)` float64. Row j is column j of C from its diagonal down. The diagonal is
            not zero. Entries that would lie below row n - 1 of C have no effect.

        Returns:
          `(n,)` float64, not finite where C^-1 overflows.
        """
        self._columns = tf.constant(columns, tf.float64)
        return self._value(self._columns).numpy()

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        """Returns the gradient of `weights @ errors` with respect to the columns last evaluated.

        Args:
          weights: `(n,)` float64.

        Returns:
          `(n, b)` float64.
        """
        return self._pull(self._columns, tf.constant(weights, tf.float64)).numpy()

    def _pulled(self, columns: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(columns)
            total = tf.tensordot(weights, self._errors(columns), 1)
        return tape.gradient(total, columns)

    def _errors(self, columns: tf.Tensor) -> tf.Tensor:
        solved = self._solved(columns)
        mapped = tf.matmul(self._maps, solved)
        p, m = self._memory, self._block
        s = p + self._keep.shape[1]
        # The columns of the state of the workload do not depend on C.
        middle = tf.concat([tf.zeros([len(self._keep), p, s - p], tf.float64), self._keep], axis=1)
        middle = tf.concat([middle, self._read_state], axis=1)
        middle = tf.broadcast_to(middle, [self._blocks, s + m * self._outputs, s - p])
        states = tf.concat([mapped[:, :, :p], middle], axis=2)
        fresh = mapped[:, :, p:]
        step, outputs = states[:, :s], states[:, s:]
        drive, white = fresh[:, :s], fresh[:, s:]
        before = self._covariances(step, tf.matmul(drive, drive, transpose_b=True))
        errors = tf.reduce_sum(tf.matmul(outputs, before) * outputs, axis=2)
        errors += tf.reduce_sum(tf.square(white), axis=2)
        by_step = tf.reduce_sum(tf.reshape(errors, [-1, self._outputs]), axis=1)
        return by_step[: self._num_steps]

    def _solved(self, columns: tf.Tensor) -> tf.Tensor:
        """The noise rows of each block, `L^-1 (-U, I)`, from the p rows before it and its noises.

        Shape (blocks, m, p + m).
        """
        p, m = self._memory, self._block
        head = tf.zeros([p, columns.shape[1]], tf.float64)
        padded = tf.concat([head, columns, self._tail], axis=0)
        shape = [self._blocks, m, columns.shape[1]]
        here = tf.reshape(padded[: self._blocks * m], shape)
        ahead = tf.reshape(padded[p:], shape)
        # The p + m columns that the rows of a block reach.
        flat = tf.reshape(tf.concat([here, ahead[:, m - p :]], axis=1), [self._blocks, -1])
        rows = tf.where(self._in_band, tf.gather(flat, self._places, axis=1), 0.0)
        own = tf.eye(m, batch_shape=[self._blocks], dtype=tf.float64)
        return tf.linalg.triangular_solve(rows[:, :, p:], tf.concat([-rows[:, :, :p], own], axis=2))

    def _covariances(self, step: tf.Tensor, add: tf.Tensor) -> tf.Tensor:
        """The covariance of the state before each block, (blocks, s, s)."""
        states = step.shape[1]

        def after(covariance: tf.Tensor, block: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
            matrix, more = block
            return tf.matmul(matrix, tf.matmul(covariance, matrix, transpose_b=True)) + more

        start = tf.zeros([states, states], tf.float64)
        if self._blocks == 1:
            return start[None]
        later = tf.scan(after, (step[:-1], add[:-1]), start)
        return tf.concat([start[None], later], axis=0)


def _places(block: int, memory: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of C in a block stand in its window of columns, and which entries are bands.

    Args:
      block: m.
      memory: p = b - 1.

    Returns:
      (m, p + m) indices into the flat window of p + m columns of b entries; and whether the entry
      is within the bands.
    """
    row, column = np.arange(block)[:, None] + memory, np.arange(memory + block)
    lag = row - column
    in_band = (lag >= 0) & (lag <= memory)
    return column * (memory + 1) + np.where(in_band, lag, 0), in_band
