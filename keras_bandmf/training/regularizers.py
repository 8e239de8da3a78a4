"""Weight regularizers: they depend on no example, and are added after the noise."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf


def regularization(variables: Sequence[keras.Variable]) -> list[tf.Tensor | None] | None:
    """Returns this replica's share of the gradients of all weight regularizers.

    Args:
        variables: The trainable variables.

    Returns:
        For each variable the share of its gradient, or None. In place of the list, None if no
        variable has a regularizer.
    """
    regularized = [variable for variable in variables if variable.regularizer is not None]
    if not regularized:
        return None
    with tf.GradientTape() as tape:
        penalty = tf.add_n(
            [tf.cast(variable.regularizer(variable), tf.float32) for variable in regularized]
        )
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    gradients = tape.gradient(penalty, [variable.value for variable in variables])
    return [None if g is None else g / replicas for g in gradients]


def regularized_values(model: keras.Model) -> list[tuple[keras.Variable, tf.Tensor]]:
    """Returns the weights with a regularizer, and their values, for a `keras.StatelessScope`.

    Within such a scope Keras takes the values that it regularizes from the scope alone.

    Args:
        model: A built model.
    """
    return [(v, v.value) for v in model.trainable_variables if v.regularizer is not None]
