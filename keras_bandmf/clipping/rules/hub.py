"""Clipping rules of keras_hub's own layers, found by name: keras_hub itself is never imported."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import MaskedLMHeadParts, kernel_of, table_of
from keras_bandmf.clipping.factors import Factor, Layout, Rows, Unsupported
from keras_bandmf.clipping.rules.base import LayerRule, constant, matrix
from keras_bandmf.clipping.rules.embedding import ReversibleEmbeddingRule, lookup
from keras_bandmf.clipping.rules.hub_deberta import RelativeEmbeddingRule
from keras_bandmf.clipping.rules.hub_t5 import T5AttentionRule, T5LayerNormRule
from keras_bandmf.clipping.rules.scale import LastAxisRule
from keras_bandmf.clipping.shapes import dims, sum_to


class RootMeanSquareRule(LastAxisRule):
    """LlamaLayerNorm and its like: x / rms(x) * (offset + scale) over the last axis, in float32."""

    def __init__(self, offset: float = 0.0):
        self.offset = offset

    def weights(self, layer: keras.layers.Layer) -> tuple[Any, Any]:
        """Returns the scale; there is no offset."""
        return layer.scale, None

    def normalized(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tf.Tensor:
        """Returns x / rms(x), computed in float32."""
        x = tf.cast(inputs, tf.float32)
        mean = tf.reduce_mean(tf.square(x), axis=-1, keepdims=True)
        return tf.cast(x * tf.math.rsqrt(mean + layer.epsilon), inputs.dtype)

    def forward(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns the scaled inputs plus `offset` times the normalized ones."""
        outputs, normalized = super().forward(layer, inputs)
        return outputs + self.offset * normalized, normalized


