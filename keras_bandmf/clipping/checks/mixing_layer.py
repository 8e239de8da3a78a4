"""Finds the layer that mixes examples: the first whose output differs where its input does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import all_layers
from keras_bandmf.clipping.checks.snapshot import Snapshot
from keras_bandmf.clipping.checks.unseen import unseen
from keras_bandmf.clipping.paths.book_keeping import forward
from keras_bandmf.clipping.rules.base import called_method

SameRow = Callable[[tf.Tensor, tf.Tensor, int], bool]

_NORMALIZE = "Use GroupNormalization or LayerNormalization instead."
_KEEP_AXIS = "Keep the example on axis 0 throughout; do not fold, transpose or reduce it."
_PER_EXAMPLE = "Compute it from one example only, or move it out of the model (`preprocess=`)."


class _Call(NamedTuple):
    operation: Any
    inputs: list[tf.Tensor]
    outputs: list[tf.Tensor]


def first_mixing_layer(
    model: keras.Model, x: Any, changed: Any, i: int, snapshot: Snapshot, same_row: SameRow
) -> tuple[str, str]:
    """Returns the first layer whose output of row i changes though its input of row i does not.

    Args:
        model: The model.
        x: Some rows.
        changed: The same rows with all but row i replaced.
        i: The row.
        snapshot: A snapshot that is restored before each run, so that both draw the same masks.
        same_row: Whether row i of two tensors agrees.

    Returns:
        (what mixes, what to use instead), both for an error message.
    """
    rows = int(keras.tree.flatten(x)[0].shape[0])
    operations: list[Any] = []

    def run(x: Any) -> list[tuple[list, list]]:
        calls: list[_Call] = []
        with _recorded(model, calls):
            forward(model, x)
        operations[:] = [call.operation for call in calls]
        return [(call.inputs, call.outputs) for call in calls]

    run = unseen(run, x)
    runs = []
    for data in (x, changed):
        snapshot.restore()
        runs.append([_Call(o, *t) for o, t in zip(operations, run(data), strict=True)])

    folded = None
    for one, other in zip(*runs, strict=True):
        if _row_axis(one.inputs, rows) and not _row_axis(one.outputs, rows) and folded is None:
            folded = one.operation
        if _agree(one.outputs, other.outputs, i, rows, same_row):
            continue
        operation = one.operation
        if folded is not None:
            return _name(folded), _KEEP_AXIS
        if not _agree(one.inputs, other.inputs, i, rows, same_row):
            return f"code before {_name(operation)}", _PER_EXAMPLE
        return _name(operation), _instead(operation)
    return f"the model '{model.name}'", _KEEP_AXIS if folded is not None else _PER_EXAMPLE


@contextlib.contextmanager
def _recorded(model: keras.Model, calls: list[_Call]) -> Iterator[None]:
    """Records every call of every layer, and of the operations of functional models."""
    operations = {id(layer): layer for layer in all_layers(model, include_self=False)}
    for part in [model, *operations.values()]:
        for operation in getattr(part, "operations", []):
            operations.setdefault(id(operation), operation)
    replaced = [
        (op, method)
        for op in operations.values()
        if (method := called_method(op)) not in vars(op)  # an operation has only `call`
    ]
    try:
        for operation, method in replaced:
            vars(operation)[method] = _recording(operation, getattr(operation, method), calls)
        yield
    finally:
        for operation, method in replaced:
            vars(operation).pop(method, None)


def _recording(operation: Any, original: Callable, calls: list[_Call]) -> Callable:
    outer = tf.compat.v1.get_default_graph()

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        # What is computed in the body of a loop cannot be returned.
        if tf.compat.v1.get_default_graph() is outer:
            calls.append(_Call(operation, _tensors((args, kwargs)), _tensors(outputs)))
        return outputs

    return call


def _tensors(structure: Any) -> list[tf.Tensor]:
    return [t for t in keras.tree.flatten(structure) if isinstance(t, tf.Tensor)]


def _row_axis(tensors: list[tf.Tensor], rows: int) -> bool:
    return bool(tensors) and all(t.shape.rank and t.shape[0] == rows for t in tensors)


def _agree(a: list[tf.Tensor], b: list[tf.Tensor], i: int, rows: int, same_row: SameRow) -> bool:
    pairs = list(zip(a, b, strict=False))
    if any(s.dtype != t.dtype or s.shape != t.shape for s, t in pairs):
        return False
    pairs = [(s, t) for s, t in pairs if s.shape.rank and s.shape[0] == rows]
    return all(same_row(s, t, i) for s, t in pairs if s.dtype != tf.string)


def _name(operation: Any) -> str:
    path = getattr(operation, "path", None) or operation.name
    return f"layer '{path}' of type {type(operation).__name__}"


def _instead(operation: Any) -> str:
    name = type(operation).__name__
    if "Norm" in name:
        return _NORMALIZE
    if name in ("Reshape", "Transpose", "Permute", "Moveaxis", "Swapaxes"):
        return _KEEP_AXIS
    return _PER_EXAMPLE
