"""Each layer of the table, run as `fit` runs it: as a graph of a number of rows not known."""

import importlib
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf.clipping.rowwise import known_layers
from tests.clipping.every_layer import ARGUMENTS, V

ROWS = 6


def run_with(layer, shape):
    """The layer as a graph of a number of rows not known, its random state given."""
    traced = tf.function(
        lambda t: layer(t, training=True), input_signature=[tf.TensorSpec([None, *shape])]
    )
    generators = [g for part in layer._flatten_layers() for g in part._seed_generators]

    def run(x, attempt):
        for generator in generators:
            generator.state.assign([attempt, 7])
        return traced(x).numpy()

    return run


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_a_row_is_not_changed_by_others_where_their_number_is_not_known(name):
    """The same draws, other rows: of a row in the middle, and with another row in place 0."""
    if not hasattr(layers, name):
        pytest.skip("not in this Keras")
    arguments, shape = ARGUMENTS[name]
    layer = getattr(layers, name)(*(a() if callable(a) else a for a in arguments))
    inputs = keras.Input(shape)
    layer(inputs)
    run = run_with(layer, shape)
    random = np.random.default_rng(0)
    for attempt in range(3):
        one = random.uniform(0, 255, size=(ROWS, *shape)).astype("float32")
        found = run(one, attempt)
        assert len(found) == ROWS
        for kept in ([2], [1, 2, 3, 4, 5], [0, 1]):
            other = random.uniform(0, 90, size=one.shape).astype("float32")
            other[kept] = one[kept]
            np.testing.assert_allclose(run(other, attempt)[kept], found[kept], rtol=1e-4, atol=1e-3)


def test_a_mixer_of_unknown_numbers_of_rows_is_found_that_way():
    """The sweep above would have found it."""
    layer = layers.RandomElasticTransform(1.0, 0.2, value_range=(0, 255))
    run = run_with(layer, V)
    random = np.random.default_rng(0)
    one = random.uniform(0, 255, size=(ROWS, *V)).astype("float32")
    other = np.concatenate([255 - one[:1], one[1:]])
    assert not np.allclose(run(one, 3)[1:], run(other, 3)[1:], atol=1e-3)


