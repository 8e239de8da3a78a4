"""What the attacker of a run has: its released gradients, and how they are set against canaries."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._checks import PrivacyError
from keras_bandmf.clipping import clipped_gradients
from keras_bandmf.optimizers.bandmf import BandMFOptimizer
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.secret_group import banded_columns
from keras_bandmf.strategies import BandedInverseStrategy
from keras_bandmf.training.regularizers import regularization

#: The canaries of a step whose median and width say something.
_ENOUGH = 8


@dataclasses.dataclass(frozen=True)
class Releases:
    """The noisy sums of all steps, and the weights at which they were taken.

    Attributes:
        sums: (num_steps, size): row t is the clipped sum of step t with its correlated noise, all
            variables after each other.
        weights: (num_steps, size): the trainable variables before step t.
        clip_norms: (num_steps,): the clip norm of step t. That of adaptive clipping changes; the
            noisy count that it follows is not kept.
    """

    sums: np.ndarray
    weights: np.ndarray
    clip_norms: np.ndarray


class _Recorder(keras.callbacks.Callback):
    """Keeps what the inner optimizer is given in each step, and the weights before it."""

    def __init__(self, model: keras.Model, plan: TrainingPlan, folder: pathlib.Path):
        super().__init__()
        self._variables = list(model.trainable_variables)
        # Variables, because a step runs in a graph.
        self._given = [tf.Variable(tf.zeros(v.shape)) for v in self._variables]
        size = sum(int(np.prod(v.shape)) for v in self._variables)
        shape = (plan.num_steps, size)
        # On disk: there is a row for each step, as large as the model.
        self._sums, self._weights = (
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)
            for name in ("sums", "weights")
        )
        self._batch_size = plan.schedule.expected_batch_size
        self._optimizer = model.optimizer
        self._clip_norms = np.full(plan.num_steps, model.optimizer.l2_norm_clip, np.float32)
        self._penalties: list[tf.Tensor | None] = []
        self.steps = 0

    def keep(self, gradients: list[tf.Tensor]) -> None:
        """Keeps the gradients of a step; runs inside of the train function."""
        for variable, gradient in zip(self._given, gradients, strict=True):
            variable.assign(tf.cast(gradient, variable.dtype))

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._weights[self.steps] = _flat(self._variables)
        current = self._optimizer.current_norm()
        if current is not None:
            self._clip_norms[self.steps] = current.numpy()
        self._penalties = regularization(self._variables) or []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        given = [v.numpy() for v in self._given]
        for index, penalty in enumerate(self._penalties):
            if penalty is not None:  # it depends on the weights alone
                given[index] = given[index] - penalty.numpy()
        # Adaptive clipping multiplies a noisy sum by the clip norm over the first one.
        scale = self._optimizer.l2_norm_clip / self._clip_norms[self.steps]
        self._sums[self.steps] = self._batch_size * scale * _flat(given)
        self.steps += 1

    def releases(self) -> Releases:
        """Returns what was kept."""
        return Releases(self._sums, self._weights, self._clip_norms)


def _flat(tensors: Any) -> np.ndarray:
    return np.concatenate([np.reshape(keras.ops.convert_to_numpy(t), -1) for t in tensors])


@contextlib.contextmanager
def recording(model: keras.Model, plan: TrainingPlan) -> Iterator[_Recorder]:
    """Records what the inner optimizer of a model is given: exactly what a step releases.

    Args:
        model: A private model, built and compiled, that was not trained yet.
        plan: The plan of its run.

    Yields:
        A callback for `fit`. What it recorded is gone at the end of the context.

    Raises:
        PrivacyError: If more or less than one step may lie between two calls of the callback.
    """
    optimizer: BandMFOptimizer = model.optimizer
    replicas = model.distribute_strategy.num_replicas_in_sync
    if replicas > 1 or model.steps_per_execution > 1:
        raise PrivacyError(
            "Expected a model on one device whose `steps_per_execution` is 1, because the released "
            f"gradient of every step is recorded. Received: {replicas} replicas, "
            f"steps_per_execution={model.steps_per_execution}. Audit the run on one device."
        )
    inner = optimizer.inner_optimizer
    apply = inner.apply
    with tempfile.TemporaryDirectory() as folder:
        recorder = _Recorder(model, plan, pathlib.Path(folder))

        def recorded(gradients: list[tf.Tensor], variables: Any = None) -> None:
            recorder.keep(gradients)
            apply(gradients, variables)

        inner.apply = recorded  # on this instance alone, as `privatize` does with a model
        try:
            yield recorder
        finally:
            del inner.apply


def filtered(sums: np.ndarray, plan: TrainingPlan) -> Iterator[tuple[np.ndarray, float]]:
    """Yields, step by step, the released sums as a contribution at that step is best seen in.

    With G the clipped sums and Z independent noise, the releases are `R = G + C^-1 Z`, hence
    `C R = C G + Z`. A contribution g at step j shifts that by `c_j g`, with `c_j` column j of C,
    and its matched filter is `V_j = c_j^T C R`. Without other contributions
    `<g, V_j>` has the mean `|c_j|^2 |g|^2` and the variance `|c_j|^2 |g|^2 stddev^2`.

    Args:
        sums: R, (num_steps, size).
        plan: The plan of the run.

    Yields:
        `V_j`, float64, and `|c_j|^2`.
    """
    columns = _columns(plan)
    steps, bands = columns.shape
    independent: dict[int, np.ndarray] = {}
    for j in range(steps):
        last = min(j + bands, steps)
        for i in range(max(independent, default=-1) + 1, last):
            first = max(0, i - bands + 1)
            taps = np.array([columns[k, i - k] for k in range(first, i + 1)])
            independent[i] = taps @ np.asarray(sums[first : i + 1], np.float64)
        column = columns[j, : last - j]
        yield column @ np.stack([independent[i] for i in range(j, last)]), float(column @ column)
        del independent[j]


def _columns(plan: TrainingPlan) -> np.ndarray:
    """Returns (num_steps, bands of C): row j is column j of C from its diagonal down."""
    strategy = plan.strategy
    if isinstance(strategy, BandedInverseStrategy):  # its C has no bands
        matrix = strategy.materialize()
        return np.stack([np.pad(matrix[j:, j], (0, j)) for j in range(plan.num_steps)])
    return banded_columns(strategy)  # a dense matrix would limit the number of steps


class Attacker:
    """The gradients that an attacker can compute, who knows the data but not who took part.

    Args:
        model: The model of the run; its weights are overwritten.
        plan: The plan of the run.
        releases: What the run released.
        x: The inputs of all rows.
        y: The targets of all rows.
    """

    def __init__(self, model: keras.Model, plan: TrainingPlan, releases: Releases, x: Any, y: Any):
        self._model, self._plan, self._releases = model, plan, releases
        self._variables = list(model.trainable_variables)
        self._data = keras.tree.map_structure(tf.convert_to_tensor, (x, y))
        self._stddev = plan.noise_stddev(model.optimizer.l2_norm_clip)
        # A variable, because a step is computed in a graph.
        self._clip_norm = tf.Variable(model.optimizer.l2_norm_clip, dtype=tf.float32)
        sizes = [int(np.prod(v.shape)) for v in self._variables]
        self._splits = np.cumsum(sizes)[:-1]
        numbers = tf.TensorSpec([None], tf.int64)
        shapes = [tf.TensorSpec(v.shape, tf.float32) for v in self._variables]
        self._sum = tf.function(self._sum_of, input_signature=[numbers], autograph=False)
        self._products = tf.function(
            self._products_with, input_signature=[numbers, *shapes], autograph=False
        )

    def without(self, step: int, rows: np.ndarray) -> np.ndarray:
        """Returns what a step released, minus the clipped gradients of rows that took part.

        Args:
            step: The step.
            rows: (k,) int64, the rows.

        Returns:
            (size,) float64.
        """
        self._go_to(step)
        known = _flat(self._sum(rows)) if len(rows) else 0.0
        return np.asarray(self._releases.sums[step], np.float64) - known

    def evidence(self, sums: np.ndarray, rows: np.ndarray, possible: np.ndarray) -> np.ndarray:
        """Returns the log of the likelihood ratio of each participation of each canary.

        Other contributions shift and widen the inner products. Their median over the canaries of a
        step is subtracted, and where they are wider than the noise their width is divided out.

        Args:
            sums: (num_steps, size), what was released, as far as the attacker cannot explain it.
            rows: (canaries,) int64, the rows of the canaries.
            possible: (num_steps, canaries) bool: where a participation is to be looked for.

        Returns:
            (num_steps, canaries) float64, zero where not `possible`.
        """
        found = np.zeros(possible.shape)
        for step, (direction, energy) in enumerate(filtered(sums, self._plan)):
            (chosen,) = np.nonzero(possible[step])
            if len(chosen) == 0:
                continue
            self._go_to(step)
            parts = self._unflat(direction)
            products, squared = self._products(rows[chosen], *parts)
            found[step, chosen] = _log_ratios(
                products.numpy().astype(np.float64),
                squared.numpy().astype(np.float64) * energy,
                self._stddev,
            )
        return found

    def _unflat(self, flat: np.ndarray) -> list[np.ndarray]:
        parts = np.split(np.asarray(flat, np.float32), self._splits)
        return [p.reshape(v.shape) for p, v in zip(parts, self._variables, strict=True)]

    def _go_to(self, step: int) -> None:
        """Gives the model the weights at which the gradients of a step were taken."""
        parts = self._unflat(self._releases.weights[step])
        for variable, value in zip(self._variables, parts, strict=True):
            variable.assign(value)
        self._clip_norm.assign(self._releases.clip_norms[step])

    def _sum_of(self, numbers: tf.Tensor) -> list[tf.Tensor]:
        data = keras.tree.map_structure(lambda t: tf.gather(t, numbers), self._data)
        optimizer = self._model.optimizer
        adapted = optimizer.current_norm() is not None
        return clipped_gradients(
            self._model,
            *data,
            l2_norm_clip=optimizer.l2_norm_clip,
            clipping=optimizer.clipping,
            current_norm=self._clip_norm.read_value() if adapted else None,
        ).sums

    def _products_with(
        self, numbers: tf.Tensor, *direction: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the inner product of each row's clipped gradient, and its squared norm."""

        def one(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            sums = [tf.cast(total, tf.float32) for total in self._sum_of(number[None])]
            pairs = zip(sums, direction, strict=True)
            product = tf.add_n([tf.reduce_sum(g * d) for g, d in pairs])
            return product, tf.add_n([tf.reduce_sum(tf.square(g)) for g in sums])

        signature = (tf.TensorSpec([], tf.float32), tf.TensorSpec([], tf.float32))
        return tf.map_fn(one, numbers, fn_output_signature=signature, parallel_iterations=1)


def _log_ratios(product: np.ndarray, squared: np.ndarray, stddev: float) -> np.ndarray:
    """Returns the log of the likelihood ratios of a shift by `squared` in each product."""
    size = np.sqrt(squared)
    seen = size > 0
    z = np.zeros_like(product)
    z[seen] = product[seen] / (size[seen] * stddev)
    width = 1.0
    if np.sum(seen) >= _ENOUGH:
        z[seen] -= np.median(z[seen])
        width = max(1.0, float(1.4826 * np.median(np.abs(z[seen]))))
    shift = size / (stddev * width)
    return np.where(seen, shift * z / width - shift**2 / 2, 0.0)
