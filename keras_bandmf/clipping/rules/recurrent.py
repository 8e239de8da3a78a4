"""Clipping rules of LSTM, GRU and SimpleRNN: products over time, of one pass through the sequence.

What a cell computes from its inputs is linear, so it is computed for all points in time at once,
before the recurrence. That tensor is what is recorded: its gradient is that of the cell's
pre-activations, and the gradients of both kernels are sums over time of products with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import all_layers
from keras_bandmf.clipping.factors import Factor, Layout, Outer, Rows, Unsupported
from keras_bandmf.clipping.rowwise.known_layers import condition_of
from keras_bandmf.clipping.rules.base import LayerRule, constant, wide
from keras_bandmf.clipping.shapes import dims, over_rows, product

# None, one mask for all gates, or one for each gate.
Masks: TypeAlias = "list[tf.Tensor] | None"
# (what the inputs add to the pre-activations at a point in time, states) -> states, of which the
# first is the output.
CellStep = Callable[[tf.Tensor, tuple[tf.Tensor, ...]], tuple[tf.Tensor, ...]]
# The same, with the number of the point in time first.
Step = Callable[[tf.Tensor, tf.Tensor, tuple[tf.Tensor, ...]], tuple[tf.Tensor, ...]]


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

    def step(self, cell: keras.layers.Layer, state_masks: Masks) -> CellStep:
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
        """Returns a reason for a layer that keeps its states, or has another cell than Keras's."""
        if layer.stateful:
            return "it is stateful"
        kind = type(layer.cell)
        if kind.__name__ != self.cell_name or condition_of(kind) is None:
            return f"its cell is a {kind.__name__} of its own"
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
        step = _masked(self.step(layer.cell, saved.state_masks), mask)
        passed = (_unrolled if layer.unroll else _in_time)(step, outputs, saved.states)
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
        outputs = _product(swapped(run.inputs), constant(cell.kernel), run.input_masks)
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

    def step(self, cell: keras.layers.Layer, state_masks: Masks) -> CellStep:
        """Returns one step."""
        recurrent = constant(cell.recurrent_kernel)

        def step(x: tf.Tensor, states: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
            z = x + _product(states[0], recurrent, state_masks)
            return (z if cell.activation is None else cell.activation(z),)

        return step


class LSTMRule(_GatedRule):
    """LSTM: four gates of z = x W + b + h U."""

    cell_name = "LSTMCell"

    def step(self, cell: keras.layers.Layer, state_masks: Masks) -> CellStep:
        """Returns one step."""
        recurrent = constant(cell.recurrent_kernel)
        return lstm_step(cell, lambda hidden: _product(hidden, recurrent, state_masks), 1)


def lstm_step(
    cell: keras.layers.Layer, product_of: Callable[[tf.Tensor], tf.Tensor], axis: int
) -> CellStep:
    """Returns one step of an LSTM, whatever its product is.

    Args:
        cell: The cell.
        product_of: The product of the last output with the recurrent kernel.
        axis: The axis of the gates.
    """

    def step(x: tf.Tensor, states: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
        hidden, carry = states
        z = tf.split(x + product_of(hidden), 4, axis=axis)
        carry = cell.recurrent_activation(z[1]) * carry
        carry += cell.recurrent_activation(z[0]) * cell.activation(z[2])
        return cell.recurrent_activation(z[3]) * cell.activation(carry), carry

    return step


class GRURule(_GatedRule):
    """GRU, with the reset gate before or after the product with the states."""

    cell_name = "GRUCell"

    def input_bias(self, cell: keras.layers.Layer) -> tf.Tensor | None:
        """Returns the bias that is added to x W: the first of two where there are two."""
        if cell.bias is None:
            return None
        bias = constant(cell.bias)
        return bias[0] if cell.reset_after else bias

    def step(self, cell: keras.layers.Layer, state_masks: Masks) -> CellStep:
        """Returns one step."""
        recurrent = constant(cell.recurrent_kernel)
        units = cell.units
        bias = constant(cell.bias)[1] if cell.reset_after and cell.bias is not None else None

        def step(x: tf.Tensor, states: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
            (hidden,) = states
            if cell.reset_after:
                inner = _product(hidden, recurrent, state_masks)
                inner = inner if bias is None else inner + bias
                z = tf.split(x[:, : 2 * units] + inner[:, : 2 * units], 2, axis=1)
                update, reset = map(cell.recurrent_activation, z)
                new = x[:, 2 * units :] + reset * inner[:, 2 * units :]
            else:
                masks = state_masks
                inner = _product(hidden, recurrent[:, : 2 * units], masks and masks[:2])
                z = tf.split(x[:, : 2 * units] + inner, 2, axis=1)
                update, reset = map(cell.recurrent_activation, z)
                kept = reset * (
                    hidden if masks is None else hidden * tf.cast(masks[2], hidden.dtype)
                )
                new = x[:, 2 * units :] + tf.matmul(kept, recurrent[:, 2 * units :])
            return (update * hidden + (1 - update) * cell.activation(new),)

        return step

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
        inner = _product(hidden, wide(cell.recurrent_kernel, g)[:, gate], masks and masks[1:2])
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

    def step(self, cell: keras.layers.Layer, state_masks: Masks) -> CellStep:
        """Returns that of the cell's rule."""
        return self._of_cells[type(cell)].step(cell, state_masks)

    def cell_gradients(
        self, cell: keras.layers.Layer, run: Recurrence, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns those of the cell's rule."""
        return self._of_cells[type(cell)].cell_gradients(cell, run, g)


def _as_masks(masks: Any) -> Masks:
    return masks if isinstance(masks, list) else [masks]


def _product(x: tf.Tensor, kernel: tf.Tensor, masks: Masks) -> tf.Tensor:
    """Returns (x * mask) W, with a mask for each gate if there are several.

    Args:
        x: Shape (batch, in) or (time, batch, in).
        kernel: Shape (in, gates * units).
        masks: Each of shape (batch, in).
    """
    if masks is None:
        # One product of matrices: TensorFlow is slower at one for each point in time.
        sizes = dims(x)
        flat = tf.matmul(tf.reshape(x, [product(sizes[:-1]), sizes[-1]]), kernel)
        return tf.reshape(flat, [*sizes[:-1], kernel.shape[1]])
    parts = tf.split(kernel, len(masks), axis=1)
    products = [
        _product(x * tf.cast(mask, x.dtype), part, None)
        for part, mask in zip(parts, masks, strict=True)
    ]
    return products[0] if len(products) == 1 else tf.concat(products, axis=-1)


def _factor(x: tf.Tensor, masks: Masks, g: tf.Tensor) -> Outer:
    """Returns the gradients of the kernel in `_product` over all points in time.

    Args:
        x: Shape (batch, time, in).
        masks: As for `_product`.
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


class _Passed(NamedTuple):
    """A pass through a sequence; time is axis 0.

    Attributes:
        hidden: The first state after each point in time.
        states: All states after the last one.
        previous: The first state before each point in time, without a gradient.
    """

    hidden: tf.Tensor
    states: tuple[tf.Tensor, ...]
    previous: tf.Tensor


def _in_time(step: Step, projected: tf.Tensor, states: Sequence[tf.Tensor]) -> _Passed:
    """Runs a step over axis 0, with a gradient that runs each step once more on the way back.

    That keeps nothing but the states, and takes less time than TensorFlow's own gradient of a loop,
    which keeps every tensor of every step.

    Args:
        step: One point in time; its first argument is the number of it.
        projected: Shape (time, batch, ...).
        states: The first states, each (batch, ...).
    """
    count = dims(projected)[0]
    kept: list[tf.Tensor] = []

    @tf.custom_gradient
    def run(projected: tf.Tensor, *states: tf.Tensor) -> Any:
        def forward(t: tf.Tensor, written: list[tf.TensorArray], *states: tf.Tensor) -> tuple:
            written = [w.write(t, s) for w, s in zip(written, states, strict=True)]
            return (t + 1, written, *step(t, projected[t], states))

        before = [tf.TensorArray(s.dtype, count, element_shape=s.shape) for s in states]
        _, before, *last = _loop(forward, count, tf.constant(0), before, *states)
        before = [written.stack() for written in before]
        kept[:] = before[:1]

        def gradient(of_hidden: tf.Tensor, *of_states: tf.Tensor) -> tuple:
            def backward(i: tf.Tensor, written: tf.TensorArray, *slopes: tf.Tensor) -> tuple:
                t = count - 1 - i
                slopes = (slopes[0] + of_hidden[t], *slopes[1:])
                inputs = [projected[t], *(s[t] for s in before)]
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(inputs)
                    after = step(t, inputs[0], tuple(inputs[1:]))
                zero = tf.UnconnectedGradients.ZERO
                of_projected, *slopes = tape.gradient(
                    after, inputs, output_gradients=list(slopes), unconnected_gradients=zero
                )
                return (i + 1, written.write(t, of_projected), *slopes)

            shape = projected.shape[1:]
            written = tf.TensorArray(projected.dtype, count, element_shape=shape)
            _, written, *slopes = _loop(backward, count, tf.constant(0), written, *of_states)
            return (written.stack(), *slopes)

        hidden = tf.concat([before[0][1:], last[0][None]], axis=0)
        return (hidden, *last), gradient

    hidden, *last = run(projected, *states)
    return _Passed(hidden, tuple(last), tf.stop_gradient(kept[0]))


def _loop(body: Callable[..., tuple], count: Any, *variables: Any) -> tuple:
    return tf.while_loop(
        lambda t, *_: t < count,
        body,
        variables,
        maximum_iterations=count,
        parallel_iterations=1,
    )


def _unrolled(step: Step, projected: tf.Tensor, states: Sequence[tf.Tensor]) -> _Passed:
    """Returns what `_in_time` returns, with every step in the graph; the length must be known."""
    current, before, hidden = tuple(states), [], []
    for t in range(projected.shape[0]):
        before.append(current[0])
        current = step(tf.constant(t), projected[t], current)
        hidden.append(current[0])
    return _Passed(tf.stack(hidden), current, tf.stop_gradient(tf.stack(before)))


def _masked(step: CellStep, mask: tf.Tensor | None) -> Step:
    """Returns a step that leaves the states as they are where the mask is False.

    Args:
        step: What the cell does.
        mask: Shape (time, batch), bool, or None.
    """

    def masked(t: tf.Tensor, x: tf.Tensor, states: tuple[tf.Tensor, ...]) -> tuple:
        new = step(x, states)
        if mask is None:
            return new
        valid = over_rows(mask[t], states[0])
        return tuple(tf.where(valid, n, s) for n, s in zip(new, states, strict=True))

    return masked


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
