"""The gradient carriers of one kernel: their layout, their state, and how they move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from keras_bandmf import _distribution
from keras_bandmf.noise import normals
from keras_bandmf.rgp import algebra
from keras_bandmf.rgp.layouts import MatrixLayout

# The rows of the carriers' random stream for each step: more than twice a model's kernels.
_ROWS_PER_STEP = 2**20


class Carrier:
    """The carriers L (m, r) and R (r, n) of a kernel W, and its value W_0 when training started.

    They are `Coordinates` of the kernel's gradient: `of` gives (dL - L L' dL, dR) as one vector of
    r (m + n) numbers, and `reconstruct` turns such a vector, with noise or without, into a gradient
    of W. The kernel itself stays an ordinary variable.

    Formal guarantees:
        L and R have orthonormal columns and rows, to rounding, so `of` never lengthens a gradient.
        They depend on the weights after each noisy step, on the public W_0 and on a key of their
        own; never on a batch. With `fixed` they are those that were given, in the whole run.

    Args:
        layout: How the kernel is a matrix.
        path: The path of the kernel, for messages.
        dtype: "float32", or "float64" for a float64 kernel.
        rank: The rank r, at most the shorter side of the matrix.
        refresh_every: The number of steps between two refreshes.
        power_iterations: The number of power iterations of each refresh.
        warmup_steps: The number of steps, the start included, at which the history is W_t itself
            and not W_t - W_0.
        restart: Whether a refresh begins at new random carriers, or at the previous ones.
        fixed: None, or orthonormal carriers (L, R) that stay. There are no refreshes then.
    """

    def __init__(
        self,
        layout: MatrixLayout,
        path: str,
        dtype: Literal["float32", "float64"],
        rank: int,
        refresh_every: int = 1,
        power_iterations: int = 1,
        warmup_steps: int = 0,
        restart: bool = False,
        fixed: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        self.layout = layout
        self.rank = rank
        self.refresh_every = refresh_every
        self.power_iterations = power_iterations
        self.warmup_steps = warmup_steps
        self.restart = restart
        self.fixed = fixed
        self.path = path
        self.dtype = tf.as_dtype(dtype)
        self.shape: tuple[int, ...] = (rank * sum(layout.sides),)
        self._index = 0
        self._state: dict[str, tf.Variable] | None = None
        self._distribution: tf.distribute.Strategy = tf.distribute.get_strategy()
        self._first_replica = 0

    @property
    def description(self) -> list[Any]:
        """What must be equal for a checkpoint to fit, as JSON."""
        schedule: list[Any] = [self.refresh_every, self.power_iterations, self.warmup_steps]
        schedule += ["restart"] * self.restart + ["fixed"] * (self.fixed is not None)
        return [list(self.layout.rows), list(self.layout.columns), self.rank, schedule]

    def start(self, kernel: Any, key: np.ndarray, index: int) -> None:
        """Draws random carriers and remembers the kernel, in the scope of the distribution.

        With warm-up steps they are turned towards the weights as they are now, which are public.
        Fixed carriers are taken as they are.

        Args:
            kernel: The Keras variable.
            key: Shape (2,), uint64: the key of all carriers of the run.
            index: The number of this kernel among those of the run.

        Raises:
            ValueError: Under CentralStorageStrategy, whose replicas share one copy of all state.
        """
        self._distribution = tf.distribute.get_strategy()
        if isinstance(self._distribution, tf.distribute.experimental.CentralStorageStrategy):
            raise ValueError(
                "Expected a distribution that keeps a copy of the gradient carriers on every "
                "replica. Use MirroredStrategy. "
                "Received: CentralStorageStrategy, which keeps one copy of everything"
            )
        self._first_replica = _distribution.local_replicas(self._distribution)[0]
        self._index = index
        if self.fixed is None:
            values = self._moving(kernel, key)
        else:
            left, right = (tf.constant(each, self.dtype) for each in self.fixed)
            values = {"left": left, "right": right}
        self._state = {
            name: tf.Variable(value.numpy(), trainable=False, name=f"rgp_{name}")
            for name, value in values.items()
        }

    def _moving(self, kernel: Any, key: np.ndarray) -> dict[str, tf.Tensor]:
        """Returns the state that carriers which are refreshed begin with."""
        key = np.asarray(key, np.uint64).view(np.int64)
        weights = tf.cast(kernel.value, self.dtype)
        left, right = self._drawn(tf.constant(key), tf.constant(0, tf.int64))
        if self.warmup_steps:
            matrix = self.layout.matrix(weights)
            left, right = algebra.refined(matrix, left, right, self.power_iterations)
        values = {"start": weights, "left": left, "right": right}
        return values | ({"key": tf.constant(key)} if self.restart else {})

    def _drawn(self, key: tf.Tensor, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns random carriers for step `step`: those of no other step or kernel."""
        m, n = self.layout.sides
        chunks = -(-self.rank * max(m, n) // normals.CHUNK)
        first, drawn = step * _ROWS_PER_STEP + 2 * self._index, []
        for side, row in ((m, first), (n, first + 1)):
            pairs = normals.standard_normals(key, row, 0, chunks)
            values = tf.reshape(tf.stack(pairs, axis=-1), [chunks * normals.CHUNK])
            columns = tf.reshape(values[: side * self.rank], (side, self.rank))
            drawn.append(algebra.orthonormal(tf.cast(columns, self.dtype)))
        return drawn[0], tf.transpose(drawn[1])

    def pair(self, dtype: tf.DType | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns L and R as tensors of `dtype`.

        Raises:
            ValueError: Before `start`.
        """
        state = self._started()
        left, right = (tf.convert_to_tensor(state[name]) for name in ("left", "right"))
        return tf.cast(left, dtype or self.dtype), tf.cast(right, dtype or self.dtype)

    def _started(self) -> dict[str, tf.Variable]:
        """Returns the state.

        Raises:
            ValueError: If there is none before `start`.
        """
        if self._state is None:
            raise ValueError(
                f"The gradient carriers of {self.path} do not exist yet, because they belong to a "
                "training run. Build the optimizer first: "
                "`optimizer.build(model.trainable_variables)`."
            )
        return self._state

    def of(self, gradient: tf.Tensor) -> tf.Tensor:
        """Returns the coordinates of a gradient of the kernel, (r (m + n),)."""
        left, right = self.pair(gradient.dtype)
        return self.joined(*algebra.project(self.layout.matrix(gradient), left, right))

    def joined(self, left_gradient: tf.Tensor, right_gradient: tf.Tensor) -> tf.Tensor:
        """Returns (dL, dR) as one vector."""
        return tf.concat([tf.reshape(left_gradient, [-1]), tf.reshape(right_gradient, [-1])], 0)

    def reconstruct(self, coordinates: tf.Tensor) -> tf.Tensor:
        """Returns the gradient of the kernel, in its shape, from coordinates with noise."""
        m, n = self.layout.sides
        coordinates = tf.cast(coordinates, self.dtype)
        left_gradient = tf.reshape(coordinates[: m * self.rank], (m, self.rank))
        right_gradient = tf.reshape(coordinates[m * self.rank :], (self.rank, n))
        matrix = algebra.reconstruct(left_gradient, right_gradient, *self.pair())
        return self.layout.kernel(matrix)

    def refresh(self, kernel: Any, step: tf.Tensor, replica: int) -> None:
        """Turns the carriers towards the historical update, if they are due before step `step`.

        Each replica computes its own copy, from equal weights and equal carriers: nothing is sent.

        Args:
            kernel: The Keras variable, after the update.
            step: Scalar int64, the number of steps made so far.
            replica: The replica in whose context this is called.
        """
        if self.fixed is not None:
            return
        left, right = self.pair()
        if self.refresh_every > 1:
            due = tf.equal(step % self.refresh_every, 0)
            left, right = tf.cond(due, lambda: self._refreshed(kernel, step), lambda: (left, right))
        else:
            left, right = self._refreshed(kernel, step)
        for name, value in (("left", left), ("right", right)):
            self._copies(name)[replica - self._first_replica].assign(value)

    def _copies(self, name: str) -> list[tf.Variable]:
        """Returns the copies of this process, in the order of its replicas."""
        return list(self._distribution.experimental_local_results(self._started()[name]))

    def _refreshed(self, kernel: Any, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        weights = tf.cast(tf.convert_to_tensor(kernel.value), self.dtype)
        begun = tf.cast(step >= self.warmup_steps, self.dtype)
        history = weights - begun * tf.convert_to_tensor(self._started()["start"])
        begin = self.pair()
        if self.restart:
            begin = self._drawn(tf.convert_to_tensor(self._started()["key"]), step)
        return algebra.refined(self.layout.matrix(history), *begin, self.power_iterations)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns the state, to be saved with the run."""
        return {name: np.asarray(value.numpy()) for name, value in self._started().items()}

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes over what `to_arrays` returned.

        Raises:
            ValueError: If it is incomplete, of another rank or kernel, or damaged.
        """
        values = {}
        for name, variable in self._started().items():
            expected, dtype = tuple(variable.shape), variable.dtype
            value = np.asarray(arrays[name]) if name in arrays else np.zeros(0)
            good = value.shape == expected and value.dtype == dtype.as_numpy_dtype
            if not good or not np.isfinite(value).all():
                raise ValueError(
                    f"Expected the carriers of {self.path} in the checkpoint to be finite, with "
                    f"'{name}' of dtype {dtype.name} and shape {expected}. They are of another "
                    "rank or model, or the file is damaged. "
                    f"Received: dtype {value.dtype.name} and shape {value.shape}"
                )
            values[name] = value
        for name in ("left", "right"):
            basis = values[name].T if name == "left" else values[name]
            # Longer carriers would lengthen gradients past the clip norm.
            basis = np.asarray(basis, np.float64)
            if np.linalg.norm(basis @ basis.T - np.eye(self.rank), 2) > 3e-5:
                raise ValueError(
                    f"Expected the carriers of {self.path} in the checkpoint to be orthonormal. "
                    f"The file is damaged. Received: '{name}', which is not"
                )
        for name, value in values.items():
            for copy in self._copies(name):
                copy.assign(value)
