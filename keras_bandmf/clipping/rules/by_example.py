"""The rule of layers without one of their own: this layer alone runs one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import (
    all_layers,
    keras_mask,
    own_trainable_variables,
    set_keras_mask,
    stored_value,
)
from keras_bandmf.clipping.factors import Factor, Rows, Unsupported
from keras_bandmf.clipping.rules.base import LayerRule, called_method
from keras_bandmf.clipping.seeds import without_draws
from keras_bandmf.clipping.vectorized import vectorized

# Operations that run a `tf.function`.
_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})


class _Call(NamedTuple):
    """One recorded call: arguments and outputs of `layer.call`."""

    args: tuple
    kwargs: dict[str, Any]
    outputs: Any


class ByExampleRule(LayerRule):
    """Any layer that treats rows independently: the layer alone is run again for each example.

    The forward pass of the batch runs the layer's own `call`, with the weights behind
    `stop_gradient`. For the gradients the layer runs once more on each example in a batch of its
    own, from the recorded inputs, and backward from the recorded gradient of the outputs.
    TensorFlow vectorizes that over the examples where it can, and loops over them where it cannot.
    The rest of the model stays on the book-keeping path.

    Args:
        whole: See `LayerRule`.

    Formal guarantees: row i of the factors is a function of row i of the recorded inputs and output
        gradients, and of scalars that belong to no example: nothing else of the forward pass can
        reach the second run, also not through what layers keep (`_sees_one_row`). Calls that cannot
        be told apart by example, layers that draw random numbers (a second run would draw others),
        layers that write a variable and layers that add a loss go the general path.
    """

    def __init__(self, whole: bool = False):
        self.whole = whole

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns a reason for a layer with a `tf.function`, which keeps the first trace's weights.

        The weights of a pass are tensors of that pass: see `recorded`.
        """
        kept = any(
            isinstance(value, tf.types.experimental.PolymorphicFunction)
            for part in all_layers(layer)
            for holder in (part, *type(part).__mro__)
            for value in vars(holder).values()
        )
        return "it has a `tf.function`" if kept else None

    def uses(self, layer: keras.layers.Layer) -> list[keras.Variable]:
        """Returns all weights inside, if the rule stands for the layers inside."""
        return layer.trainable_variables if self.whole else []

    def recorded(
        self, layer: keras.layers.Layer, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Runs the layer's own `call`; returns the floating tensors among its outputs."""
        variables = self._variables(layer)
        values = [(v, tf.stop_gradient(stored_value(v))) for v in variables]
        scope = keras.StatelessScope(state_mapping=values, collect_losses=True)
        before = dict(scope.state_mapping)
        with without_draws(layer), scope:
            outputs = getattr(type(layer), called_method(layer))(layer, *args, **kwargs)
        if scope.losses:
            raise Unsupported(f"{layer.path}: calls `add_loss`")
        after = scope.state_mapping
        if len(after) > len(before) or any(after[k] is not value for k, value in before.items()):
            raise Unsupported(f"{layer.path}: writes a variable in its `call`")
        if not all(isinstance(t, tf.Tensor) for t in keras.tree.flatten(outputs)):
            raise Unsupported(f"{layer.path}: returns something that is not a tensor")
        outputs = keras.tree.map_structure(_own_tensor, outputs)
        return _floating(outputs), _Call(args, kwargs, outputs)

    def finish(self, layer: keras.layers.Layer, outputs: Any, saved: Any) -> Any:
        """Returns the outputs of the layer's own `call`."""
        return saved.outputs

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: Any
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of the layer's weights, written out."""
        variables = self._variables(layer)
        leaves = keras.tree.flatten((saved.args, saved.kwargs))
        batch = _floating(saved.outputs)[0].shape[0]
        split = [i for i, leaf in enumerate(leaves) if _belongs_to_rows(layer, leaf, batch)]
        masks = [(i, keras_mask(leaves[i])) for i in split if keras_mask(leaves[i]) is not None]
        for _, mask in masks:
            _belongs_to_rows(layer, mask, batch)
        rows = ([leaves[i] for i in split], [m for _, m in masks], list(g))

        def of_row(row: tuple) -> list[tf.Tensor]:
            own = list(leaves)
            inputs, of_masks, slopes = row
            for i, tensor in zip(split, inputs, strict=True):
                own[i] = tensor[None]
            for (i, _), mask in zip(masks, of_masks, strict=True):
                set_keras_mask(own[i], mask[None])
            args, kwargs = keras.tree.pack_sequence_as((saved.args, saved.kwargs), own)
            return _gradients_of_row(layer, variables, args, kwargs, slopes)

        with without_draws(layer):
            if not tf.executing_eagerly():
                _sees_one_row(layer, of_row, rows, leaves)
            try:
                found = vectorized(of_row, rows, or_loop=False)
            except (NotImplementedError, TypeError, ValueError):
                # An operation cannot be vectorized.
                signature = [tf.TensorSpec(v.shape, v.dtype) for v in variables]
                found = tf.map_fn(of_row, rows, fn_output_signature=signature)
        return [
            (v, Rows(tf.cast(values, g[0].dtype)))
            for v, values in zip(variables, found, strict=True)
        ]

    def _variables(self, layer: keras.layers.Layer) -> list[keras.Variable]:
        if self.whole:
            return layer.trainable_variables
        own = {id(v) for v in own_trainable_variables(layer)}
        return [v for v in layer.trainable_variables if id(v) in own]


def _gradients_of_row(
    layer: keras.layers.Layer,
    variables: list[keras.Variable],
    args: tuple,
    kwargs: dict[str, Any],
    slopes: list[tf.Tensor],
) -> list[tf.Tensor]:
    """Returns the gradients by `variables` of one example, in the dtypes of the variables.

    Args:
        layer: The layer.
        variables: Weights of the layer.
        args: The arguments of a call with one example on axis 0.
        kwargs: Likewise.
        slopes: The gradients by the floating outputs, without axis 0.
    """
    values = [tf.identity(stored_value(v)) for v in variables]
    mapping = list(zip(variables, values, strict=True))
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        with keras.StatelessScope(state_mapping=mapping):
            outputs = _floating(layer(*args, **kwargs))
    own = [tf.cast(s[None], t.dtype) for s, t in zip(slopes, outputs, strict=True)]
    if not all(s.shape.is_compatible_with(t.shape) for s, t in zip(own, outputs, strict=True)):
        raise Unsupported(f"{layer.path}: a batch of one row does not give one row")
    zero = tf.UnconnectedGradients.ZERO
    found = tape.gradient(outputs, values, output_gradients=own, unconnected_gradients=zero)
    return [tf.convert_to_tensor(g) for g in found]


def _sees_one_row(
    layer: keras.layers.Layer, of_row: Callable[[tuple], Any], rows: tuple, shared: list[Any]
) -> None:
    """Checks that the second run of a layer reads of the forward pass what it is given alone.

    A layer may read a tensor that another call left on an object. That has all rows in it.

    Args:
        layer: The layer.
        of_row: The second run, a function of one row.
        rows: What it gets the rows of.
        shared: Arguments of the call, among them those that all rows share.

    Raises:
        Unsupported: If it reads another tensor of the graph around it, or calls a `tf.function`,
            which may read what it kept. An eager tensor cannot be told from a constant of the
            layer; the trial trace, which is a graph, comes before any eager pass.
    """
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype), rows)
    traced = tf.function(of_row, autograph=False).get_concrete_function(specs)
    if any(operation.type in _CALLS for operation in traced.graph.get_operations()):
        raise Unsupported(f"{layer.path}: its `call` calls a `tf.function`")
    known = {id(leaf) for leaf in shared if isinstance(leaf, tf.Tensor) and leaf.shape.rank == 0}
    for tensor in traced.captured_inputs:
        symbolic = tf.is_symbolic_tensor(tensor) and tensor.dtype != tf.resource
        if symbolic and id(tensor) not in known:
            raise Unsupported(
                f"{layer.path}: its `call` reads a tensor that is not among its arguments "
                f"({tensor.name})"
            )


def _floating(outputs: Any) -> list[tf.Tensor]:
    return [t for t in keras.tree.flatten(outputs) if t.dtype.is_floating]


def _own_tensor(tensor: tf.Tensor) -> tf.Tensor:
    """Returns a copy of an output: a layer may return its input, which others read, too."""
    copy, mask = tf.identity(tensor), keras_mask(tensor)
    if mask is not None:
        set_keras_mask(copy, mask)
    return copy


def _belongs_to_rows(layer: keras.layers.Layer, leaf: Any, batch: int | None) -> bool:
    """Returns whether an argument has an entry for each example; else all examples share it.

    Raises:
        Unsupported: If it cannot be told.
    """
    if not isinstance(leaf, tf.Tensor) or leaf.shape.rank == 0:
        return False
    if leaf.shape.rank is None or leaf.shape[0] != batch:
        raise Unsupported(
            f"{layer.path}: called with a tensor of shape {leaf.shape}, whose first axis is not "
            "known to be that of the examples"
        )
    return True
