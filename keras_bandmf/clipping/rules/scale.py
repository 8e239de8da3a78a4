"""Clipping rules of normalizations and other elementwise scales: gradients written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf.clipping.factors import Factor, Rows
from keras_bandmf.clipping.rules.base import LayerRule, constant
from keras_bandmf.clipping.shapes import dims, sum_to


class ScaleRule(LayerRule):
    """Normalizations: outputs = gamma * normalized + beta, computed in at least float32."""

    def normalized(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tf.Tensor:
        """Returns the inputs, normalized example by example."""
        raise NotImplementedError

    def weights(self, layer: keras.layers.Layer) -> tuple[Any, Any]:
        """Returns (gamma, beta), with None for one that the layer does without."""
        return layer.gamma, layer.beta

    def axes(self, layer: keras.layers.Layer, rank: int) -> list[int]:
        """Returns the axes that gamma and beta have, of inputs of `rank` axes."""
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        return sorted(a % rank for a in axes)

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns a reason for a layer that normalizes across examples."""
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        return "it normalizes over axis 0" if 0 in axes else None

    def forward(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns gamma * normalized + beta, and the normalized inputs for the gradients."""
        x = tf.cast(inputs, tf.float64 if inputs.dtype == tf.float64 else tf.float32)
        normalized = self.normalized(layer, x)
        axes = self.axes(layer, x.shape.rank)
        shape = [x.shape[i] if i in axes else 1 for i in range(x.shape.rank)]
        gamma, beta = self.weights(layer)
        outputs = normalized
        if gamma is not None:
            outputs *= tf.cast(tf.reshape(constant(gamma), shape), x.dtype)
        if beta is not None:
            outputs += tf.cast(tf.reshape(constant(beta), shape), x.dtype)
        # A layer without gamma and beta has nothing to tap; identity keeps the tensor its own.
        return tf.identity(outputs), normalized

    def finish(self, layer: keras.layers.Layer, outputs: tf.Tensor, saved: Any) -> tf.Tensor:
        """Casts the outputs as Keras's layer does."""
        return keras.ops.cast(outputs, layer.compute_dtype)

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of gamma and beta, written out."""
        normalized = tf.cast(saved, g.dtype)
        axes = self.axes(layer, g.shape.rank)
        others = [i for i in range(1, g.shape.rank) if i not in axes]
        gamma, beta = self.weights(layer)
        found: list[tuple[keras.Variable, Factor]] = []
        if gamma is not None:
            found.append((gamma, Rows(tf.reduce_sum(normalized * g, axis=others))))
        if beta is not None:
            found.append((beta, Rows(tf.reduce_sum(g, axis=others))))
        return found


class LayerNormalizationRule(ScaleRule):
    """LayerNormalization over any axes but the first."""

    def normalized(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tf.Tensor:
        """Returns the inputs normalized over the layer's axes."""
        return keras.ops.layer_normalization(
            inputs,
            None,
            None,
            axis=layer.axis,
            epsilon=layer.epsilon,
            **({"rms_scaling": True} if layer.rms_scaling else {}),
        )


class GroupNormalizationRule(ScaleRule):
    """GroupNormalization; the statistics are those of one example."""

    def normalized(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tf.Tensor:
        """Returns the inputs normalized over each group of channels of an example."""
        axis = layer.axis % inputs.shape.rank
        sizes = dims(inputs)
        grouped = sizes[:axis] + [layer.groups, sizes[axis] // layer.groups] + sizes[axis + 1 :]
        x = tf.reshape(inputs, grouped)
        over = [i for i in range(1, x.shape.rank) if i != axis]
        mean, variance = tf.nn.moments(x, over, keepdims=True)
        return tf.reshape((x - mean) * tf.math.rsqrt(variance + layer.epsilon), sizes)


class RMSNormalizationRule(ScaleRule):
    """RMSNormalization over any axes but the first."""

    def weights(self, layer: keras.layers.Layer) -> tuple[Any, Any]:
        """Returns the scale; there is no offset."""
        return layer.scale, None

    def normalized(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tf.Tensor:
        """Returns the inputs divided by their root mean square."""
        return keras.ops.rms_normalization(inputs, axis=layer.axis, epsilon=layer.epsilon)


class LastAxisRule(ScaleRule):
    """Layers without an `axis`, which always work along the last one."""

    def axes(self, layer: keras.layers.Layer, rank: int) -> list[int]:
        """Returns the last axis."""
        return [rank - 1]

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns None."""
        return None


class PReLURule(LayerRule):
    """PReLU: outputs = relu(x) - alpha * relu(-x)."""

    def forward(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns relu(x) - alpha * relu(-x), and relu(-x) for the gradients."""
        below = keras.ops.relu(-inputs)
        return keras.ops.relu(inputs) - constant(layer.alpha) * below, below

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns -relu(-x) g, summed over what shares an alpha."""
        return [(layer.alpha, Rows(sum_to(-tf.cast(saved, g.dtype) * g, tuple(layer.alpha.shape))))]