class LayerScaleRule(LastAxisRule):
    """DINOV2LayerScale and DINOV3LayerScale: the inputs times a vector, along the last axis."""

    def weights(self, layer: keras.layers.Layer) -> tuple[Any, Any]:
        """Returns the vector; there is no offset."""
        return layer.lambda1, None

    def normalized(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tf.Tensor:
        """Returns the inputs as they are."""
        return inputs


class PositionEmbeddingRule(LayerRule):
    """PositionEmbedding: the first rows of a table for every example, or rows by index."""

    def forward(
        self, layer: keras.layers.Layer, inputs: tf.Tensor, positions: Any = None
    ) -> tuple[tf.Tensor, Any]:
        """Returns rows of the table, for every example the first or those asked for."""
        table = constant(layer.position_embeddings)
        sizes = dims(inputs)
        if positions is None:
            return tf.broadcast_to(table[: sizes[-2]], sizes), None
        positions = tf.convert_to_tensor(positions)
        if positions.shape.rank != 2 or inputs.shape.rank != 3:
            raise Unsupported(f"{layer.path}: `positions` without an example axis")
        ids = tf.where(positions < 0, positions + layer.sequence_length, positions)
        ids = tf.broadcast_to(ids, sizes[:-1])  # one row of positions serves every example
        return tf.broadcast_to(tf.gather(table, ids), sizes), ids

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of the table."""
        table = layer.position_embeddings
        if saved is not None:
            return [(table, lookup(saved, g, layer.sequence_length))]
        between = list(range(1, g.shape.rank - 2))
        rows = tf.reduce_sum(g, axis=between) if between else g
        return [(table, Rows(rows, _FirstRows(layer.sequence_length)))]


class MaskedLMHeadRule(LayerRule):
    """MaskedLMHead: what is its own is the bias, and the kernel if it has no token embedding."""

    def forward(
        self, layer: keras.layers.Layer, inputs: tf.Tensor, mask_positions: Any
    ) -> tuple[tf.Tensor, Any]:
        """Returns the logits at the masked places; saves what the last kernel is applied to."""
        x = tf.gather(inputs, tf.cast(mask_positions, tf.int32), batch_dims=1)
        parts = MaskedLMHeadParts(layer)
        x = parts.layer_norm(parts.dense(x))
        if layer.token_embedding:
            outputs = layer.token_embedding(x, reverse=True)
        else:
            outputs = keras.ops.matmul(x, constant(kernel_of(layer)))
        return keras.ops.cast(outputs, layer.compute_dtype) + constant(parts.bias), x

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of the bias, and of the kernel if the layer has its own."""
        bias = MaskedLMHeadParts(layer).bias
        found: list[tuple[keras.Variable, Factor]] = [(bias, Rows(sum_to(g, tuple(bias.shape))))]
        if not layer.token_embedding:
            found.append((kernel_of(layer), matrix(tf.cast(saved, g.dtype), g)))
        return found


class ViTEmbeddingRule(LayerRule):
    """ViTPatchingAndEmbedding: class token and positions, which belong to no example's inputs.

    PaliGemmaVitEmbeddings is the same without a class token. The layer looks its positions up once
    for the whole batch; here they are added to every example, so that each has a gradient of its
    own.
    """

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns a reason for LoRA or quantization on the table of positions."""
        return "LoRA is enabled on the positions" if _plain_table(layer) is None else None

    def uses(self, layer: keras.layers.Layer) -> list[keras.Variable]:
        """Returns the table of positions, which an inner layer owns."""
        return [_plain_table(layer)]

    def forward(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns the patches with class token and positions added to every example."""
        patches = layer.patch_embedding(inputs)
        if layer.patch_embedding.data_format == "channels_first":
            patches = tf.transpose(patches, [0, 2, 3, 1])
        sizes = dims(patches)
        patches = tf.reshape(patches, [sizes[0], layer.num_patches, sizes[-1]])
        if _has_class_token(layer):
            token = tf.cast(constant(layer.class_token), patches.dtype)
            token = tf.broadcast_to(token, [sizes[0], 1, sizes[-1]])
            patches = tf.concat([token, patches], axis=1)
        positions = constant(layer.position_embedding.embeddings)
        return patches + tf.cast(positions, patches.dtype), None

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of the positions and of the class token."""
        found = [(_plain_table(layer), Rows(g))]
        if _has_class_token(layer):
            shape = tuple(layer.class_token.shape)
            found.append((layer.class_token, Rows(g[:, :1], Layout(shape))))
        return found


# Class by module and name, as `rule_by_name` asks for them.
_FLOAT32_RMS = RootMeanSquareRule()
_RULES: dict[str, LayerRule] = {
    "keras_hub.src.layers.modeling.masked_lm_head.MaskedLMHead": MaskedLMHeadRule(),
    "keras_hub.src.layers.modeling.position_embedding.PositionEmbedding": PositionEmbeddingRule(),
    "keras_hub.src.layers.modeling.reversible_embedding.ReversibleEmbedding": (
        ReversibleEmbeddingRule()
    ),
    "keras_hub.src.models.deberta_v3.relative_embedding.RelativeEmbedding": RelativeEmbeddingRule(),
    "keras_hub.src.models.dinov2.dinov2_layers.DINOV2LayerScale": LayerScaleRule(),
    "keras_hub.src.models.dinov3.dinov3_layers.DINOV3LayerScale": LayerScaleRule(),
    "keras_hub.src.models.gemma.rms_normalization.RMSNormalization": RootMeanSquareRule(offset=1.0),
    "keras_hub.src.models.gemma3.gemma3_layers.RMSNormalization": RootMeanSquareRule(offset=1.0),
    "keras_hub.src.models.gpt_oss.gpt_oss_layer_norm.GptOssLayerNormalization": _FLOAT32_RMS,
    "keras_hub.src.models.llama.llama_layernorm.LlamaLayerNorm": _FLOAT32_RMS,
    "keras_hub.src.models.mistral.mistral_layer_norm.MistralLayerNormalization": _FLOAT32_RMS,
    "keras_hub.src.models.mixtral.mixtral_layer_norm.MixtralLayerNormalization": _FLOAT32_RMS,
    "keras_hub.src.models.pali_gemma.pali_gemma_vit.PaliGemmaVitEmbeddings": ViTEmbeddingRule(),
    "keras_hub.src.models.phi3.phi3_layernorm.Phi3LayerNorm": _FLOAT32_RMS,
    "keras_hub.src.models.qwen.qwen_layernorm.QwenLayerNorm": _FLOAT32_RMS,
    "keras_hub.src.models.qwen3.qwen3_layernorm.Qwen3LayerNorm": _FLOAT32_RMS,
    "keras_hub.src.models.roformer_v2.roformer_v2_attention.RoformerNorm": _FLOAT32_RMS,
    "keras_hub.src.models.t5.t5_layer_norm.T5LayerNorm": T5LayerNormRule(),
    "keras_hub.src.models.t5.t5_multi_head_attention.T5MultiHeadAttention": T5AttentionRule(),
    "keras_hub.src.models.vit.vit_layers.ViTPatchingAndEmbedding": ViTEmbeddingRule(),
}


def rule_by_name(layer_class: type) -> LayerRule | None:
    """Returns the rule of one of keras_hub's classes, or None.

    Args:
        layer_class: Any class.

    Returns:
        A rule only if the class is the very object that its module of that name holds: a class that
        is merely called the same, in a user's module or in a function, has none.
    """
    rule = _RULES.get(f"{layer_class.__module__}.{layer_class.__qualname__}")
    module = sys.modules.get(layer_class.__module__)
    if getattr(module, layer_class.__qualname__, None) is not layer_class:
        return None
    return rule


@dataclasses.dataclass(frozen=True)
class _FirstRows:
    """Layout of gradients that reach only the first rows of a table of `count` rows."""

    count: int

    def __call__(self, total: tf.Tensor) -> tf.Tensor:
        return tf.pad(total, [[0, self.count - dims(total)[0]], [0, 0]])


def _has_class_token(layer: keras.layers.Layer) -> bool:
    return getattr(layer, "use_class_token", False)


def _plain_table(layer: keras.layers.Layer) -> keras.Variable | None:
    table = layer.position_embedding
    return None if table.lora_enabled or table.quantization_mode is not None else table_of(table)
