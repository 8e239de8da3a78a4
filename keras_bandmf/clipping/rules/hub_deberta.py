"""The clipping rule of the relative positions of keras_hub's DeBERTa."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf.clipping.factors import Factor, Rows
from keras_bandmf.clipping.rules.base import LayerRule, constant
from keras_bandmf.clipping.rules.scale import LayerNormalizationRule
from keras_bandmf.clipping.shapes import dims

_NORMALIZATION = LayerNormalizationRule()


class RelativeEmbeddingRule(LayerRule):
    """RelativeEmbedding: a table, normalized, that every example gets whole.

    The layer normalizes its table once for the whole batch, so the rule stands for the layer
    normalization inside, too: its scale and offset get a gradient for each example.
    """

    whole = True

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns a reason if the layer inside is not the one that keras_hub puts there."""
        same = type(layer.layer_norm) is keras.layers.LayerNormalization
        return None if same else f"its `layer_norm` is a {type(layer.layer_norm).__name__}"

    def uses(self, layer: keras.layers.Layer) -> list[keras.Variable]:
        """Returns the scale and the offset of the normalization."""
        return layer.layer_norm.trainable_variables

    def forward(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns the normalized table for every example, and it alone before the scale."""
        table = constant(layer.rel_embeddings)
        outputs, normalized = _NORMALIZATION.forward(layer.layer_norm, table[None])
        return tf.broadcast_to(outputs, [dims(inputs)[0], *table.shape]), normalized

    def finish(self, layer: keras.layers.Layer, outputs: tf.Tensor, saved: Any) -> tf.Tensor:
        """Casts as the normalization does."""
        return keras.ops.cast(outputs, layer.layer_norm.compute_dtype)

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of scale and offset, and by them those of the table."""
        norm, table = layer.layer_norm, layer.rel_embeddings
        normalized, values = tf.cast(saved, g.dtype), tf.cast(constant(table), g.dtype)
        _, variance = tf.nn.moments(values, [-1], keepdims=True)
        scaled = g * tf.cast(constant(norm.gamma), g.dtype)
        # What changes only the mean or the length of a row of the table has no effect.
        mean = tf.reduce_mean(scaled, axis=-1, keepdims=True)
        along = tf.reduce_mean(scaled * normalized, axis=-1, keepdims=True)
        of_table = (scaled - mean - along * normalized) * tf.math.rsqrt(variance + norm.epsilon)
        return [*_NORMALIZATION.gradients(norm, saved, g), (table, Rows(of_table))]
