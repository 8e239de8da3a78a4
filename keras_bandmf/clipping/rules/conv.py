"""Clipping rules of convolutions: products or Gram matrices of patches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import kernel_of
from keras_bandmf.clipping.factors import Factor, Layout, Outer, Rows, prefers_product
from keras_bandmf.clipping.rules.base import (
    KernelRule,
    LinearRule,
    constant,
    lora_scale,
    matrix,
    wide,
)
from keras_bandmf.clipping.rules.patches import Slices
from keras_bandmf.clipping.shapes import dims, product, sum_to

# Fewer channels than this make a matrix product too thin: neighbors are joined first.
_THIN = 16


class ConvRule(LinearRule):
    """Conv1D, 2D and 3D with any strides, padding, dilation, groups and data format."""

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns a reason for LoRA on grouped channels, which Keras applies in another way."""
        if getattr(layer, "lora_enabled", False) and layer.groups > 1:
            return "LoRA is enabled on grouped channels"
        return super().refuses(layer)

    def linear(self, layer: keras.layers.Layer, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Returns the convolution of the inputs with a kernel."""
        padding, x = layer.padding, inputs
        if padding == "causal":
            left = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
            spatial = 1 if layer.data_format == "channels_last" else 2
            x = tf.pad(x, [[left, 0] if i == spatial else [0, 0] for i in range(3)])
            padding = "valid"
        return keras.ops.conv(
            x,
            kernel,
            strides=list(layer.strides),
            padding=padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    def kernel_factor(
        self, layer: keras.layers.Layer, inputs: tf.Tensor, g: tf.Tensor, shape: tuple[int, ...]
    ) -> Factor:
        """Returns patches(x)'g, written out or as factors."""
        x, g = channels_last(layer, tf.cast(inputs, g.dtype), g)
        return sliding_factor(layer, x, g, shape, layer.groups)

    def forward(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns the convolution plus the bias, and the inputs for the gradients."""
        return with_bias(layer, self.linear(layer, inputs, constant(layer.kernel))), inputs

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of the kernel, or of LoRA's two factors, and of the bias."""
        if not layer.lora_enabled:
            kernel = kernel_of(layer)
            found = [(kernel, self.kernel_factor(layer, saved, g, tuple(kernel.shape)))]
            return [*found, *bias_gradient(layer, *channels_last(layer, g))]
        x, g = channels_last(layer, tf.cast(saved, g.dtype), g)
        bias = bias_gradient(layer, g)
        # Outputs are x * (W + s A B), with B on the channels alone.
        a, b = layer.lora_kernel_a, layer.lora_kernel_b
        scaled = lora_scale(layer) * g
        behind = tf.matmul(scaled, wide(b, g), transpose_b=True)
        slices = Slices(layer, x, dims(g)[1:-1])
        patches = tf.concat([slices.at(k) for k in slices.offsets], axis=-1)[:, 0]
        middle = tf.matmul(patches, tf.reshape(wide(a, g), [-1, a.shape[-1]]))
        return [
            (a, sliding_factor(layer, x, behind, tuple(a.shape), 1)),
            (b, matrix(middle, scaled)),
            *bias,
        ]


class ConvTransposeRule(KernelRule):
    """Conv1DTranspose, 2D and 3D: a convolution whose inputs and outputs have changed places."""

    def forward(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns the transposed convolution, and the inputs for the gradients."""
        outputs = keras.ops.conv_transpose(
            inputs,
            constant(layer.kernel),
            strides=list(layer.strides),
            padding=layer.padding,
            output_padding=layer.output_padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
        return with_bias(layer, outputs), inputs

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns patches(g)'x for the kernel, and the gradient of the bias."""
        x, g = channels_last(layer, tf.cast(saved, g.dtype), g)
        factor = sliding_factor(layer, g, x, tuple(layer.kernel.shape), 1)
        return [(layer.kernel, factor), *bias_gradient(layer, g)]


class DepthwiseConvRule(KernelRule):
    """DepthwiseConv1D and 2D: the kernel of an example is small, so its gradient is written out."""

    def forward(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns the depthwise convolution, and the inputs for the gradients."""
        return with_bias(layer, depthwise(layer, inputs, layer.kernel)), inputs

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of the kernel, written out, and of the bias."""
        x, g = channels_last(layer, tf.cast(saved, g.dtype), g)
        return [(layer.kernel, _depthwise_rows(layer, x, g)), *bias_gradient(layer, g)]


class SeparableConvRule(KernelRule):
    """SeparableConv1D and 2D: a depthwise convolution, then a matrix on the channels."""

    def forward(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns both convolutions in turn; saves the inputs and what is between the two."""
        (middle,) = channels_last(layer, depthwise(layer, inputs, layer.depthwise_kernel))
        pointwise = constant(layer.pointwise_kernel)
        outputs = keras.ops.matmul(middle, tf.reshape(pointwise, pointwise.shape[-2:]))
        if layer.data_format == "channels_first":
            outputs = tf.transpose(outputs, [0, layer.rank + 1, *range(1, layer.rank + 1)])
        return with_bias(layer, outputs), (inputs, middle)

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of both kernels and of the bias."""
        inputs, middle = (tf.cast(t, g.dtype) for t in saved)
        x, g = channels_last(layer, inputs, g)
        pointwise = layer.pointwise_kernel
        flat = tf.reshape(wide(pointwise, g), pointwise.shape[-2:])
        behind = tf.matmul(g, flat, transpose_b=True)
        channels = matrix(middle, g)
        return [
            (layer.depthwise_kernel, _depthwise_rows(layer, x, behind)),
            (pointwise, Outer(channels.a, channels.g, Layout(tuple(pointwise.shape)))),
            *bias_gradient(layer, g),
        ]


def depthwise(layer: keras.layers.Layer, inputs: tf.Tensor, kernel: keras.Variable) -> tf.Tensor:
    """Returns the depthwise convolution of `layer` with the value of `kernel`."""
    return keras.ops.depthwise_conv(
        inputs,
        constant(kernel),
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )


def with_bias(layer: keras.layers.Layer, outputs: tf.Tensor) -> tf.Tensor:
    """Returns `outputs` plus the bias of their channels, if the layer has one."""
    if not layer.use_bias:
        return outputs
    bias = constant(layer.bias)
    if layer.data_format == "channels_first":
        bias = tf.reshape(bias, [-1] + [1] * layer.rank)
    return keras.ops.add(outputs, bias)


def bias_gradient(layer: keras.layers.Layer, g: tf.Tensor) -> list[tuple[keras.Variable, Rows]]:
    """Returns the bias and its gradient, given that of the outputs, channels last."""
    return [(layer.bias, Rows(sum_to(g, tuple(layer.bias.shape))))] if layer.use_bias else []


def channels_last(layer: keras.layers.Layer, *tensors: tf.Tensor) -> list[tf.Tensor]:
    """Returns tensors in the layer's data format with their channels moved to the end."""
    if layer.data_format == "channels_last":
        return list(tensors)
    return [tf.transpose(t, [0, *range(2, layer.rank + 2), 1]) for t in tensors]


def sliding_factor(
    layer: Any, x: tf.Tensor, g: tf.Tensor, shape: tuple[int, ...], groups: int
) -> Rows | Outer:
    """Returns the gradient patches(x)'g of a kernel of shape `shape`, product or factors.

    Args:
        layer: The convolution: anything with the attributes that `Slices` reads.
        x: The side that the kernel slides over: inputs, or output gradients if transposed.
        g: The other side.
        shape: (*size, channels of x / groups, channels of g).
        groups: The number of groups of channels.
    """
    cells, out = dims(g)[1:-1], shape[-1] // groups
    slices = Slices(layer, x, cells, groups)
    positions = product(cells)
    g = tf.reshape(g, [dims(g)[0], positions, groups, out])
    g = tf.transpose(g, [0, 2, 1, 3]) if groups > 1 else g[:, None, :, 0]
    width = product(list(shape[:-1]))
    layout = Layout(shape)
    if groups > 1:
        layout = Layout(shape, (groups, width, out), (1, 0, 2))

    if not prefers_product(positions, width, out):
        patches = tf.concat([slices.at(k) for k in slices.offsets], axis=-1)
        return Outer(patches, g, layout)
    if groups > 1 or shape[-2] >= _THIN:
        parts = [[k] for k in slices.offsets]
    else:
        parts = [list(row) for _, row in itertools.groupby(slices.offsets, key=lambda k: k[:-1])]
    values: list[tf.Tensor] = []
    for part in parts:
        # Two at a time: all slices at once would be as many copies of the inputs, and one alone
        # leaves processors idle while it is copied.
        with tf.control_dependencies(values[-2:-1]):
            a = tf.concat([slices.at(k) for k in part], axis=-1)
            values.append(Outer(a, g, layout).as_rows().values)
    return Rows(tf.concat(values, axis=2), layout)


def _depthwise_rows(layer: keras.layers.Layer, x: tf.Tensor, g: tf.Tensor) -> Rows:
    """Returns the gradients of a kernel (*size, channels, multiplier), one offset at a time."""
    cells, channels = dims(g)[1:-1], x.shape[-1]
    slices = Slices(layer, x, cells)
    multiplier = g.shape[-1] // channels
    g = tf.reshape(g, [dims(g)[0], product(cells), channels, multiplier])
    values: list[tf.Tensor] = []
    for k in slices.offsets:
        # One after the other, because all products at once would be as many copies of the outputs.
        with tf.control_dependencies(values[-1:]):
            products = slices.at(k)[:, 0, :, :, None] * g
            values.append(tf.reduce_sum(products, axis=1, keepdims=True))
    return Rows(tf.concat(values, axis=1), Layout((*layer.kernel_size, channels, multiplier)))
