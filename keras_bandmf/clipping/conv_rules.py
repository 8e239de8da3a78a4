"""Clipping rule of Conv1D and Conv2D: patches by slices, products or Gram matrices of patches."""

from __future__ import annotations

import itertools
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf.clipping.factors import Factor, Outer, Rows, prefers_product
from keras_bandmf.clipping.layer_rules import _KernelRule, constant
from keras_bandmf.clipping.shapes import dims, product, sum_to

# Fewer channels than this make a matrix product too thin: neighbours are joined first.
_THIN = 16


class ConvRule(_KernelRule):
    """Conv1D and Conv2D with any strides, padding, dilation, groups and data format."""

    def forward(self, layer, inputs):
        padding, x = layer.padding, inputs
        if padding == "causal":
            left = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
            spatial = 1 if layer.data_format == "channels_last" else 2
            x = tf.pad(x, [[left, 0] if i == spatial else [0, 0] for i in range(3)])
            padding = "valid"
        outputs = keras.ops.conv(
            x,
            constant(layer.kernel),
            strides=list(layer.strides),
            padding=padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
        if layer.use_bias:
            ones = [1] * layer.rank
            last = layer.data_format == "channels_last"
            shape = [1, *ones, layer.filters] if last else [1, layer.filters, *ones]
            outputs = keras.ops.add(outputs, tf.reshape(constant(layer.bias), shape))
        return outputs, inputs

    def gradients(self, layer, saved, g):
        x = tf.cast(saved, g.dtype)
        if layer.data_format == "channels_first":
            to_last = [0, *range(2, layer.rank + 2), 1]
            x, g = tf.transpose(x, to_last), tf.transpose(g, to_last)
        found = [(layer._kernel, _kernel_factor(layer, x, g))]
        if layer.use_bias:
            found.append((layer.bias, Rows(sum_to(g, (layer.filters,)))))
        return found


def _kernel_factor(layer: keras.layers.Layer, x: tf.Tensor, g: tf.Tensor) -> Factor:
    """The kernel's gradient: patches' times output gradients, product or factors."""
    groups, shape = layer.groups, tuple(layer._kernel.shape)
    cells, out = dims(g)[1:-1], shape[-1] // groups
    slices = _Slices(layer, x, cells)
    positions = product(cells)
    g = tf.reshape(g, [dims(g)[0], positions, groups, out])
    g = tf.transpose(g, [0, 2, 1, 3]) if groups > 1 else g[:, None, :, 0]
    width = product(list(shape[:-1]))

    if not prefers_product(positions, width, out):
        patches = tf.concat([slices.at(k) for k in slices.offsets], axis=-1)
        return Outer(patches, g, _layout(shape, groups))
    if groups > 1 or shape[-2] >= _THIN:
        parts = [[k] for k in slices.offsets]
    else:
        parts = [list(row) for _, row in itertools.groupby(slices.offsets, key=lambda k: k[:-1])]
    values = []
    for part in parts:
        a = slices.at(part[0]) if len(part) == 1 else tf.concat([slices.at(k) for k in part], -1)
        values.append(Outer(a, g, _layout(shape, groups)).as_rows().values)
    return Rows(tf.concat(values, axis=2), _layout(shape, groups))


def _layout(shape: tuple[int, ...], groups: int):
    """(groups, offsets * channels, out) to the kernel's (*size, channels, groups * out)."""

    def layout(total: tf.Tensor) -> tf.Tensor:
        if groups > 1:
            total = tf.transpose(total, [1, 0, 2])
        return tf.reshape(total, shape)

    return layout


class _Slices:
    """The inputs each kernel offset sees, by strided slices."""

    def __init__(self, layer: keras.layers.Layer, x: tf.Tensor, cells: list[Any]):
        self.strides, self.dilation = layer.strides, layer.dilation_rate
        self.groups, self.cells = layer.groups, cells
        self.offsets = list(itertools.product(*(range(k) for k in layer.kernel_size)))
        self.x = tf.pad(x, self._padding(layer, dims(x)[1:-1])) if layer.padding != "valid" else x

    def _padding(self, layer: keras.layers.Layer, sizes: list[Any]) -> list[list[Any]]:
        pads: list[list[Any]] = [[0, 0]]
        for size, out, k, s, d in zip(
            sizes, self.cells, layer.kernel_size, self.strides, self.dilation, strict=True
        ):
            needed = (out - 1) * s + (k - 1) * d + 1 - size
            if layer.padding == "causal":
                pads.append([(k - 1) * d, 0])
                continue
            total = max(needed, 0) if isinstance(needed, int) else tf.maximum(needed, 0)
            pads.append([total // 2, total - total // 2])
        return [*pads, [0, 0]]

    def at(self, offset: tuple[int, ...]) -> tf.Tensor:
        """Inputs seen by one kernel offset: (batch, groups, positions, channels)."""
        index = [slice(None)]
        for k, out, s, d in zip(offset, self.cells, self.strides, self.dilation, strict=True):
            index.append(slice(k * d, k * d + (out - 1) * s + 1, s))
        part = self.x[tuple(index)]
        batch, channels, positions = dims(part)[0], dims(part)[-1], product(self.cells)
        if self.groups == 1:
            return tf.reshape(part, [batch, 1, positions, channels])
        part = tf.reshape(part, [batch, positions, self.groups, channels // self.groups])
        return tf.transpose(part, [0, 2, 1, 3])
