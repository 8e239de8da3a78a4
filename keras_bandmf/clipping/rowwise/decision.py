"""Decides from layers and operations whether a model treats rows independently by construction."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import keras

from keras_bandmf._keras_internals import (
    METHODS_BEFORE_THE_GRAPH,
    FunctionalModel,
    graph_inside,
    inner_layers,
    nodes_by_depth,
)
from keras_bandmf.clipping.rowwise.known_layers import (
    ARGUMENTS_WITHOUT_ROWS,
    MASK_AXES,
    REFUSED_ARGUMENTS,
    activation_reason,
    array_reason,
    condition_of,
    function_reason,
    holds_no_row,
    inner_rank,
    is_the_one,
    quantized_reason,
    replaced_reason,
)
from keras_bandmf.clipping.rowwise.known_operations import operation_reason

# Filled only at import time, by modules that define custom layers and models.
_DECLARED: set[type] = set()


class Rowwise(NamedTuple):
    """What is known of a model.

    Attributes:
        unknown: The reasons, one for each layer or operation that may mix rows.
        declared: The paths of the layers that were declared row-wise.
    """

    unknown: list[str]
    declared: list[str]


def declare_row_wise(layer_class: type) -> type:
    """Declares that layers or models of exactly this class treat the rows of a batch independently.

    Row i of every output must depend on row i of the inputs alone, whatever the data, the batch
    size, the random state and the training step: no statistics of the batch, no permutation of its
    rows, no state that one batch leaves for the next. Layers inside are judged by themselves.
    Without the declaration a model with a custom layer is trained one example at a time, which
    cannot mix rows but is slow. The function can be used as a decorator.

    Args:
        layer_class: A subclass of `keras.layers.Layer`. Its own subclasses are not covered.

    Returns:
        The class.

    Raises:
        ValueError: If it is not a class of layers.

    Formal guarantees: none of its own. It is a promise of the author's on which privacy rests.
    `check_model` tests it on a batch of the run's size with many random states, and in `fit` each
    batch has a masked row whose gradients must be zero. Both can miss a promise that is broken
    rarely, or where no gradient shows it (before the first trained layer, or behind weights of
    zero).

    Example:
        >>> import keras
        >>> from keras_bandmf import clipping
        >>> @clipping.declare_row_wise
        ... class Double(keras.layers.Layer):
        ...     def call(self, inputs):
        ...         return 2.0 * inputs
        >>> model = keras.Sequential([keras.Input((3,)), Double(), keras.layers.Dense(1)])
        >>> clipping.explain(model).route
        'book-keeping'
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        raise ValueError(
            "Expected `layer_class` to be a subclass of `keras.layers.Layer`. "
            f"Received: layer_class={layer_class!r}"
        )
    _DECLARED.add(layer_class)
    return layer_class


