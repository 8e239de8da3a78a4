"""Clipping rules of tables: Embedding and ReversibleEmbedding, LoRA included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import set_keras_mask, table_of
from keras_bandmf.clipping.factors import Factor, Lookup
from keras_bandmf.clipping.rules.base import LinearRule, constant, lora_scale, matrix, wide
from keras_bandmf.clipping.shapes import dims, positions, product


class EmbeddingRule(LinearRule):
    """Embedding on (batch, ...) integers."""

    def linear(self, layer: keras.layers.Layer, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Returns the rows of a table."""
        return keras.ops.take(kernel, inputs, axis=0)

    def kernel_factor(
        self, layer: keras.layers.Layer, inputs: tf.Tensor, g: tf.Tensor, shape: tuple[int, ...]
    ) -> Factor:
        """Returns g, added to the rows that were read."""
        return lookup(inputs, g, shape[0])

    def forward(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns the rows of the table, and their numbers for the gradients."""
        if inputs.dtype not in (tf.int32, tf.int64):
            inputs = tf.cast(inputs, tf.int32)
        ids = tf.where(inputs < 0, inputs + layer.input_dim, inputs)
        return self.linear(layer, ids, constant(layer.embeddings)), ids

    def finish(self, layer: keras.layers.Layer, outputs: tf.Tensor, saved: Any) -> tf.Tensor:
        """Casts the rows as Keras's layer does."""
        return keras.ops.cast(outputs, layer.compute_dtype)

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of the table, or of LoRA's two factors."""
        if not layer.lora_enabled:
            table = table_of(layer)
            return [(table, self.kernel_factor(layer, saved, g, tuple(table.shape)))]
        # Row id of the table is W[id] + s A[id] B.
        a, b = layer.lora_embeddings_a, layer.lora_embeddings_b
        scaled = lora_scale(layer) * g
        return [
            (a, lookup(saved, tf.matmul(scaled, wide(b, g), transpose_b=True), layer.input_dim)),
            (b, matrix(tf.gather(wide(a, g), saved), scaled)),
        ]


class ReversibleEmbeddingRule(EmbeddingRule):
    """ReversibleEmbedding in both directions; `merged` adds them up, cross term included."""

    def forward(
        self, layer: keras.layers.Layer, inputs: tf.Tensor, reverse: bool = False
    ) -> tuple[tf.Tensor, Any]:
        """Returns rows of the table, or logits from its transpose with `reverse=True`."""
        if not reverse:
            outputs, ids = super().forward(layer, inputs)
            return outputs, (False, ids, inputs)
        kernel = constant(layer.embeddings if layer.tie_weights else layer.reverse_embeddings)
        if layer.reverse_dtype is not None:
            inputs = keras.ops.cast(inputs, layer.reverse_dtype)
            kernel = keras.ops.cast(kernel, layer.reverse_dtype)
        if layer.tie_weights:
            kernel = keras.ops.transpose(kernel)
        return keras.ops.matmul(inputs, kernel), (True, inputs, None)

    def finish(self, layer: keras.layers.Layer, outputs: tf.Tensor, saved: Any) -> tf.Tensor:
        """Casts rows and attaches their mask; caps logits where the layer does."""
        reverse, _, ids = saved
        if reverse:
            cap = getattr(layer, "logit_soft_cap", None)
            return outputs if cap is None else keras.ops.tanh(outputs / cap) * cap
        outputs = super().finish(layer, outputs, saved)
        if layer.mask_zero:
            # Keras's layer sets the mask in `call`, not in `compute_mask`.
            set_keras_mask(outputs, keras.ops.not_equal(ids, 0))
        return outputs

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of the table, whichever way it was used."""
        reverse, inputs, _ = saved
        if not reverse:
            return super().gradients(layer, inputs, g)
        x = tf.cast(inputs, g.dtype)
        if not layer.tie_weights:
            return [(layer.reverse_embeddings, matrix(x, g))]
        if not layer.lora_enabled:
            # Logits are x E': the table's gradient is g'x, its rows those of the vocabulary.
            return [(table_of(layer), matrix(g, x))]
        a, b = layer.lora_embeddings_a, layer.lora_embeddings_b
        scaled = lora_scale(layer) * g
        return [
            (a, matrix(scaled, tf.matmul(x, wide(b, g), transpose_b=True))),
            (b, matrix(tf.matmul(scaled, wide(a, g)), x)),
        ]


def nearest_ids(ids: tf.Tensor, rows: int) -> tf.Tensor:
    """Replaces ids that a table of `rows` rows does not have by the nearest, as XLA reads them.

    Elsewhere the forward pass refuses them on a CPU and reads zeros on a GPU; norms and sums must
    not disagree on which row they belong to.
    """
    return tf.clip_by_value(ids, 0, rows - 1)


def lookup(ids: tf.Tensor, g: tf.Tensor, rows: int) -> Lookup:
    """Returns the gradients of a table read at `ids` (batch, ...), for g (batch, ..., width)."""
    sizes = dims(ids)
    flat = tf.reshape(nearest_ids(ids, rows), [sizes[0], product(sizes[1:])])
    flat = tf.cast(flat, tf.int32)
    return Lookup(flat, positions(g)[:, 0], rows)
