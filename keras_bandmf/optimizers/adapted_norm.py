"""The clip norm of adaptive clipping: which step has which, and how it is saved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_bandmf import _distribution
from keras_bandmf.clipping.modes import COUNT_SHARE, AdaptiveClipping, ClippingMode

#: The shape of the count of small gradients, as one more entry of a clipped sum.
COUNT_SHAPE = (1,)


def adapts(mode: ClippingMode) -> bool:
    """Returns whether a mode of clipping changes the clip norm."""
    return isinstance(mode, AdaptiveClipping)


class AdaptedNorm:
    """The clip norm of one run, of which every replica keeps its own copy.

    Formal guarantees:
        It changes in `update` by what the noisy count says, and otherwise only to the value that a
        checkpoint, or another worker, has from such updates. Gradients that were clipped at another
        norm than the step's are recognized by `is_of`.

    Args:
        mode: The clipping mode.
        l2_norm_clip: The clip norm that the run begins with.

    Raises:
        ValueError: In the scope of a distribution whose replicas share their variables.
    """

    def __init__(self, mode: AdaptiveClipping, l2_norm_clip: float):
        self._mode, self._first = mode, l2_norm_clip
        self._distribution = tf.distribute.get_strategy()
        if isinstance(self._distribution, tf.distribute.experimental.CentralStorageStrategy):
            raise ValueError(
                "Adaptive clipping needs a variable on each replica. Received: "
                "CentralStorageStrategy. Use MirroredStrategy, or another mode of clipping."
            )
        self._first_replica = _distribution.local_replicas(self._distribution)[0]
        with tf.init_scope(), self._distribution.scope():
            first = tf.constant(l2_norm_clip, tf.float32)
            self._norm = _distribution.own_variable(first, "clip_norm")

    def _copies(self) -> list[tf.Variable]:
        return list(self._distribution.experimental_local_results(self._norm))

    def read(self) -> tf.Tensor:
        """Returns the clip norm of the next step, on this replica in a replica context."""
        return self._own().read_value()

    def _own(self) -> tf.Variable:
        if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
            return self._copies()[0]
        return self._copies()[_distribution.replica_id() - self._first_replica]

    def is_of(self, current_norm: tf.Tensor) -> tf.Tensor:
        """Returns whether gradients were clipped at the norm of this step, a scalar bool.

        Args:
            current_norm: The norm that they were clipped at.
        """
        return tf.equal(current_norm, self.read())

    def scale(self) -> tf.Tensor:
        """Returns what a noisy sum is multiplied by: the clip norm over the first one."""
        return self.read() / self._first

    def update(self, noisy_count: tf.Tensor) -> None:
        """Moves the clip norm on after a step.

        Args:
            noisy_count: The noisy count of all replicas, divided by the batch size and multiplied
                by `scale`, of shape `COUNT_SHAPE`.
        """
        current = self.read()
        share = noisy_count[0] / (COUNT_SHARE * tf.cast(current, noisy_count.dtype))
        following = self._mode.next_norm(current, share, self._first)
        self._own().assign(following)

    @property
    def value(self) -> np.ndarray:
        """The clip norm of the next step, a float32 scalar, to be saved with the run."""
        return self._copies()[0].numpy()

    @value.setter
    def value(self, saved: np.ndarray) -> None:
        least = self._mode.least_norm(self._first)
        largest = self._mode.largest_norm(self._first)
        if not np.float32(least) <= saved <= np.float32(largest):
            raise ValueError(
                f"`clip_norm` in the checkpoint must be from {least:g} to {largest:g}. Received: "
                f"{saved!r}. The file is damaged."
            )
        for copy in self._copies():
            copy.assign(saved)

    def take_from_chief(self) -> None:
        """Gives all worker processes the clip norm of the first one.

        Their own differ at most by how their processors round. All of them must call it.
        """
        own = np.array([self.value], np.float64).view(np.int64)
        sent = _distribution.from_chief(self._distribution, own).view(np.float64)
        self.value = sent[0].astype(np.float32)


def with_adapted_norm(
    shapes: Sequence[Sequence[int]], mode: ClippingMode, l2_norm_clip: float
) -> tuple[list[Sequence[int]], AdaptedNorm | None]:
    """Returns the shapes of the entries of a clipped sum, and the clip norm if it is adapted.

    Args:
        shapes: The shapes of the gradients.
        mode: The clipping mode.
        l2_norm_clip: The clip norm that the run begins with.

    Raises:
        ValueError: See `AdaptedNorm`.
    """
    if not isinstance(mode, AdaptiveClipping):
        return list(shapes), None
    return [*shapes, COUNT_SHAPE], AdaptedNorm(mode, l2_norm_clip)
