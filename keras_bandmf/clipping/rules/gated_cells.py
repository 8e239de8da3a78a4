"""Cells of LSTM, GRU and SimpleRNN, forward and back, with the derivatives written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import keras
import tensorflow as tf

from keras_bandmf.clipping.rules.base import constant
from keras_bandmf.clipping.rules.in_time import Cell, Retraced, States
from keras_bandmf.clipping.shapes import dims, product

# None, one mask for all gates, or one for each gate.
Masks: TypeAlias = "list[tf.Tensor] | None"


def cell_of(steps: GatedCell) -> Cell:
    """Returns the cell, whose derivatives are those of sigmoid and tanh; with others, retraced."""
    cell = steps.cell
    recurrent = getattr(cell, "recurrent_activation", keras.activations.sigmoid)
    if cell.activation is keras.activations.tanh and recurrent is keras.activations.sigmoid:
        return steps
    return Retraced(lambda x, states: steps.forward(x, states)[0])


class GatedCell:
    """A cell whose gates see one product of the last output with the recurrent kernel.

    Args:
        cell: Keras's cell.
        masks: The dropout masks of the states.

    Attributes:
        keeps: How many tensors like a state are kept.
    """

    keeps = 1

    def __init__(self, cell: keras.layers.Layer, masks: Masks):
        self.cell = cell
        self.kernel = constant(cell.recurrent_kernel)
        self.masks = masks

    def product(self, hidden: tf.Tensor) -> tf.Tensor:
        """Returns the product."""
        return gated_product(hidden, self.kernel, self.masks)

    def transposed(self, g: tf.Tensor) -> tf.Tensor:
        """Returns the gradient by the last output, given that by the product."""
        if self.masks is None:
            return tf.matmul(g, self.kernel, transpose_b=True)
        count = len(self.masks)
        parts = zip(
            tf.split(g, count, axis=1),
            tf.split(self.kernel, count, axis=1),
            self.masks,
            strict=True,
        )
        return tf.add_n(
            [tf.matmul(p, k, transpose_b=True) * tf.cast(m, p.dtype) for p, k, m in parts]
        )

    def forward(self, x: tf.Tensor, states: States) -> tuple[States, list[tf.Tensor]]:
        """Returns the states after the step, and what is kept."""
        raise NotImplementedError

    def kept(self, x: tf.TensorSpec, states: Sequence[tf.TensorSpec]) -> list[tf.TensorSpec]:
        """Returns the shape and dtype of what is kept: `keeps` states side by side."""
        # A state that was given may have a width that is not known yet.
        width = self.keeps * self.kernel.shape[0]
        return [tf.TensorSpec([states[0].shape[0], width], states[0].dtype)]

    def backward(self, kept: list[tf.Tensor], slopes: States) -> tuple[tf.Tensor, States]:
        """Returns the gradients by `x` and the states."""
        raise NotImplementedError


class SimpleCell(GatedCell):
    """h = activation(x + h U)."""

    def forward(self, x: tf.Tensor, states: States) -> tuple[States, list[tf.Tensor]]:
        """Returns the output, which is kept."""
        z = x + self.product(states[0])
        hidden = z if self.cell.activation is None else self.cell.activation(z)
        return (hidden,), [hidden]

    def backward(self, kept: list[tf.Tensor], slopes: States) -> tuple[tf.Tensor, States]:
        """Returns the gradients by `x` and the state."""
        of_x = _of_tanh(kept[0], slopes[0])
        return of_x, (self.transposed(of_x),)


class LSTMCell(GatedCell):
    """Four gates of z = x + h U: write, forget, new and read."""

    keeps = 6

    def forward(self, x: tf.Tensor, states: States) -> tuple[States, list[tf.Tensor]]:
        """Returns output and carry; keeps the gates and the carry, before and activated."""
        z = x + self.product(states[0])
        new, gates = lstm_gates(self.cell, z, states[1], axis=1)
        return new, [tf.concat([*gates, states[1]], axis=1)]

    def backward(self, kept: list[tf.Tensor], slopes: States) -> tuple[tf.Tensor, States]:
        """Returns the gradients by `x` and the states."""
        write, forget, new, read, shown, carry = tf.split(kept[0], 6, axis=1)
        of_hidden, of_carry = slopes
        of_carry += _of_tanh(shown, of_hidden * read)
        gates = [
            _of_sigmoid(write, of_carry * new),
            _of_sigmoid(forget, of_carry * carry),
            _of_tanh(new, of_carry * write),
            _of_sigmoid(read, of_hidden * shown),
        ]
        of_x = tf.concat(gates, axis=1)
        return of_x, (self.transposed(of_x), of_carry * forget)


def lstm_gates(
    cell: keras.layers.Layer, z: tf.Tensor, carry: tf.Tensor, axis: int
) -> tuple[States, list[tf.Tensor]]:
    """Returns the states of an LSTM after a step, and its gates and its activated carry.

    Args:
        cell: The cell.
        z: The pre-activations of the four gates, side by side.
        carry: The second state before the step.
        axis: The axis of the gates.
    """
    write, forget, new, read = tf.split(z, 4, axis=axis)
    write, forget, read = map(cell.recurrent_activation, (write, forget, read))
    new = cell.activation(new)
    carry = forget * carry + write * new
    shown = cell.activation(carry)
    return (read * shown, carry), [write, forget, new, read, shown]


class GRUCell(GatedCell):
    """GRU with the reset gate after the product: update, reset and new of x and h U + b.

    The bias that is added to the product is the second of two.
    """

    keeps = 5

    def __init__(self, cell: keras.layers.Layer, masks: Masks):
        super().__init__(cell, masks)
        self.bias = None if cell.bias is None else constant(cell.bias)[1]

    def product(self, hidden: tf.Tensor) -> tf.Tensor:
        """Returns the product plus its bias."""
        outputs = super().product(hidden)
        return outputs if self.bias is None else tf.nn.bias_add(outputs, self.bias)

    def forward(self, x: tf.Tensor, states: States) -> tuple[States, list[tf.Tensor]]:
        """Returns the output; keeps the gates, what is reset, and the state."""
        (hidden,) = states
        inner = tf.split(self.product(hidden), 3, axis=1)
        outer = tf.split(x, 3, axis=1)
        update = self.cell.recurrent_activation(outer[0] + inner[0])
        reset = self.cell.recurrent_activation(outer[1] + inner[1])
        new = self.cell.activation(outer[2] + reset * inner[2])
        kept = tf.concat([update, reset, new, inner[2], hidden], axis=1)
        return (update * hidden + (1 - update) * new,), [kept]

    def backward(self, kept: list[tf.Tensor], slopes: States) -> tuple[tf.Tensor, States]:
        """Returns the gradients by `x` and the state."""
        update, reset, new, inner, hidden = tf.split(kept[0], 5, axis=1)
        (slope,) = slopes
        of_update = _of_sigmoid(update, slope * (hidden - new))
        of_new = _of_tanh(new, slope * (1 - update))
        of_reset = _of_sigmoid(reset, of_new * inner)
        of_product = tf.concat([of_update, of_reset, of_new * reset], axis=1)
        of_x = tf.concat([of_update, of_reset, of_new], axis=1)
        return of_x, (self.transposed(of_product) + slope * update,)


def gated_product(x: tf.Tensor, kernel: tf.Tensor, masks: Masks) -> tf.Tensor:
    """Returns (x * mask) W, with a mask for each gate if there are several.

    Args:
        x: Shape (batch, in) or (time, batch, in).
        kernel: Shape (in, gates * units).
        masks: Each of shape (batch, in).
    """
    if masks is None and x.shape.rank == 2:
        return tf.matmul(x, kernel)
    if masks is None:
        # One product of matrices: TensorFlow is slower at one for each point in time.
        sizes = dims(x)
        flat = tf.matmul(tf.reshape(x, [product(sizes[:-1]), sizes[-1]]), kernel)
        return tf.reshape(flat, [*sizes[:-1], kernel.shape[1]])
    parts = tf.split(kernel, len(masks), axis=1)
    products = [
        gated_product(x * tf.cast(mask, x.dtype), part, None)
        for part, mask in zip(parts, masks, strict=True)
    ]
    return products[0] if len(products) == 1 else tf.concat(products, axis=-1)


def _of_sigmoid(value: tf.Tensor, slope: tf.Tensor) -> tf.Tensor:
    """Returns the gradient by the argument of a sigmoid that has this value."""
    return tf.raw_ops.SigmoidGrad(y=value, dy=slope)


def _of_tanh(value: tf.Tensor, slope: tf.Tensor) -> tf.Tensor:
    """Returns the gradient by the argument of a hyperbolic tangent that has this value."""
    return tf.raw_ops.TanhGrad(y=value, dy=slope)
