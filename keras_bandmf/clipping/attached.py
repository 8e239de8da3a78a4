"""What Keras hangs on a tensor and reads in losses and metrics: its mask and its logits."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import (
    keras_logits,
    keras_mask,
    set_keras_logits,
    set_keras_mask,
)

# In a graph Keras looks for the operation that made an output, and takes its input for logits.
_ACTIVATIONS = {"Softmax": tf.nn.softmax, "Sigmoid": tf.sigmoid}


def attached_to(leaf: Any) -> dict[str, tf.Tensor]:
    """Returns what Keras knows of a tensor besides its values, to be carried where that is lost.

    Slices, results of loops and of functions are new tensors, with nothing on them.

    Args:
        leaf: A tensor, or None.

    Returns:
        Tensors with the same rows, perhaps none: `"mask"`, `"logits"`, and the input of the
        operation that made `leaf` under the type of that operation.
    """
    found = {"mask": keras_mask(leaf), "logits": keras_logits(leaf)}
    if found["logits"] is None and not tf.executing_eagerly():
        operation = getattr(leaf, "op", None)
        if operation is not None and operation.type in _ACTIVATIONS:
            found[operation.type] = operation.inputs[0]
    return {name: t for name, t in found.items() if t is not None}


def with_attached(leaf: tf.Tensor, attached: dict[str, tf.Tensor]) -> tf.Tensor:
    """Returns a tensor that is to losses and metrics of Keras what the first one was.

    Args:
        leaf: Rows of the first tensor.
        attached: The same rows of what `attached_to` returned for it.
    """
    for name, activation in _ACTIVATIONS.items():
        if name in attached:
            leaf = activation(attached[name])
    if "mask" in attached:
        set_keras_mask(leaf, attached["mask"])
    if "logits" in attached:
        set_keras_logits(leaf, attached["logits"])
    return leaf


def all_with_attached(outputs: Any, attached: list[dict[str, tf.Tensor]]) -> Any:
    """Returns `with_attached` of every leaf of a structure.

    Args:
        outputs: A structure of tensors.
        attached: An entry for each leaf of it, in their order.
    """
    leaves = keras.tree.flatten(outputs)
    restored = [with_attached(leaf, each) for leaf, each in zip(leaves, attached, strict=True)]
    return keras.tree.pack_sequence_as(outputs, restored)