_T5 = {"hidden_dim": 8, "key_value_dim": 4, "num_heads": 2, "dropout": 0.0}
_T5_BLOCK = {**_T5, "intermediate_dim": 5, "activation": "relu", "layer_norm_epsilon": 1e-6}
_ROFORMER = {"heads": 2, "head_size": 4}
_SMOL = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_bias": True,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True],
    "layer_types": ["full_attention"],
    "layer_idx": 0,
}
_T5_GEMMA = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 4.0,
    "attention_bias": True,
    "head_dim": 4,
    "initializer_range": 0.5,
    "attention_dropout": 0.0,
}
_T5_GEMMA_BLOCK = {
    **_T5_GEMMA,
    "rms_norm_eps": 1e-6,
    "intermediate_size": 5,
    "hidden_activation": "gelu_approximate",
    "dropout_rate": 0.0,
    "layer_type": "sliding_attention",
    "sliding_window": 2,
}
_X, _HEADS, _IMAGE = (5, 8), (5, 2, 4), (4, 4, 3)
_DINO = {"num_layers": 1, "hidden_dim": 8, "num_heads": 2, "intermediate_dim": 5}
_PATCHES = {"hidden_dim": 8, "patch_size": 2, "num_register_tokens": 2}
# Name -> settings, the shapes of an example's inputs, and its masks by the names of arguments.
HUB = {
    "layers.modeling.alibi_bias.AlibiBias": ({}, [(2, 5, 5)], {}),
    "models.deberta_v3.disentangled_attention_encoder.DisentangledAttentionEncoder": (
        {"intermediate_dim": 5, "num_heads": 2, "max_position_embeddings": 8, "bucket_size": 3},
        [_X, (6, 8)],
        {"padding_mask": (5,), "attention_mask": (5, 5)},
    ),
    "models.deberta_v3.disentangled_self_attention.DisentangledSelfAttention": (
        {"num_heads": 2, "hidden_dim": 8, "max_position_embeddings": 8, "bucket_size": 3}
        | {"dropout": 0.0},
        [_X, (6, 8)],
        {"attention_mask": (5, 5)},
    ),
    "models.deberta_v3.relative_embedding.RelativeEmbedding": (
        {"hidden_dim": 8, "bucket_size": 3},
        [_X],
        {},
    ),
    "models.deit.deit_layers.DeiTEmbeddings": (
        {"image_size": (4, 4), "patch_size": (2, 2), "hidden_dim": 8},
        [_IMAGE],
        {},
    ),
    "models.deit.deit_layers.DeiTEncoder": (_DINO, [_X], {}),
    "models.dinov2.dinov2_layers.DINOV2Embedding": (
        {**_PATCHES, "image_shape": (4, 4), "position_embedding_shape": (4, 4)},
        [_IMAGE],
        {"masks": (4,)},
    ),
    "models.dinov2.dinov2_layers.DINOV2Encoder": ({**_DINO, "use_swiglu_ffn": True}, [_X], {}),
    "models.dinov3.dinov3_layers.DINOV3Embedding": (_PATCHES, [_IMAGE], {"masks": (4,)}),
    "models.dinov3.dinov3_layers.DINOV3Encoder": (
        {**_DINO, "use_gated_mlp": True},
        [_X],
        {"attention_mask": (1, 5, 5)},
    ),
    "models.esm.esm_attention.ESMRotaryEmbedding": ({}, [_HEADS, _HEADS], {}),
    "models.esm.esm_attention.EsmSelfAttention": (_ROFORMER, [_X], {"attention_mask": (5,)}),
    "models.esm.esm_encoder.ESMEncoder": (
        {**_ROFORMER, "intermediate_size": 5},
        [_X],
        {"attention_mask": (5,)},
    ),
    "models.mit.mit_layers.HierarchicalTransformerEncoder": (
        {"project_dim": 8, "num_heads": 2, "sr_ratio": 2},
        [(16, 8)],
        {},
    ),
    "models.mit.mit_layers.OverlappingPatchingAndEmbedding": (
        {"project_dim": 8, "patch_size": 3, "stride": 2},
        [_IMAGE],
        {},
    ),
    "models.pali_gemma.pali_gemma_decoder_block.PaliGemmaDecoderBlock": (
        {"hidden_dim": 8, "intermediate_dim": 5, "head_dim": 4, "num_query_heads": 2}
        | {"num_key_value_heads": 1},
        [_X],
        {"padding_mask": (3,), "response_mask": (3,)},
    ),
    "models.pali_gemma.pali_gemma_vit.PaliGemmaVitEncoder": (
        {**_DINO, "patch_size": 2, "image_size": 4},
        [_IMAGE],
        {},
    ),
    "models.roformer_v2.roformer_v2_attention.RoformerAttention": (
        _ROFORMER,
        [_X],
        {"attention_mask": (5,)},
    ),
    "models.roformer_v2.roformer_v2_attention.RoformerNorm": ({}, [_X], {}),
    "models.roformer_v2.roformer_v2_attention.RoformrPositionalEmbedding": (
        {"output_dim": 4},
        [[_HEADS, _HEADS]],
        {},
    ),
    "models.roformer_v2.roformer_v2_encoder.RoformerV2Encoder": (
        {**_ROFORMER, "intermediate_size": 5},
        [_X],
        {"attention_mask": (5,)},
    ),
    "models.smollm3.smollm3_layers.SmolLM3DecoderLayer": (
        {**_SMOL, "intermediate_size": 5, "mlp_bias": True, "layer_norm_epsilon": 1e-6},
        [_X],
        {"decoder_padding_mask": (5,), "decoder_attention_mask": (5, 5)},
    ),
    "models.smollm3.smollm3_layers.SmolLM3MLP": (
        {"hidden_size": 8, "intermediate_size": 5, "mlp_bias": True},
        [_X],
        {},
    ),
    "models.smollm3.smollm3_layers.SmolLM3RotaryEmbedding": (
        {"hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 8}
        | {"rope_theta": 100.0, "partial_rotary_factor": 1.0},
        [_HEADS],
        {},
    ),
    "models.t5.t5_multi_head_attention.T5MultiHeadAttention": (
        {**_T5, "is_decoder": True, "use_relative_attention_bias": True},
        [_X],
        {"mask": (5, 5)},
    ),
    "models.t5.t5_transformer_layer.T5TransformerLayer": (
        {**_T5_BLOCK, "is_decoder": False, "use_relative_attention_bias": True},
        [_X],
        {"attention_mask": (5, 5)},
    ),
    "models.t5gemma.t5gemma_attention.T5GemmaAttention": (
        _T5_GEMMA,
        [_X],
        {"attention_mask": (1, 5, 5)},
    ),
    "models.t5gemma.t5gemma_decoder.T5GemmaDecoderLayer": (
        _T5_GEMMA_BLOCK,
        [[_X, _X]],
        {"self_attention_padding_mask": (5,), "cross_attention_padding_mask": (5,)},
    ),
    "models.t5gemma.t5gemma_encoder.T5GemmaEncoderLayer": (
        _T5_GEMMA_BLOCK,
        [_X],
        {"padding_mask": (5,)},
    ),
    "models.t5gemma.t5gemma_layers.T5GemmaMLP": (
        {"hidden_size": 8, "intermediate_size": 5, "hidden_activation": "gelu_approximate"}
        | {"dropout_rate": 0.0},
        [_X],
        {},
    ),
    "models.t5gemma2.t5gemma2_attention.T5Gemma2Attention": (
        _T5_GEMMA,
        [_X],
        {"attention_mask": (1, 5, 5)},
    ),
    "models.t5gemma2.t5gemma2_decoder.T5Gemma2DecoderLayer": (
        _T5_GEMMA_BLOCK,
        [[_X, _X]],
        {"self_attention_padding_mask": (5,), "cross_attention_padding_mask": (5,)},
    ),
    "models.t5gemma2.t5gemma2_encoder.T5Gemma2EncoderLayer": (
        _T5_GEMMA_BLOCK,
        [_X],
        {"padding_mask": (5,)},
    ),
    "models.whisper.whisper_backbone.Padder": ({}, [_X], {}),
    "models.whisper.whisper_decoder.WhisperDecoder": (
        {"intermediate_dim": 5, "num_heads": 2},
        [_X, _X],
        {"decoder_padding_mask": (5,), "encoder_padding_mask": (5,)},
    ),
    "models.whisper.whisper_encoder.WhisperEncoder": (
        {"intermediate_dim": 5, "num_heads": 2},
        [_X],
        {"padding_mask": (5,)},
    ),
}


def structures(name, of_input, of_mask):
    """Inputs and masks of a layer of `HUB`, made by functions of their shapes."""
    _, shapes, masks = HUB[name]
    inputs = [[of_input(t) for t in s] if isinstance(s, list) else of_input(s) for s in shapes]
    return inputs, {argument: of_mask(shape) for argument, shape in masks.items()}


@pytest.mark.parametrize("name", HUB)
def test_a_row_is_not_changed_by_others_in_layers_of_keras_hub(name):
    """As many rows as positions too, and as heads: an axis that is taken for another would fit."""
    pytest.importorskip("keras_hub")
    module, _, kind = f"keras_hub.src.{name}".rpartition(".")
    layer_class = getattr(importlib.import_module(module), kind)
    assert known_layers.condition_of(layer_class) is not None
    layer = layer_class(**HUB[name][0])
    random = np.random.default_rng(0)
    for rows in (5, 2, 6):
        inputs, masks = structures(
            name,
            lambda shape, rows=rows: random.normal(size=(rows, *shape)).astype("float32"),
            lambda shape, rows=rows: random.integers(0, 2, size=(rows, *shape)) == 1,
        )
        if name.endswith(("T5GemmaAttention", "T5Gemma2Attention")):  # its mask is added to scores
            masks = {"attention_mask": -1e9 * masks["attention_mask"].astype("float32")}
        layer(*inputs, **masks)
        for v in layer.trainable_variables:
            v.assign(random.normal(size=v.shape))
        spec = keras.tree.map_structure(
            lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), (inputs, masks)
        )
        traced = tf.function(
            lambda inputs, masks: (
                layer(*inputs, **masks, training=False)
                if "training" in inspect.signature(layer.call).parameters
                else layer(*inputs, **masks)
            )
        ).get_concrete_function(*spec)
        found = leaves(traced(*keras.tree.map_structure(tf.constant, (inputs, masks))))
        for kept in (0, rows - 1):
            others = keras.tree.map_structure(
                lambda t, kept=kept: tf.constant(changed(kept, t)),
                (inputs, masks),
            )
            for one, other in zip(found, leaves(traced(*others)), strict=True):
                assert one.shape[0] == rows
                np.testing.assert_allclose(one[kept], other[kept], rtol=1e-4, atol=1e-5)


def changed(kept, array):
    """All rows but one changed."""
    other = ~array if array.dtype == bool else array[::-1] + 1
    rows = (np.arange(len(array)) == kept).reshape([-1] + [1] * (array.ndim - 1))
    return np.where(rows, array, other)


def leaves(outputs):
    """The tensors among outputs; DeiT's encoder returns empty ones, too."""
    return [t for t in keras.tree.flatten(outputs) if t is not None and t.shape[0] != 0]
