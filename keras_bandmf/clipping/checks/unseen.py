"""Runs code of the user's model and loss on private rows as a graph: no value shows in Python.

A layer or loss that keeps a value of its first eager call would make it a constant of every later
graph, and of the released model. Code that is traced sees symbols instead of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import keras_mask, set_keras_mask
from keras_bandmf.clipping.checks.captures import Refused
from keras_bandmf.clipping.paths.book_keeping import forward
from keras_bandmf.clipping.shapes import on_tensors


def unseen(function: Callable[..., Any], *data: Any, known: bool = False) -> Any:
    """Traces `function` with symbols in place of rows, their number unknown where it can be.

    Args:
        function: A function of as many structures as `data` has, with rows on axis 0. It returns
            tensors and None in lists or tuples.
        *data: Structures of tensors, of which only shapes and dtypes are used.
        known: Whether to trace for the number of rows of `data` and no other.

    Returns:
        A callable of structures like `data`, the number of rows apart; its attribute `graph` is
        the graph.

    Raises:
        Exception: Whatever `function` raises when it is traced.

    Formal guarantees: `function` runs while it is traced and never again, on tensors without
        values, also where `tf.config.run_functions_eagerly` is on. So no Python code that it calls
        gets a value of a row, operations that call Python (`tf.py_function`) apart;
        `captures.Watch` refuses these.
    """
    leaves = _leaves(data)

    def flat(*tensors: tf.Tensor) -> Any:
        rows = iter(tensors)
        return function(*(on_tensors(lambda _: next(rows), part) for part in data))

    def traced(rows: int | None) -> Any:
        specs = [tf.TensorSpec([rows, *t.shape[1:]], t.dtype) for t in leaves]
        return tf.function(flat, autograph=False).get_concrete_function(*specs)

    rows = int(leaves[0].shape[0])
    try:
        concrete = traced(rows if known else None)
    except Refused:
        raise
    except Exception:  # a model may need the number of rows while it is traced
        concrete = traced(rows)
    return _Unseen(concrete)


class _Unseen:
    """A traced function, called with structures."""

    def __init__(self, concrete: Any):
        self._concrete = concrete
        self.graph = concrete.graph

    def __call__(self, *data: Any) -> Any:
        return self._concrete(*_leaves(data))


class UnseenForward:
    """The training forward pass on rows that the model's Python code does not get to see.

    Args:
        model: A built model.
        x: The inputs, tensors, of which only shapes and dtypes are used.
        known: See `unseen`.
    """

    def __init__(self, model: keras.Model, x: Any, known: bool = False):
        self._structure: Any = None

        def run(x: Any) -> tuple[list, list]:
            outputs = forward(model, x)
            self._structure = keras.tree.map_structure(lambda _: 0, outputs)
            leaves = keras.tree.flatten(outputs)
            return leaves, [keras_mask(t) for t in leaves]

        self._run = unseen(run, x, known=known)

    def __call__(self, x: Any) -> Any:
        """Returns the outputs of the model, with their Keras masks."""
        outputs, masks = self._run(x)
        for output, mask in zip(outputs, masks, strict=True):
            if mask is not None:
                set_keras_mask(output, mask)
        return keras.tree.pack_sequence_as(self._structure, outputs)


def _leaves(data: Any) -> list[tf.Tensor]:
    return [t for t in keras.tree.flatten(data) if t is not None]
