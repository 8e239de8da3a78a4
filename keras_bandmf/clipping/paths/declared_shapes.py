"""Checks in each trace that the tensors of a functional model have the shapes that it declared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_bandmf._keras_internals import (
    RUN_GRAPH,
    FunctionalModel,
    all_layers,
    nodes_by_depth,
)
from keras_bandmf.clipping.factors import Unsupported
from keras_bandmf.clipping.rowwise.decision import graph_of
from keras_bandmf.clipping.rowwise.known_layers import holds_no_row


@contextlib.contextmanager
def checked_shapes(model: keras.Model, rows: int | None = None) -> Iterator[None]:
    """Compares what each layer and operation returns with what the model declares that it returns.

    `rowwise` reads axes off the shapes that Keras declared when the model was made. Where a layer
    returns another number of axes than it declared, axis 1 of the declared tensor may be the rows.

    Args:
        model: A built model. The functional models in it are checked too.
        rows: The number of rows if no other axis has that size, else None.

    Raises:
        Unsupported: From a call of the model inside, if a tensor has another shape.

    Formal guarantees: of a call that returns, that every tensor between the layers and operations
    of the functional models that ran has the declared number of axes; the declared size, or one
    that is not known yet, along each axis from 1 on; and on axis 0, where sizes are known, that of
    the model's inputs, or the declared one of tensors that hold no row. With `rows`, besides, that
    axis 0 has this size, that no other axis has it unless it was declared, and that no size is
    unknown which the inputs and the model have made known.
    """
    graphs = {id(g): g for part in all_layers(model) if (g := graph_of(part)) is not None}
    before = {key: vars(graph).get(RUN_GRAPH) for key, graph in graphs.items()}
    try:
        for graph in graphs.values():
            # On this instance only, bypassing Keras's attribute tracking.
            vars(graph)[RUN_GRAPH] = _checking(graph, getattr(graph, RUN_GRAPH), rows)
        yield
    finally:
        for key, graph in graphs.items():
            if before[key] is None:
                vars(graph).pop(RUN_GRAPH, None)
            else:
                vars(graph)[RUN_GRAPH] = before[key]


def _checking(graph: FunctionalModel, run: Callable, rows: int | None) -> Callable:
    def checked(inputs: Any, operation_fn: Any = lambda op: op, call_fn: Any = None) -> Any:
        if call_fn is not None:  # symbolic: nothing is computed
            return run(inputs, operation_fn=operation_fn, call_fn=call_fn)
        given = [t for t in keras.tree.flatten(inputs) if t is not None]
        strict = rows is not None and all(None not in tuple(t.shape) for t in given)
        for tensor, declared in zip(keras.tree.flatten(inputs), graph.inputs, strict=True):
            if tensor is not None:
                _refuse(graph.name, tensor, declared, rows, given, strict)
        waiting = iter(_in_order(graph))

        def look(operation: Any) -> Callable:
            node = next(waiting, None)
            if node is None or node.operation is not operation:
                raise Unsupported(f"{graph.name}: its layers run in another order than its graph's")
            call = operation_fn(operation)

            def called(*args: Any, **kwargs: Any) -> Any:
                outputs = call(*args, **kwargs)
                found = keras.tree.flatten(outputs)
                if len(found) != len(node.outputs):
                    raise Unsupported(
                        f"{operation.name}: returns {len(found)} tensors, not those "
                        f"{len(node.outputs)} that it declared"
                    )
                for tensor, declared in zip(found, node.outputs, strict=True):
                    _refuse(operation.name, tensor, declared, rows, given, strict)
                return outputs

            return called

        outputs = run(inputs, operation_fn=look)
        if next(waiting, None) is not None:
            raise Unsupported(f"{graph.name}: not all layers of its graph run")
        return outputs

    return checked


def _in_order(graph: FunctionalModel) -> list[Any]:
    """Returns the calls of the graph, in the order in which Keras runs them."""
    return [
        node
        for depth in sorted(nodes_by_depth(graph), reverse=True)
        for node in nodes_by_depth(graph)[depth]
        if node.operation and not node.is_input
    ]


def _refuse(
    name: str, tensor: Any, declared: Any, rows: int | None, inputs: list[Any], strict: bool
) -> None:
    shape = getattr(tensor, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None:
        raise Unsupported(f"{name}: the number of axes of what it returns is not known")
    shape, promised = tuple(shape), tuple(declared.shape)
    fits = len(shape) == len(promised)
    for axis, (size, expected) in enumerate(zip(shape, promised, strict=False)):
        if axis == 0 and holds_no_row(declared):
            fits = fits and size == expected
        elif axis == 0:
            known = inputs[0].shape[0] if rows is None else rows
            fits = fits and (size == known or (rows is None and None in (size, known)))
        elif expected is None:
            fits = fits and (size is None or size != rows)
        else:
            fits = fits and (size == expected or (size is None and not strict))
    if not fits:
        raise Unsupported(
            f"{name}: its tensor of shape {shape} is not of the declared shape {promised}, so that "
            "the rows may be on another axis than axis 0"
        )
