"""Decides how many examples to work on at a time, from the tensors of a trial trace."""

from __future__ import annotations

from typing import Any

import keras

from keras_bandmf.clipping.factors import BLOCK_ROWS, Unsupported
from keras_bandmf.clipping.paths.liveness import Memory, memory_of
from keras_bandmf.clipping.paths.routing import TRIAL_ROWS, data_key, trial_graph

# The memory that one microbatch may take, in bytes.
_BUDGET = 2**30
# What a process takes for each byte that is alive: allocators keep some of what was freed, and
# kernels need scratch memory. Measured: 1.2 where tensors are large, 2.0 where there are many
# (`benchmarks/microbatches.py`).
TAKEN_FOR_ALIVE = 1.5
# Whole blocks, so that tensors with a row for each block grow with the rows, too.
_ROWS = TRIAL_ROWS * BLOCK_ROWS
_ATTRIBUTE = "_bandmf_memory"


def rows_at_a_time(
    model: keras.Model,
    x: Any,
    y: Any,
    sample_weight: Any,
    loss: Any,
    float64_sums: bool = False,
) -> int:
    """Returns the number for `microbatch_size="auto"`: as many examples as fit in 1 GiB.

    The memory is that of what is alive at the worst moment of the forward and backward pass, the
    norms and the clipped sums (`liveness.memory_of`), less what it would be without examples:
    parameters and their sums come on top. A process takes about `TAKEN_FOR_ALIVE` times that. It is
    computed and not measured, because the result depends on the number in its last bits: a run that
    is resumed, on this machine or another, must find the same one.

    Args:
        model: A built model.
        x: The inputs, tensors. Only dtypes and shapes matter, here and below.
        y: The targets, or None.
        sample_weight: The weights, or None.
        loss: See `clipped_gradients`.
        float64_sums: See `clipped_gradients`.

    Returns:
        At least 1. Models on the general path work on one example at a time anyway.

    Raises:
        ValueError: If a size other than the number of rows is not known.
    """
    try:
        memory = step_memory(model, x, y, sample_weight, loss, float64_sums)
    except Unsupported:
        return 1
    return memory.most_rows(int(_BUDGET / TAKEN_FOR_ALIVE))


def step_memory(
    model: keras.Model,
    x: Any,
    y: Any,
    sample_weight: Any,
    loss: Any,
    float64_sums: bool = False,
) -> Memory:
    """Returns the memory of a step as a function of the number of examples.

    The arguments are those of `rows_at_a_time`.

    Raises:
        ValueError: If a size other than the number of rows is not known.
        Unsupported: If the model takes the general path.
    """
    for leaf in keras.tree.flatten((x, y, sample_weight)):
        if leaf is not None and not leaf.shape[1:].is_fully_defined():
            raise ValueError(
                'Expected examples of one known shape for `microbatch_size="auto"`. Pad them to a '
                f"fixed length, or pass a number. Received: data of shape {tuple(leaf.shape)}"
            )
    key = (*data_key(model, x, y, sample_weight, loss), float64_sums)
    known = vars(model).get(_ATTRIBUTE)
    if known is None or known[0] != key:
        graph = trial_graph(model, x, y, sample_weight, loss, _ROWS, float64_sums)
        known = (key, memory_of(graph, _ROWS, TRIAL_ROWS))
        # Bypasses Keras's attribute tracking, as for the route.
        object.__setattr__(model, _ATTRIBUTE, known)
    return known[1]
