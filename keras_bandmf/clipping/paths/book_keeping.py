"""The book-keeping path: norms and clipped sums from one forward and one backward pass.

For y = x W the gradient of example i is x_i' g_i with g_i = dL_i/dy. One backward pass to the
pre-activations yields every g; norms and clipped sums follow from x and g without a gradient per
example in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import added_losses, all_layers, takes_training
from keras_bandmf.clipping.attached import attached_to
from keras_bandmf.clipping.clipper import Clipper
from keras_bandmf.clipping.coordinates import released_shape
from keras_bandmf.clipping.factors import Factor, Unsupported
from keras_bandmf.clipping.losses import BatchLoss
from keras_bandmf.clipping.merge import merged
from keras_bandmf.clipping.paths.declared_shapes import checked_shapes
from keras_bandmf.clipping.row_losses import per_example_losses
from keras_bandmf.clipping.rules.base import LayerRule, called_method
from keras_bandmf.clipping.rules.registry import assigned_rules
from keras_bandmf.clipping.shapes import by_example, over_rows

# The number of masked rows that are watched in each batch or chunk. More would cost time.
_SENTINELS = 8


class Clipped(NamedTuple):
    """What either path returns: tensors, nothing else."""

    sums: list[tf.Tensor]
    norms: tf.Tensor
    losses: tf.Tensor
    was_clipped: tf.Tensor
    outputs: Any
    attached: list[dict[str, tf.Tensor]]
    rows_mixed: tf.Tensor


class _Record(NamedTuple):
    """One tapped call."""

    layer: keras.layers.Layer
    rule: LayerRule
    saved: Any
    outputs: tf.Tensor | list[tf.Tensor]


# The gradient at a recorded tensor, None if nobody used it, and the axis of the examples.
Tap = tuple[tf.Tensor | None, int]


def forward(model: keras.Model, x: Any) -> Any:
    """Runs the training forward pass, called as Keras's own `train_step` calls it.

    Raises:
        ValueError: If a layer called `add_loss`, because that loss belongs to no single example.
    """
    y_pred = model(x, training=True) if takes_training(model) else model(x)
    for layer in all_layers(model):
        if added_losses(layer):
            raise ValueError(
                "A loss added by `add_loss` in the forward pass belongs to the whole batch and "
                "cannot be clipped by example. Make it part of `compile(loss=...)`, or a weight "
                "regularizer (`kernel_regularizer=`) if it does not depend on the data. "
                f"Received: `add_loss` in layer '{layer.path}' of type {type(layer).__name__}"
            )
    return y_pred


def clip_by_book_keeping(
    model: keras.Model,
    x: Any,
    y: Any,
    sample_weight: Any,
    mask: tf.Tensor,
    clipper: Clipper,
    loss: BatchLoss,
    rows_per_example: int = 1,
) -> Clipped:
    """Returns clipped sums of a batch by one forward and one backward pass.

    Args:
        model: A built model. Every layer with trainable weights has a rule.
        x: The inputs, a structure of tensors with the example on axis 0, as all data here.
        y: The targets, or None.
        sample_weight: The weights, or None.
        mask: Shape (batch,), bool; False for padding.
        clipper: The clipper of this model.
        loss: A loss from `losses.batch_loss`.
        rows_per_example: The number of consecutive rows that are one example: its gradient is the
            mean over those of its rows that are not masked out.

    Returns:
        `Clipped`, sums aligned with `model.trainable_variables`. Norms have an entry for each
        example, losses and outputs for each row.

    Raises:
        Unsupported: If the model cannot take this path. The general path is exact for it.

    Formal guarantees: if no example influences another example's outputs (`rowwise`), each
    masked-in example adds to `sums` a vector of which each group of variables has a norm of at most
    the group's clip norm, up to rounding; masked-out examples and those with a gradient that is not
    finite in any variable add exactly zero. `rows_mixed` is True only if the loss of one row
    depends on an activation of another, masked one. It is a sentinel, not a proof: it does not see
    statistics behind `stop_gradient`, mixing of inputs that no gradient is taken by, as any mixing
    is that comes before the first trained layer, rows that read others while nobody reads the
    masked ones, mixing behind an activation with slope zero, or weights of zero between. Tensors
    of functional models that are not of the declared shape are refused (`checked_shapes`).
    """
    variables = model.trainable_variables
    values = [v.value for v in variables]
    records: list[_Record] = []
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        with tapped(model, tape, records), checked_shapes(model):
            y_pred = forward(model, x)
    losses, outputs, slopes = per_example_losses(loss, y, y_pred, sample_weight, values)
    if rows_per_example > 1:
        shares = row_shares(mask, rows_per_example)
        slopes = [s * over_rows(tf.cast(shares, s.dtype), s) for s in slopes]
    # A masked row has no loss: whatever gradient it has at a tap is that of another row's loss.
    slopes = [tf.where(over_rows(mask, s), s, tf.zeros_like(s)) for s in slopes]
    factors, taps = example_gradients(
        tape, records, variables, outputs, slopes, mask, clipper.dtype, rows_per_example
    )
    squared = [factors[i].squared_norms() if i in factors else None for i in range(len(variables))]
    examples = example_mask(mask, rows_per_example)
    weights, norms, was_clipped = clipper.factors(squared, examples)
    sums = [
        factors[i].weighted_sum(weights[group])
        if i in factors
        else tf.zeros(released_shape(v), clipper.dtype)
        for i, (v, group) in enumerate(zip(variables, clipper.groups, strict=True))
    ]
    attached = [attached_to(t) for t in keras.tree.flatten(y_pred)]
    return Clipped(sums, norms, losses, was_clipped, y_pred, attached, _rows_mixed(taps, mask))


def example_mask(mask: tf.Tensor, rows_per_example: int) -> tf.Tensor:
    """Returns which examples have a row that is not masked out, shape (examples,), bool."""
    if rows_per_example == 1:
        return mask
    return tf.reduce_any(by_example(mask, rows_per_example), axis=1)


def row_shares(mask: tf.Tensor, rows_per_example: int) -> tf.Tensor:
    """Returns what each row counts in the mean over the rows of its example that are not masked.

    Args:
        mask: Shape (rows,), bool.
        rows_per_example: The number of consecutive rows that are one example.

    Returns:
        Shape (rows,), float32. The shares of the rows that are not masked out add up to 1 in each
        example that has any.
    """
    counted = by_example(tf.cast(mask, tf.float32), rows_per_example)
    count = tf.reduce_sum(counted, axis=1, keepdims=True)
    return tf.reshape(tf.math.divide_no_nan(counted, count), [-1])


def _rows_mixed(taps: list[Tap], mask: tf.Tensor) -> tf.Tensor:
    """Returns, as a scalar bool, whether a masked row has a gradient at any recorded call.

    The first `_SENTINELS` masked rows are looked at. NaN and infinity are no evidence: zero times
    an infinite activation of the row itself gives them.
    """
    masked = tf.cumsum(tf.cast(tf.logical_not(mask), tf.int32))
    places = tf.searchsorted(masked, tf.range(1, _SENTINELS + 1))
    exists = places < tf.shape(mask)[0]
    places = tf.where(exists, places, tf.zeros_like(places))
    found = [tf.constant(False)]
    for g, axis in taps:
        if g is not None:
            g = tf.gather(tf.convert_to_tensor(g), places, axis=axis)
            if axis:
                g = tf.transpose(g, [axis, *(i for i in range(g.shape.rank) if i != axis)])
            reached = tf.logical_and(tf.math.is_finite(g), tf.not_equal(g, tf.zeros([], g.dtype)))
            found.append(tf.reduce_any(tf.logical_and(reached, over_rows(exists, g))))
    return tf.reduce_any(tf.stack(found))


def example_gradients(
    tape: tf.GradientTape,
    records: list[_Record],
    variables: list[keras.Variable],
    outputs: list[tf.Tensor],
    slopes: list[tf.Tensor],
    mask: tf.Tensor,
    dtype: tf.DType,
    rows_per_example: int = 1,
) -> tuple[dict[int, Factor], list[Tap]]:
    """Returns every example's gradient, as a factor for each variable, from one backward pass.

    Args:
        tape: The tape on which a forward pass ran inside `tapped`, watching `variables`.
        records: What `tapped` recorded.
        variables: The variables to differentiate by.
        outputs: Tensors of that forward pass, with the example on axis 0.
        slopes: The gradients of the summed losses by `outputs`.
        mask: Shape (batch,), bool. With several rows an example, a row that is masked out adds
            nothing to its example; else it gives the number of examples only.
        dtype: The dtype of the factors, float32 or float64.
        rows_per_example: The number of consecutive rows whose gradients are added up first.

    Returns:
        Position in `variables` -> factor, those without a gradient left out; and the gradients at
        all recorded tensors, in the order of `records`.

    Raises:
        Unsupported: If a weight is used outside a layer with a rule, or a call is not by example.
    """
    _check_records(records, tf.convert_to_tensor(mask))
    taps, direct = tape.gradient(
        outputs, ([r.outputs for r in records], [v.value for v in variables]), slopes
    )
    leaks = [v.path for v, g in zip(variables, direct, strict=True) if g is not None]
    if leaks:
        raise Unsupported(f"used outside a layer that has a rule: {', '.join(leaks)}")
    parts = _by_variable(records, taps, variables, dtype)
    if rows_per_example > 1:
        for of_one in parts.values():
            if any(not hasattr(factor, "grouped") for factor in of_one):
                raise Unsupported("a factor of a rule has no method `grouped`")
        parts = {
            i: [factor.grouped(rows_per_example, mask) for factor in of_one]
            for i, of_one in parts.items()
        }
    found = [
        (g, record.rule.example_axis)
        for record, of_call in zip(records, taps, strict=True)
        for g in keras.tree.flatten(of_call)
    ]
    return {i: merged(of_one) for i, of_one in parts.items()}, found


def _by_variable(
    records: list[_Record],
    taps: list[Any],
    variables: list[keras.Variable],
    dtype: tf.DType,
) -> dict[int, list[Factor]]:
    """Returns the factors of each trainable variable, one for each call that uses it."""
    index = {id(v): i for i, v in enumerate(variables)}
    found: dict[int, list[Factor]] = {}
    for record, g in zip(records, taps, strict=True):
        if all(part is None for part in keras.tree.flatten(g)):
            continue  # outputs nobody used: their gradient is zero
        if isinstance(g, list):
            g = [
                tf.zeros_like(t, dtype) if part is None else _as_tensor(part, dtype)
                for t, part in zip(record.outputs, g, strict=True)
            ]
        else:
            g = _as_tensor(g, dtype)
        for variable, factor in record.rule.gradients(record.layer, record.saved, g):
            if id(variable) in index:
                found.setdefault(index[id(variable)], []).append(factor)
    return found


def _as_tensor(g: Any, dtype: tf.DType) -> tf.Tensor:
    return tf.cast(tf.convert_to_tensor(g), dtype)


@contextlib.contextmanager
def tapped(
    model: keras.layers.Layer, tape: tf.GradientTape, records: list[_Record]
) -> Iterator[None]:
    """Replaces the method that runs, on every layer whose rule gives gradients of trained weights.

    Args:
        model: A model or layer. It and the layers in it are recorded.
        tape: The tape that watches every pre-activation.
        records: A list that gets a record for each call.

    Raises:
        Unsupported: If a layer with trainable weights has no rule.
    """
    assigned = assigned_rules(model)
    if assigned.missing:
        raise Unsupported("; ".join(assigned.missing))
    replaced = []
    try:
        for layer, rule in assigned.rules:
            # Bypasses Keras's attribute tracking, and changes this instance only.
            vars(layer)[called_method(layer)] = _recording(layer, rule, tape, records)
            replaced.append(layer)
        yield
    finally:
        for layer in replaced:
            del vars(layer)[called_method(layer)]


def _recording(
    layer: keras.layers.Layer, rule: LayerRule, tape: tf.GradientTape, records: list[_Record]
) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        outputs, saved = rule.recorded(layer, args, kwargs)
        tape.watch(outputs)
        records.append(_Record(layer, rule, saved, outputs))
        return rule.finish(layer, outputs, saved)

    return call


def _check_records(records: list[_Record], mask: tf.Tensor) -> None:
    """Checks that every recorded call ran once, in this graph, with a row for each example."""
    batch = mask.shape[0]
    for record, tensor in ((r, t) for r in records for t in keras.tree.flatten(r.outputs)):
        if not tf.executing_eagerly() and tensor.graph is not tf.compat.v1.get_default_graph():
            raise Unsupported(f"{record.layer.path}: called inside a loop, a branch or a function")
        axis, rank = record.rule.example_axis, tensor.shape.rank or 0
        rows = tensor.shape[axis] if rank > axis else None
        if rank <= axis or (batch is not None and rows is not None and rows != batch):
            raise Unsupported(
                f"{record.layer.path}: its axis {axis} is not the example axis "
                f"(shape {tuple(tensor.shape)} for {batch} examples)"
            )
