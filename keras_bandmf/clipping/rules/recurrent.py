"""Clipping rules of LSTM, GRU and SimpleRNN: products over time, of one pass through the sequence.

What a cell computes from its inputs is linear, so it is computed for all points in time at once,
before the recurrence. That tensor is what is recorded: its gradient is that of the cell's
pre-activations, and the gradients of both kernels are sums over time of products with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import all_layers
from keras_bandmf.clipping.factors import Factor, Layout, Outer, Rows, Unsupported
from keras_bandmf.clipping.rowwise.known_layers import condition_of
from keras_bandmf.clipping.rules.base import LayerRule, constant, wide
from keras_bandmf.clipping.rules.gated_cells import (
    GRUCell,
    LSTMCell,
    Masks,
    SimpleCell,
    cell_of,
    gated_product,
)
from keras_bandmf.clipping.rules.in_time import Cell, Retraced, States, in_time, unrolled
from keras_bandmf.clipping.shapes import dims


class Recurrence:
    """One call of a recurrent layer: what its gradients are made of.

    Attributes:
        inputs: Shape (batch, time, ...).
        states: The first states.
        mask: Shape (batch, time), bool, or None.
        input_masks: The dropout masks of the inputs.
        state_masks: The dropout masks of the states.
        projected: What was recorded: shape (time, batch, ...), from the inputs alone.
        previous: The output before each point in time, (batch, time, ...); known after `finish`.
    """

    def __init__(
        self,
        inputs: tf.Tensor,
        states: list[tf.Tensor],
        mask: tf.Tensor | None,
        input_masks: Masks,
        state_masks: Masks,
    ):
        self.inputs = inputs
        self.states = states
        self.mask = mask
        self.input_masks = input_masks
        self.state_masks = state_masks
        self.projected: Any = None
        self.previous: Any = None


class RecurrentRule(LayerRule):
    """A recurrent layer whose cell is of one of the types that derived rules are written for.

    Attributes:
        cell_name: The name of the class of Keras whose `call` the rule knows.
    """

    whole = True
    example_axis = 1
    cell_name = ""

    def drops(self, cell: keras.layers.Layer, rate: float) -> bool:
        """Returns whether Keras's cell uses its dropout masks: most do not at a rate of one."""
        return 0.0 < rate < 1.0

    def projected(self, cell: keras.layers.Layer, run: Recurrence) -> tf.Tensor:
        """Returns the part of the pre-activations that depends on the inputs alone."""
        raise NotImplementedError

    def step(self, cell: keras.layers.Layer, state_masks: Masks) -> Cell:
        """Returns what the cell does at one point in time, its weights constant."""
        raise NotImplementedError

    def cell_gradients(
        self, cell: keras.layers.Layer, run: Recurrence, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of the cell's weights.

        Args:
            cell: The cell.
            run: The call.
            g: Shape (batch, time, ...): the gradient by `run.projected`, its axes swapped.
        """
        raise NotImplementedError

    def uses(self, layer: keras.layers.Layer) -> list[keras.Variable]:
        """Returns the weights of the cell."""
        return layer.cell.trainable_variables

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns a reason for a layer that keeps its states, or whose cell the rule misreads."""
        if layer.stateful:
            return "it is stateful"
        kind = type(layer.cell)
        if kind.__name__ != self.cell_name or condition_of(kind) is None:
            return f"its cell is a {kind.__name__} of its own"
        if layer.cell.compute_dtype != layer.compute_dtype:
            return f"its cell computes in {layer.cell.compute_dtype}, not {layer.compute_dtype}"
        # An activation, whose weights the rule would not know.
        inside = all_layers(layer.cell, include_self=False)
        return f"its cell holds a layer ({inside[0].name})" if inside else None

    def forward(
        self,
        layer: keras.layers.Layer,
        inputs: tf.Tensor,
        initial_state: Any = None,
        mask: Any = None,
        training: bool | None = False,
    ) -> tuple[tf.Tensor, Any]:
        """Returns the inputs times the kernel, for all points in time."""
        cell = layer.cell
        states = initial_state
        if states is None:
            states = layer.get_initial_state(batch_size=dims(inputs)[0])
        states = [keras.ops.cast(s, cell.compute_dtype) for s in keras.tree.flatten(states)]
        # In the order in which Keras draws them. They are drawn even where they are not used.
        input_masks = cell.get_dropout_mask(inputs[:, 0])
        state_masks = cell.get_recurrent_dropout_mask(states[0])
        cell.reset_dropout_mask()
        cell.reset_recurrent_dropout_mask()
        drops = training and self.drops(cell, cell.dropout)
        input_masks = _as_masks(input_masks) if drops else None
        drops = training and self.drops(cell, cell.recurrent_dropout)
        state_masks = _as_masks(state_masks) if drops else None
        mask = keras.tree.flatten(mask)[0]
        if mask is not None:
            mask = tf.cast(mask, tf.bool)
            if mask.shape.rank != 2:
                raise Unsupported(f"{layer.path}: its mask has other axes than (batch, time)")
        run = Recurrence(inputs, states, mask, input_masks, state_masks)
        run.projected = self.projected(cell, run)
        return run.projected, run

    def finish(self, layer: keras.layers.Layer, outputs: tf.Tensor, saved: Any) -> Any:
        """Runs the recurrence over what was recorded; returns outputs and states as Keras does."""
        mask = None if saved.mask is None else tf.transpose(saved.mask)
        if layer.go_backwards:
            outputs = tf.reverse(outputs, [0])
            mask = None if mask is None else tf.reverse(mask, [0])
        step = self.step(layer.cell, saved.state_masks)
        passed = (unrolled if layer.unroll else in_time)(step, mask, outputs, saved.states)
        previous = passed.previous
        saved.previous = swapped(tf.reverse(previous, [0]) if layer.go_backwards else previous)
        if mask is None:
            result = swapped(passed.hidden) if layer.return_sequences else passed.states[0]
        else:
            sequence = _as_returned(layer, passed.hidden, mask)
            result = swapped(sequence) if layer.return_sequences else sequence[-1]
        result = keras.ops.cast(result, layer.compute_dtype)
        if not layer.return_state:
            return result
        return (result, *(keras.ops.cast(s, layer.compute_dtype) for s in passed.states))

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of the cell's weights."""
        return self.cell_gradients(layer.cell, saved, swapped(g))


class _GatedRule(RecurrentRule):
    """Cells with two matrices, of which each holds those of all gates side by side.

    The gradients are those of cells that compute all else from x W + b + h U.
    """

    def projected(self, cell: keras.layers.Layer, run: Recurrence) -> tf.Tensor:
        """Returns x W plus the bias that is added to it."""
        outputs = gated_product(swapped(run.inputs), constant(cell.kernel), run.input_masks)
        bias = self.input_bias(cell)
        return outputs if bias is None else tf.nn.bias_add(outputs, bias)

    def input_bias(self, cell: keras.layers.Layer) -> tf.Tensor | None:
        """Returns the bias that is added to x W."""
        return None if cell.bias is None else constant(cell.bias)

    def cell_gradients(
        self, cell: keras.layers.Layer, run: Recurrence, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of kernels and bias."""
        recurrent = _factor(run.previous, run.state_masks, g)
        found: list[tuple[keras.Variable, Factor]] = [
            (cell.kernel, _factor(run.inputs, run.input_masks, g)),
            (cell.recurrent_kernel, recurrent),
        ]
        if cell.bias is not None:
            found.append((cell.bias, Rows(tf.reduce_sum(g, axis=1))))
        return found


class SimpleRNNRule(_GatedRule):
    """SimpleRNN: h = activation(x W + b + h U)."""

    cell_name = "SimpleRNNCell"

    def drops(self, cell: keras.layers.Layer, rate: float) -> bool:
        """Returns whether there are masks: this cell uses them at any rate."""
        return rate > 0.0

    def step(self, cell: keras.layers.Layer, state_masks: Masks) -> Cell:
        """Returns one step."""
        return cell_of(SimpleCell(cell, state_masks))


class LSTMRule(_GatedRule):
    """LSTM: four gates of z = x W + b + h U."""

    cell_name = "LSTMCell"

    def step(self, cell: keras.layers.Layer, state_masks: Masks) -> Cell:
        """Returns one step."""
        return cell_of(LSTMCell(cell, state_masks))


class GRURule(_GatedRule):
    """GRU, with the reset gate before or after the product with the states."""

    cell_name = "GRUCell"

    def input_bias(self, cell: keras.layers.Layer) -> tf.Tensor | None:
        """Returns the bias that is added to x W: the first of two where there are two."""
        if cell.bias is None:
            return None
        bias = constant(cell.bias)
        return bias[0] if cell.reset_after else bias

    def step(self, cell: keras.layers.Layer, state_masks: Masks) -> Cell:
        """Returns one step."""
        if cell.reset_after:
            return cell_of(GRUCell(cell, state_masks))
        units = cell.units
        recurrent = constant(cell.recurrent_kernel)

        def step(x: tf.Tensor, states: States) -> States:
            (hidden,) = states
            masks = state_masks
            inner = gated_product(hidden, recurrent[:, : 2 * units], masks and masks[:2])
            z = tf.split(x[:, : 2 * units] + inner, 2, axis=1)
            update, reset = map(cell.recurrent_activation, z)
            kept = reset * (hidden if masks is None else hidden * tf.cast(masks[2], hidden.dtype))
            new = x[:, 2 * units :] + tf.matmul(kept, recurrent[:, 2 * units :])
            return (update * hidden + (1 - update) * cell.activation(new),)

        return Retraced(step)

    def cell_gradients(
        self, cell: keras.layers.Layer, run: Recurrence, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of kernels and biases."""
        units = cell.units
        reset = self._reset(cell, run, g)
        hidden = tf.cast(run.previous, g.dtype)
        found: list[tuple[keras.Variable, Factor]] = [
            (cell.kernel, _factor(run.inputs, run.input_masks, g))
        ]
        if not cell.reset_after:
            parts = [hidden, hidden, hidden]
            if run.state_masks is not None:
                parts = [hidden * tf.cast(m, g.dtype)[:, None] for m in run.state_masks]
            parts[2] *= reset
            found.append((cell.recurrent_kernel, _by_gate(parts, g)))
            if cell.bias is not None:
                found.append((cell.bias, Rows(tf.reduce_sum(g, axis=1))))
            return found
        inner = tf.concat([g[..., : 2 * units], reset * g[..., 2 * units :]], axis=-1)
        recurrent = _factor(run.previous, run.state_masks, inner)
        found.append((cell.recurrent_kernel, recurrent))
        if cell.bias is not None:
            found.append((cell.bias, Rows(tf.reduce_sum(tf.stack([g, inner], axis=1), axis=2))))
        return found

    def _reset(self, cell: keras.layers.Layer, run: Recurrence, g: tf.Tensor) -> tf.Tensor:
        """Returns the reset gate at all points in time, computed anew from the states."""
        gate = slice(cell.units, 2 * cell.units)
        masks = run.state_masks
        hidden = swapped(tf.cast(run.previous, g.dtype))
        inner = gated_product(hidden, wide(cell.recurrent_kernel, g)[:, gate], masks and masks[1:2])
        if cell.reset_after and cell.bias is not None:
            inner += wide(cell.bias, g)[1, gate]
        inner += tf.cast(run.projected[..., gate], g.dtype)
        return swapped(cell.recurrent_activation(inner))


class AnyRecurrentRule(RecurrentRule):
    """`keras.layers.RNN` of a cell of Keras that has a rule."""

    def __init__(self, of_cells: dict[type, RecurrentRule]):
        self._of_cells = of_cells

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns a reason for a cell of another type."""
        rule = self._of_cells.get(type(layer.cell))
        if rule is None:
            return f"no rule for {type(layer.cell).__name__}"
        return rule.refuses(layer)

    def drops(self, cell: keras.layers.Layer, rate: float) -> bool:
        """Returns what the cell's rule does."""
        return self._of_cells[type(cell)].drops(cell, rate)

    def projected(self, cell: keras.layers.Layer, run: Recurrence) -> tf.Tensor:
        """Returns that of the cell's rule."""
        return self._of_cells[type(cell)].projected(cell, run)

    def step(self, cell: keras.layers.Layer, state_masks: Masks) -> Cell:
        """Returns that of the cell's rule."""
        return self._of_cells[type(cell)].step(cell, state_masks)

    def cell_gradients(
        self, cell: keras.layers.Layer, run: Recurrence, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns those of the cell's rule."""
        return self._of_cells[type(cell)].cell_gradients(cell, run, g)


def _as_masks(masks: Any) -> Masks:
    return masks if isinstance(masks, list) else [masks]


def _factor(x: tf.Tensor, masks: Masks, g: tf.Tensor) -> Outer:
    """Returns the gradients of the kernel in `gated_product` over all points in time.

    Args:
        x: Shape (batch, time, in).
        masks: As for `gated_product`.
        g: Shape (batch, time, gates * units): the gradient of the product.
    """
    x = tf.cast(x, g.dtype)
    if masks is not None:
        return _by_gate([x * tf.cast(m, g.dtype)[:, None] for m in masks], g)
    return Outer(x[:, None], g[:, None], Layout((x.shape[-1], g.shape[-1])))


def _by_gate(inputs: list[tf.Tensor], g: tf.Tensor) -> Outer:
    """Returns the gradients of a kernel whose gates see inputs of their own.

    Args:
        inputs: For each gate, shape (batch, time, in).
        g: Shape (batch, time, gates * units).
    """
    count, width = len(inputs), inputs[0].shape[-1]
    units = g.shape[-1] // count
    layout = Layout((width, count * units), (count, width, units), (1, 0, 2))
    return Outer(tf.stack(inputs, axis=1), tf.stack(tf.split(g, count, axis=2), axis=1), layout)


def swapped(tensor: tf.Tensor) -> tf.Tensor:
    """Returns (batch, time, ...) as (time, batch, ...), and the other way round."""
    return tf.transpose(tensor, [1, 0, *range(2, tensor.shape.rank)])


def _as_returned(layer: keras.layers.Layer, hidden: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Returns the outputs at masked points in time as Keras's layer does.

    They are zeros with `zero_output_for_mask`, else the last output, or zeros before any.

    Args:
        layer: The layer.
        hidden: The first state after each point in time, (time, batch, ...).
        mask: Shape (time, batch), bool.
    """
    shown = mask
    if not layer.zero_output_for_mask:
        shown = tf.cumsum(tf.cast(mask, tf.int32), axis=0) > 0
    shown = tf.reshape(shown, [*dims(shown), *[1] * (hidden.shape.rank - 2)])
    return tf.where(shown, hidden, tf.zeros_like(hidden))
