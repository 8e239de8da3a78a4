"""Weight regularisers: they depend on no example, and are added after the noise."""

from __future__ import annotations

import tensorflow as tf


def regularisation(variables: list) -> tuple[tf.Tensor, list[tf.Tensor | None] | None]:
    """Returns the penalty of the weight regularisers and this replica's part of its gradients."""
    regularised = [variable for variable in variables if variable.regularizer is not None]
    if not regularised:
        return tf.zeros([]), None
    with tf.GradientTape() as tape:
        penalty = tf.add_n(
            [tf.cast(variable.regularizer(variable), tf.float32) for variable in regularised]
        )
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    gradients = tape.gradient(penalty, [variable.value for variable in variables])
    return penalty, [None if g is None else g / replicas for g in gradients]
