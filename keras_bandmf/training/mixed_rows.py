"""Ends `fit` at the step in which a masked row was found to have an influence."""

from __future__ import annotations

import keras
import tensorflow as tf

from keras_bandmf._checks import PrivacyError


class MixedRows(keras.callbacks.Callback):
    """Remembers whether rows were mixed, and raises at the end of that very step.

    Formal guarantees: by then every update of the step is NaN (`apply_clipped`), on all replicas if
    on one: no number that depends on the examples has reached the weights. It sees
    what `clipping.clipped_gradients` calls `rows_mixed`, on the replicas of its own process.

    Args:
        strategy: the strategy of the model.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        super().__init__()
        self._strategy = strategy
        with strategy.scope():
            self._found = tf.Variable(
                0.0,
                trainable=False,
                # Each replica writes its own, and nothing is sent.
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
                name="rows_mixed",
            )

    def note(self, rows_mixed: tf.Tensor) -> None:
        """Adds the finding of a step, in a replica context."""
        self._found.assign_add(tf.cast(rows_mixed, tf.float32))

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Starts anew."""
        for found in self._strategy.experimental_local_results(self._found):
            found.assign(0.0)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Looks at the finding.

        Raises:
            ValueError: if rows were mixed.
        """
        found = self._strategy.experimental_local_results(self._found)
        if any(float(value) for value in found):
            raise PrivacyError(
                "The model mixes the rows of a batch: in this step a masked row, whose loss counts "
                "for nothing, had a gradient. Clipping by example bounds nothing then, and the "
                "update was made NaN: the weights are lost, and nothing was released. A layer or "
                "model that was declared row-wise (`clipping.declare_row_wise`, or by a clipping "
                "rule) is not: take the declaration back and it is trained one example at a time. "
                f"Received: model '{self.model.name}'"
            )
