"""Weight regularizers: they depend on no example, and are added after the noise."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf


def regularization(
    variables: Sequence[keras.Variable],
) -> tuple[tf.Tensor, list[tf.Tensor | None] | None]:
    """Returns the penalty of the weight regularizers, and this replica's share of its gradients.

    Args:
        variables: The trainable variables.

    Returns:
        The penalty, a float32 scalar; and for each variable the share of its gradient, or None. In
        place of the list, None if no variable has a regularizer.
    """
    regularized = [variable for variable in variables if variable.regularizer is not None]
    if not regularized:
        return tf.zeros([]), None
    with tf.GradientTape() as tape:
        penalty = tf.add_n(
            [tf.cast(variable.regularizer(variable), tf.float32) for variable in regularized]
        )
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    gradients = tape.gradient(penalty, [variable.value for variable in variables])
    return penalty, [None if g is None else g / replicas for g in gradients]
