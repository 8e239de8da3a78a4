"""Decides how many examples to work on at a time, from the tensors of a trial trace."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_bandmf.clipping.factors import Unsupported
from keras_bandmf.clipping.paths.routing import TRIAL_ROWS, data_key, trial_graph

# The memory that the tensors of one microbatch may take together, in bytes.
_BUDGET = 2**30
# Operations whose outputs are their inputs, or are alive for the whole step anyway.
_NO_MEMORY = {"Identity", "Placeholder", "ReadVariableOp", "Reshape", "Squeeze", "ExpandDims"}
_OPAQUE = (tf.resource, tf.variant, tf.string)
_ATTRIBUTE = "_bandmf_example_bytes"


def rows_at_a_time(model: keras.Model, x: Any, y: Any, sample_weight: Any, loss: Any) -> int:
    """Returns the number for `microbatch_size="auto"`: as many examples as fit in 1 GiB.

    The memory of an example is taken to be the sum over all tensors of the forward and backward
    pass, the norms and the clipped sums that have a row for each example, as if none were freed
    before the end. That is more than what is alive at any one time, so 1 GiB is kept with room to
    spare; parameters, gradients and the data itself come on top.

    Args:
        model: A built model.
        x: The inputs, tensors. Only dtypes and shapes matter, here and below.
        y: The targets, or None.
        sample_weight: The weights, or None.
        loss: See `clipped_gradients`.

    Returns:
        At least 1. Models on the general path work on one example at a time anyway.

    Raises:
        ValueError: If a size other than the number of rows is not known.
    """
    for leaf in keras.tree.flatten((x, y, sample_weight)):
        if leaf is not None and not leaf.shape[1:].is_fully_defined():
            raise ValueError(
                'Expected examples of one known shape for `microbatch_size="auto"`. Pad them to a '
                f"fixed length, or pass a number. Received: data of shape {tuple(leaf.shape)}"
            )
    key = data_key(model, x, y, sample_weight, loss)
    known = vars(model).get(_ATTRIBUTE)
    if known is None or known[0] != key:
        try:
            size = _bytes_per_example(trial_graph(model, x, y, sample_weight, loss))
        except Unsupported:
            size = _BUDGET
        known = (key, size)
        # Bypasses Keras's attribute tracking, as for the route.
        object.__setattr__(model, _ATTRIBUTE, known)
    return max(1, _BUDGET // max(known[1], 1))


def _bytes_per_example(graph: tf.Graph) -> int:
    """Returns the bytes for one row of all tensors in a trial trace that grow with the rows."""
    total = 0
    for operation in graph.get_operations():
        if operation.type in _NO_MEMORY:
            continue
        for tensor in operation.outputs:
            dtype = tensor.dtype.base_dtype
            count = tensor.shape.num_elements()
            if count and count % TRIAL_ROWS == 0 and dtype not in _OPAQUE:
                total += count // TRIAL_ROWS * dtype.size
    return total
