"""Clipping rule of ConvLSTM1D, 2D and 3D: an LSTM whose products are convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_bandmf.clipping.factors import Factor, Rows
from keras_bandmf.clipping.rules.base import constant
from keras_bandmf.clipping.rules.conv import channels_last, sliding_factor, with_bias
from keras_bandmf.clipping.rules.gated_cells import Masks, lstm_gates
from keras_bandmf.clipping.rules.in_time import Cell, Retraced, States
from keras_bandmf.clipping.rules.recurrent import Recurrence, RecurrentRule, swapped
from keras_bandmf.clipping.shapes import by_example, dims, merge_rows, product


class _Window(NamedTuple):
    """What a kernel slides by, as `patches.Slices` reads it."""

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation_rate: tuple[int, ...]
    padding: str


class ConvLSTMRule(RecurrentRule):
    """ConvLSTM: four gates of z = x * W + b + h * U, without dropout.

    Each point in time counts as a row of a convolution, and the rows of an example are added up.
    """

    cell_name = "ConvLSTMCell"

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns a reason for a layer that drops units or keeps its states."""
        if layer.cell.dropout or layer.cell.recurrent_dropout:
            return "its gates see inputs of their own, by dropout"
        return super().refuses(layer)

    def projected(self, cell: keras.layers.Layer, run: Recurrence) -> tf.Tensor:
        """Returns x * W + b for all points in time."""
        inputs = swapped(run.inputs)
        kernel = constant(cell.kernel)
        outputs = cell.input_conv(merge_rows(inputs), kernel, padding=cell.padding)
        return by_example(with_bias(cell, outputs), dims(inputs)[1])

    def step(self, cell: keras.layers.Layer, state_masks: Masks) -> Cell:
        """Returns one step."""
        recurrent = constant(cell.recurrent_kernel)
        axis = 1 if cell.data_format == "channels_first" else -1

        def step(x: tf.Tensor, states: States) -> States:
            hidden, carry = states
            return lstm_gates(cell, x + cell.recurrent_conv(hidden, recurrent), carry, axis)[0]

        return Retraced(step)

    def cell_gradients(
        self, cell: keras.layers.Layer, run: Recurrence, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of both kernels and of the bias."""
        once = (1,) * cell.rank
        outer = _Window(cell.kernel_size, cell.strides, cell.dilation_rate, cell.padding)
        inner = _Window(cell.kernel_size, once, once, "same")
        found = [
            (cell.kernel, _over_time(cell, outer, run.inputs, g, cell.kernel)),
            (
                cell.recurrent_kernel,
                _over_time(cell, inner, run.previous, g, cell.recurrent_kernel),
            ),
        ]
        if cell.use_bias:
            (of_rows,) = channels_last(cell, merge_rows(g))
            sizes = dims(of_rows)
            per_row = tf.reshape(of_rows, [dims(g)[0], -1, sizes[-1]])
            found.append((cell.bias, Rows(tf.reduce_sum(per_row, axis=1))))
        return found


def _over_time(
    cell: keras.layers.Layer,
    window: _Window,
    inputs: tf.Tensor,
    g: tf.Tensor,
    kernel: keras.Variable,
) -> Any:
    """Returns the gradients of a kernel, added up over the points in time of each example.

    Args:
        cell: The cell, for its data format.
        window: How the kernel slides.
        inputs: Shape (batch, time, ...): what it slides over.
        g: Shape (batch, time, ...): the gradient of the convolution.
        kernel: The variable.
    """
    batch, time = dims(g)[:2]
    x, g = channels_last(cell, merge_rows(tf.cast(inputs, g.dtype)), merge_rows(g))
    factor = sliding_factor(window, x, g, tuple(kernel.shape), 1)
    return factor.grouped(time, tf.ones([product([batch, time])], tf.bool))
