"""The callback that ends `fit` when a masked row had an influence."""

from __future__ import annotations

import keras
import tensorflow as tf

from keras_bandmf._checks import PrivacyError


class MixedRows(keras.callbacks.Callback):
    """Remembers whether rows were mixed, and raises at the end of that very step.

    Formal guarantees:
        By then every update of the step is NaN (`apply_clipped`), on all replicas if on one: no
        number that depends on the examples has reached the weights. It sees what
        `clipping.clipped_gradients` calls `rows_mixed`, on the replicas of its own process.

    Args:
        distribution: The distribution of the model.
    """

    def __init__(self, distribution: tf.distribute.Strategy):
        super().__init__()
        self._distribution = distribution
        with distribution.scope():
            self._found = tf.Variable(
                0.0,
                trainable=False,
                # Each replica writes its own copy, and nothing is sent.
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
                name="rows_mixed",
            )

    def note(self, rows_mixed: tf.Tensor) -> None:
        """Records the finding of a step. Call it in a replica context."""
        self._found.assign_add(tf.cast(rows_mixed, tf.float32))

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Forgets the findings of earlier runs."""
        for found in self._distribution.experimental_local_results(self._found):
            found.assign(0.0)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Checks the findings of the step.

        Raises:
            PrivacyError: If rows were mixed.
        """
        found = self._distribution.experimental_local_results(self._found)
        if any(float(value) for value in found):
            raise PrivacyError(
                "The model mixes the rows of a batch: in this step a masked row, whose loss does "
                "not count, had a gradient. Clipping each example then bounds nothing, so the "
                "update was made NaN: the weights are lost, and nothing was released. A layer or "
                "model that was declared row-wise (by `clipping.declare_row_wise` or a clipping "
                "rule) is not. Remove the declaration, and it is trained one example at a time. "
                f"Received: model '{self.model.name}'"
            )
