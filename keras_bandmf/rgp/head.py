"""The head of a model: the layers that make its outputs, which stay without carriers."""

from __future__ import annotations

import keras

from keras_bandmf.rgp.layouts import carried_kernel


def head_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers with a kernel that are last on the way to an output.

    Args:
        model: built. One that is not functional says nothing about the way: its last layer with a
            kernel is taken for the head.
    """
    model = getattr(model, "_functional", None) or model
    if isinstance(model, keras.Model) and hasattr(model, "operations"):
        found: list[keras.layers.Layer] = []
        seen: set[int] = set()
        waiting = list(keras.tree.flatten(model.outputs))
        while waiting:
            operation, node, _ = waiting.pop()._keras_history
            if id(operation) in seen:
                continue
            seen.add(id(operation))
            inner = _last_kernel(operation)
            if inner:
                found += inner
            elif operation._inbound_nodes:
                waiting += operation._inbound_nodes[node].input_tensors
        return found
    return _last_kernel(model)


def _last_kernel(operation: object) -> list[keras.layers.Layer]:
    if not isinstance(operation, keras.layers.Layer):
        return []
    parts = operation._flatten_layers()
    kernels = [layer for layer in parts if not isinstance(carried_kernel(layer), str)]
    return kernels[-1:]
