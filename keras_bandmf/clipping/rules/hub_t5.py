"""Clipping rules of keras_hub's T5: its normalization and its relative attention bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import t5_bucket
from keras_bandmf.clipping.factors import Factor, Rows, Unsupported
from keras_bandmf.clipping.rules.base import LayerRule, constant
from keras_bandmf.clipping.rules.scale import LastAxisRule
from keras_bandmf.clipping.shapes import dims


class T5LayerNormRule(LastAxisRule):
    """T5LayerNorm: x / rms(x) * weight over the last axis."""

    def weights(self, layer: keras.layers.Layer) -> tuple[Any, Any]:
        """Returns the weight; there is no offset."""
        return layer.weight, None

    def normalized(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tf.Tensor:
        """Returns x / rms(x)."""
        mean = tf.reduce_mean(tf.square(inputs), axis=-1, keepdims=True)
        return inputs * tf.math.rsqrt(mean + layer.epsilon)


class T5AttentionRule(LayerRule):
    """T5MultiHeadAttention: the table of biases by relative position, in the first of a stack.

    The layer looks its biases up once for the whole batch. Here every example gets biases of its
    own, and the layer then does what it does in all blocks but the first: it uses the biases that
    it is called with. The projections inside have rules of their own.
    """

    def forward(
        self,
        layer: keras.layers.Layer,
        inputs: tf.Tensor,
        mask: Any = None,
        key_value_states: Any = None,
        position_bias: Any = None,
        training: bool | None = False,
    ) -> tuple[tf.Tensor, Any]:
        """Returns the biases of every example, (batch, heads, queries, keys), before the mask.

        Raises:
            Unsupported: If the layer is called with biases in place of those of its own table.
        """
        if position_bias is not None:
            raise Unsupported(f"{layer.path}: called with `position_bias`, with a table of its own")
        keys = inputs if key_value_states is None else key_value_states
        count, (queries, keys) = dims(inputs)[0], (dims(t)[1] for t in (inputs, keys))
        table = constant(layer.relative_attention_bias)
        distances = tf.range(1 - queries, keys)
        # By distance first: one look-up for each diagonal.
        by_distance = tf.gather(table, t5_bucket(layer, distances))
        places = queries - 1 - tf.range(queries)[:, None] + tf.range(keys)[None, :]
        bias = tf.transpose(tf.gather(by_distance, places), [2, 0, 1])
        bias = tf.broadcast_to(bias, [count, layer.num_heads, queries, keys])
        return bias, (inputs, mask, key_value_states, training)

    def finish(self, layer: keras.layers.Layer, outputs: tf.Tensor, saved: Any) -> Any:
        """Runs the layer with these biases, into which the mask is folded as the layer does."""
        inputs, mask, key_value_states, training = saved
        if mask is not None:
            blocked = 1.0 - tf.cast(mask, outputs.dtype)
            outputs = outputs + blocked[:, None] * tf.constant(-1e9, outputs.dtype)
        return type(layer).call(
            layer,
            inputs,
            key_value_states=key_value_states,
            position_bias=outputs,
            training=training,
        )

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns g added up by bucket, (batch, buckets, heads)."""
        table = layer.relative_attention_bias
        queries, keys = dims(g)[2:]
        buckets = t5_bucket(layer, tf.range(1 - queries, keys))
        which = tf.one_hot(buckets, table.shape[0], dtype=g.dtype)
        return [(table, Rows(tf.einsum("bhd,dr->brh", diagonal_sums(g), which)))]


def diagonal_sums(matrices: tf.Tensor) -> tf.Tensor:
    """Returns the sums along all diagonals of matrices, from the lower left to the upper right.

    Args:
        matrices: Shape (..., rows, columns).

    Returns:
        Shape (..., rows + columns - 1). Entry d is the sum of what has column - row = d - rows + 1.
    """
    *lead, rows, columns = dims(matrices)
    # A row of zeros behind each row, one of which is then left out: each row moves on by one.
    padding = [[0, 0]] * (len(lead) + 1) + [[0, rows]]
    padded = tf.pad(tf.reverse(matrices, [-2]), padding)
    flat = tf.reshape(padded, [*lead, rows * (columns + rows)])
    skewed = tf.reshape(flat[..., : rows * (columns + rows - 1)], [*lead, rows, columns + rows - 1])
    return tf.reduce_sum(skewed, axis=-2)
