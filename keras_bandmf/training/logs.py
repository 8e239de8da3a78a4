"""The logs of a private step: what Keras itself would log of the rows that are not padding."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import loss_of_training_step, loss_tracker
from keras_bandmf.clipping.attached import all_with_attached
from keras_bandmf.clipping.clipped import ClippedGradients
from keras_bandmf.clipping.losses import is_mean_of_rows, overrides_compute_loss
from keras_bandmf.training.regularizers import regularized_values


class StepLogs:
    """Updates the metrics of a model as Keras's own `train_step` does, on the rows of one step.

    Keras's own code computes losses and metrics, from the outputs that the step has anyway: the
    losses are those before clipping, of all outputs, in the sense of the user's `compute_loss`.
    A loss that is the mean of the losses of rows, which clipping has computed, is not computed
    again. Padding is taken out before, and a step without examples changes no metric.

    Formal guarantees:
        None for the logs: they are computed from the examples without noise. Of what Keras's code
        of the loss assigns, variables of metrics alone are changed: a running mean that a loss
        keeps, and would read at the next step, stays as it was. (`captures.Watch` refuses a loss
        that reads a metric, or that assigns to variables of TensorFlow.)

    Args:
        model: The model.
        x: The inputs of the step, as all data here a structure of tensors with padding.
        y: The targets, or None.
        sample_weight: The weights, or None.
        clipped: The clipped gradients of these rows.
    """

    def __init__(
        self,
        model: keras.Model,
        x: Any,
        y: Any,
        sample_weight: Any,
        clipped: ClippedGradients,
    ):
        self._model = model
        self._count = tf.reduce_sum(tf.cast(clipped.mask, tf.int32))

        def unpadded(structure: Any) -> Any:
            return keras.tree.map_structure(
                lambda part: None if part is None else tf.boolean_mask(part, clipped.mask),
                structure,
            )

        # Keras's own methods read no inputs, and no class may override `compute_metrics`. A
        # function set on this instance may.
        self._own_metrics = "compute_metrics" in vars(model)
        needed = self._own_metrics or overrides_compute_loss(model)
        self._x = unpadded(x) if needed else None
        self._y, self._sample_weight = unpadded(y), unpadded(sample_weight)
        # Without its mask and logits, an output has another loss.
        self._y_pred = all_with_attached(unpadded(clipped.outputs), unpadded(clipped.attached))
        self._losses = unpadded(clipped.losses)

    def note_losses(self) -> None:
        """Updates the metrics of the losses. Call it before the weights are updated."""
        model = self._model
        with keras.StatelessScope(regularized_values(model)) as scope:
            loss = self._loss()
            loss_tracker(model).update_state(loss, sample_weight=self._count)
        for variable in model.metrics_variables:
            value = scope.get_current_value(variable)
            if value is not None:
                variable.assign(tf.where(self._count > 0, value, variable.value))

    def _loss(self) -> tf.Tensor:
        """Returns the loss of the step with what weight regularizers add to it."""
        model = self._model
        if is_mean_of_rows(model, self._y_pred):
            count = tf.cast(tf.maximum(self._count, 1), self._losses.dtype)
            penalties = [tf.cast(penalty, count.dtype) for penalty in model.losses]
            return tf.add_n([tf.reduce_sum(self._losses) / count, *penalties])
        loss = loss_of_training_step(model, self._x, self._y, self._y_pred, self._sample_weight)
        # Keras divides it by the number of replicas, for the gradients.
        return loss * tf.distribute.get_strategy().num_replicas_in_sync

    def metrics(self) -> dict[str, Any]:
        """Updates the other metrics, and returns the values of all."""
        model = self._model
        variables = model.metrics_variables
        before = [tf.identity(variable.value) for variable in variables]
        logs = model.compute_metrics(self._x, self._y, self._y_pred, self._sample_weight)
        # The mean of nothing, in a function of the user's own, would be NaN for a whole epoch.
        for variable, value in zip(variables, before, strict=True):
            variable.assign(tf.where(self._count > 0, variable.value, value))
        return logs if self._own_metrics else model.get_metrics_result()