def may_be_row_wise(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer's class is declared row-wise, or is known to be with its settings.

    The number of axes of its inputs is not known here, nor are the layers inside looked at: whether
    a model treats rows independently is found by `rowwise`.
    """
    if quantized_reason(layer, None) is not None:
        return False
    if type(layer) in _DECLARED:
        return True
    condition = condition_of(type(layer))
    if condition is None or function_reason(layer) is not None:
        return False
    return condition(layer, None) is None


def rowwise(model: keras.Model) -> Rowwise:
    """Returns what is known of `model`, from every layer and every operation between them.

    Formal guarantees: if both lists are empty, then `model` consists of layers and operations of
    the tables of `known_layers` and `known_operations`, and row i of its outputs depends on row i
    of its inputs alone, provided that each tensor between them has as many axes as Keras declared,
    and the rows on axis 0 alone. That is not taken on trust: the trial trace that decides on the
    path before the first step compares every such tensor, of all functional models inside too, with
    what was declared, with 1009 rows, so that their axis is known by its size, and each trace that
    trains compares it again as far as sizes are known, so that an unknown number of rows is covered
    (`declared_shapes`); a model that differs goes the general path. The tables were made by reading
    the sources of Keras and keras_hub, and rest on that reading. Methods replaced on an instance of
    a layer or operation, other than `build` and `quantize`, are found, and on a functional model
    those that run its graph; so are functions that a known layer holds, in place of a layer inside,
    say. What is replaced inside other objects that a layer holds is not.
    """
    found = Rowwise([], [])
    _look(model, None, found, set())
    return found


def advice(unknown: list[str]) -> str:
    """Returns the reasons in one sentence, with the way out."""
    shown = unknown[:3]
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    return (
        f"rows may be mixed: {'; '.join(shown)}{more}. If it treats every row by itself, declare "
        "that with `clipping.declare_row_wise(TheClass)`"
    )


def _look(layer: Any, rank: int | None, found: Rowwise, seen: set) -> None:
    if (id(layer), rank) in seen:
        return
    seen.add((id(layer), rank))
    why = _own_reason(layer, rank, found)
    if why is not None:
        name = getattr(layer, "path", None) or layer.name
        found.unknown.append(f"{name} of type {type(layer).__name__}: {why}")
        return
    graph = graph_of(layer)
    if graph is not None:
        _look_at_graph(graph, found, seen)
        return
    for part in _parts(layer):
        _look(part, inner_rank(layer, rank), found, seen)


def _own_reason(layer: Any, rank: int | None, found: Rowwise) -> str | None:
    """Returns why the code of this layer itself may mix rows, or None."""
    if isinstance(layer, keras.Model):  # of which `compile` and `privatize` replace some
        why = next(
            (f"its `{n}` was replaced on it" for n in METHODS_BEFORE_THE_GRAPH if n in vars(layer)),
            None,
        )
    else:
        why = replaced_reason(layer)
    if why is not None:
        return why
    why = activation_reason(layer) or array_reason(layer) or quantized_reason(layer, rank)
    if why is not None:
        return why
    if type(layer) in _DECLARED:
        found.declared.append(layer.path)
        return None
    if isinstance(layer, (FunctionalModel, keras.Sequential)):
        if graph_of(layer) is None:
            return "it has a `call` of its own, or no graph of layers"
        return None
    condition = condition_of(type(layer))
    if condition is None:
        kind = "a model with a `call` of its own" if isinstance(layer, keras.Model) else "a layer"
        return f"{kind} that is not known to treat rows independently"
    return function_reason(layer) or condition(layer, rank)


def graph_of(layer: Any) -> FunctionalModel | None:
    """Returns the graph that runs when `layer` is called, or None."""
    if type(layer) is keras.Sequential:
        return graph_inside(layer)
    if not isinstance(layer, FunctionalModel):
        return None
    for kind in type(layer).__mro__:
        if kind is FunctionalModel:
            return layer
        # That of keras_hub only refuses strings.
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name == "keras_hub.src.utils.pipeline_model.PipelineModel" and is_the_one(kind):
            continue
        if METHODS_BEFORE_THE_GRAPH & set(vars(kind)):
            return None
    return None


def _look_at_graph(graph: FunctionalModel, found: Rowwise, seen: set) -> None:
    for node in (node for nodes in nodes_by_depth(graph).values() for node in nodes):
        operation = node.operation
        if not isinstance(operation, keras.layers.Layer):
            why = operation_reason(node)
            if why is not None:
                name = type(operation).__name__
                found.unknown.append(f"{operation.name} of type {name}: {why}")
            continue
        if not node.input_tensors:  # an input
            continue
        why = _call_reason(node)
        if why is not None:
            name = type(operation).__name__
            found.unknown.append(f"{operation.path} of type {name}: {why}")
        for rank in {len(t.shape) for t in _first_argument(node)}:
            _look(operation, rank, found, seen)


def _call_reason(node: Any) -> str | None:
    """Returns why a call in a functional model may mix rows, whatever the layer, or None."""
    for argument in keras.tree.flatten((node.arguments.args, node.arguments.kwargs)):
        if hasattr(argument, "shape") and not isinstance(argument, keras.KerasTensor):
            return "it is called with a constant, which may have an axis where the rows are"
    tensors = [t for t in (*node.input_tensors, *node.outputs) if not holds_no_row(t)]
    if any(not len(t.shape) or t.shape[0] != tensors[0].shape[0] for t in tensors):
        return "axis 0 is not the rows in all of its inputs and outputs"
    ranks = {len(t.shape) for t in _first_argument(node)}
    if type(node.operation).__module__.startswith("keras.src.layers.merging") and len(ranks) != 1:
        return "its inputs have different numbers of axes"
    return _side_reason(node, ranks)


def _first_argument(node: Any) -> list[Any]:
    """Returns the tensors that a layer works on; masks and the like have axes of their own."""
    given = node.arguments.args[:1]
    bound = None if given else _bound(node)
    if bound is not None:  # called with keywords alone
        parameters = list(inspect.signature(type(node.operation).call).parameters)
        given = [bound[name] for name in parameters[1:2] if name in bound]
    first = [t for t in keras.tree.flatten(given) if hasattr(t, "shape")]
    return first or node.input_tensors


def _bound(node: Any) -> dict[str, Any] | None:
    """Returns the arguments of a call of a layer by name, or None if they are not its `call`'s."""
    signature = inspect.signature(type(node.operation).call)
    try:
        bound = signature.bind(node.operation, *node.arguments.args, **node.arguments.kwargs)
    except TypeError:
        return None
    return dict(bound.arguments)


def _side_reason(node: Any, ranks: set[int]) -> str | None:
    """Returns why an argument after the first may be read along the rows, or None."""
    if isinstance(node.operation, keras.Model):
        return None  # its own layers are looked at
    bound = _bound(node)
    if bound is None:
        return "its arguments are not those of its `call`"
    kind = type(node.operation)
    full_name = f"{kind.__module__}.{kind.__qualname__}" if is_the_one(kind) else ""
    mask_axes = MASK_AXES.get(full_name)
    for name, value in list(bound.items())[2:]:
        sides = {len(t.shape) for t in keras.tree.flatten(value) if hasattr(t, "shape")}
        if not sides:
            continue
        if name == REFUSED_ARGUMENTS.get(full_name):
            return f"its `{name}` may be read along the rows"
        if name == "mask" and isinstance(node.operation, keras.layers.Softmax):
            fits = sides == ranks
        elif name == "mask" and isinstance(node.operation, keras.layers.Attention):
            fits = sides == {2}
        elif name == ARGUMENTS_WITHOUT_ROWS.get(full_name):
            fits = all(holds_no_row(t) for t in keras.tree.flatten(value))
        elif name == "input_tensor":  # added as it is
            fits = sides == ranks
        elif name == "position_bias":  # added to scores, which have four axes, from the right
            fits = sides == {4}
        elif name == "attention_mask" and mask_axes is not None:
            fits = sides == {mask_axes}
        else:
            fits = min(sides) >= (3 if name.endswith("attention_mask") else 2)
        if not fits:
            return f"its `{name}` has {min(sides)} axes, and may be read along the rows"
    return None


def _parts(layer: Any) -> list[Any]:
    # Keras keeps the layers that a layer holds here, also those in lists and dicts.
    return [part for part in inner_layers(layer) if isinstance(part, keras.layers.Layer)]
