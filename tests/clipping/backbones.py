"""The backbones of keras_hub in their smallest sizes, none of which loads anything."""

import keras
import numpy as np

from tests.clipping import backbones_of_parts

VOCABULARY, LENGTH = 50, 6
_TEXT = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 24,
}
_QUERIES = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 24,
}
_EXPERTS = {"num_experts": 3, "top_k": 2}
_MOE = {**_EXPERTS, "moe_intermediate_dim": 8}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
_SMOL = {
    "vocabulary_size": VOCABULARY,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True, True],
    "layer_types": ["full_attention", "full_attention"],
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 16,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
}
_TWO_SIDES = {
    "vocabulary_size": VOCABULARY,
    "query_pre_attn_scalar": 4.0,
    **{
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "hidden_dim": 16,
            "intermediate_dim": 24,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "layer_types": ["full_attention", "full_attention"],
        }.items()
    },
}
_PATCHES = {
    "image_shape": (8, 8, 3),
    "patch_size": (4, 4),
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
}
_DINO = {
    "image_shape": (8, 8, 3),
    "patch_size": 4,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 24,
}
# Name -> arguments. Those of text come first.
ARGUMENTS = {
    "AlbertBackbone": {**_TEXT, "embedding_dim": 8},
    "BartBackbone": _TEXT,
    "BertBackbone": _TEXT,
    "BloomBackbone": _TEXT,
    "DebertaV3Backbone": {**_TEXT, "max_sequence_length": 16, "bucket_size": 4},
    "DistilBertBackbone": _TEXT,
    "ESM2Backbone": _TEXT,
    "ESMBackbone": _TEXT,
    "EdRecBackbone": {
        "vocab_size": VOCABULARY,
        "num_layers_enc": 2,
        "num_layers_dec": 2,
        "hidden_dim": 16,
        "intermediate_dim": 24,
        "num_heads": 2,
    },
    "ElectraBackbone": {
        **{name: value for name, value in _TEXT.items() if name != "vocabulary_size"},
        "vocab_size": VOCABULARY,
        "embedding_dim": 8,
    },
    "FNetBackbone": {name: value for name, value in _TEXT.items() if name != "num_heads"},
    "FalconBackbone": {
        **{name: value for name, value in _TEXT.items() if name != "num_heads"},
        "num_attention_heads": 2,
    },
    "GPT2Backbone": _TEXT,
    "GPTNeoXBackbone": _TEXT,
    "Gemma3Backbone": {
        **_QUERIES,
        "image_size": 8,
        "head_dim": 4,
        "use_sliding_window_attention": True,
        "sliding_window_size": 4,
    },
    "GemmaBackbone": {**_QUERIES, "head_dim": 4},
    "GptOssBackbone": {**_QUERIES, **_EXPERTS},
    "Llama3Backbone": _QUERIES,
    "LlamaBackbone": _QUERIES,
    "MistralBackbone": _QUERIES,
    "MixtralBackbone": {**_QUERIES, **_EXPERTS},
    "OPTBackbone": _TEXT,
    "Phi3Backbone": _QUERIES,
    "Qwen2Backbone": _QUERIES,
    "Qwen3Backbone": {**_QUERIES, "head_dim": 4},
    "Qwen3MoeBackbone": {**_QUERIES, **_MOE, "head_dim": 4},
    "Qwen3_5Backbone": {**_QUERIES, **_LINEAR, "head_dim": 4, "partial_rotary_factor": 1.0},
    "QwenBackbone": _QUERIES,
    "QwenMoeBackbone": {**_QUERIES, **_MOE, "shared_expert_intermediate_dim": 8},
    "RWKV7Backbone": {
        "vocabulary_size": VOCABULARY,
        "num_layers": 2,
        "hidden_size": 16,
        "head_size": 8,
        "intermediate_dim": 24,
        "gate_lora": 4,
        "mv_lora": 4,
        "aaa_lora": 4,
        "decay_lora": 4,
    },
    "RobertaBackbone": _TEXT,
    "RoformerV2Backbone": {**_TEXT, "head_size": 8},
    "SmolLM3Backbone": _SMOL,
    "SmolLMBackbone": _SMOL,
    "T5Backbone": _TEXT,
    "T5GemmaBackbone": _TWO_SIDES,
    "XLMRobertaBackbone": _TEXT,
    "XLNetBackbone": _TEXT,
    "DINOV2Backbone": {**_DINO, "position_embedding_shape": (8, 8, 3)},
    "DINOV3Backbone": _DINO,
    "DeiTBackbone": {**_PATCHES, "intermediate_dim": 24},
    "DenseNetBackbone": {
        "stackwise_num_repeats": [1, 1],
        "image_shape": (32, 32, 3),
        "growth_rate": 4,
    },
    "MiTBackbone": {
        "layerwise_depths": [1, 1],
        "num_layers": 2,
        "layerwise_num_heads": [1, 2],
        "layerwise_sr_ratios": [2, 1],
        "max_drop_path_rate": 0.0,
        "layerwise_patch_sizes": [3, 3],
        "layerwise_strides": [2, 2],
        "hidden_dims": [8, 16],
        "image_shape": (16, 16, 3),
    },
    "ResNetBackbone": {
        "input_conv_filters": [64],
        "input_conv_kernel_sizes": [3],
        "stackwise_num_filters": [64, 64],
        "stackwise_num_blocks": [1, 1],
        "stackwise_num_strides": [1, 2],
        "block_type": "basic_block",
        "image_shape": (16, 16, 3),
    },
    "SwinTransformerBackbone": {
        "image_shape": (16, 16, 3),
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (2, 2),
        "window_size": 2,
        "patch_size": 2,
        "drop_path": 0.0,
    },
    "VGGBackbone": {
        "stackwise_num_repeats": [1, 1],
        "stackwise_num_filters": [4, 8],
        "image_shape": (16, 16, 3),
    },
    "ViTBackbone": {**_PATCHES, "mlp_dim": 24},
    "ViTDetBackbone": {
        "hidden_size": 16,
        "num_layers": 2,
        "intermediate_dim": 24,
        "num_heads": 2,
        "global_attention_layer_indices": [1],
        "image_shape": (16, 16, 3),
        "patch_size": 4,
        "num_output_channels": 8,
        "window_size": 2,
    },
    "CSPNetBackbone": {
        "stem_filters": 8,
        "stem_kernel_size": 3,
        "stem_strides": 1,
        "stackwise_depth": [1, 1],
        "stackwise_strides": 2,
        "stackwise_num_filters": [8, 8],
        "block_type": "dark_block",
        "stage_type": "csp",
        "block_ratio": [0.5],
        "stem_padding": "same",
        "image_shape": (16, 16, 3),
    },
    "EfficientNetBackbone": {
        "stackwise_kernel_sizes": [3, 3],
        "stackwise_num_repeats": [1, 1],
        "stackwise_input_filters": [8, 8],
        "stackwise_output_filters": [8, 8],
        "stackwise_expansion_ratios": [1, 2],
        "stackwise_squeeze_and_excite_ratios": [0.0, 0.25],
        "stackwise_strides": [1, 2],
        "stackwise_block_types": ["fused", "unfused"],
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "num_features": 16,
        "input_shape": (16, 16, 3),
    },
    "FluxBackbone": {
        "input_channels": 4,
        "hidden_size": 16,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [2, 4, 2],
        "theta": 10_000,
        "use_bias": True,
        "guidance_embed": True,
        "image_shape": (5, 4),
        "text_shape": (3, 4),
        "image_ids_shape": (5, 3),
        "text_ids_shape": (3, 3),
        "y_shape": (4,),
    },
    "Gemma3nBackbone": {
        "text_vocab_size": VOCABULARY,
        "text_hidden_size": 16,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": [24, 24],
        "hidden_activation": "gelu_approximate",
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 4,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 4,
        "altup_num_inputs": 2,
        "laurel_rank": 2,
    },
    "Gemma4Backbone": {**_QUERIES, "image_size": 8, "head_dim": 4, "sliding_window_size": 4},
    "HGNetV2Backbone": {
        "depths": [1],
        "embedding_size": 8,
        "hidden_sizes": [16],
        "stem_channels": [3, 8, 8],
        "hidden_act": "relu",
        "use_learnable_affine_block": True,
        "stackwise_stage_filters": [[8, 8, 16, 1, 1, 3]],
        "apply_downsample": [False],
        "use_lightweight_conv_block": [False],
        "image_shape": (16, 16, 3),
    },
    "MobileNetBackbone": {
        "stackwise_expansion": [[8], [8]],
        "stackwise_num_blocks": [1, 1],
        "stackwise_num_filters": [[8], [8]],
        "stackwise_kernel_size": [[3], [3]],
        "stackwise_num_strides": [[2], [1]],
        "stackwise_se_ratio": [[None], [0.25]],
        "stackwise_activation": [["relu"], ["relu"]],
        "stackwise_padding": [[1], [1]],
        "output_num_filters": 8,
        "depthwise_filters": 8,
        "depthwise_stride": 1,
        "depthwise_residual": False,
        "squeeze_and_excite": 0.5,
        "last_layer_filter": 8,
        "input_num_filters": 8,
        "image_shape": (16, 16, 3),
    },
    "MobileNetV5Backbone": {
        "stackwise_block_types": [["er"], ["uir"]],
        "stackwise_num_blocks": [1, 1],
        "stackwise_num_filters": [[8], [8]],
        "stackwise_strides": [[2], [1]],
        "stackwise_act_layers": [["relu"], ["relu"]],
        "stackwise_exp_ratios": [[2.0], [2.0]],
        "stackwise_se_ratios": [[0.0], [0.0]],
        "stackwise_dw_kernel_sizes": [[0], [3]],
        "stackwise_dw_start_kernel_sizes": [[0], [0]],
        "stackwise_dw_end_kernel_sizes": [[0], [0]],
        "stackwise_exp_kernel_sizes": [[3], [0]],
        "stackwise_pw_kernel_sizes": [[1], [0]],
        "stackwise_num_heads": [[0], [0]],
        "stackwise_key_dims": [[0], [0]],
        "stackwise_value_dims": [[0], [0]],
        "stackwise_kv_strides": [[0], [0]],
        "stackwise_use_cpe": [[False], [False]],
        "stem_size": 8,
        "use_msfa": False,
        "image_shape": (16, 16, 3),
    },
    "MoonshineBackbone": {
        "vocabulary_size": VOCABULARY,
        "filter_dim": 16,
        "encoder_num_layers": 1,
        "decoder_num_layers": 1,
        "hidden_dim": 16,
        "intermediate_dim": 24,
        "encoder_num_heads": 2,
        "decoder_num_heads": 2,
        "partial_rotary_factor": 0.5,
    },
    "PaliGemmaBackbone": {
        **_QUERIES,
        "image_size": 8,
        "head_dim": 4,
        "vit_patch_size": 4,
        "vit_num_heads": 2,
        "vit_hidden_dim": 16,
        "vit_num_layers": 1,
        "vit_intermediate_dim": 24,
    },
    "Qwen3_5MoeBackbone": {
        "vocabulary_size": VOCABULARY,
        "num_layers": 4,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_dim": 16,
        "moe_intermediate_dim": 8,
        "shared_expert_intermediate_size": 8,
        **_EXPERTS,
        **_LINEAR,
    },
    "T5Gemma2Backbone": {**_TWO_SIDES, "use_query_key_norm": True},
    "VideoPrismBackbone": {
        "num_frames": 2,
        "patch_size": 4,
        "hidden_dim": 16,
        "intermediate_dim": 24,
        "num_heads": 2,
        "num_spatial_layers": 1,
        "num_temporal_layers": 1,
        "num_auxiliary_layers": 1,
        "vocabulary_size": VOCABULARY,
        "num_text_layers": 1,
        "image_shape": (8, 8, 3),
    },
    "WhisperBackbone": {**_TEXT, "num_mels": 4, "max_encoder_sequence_length": 16},
    "XceptionBackbone": {
        "stackwise_conv_filters": [[4, 8], [8, 8]],
        "stackwise_pooling": [True, False],
        "image_shape": (32, 32, 3),
    },
}

# Shapes of inputs that are not `LENGTH` long.
_SHAPES = {
    "SAM3PromptableConceptBackbone": {"boxes": (2, 5), "box_labels": (2,)},
    "MoonshineBackbone": {"encoder_input_values": (1400, 1), "encoder_padding_mask": (1400,)},
    "SAMBackbone": {"points": (1, 2), "labels": (1,), "boxes": (1, 2, 2), "masks": (0, 16, 16, 1)},
}
# Outputs left out: of SAM, without a row for each example; of SAM 3, of other shapes than declared.
_LEFT_OUT = {"prompt_dense_positional_embeddings", "presence_logits", "pred_masks"}
NAMES = sorted([*ARGUMENTS, *backbones_of_parts.ARGUMENTS])


def model_of(kind):
    """A backbone of this class with a head of two outputs; dropout is off.

    Raises:
        KeyError: If the catalog has no arguments for it.
    """
    name = kind.__name__
    made_of_parts = backbones_of_parts.ARGUMENTS.get(name)
    backbone = kind(**(made_of_parts() if made_of_parts else ARGUMENTS[name]))
    for layer in backbone._flatten_layers():
        if isinstance(getattr(layer, "rate", None), float):
            layer.rate = 0.0
    outputs = backbone.output
    if isinstance(outputs, dict):
        outputs = [t for key, t in outputs.items() if key not in _LEFT_OUT]
    floating = [t for t in keras.tree.flatten(outputs) if _is_floating(t)]
    pooled = [_pooled(t) for t in floating]
    features = keras.layers.Concatenate()(pooled) if len(pooled) > 1 else pooled[0]
    return keras.Model(backbone.input, keras.layers.Dense(2)(features), name=name)


def _is_floating(tensor):
    return keras.backend.standardize_dtype(tensor.dtype).startswith("float")


def _pooled(output):
    """An output as a matrix of a known width, with a row for each example."""
    if output.shape[-1] is None:  # such as similarities with all examples of a batch
        return keras.ops.mean(output, axis=-1, keepdims=True)
    between = list(range(1, len(output.shape) - 1))
    return keras.ops.mean(output, axis=between) if between else output


def data_of(model, rows):
    """Random (x, y) for a model of `model_of`; each row has a length of its own."""
    random = np.random.default_rng(0)
    shapes = _SHAPES.get(model.name, {})

    def of_input(tensor):
        sizes = shapes.get(tensor.name, tensor.shape[1:])
        shape = (rows, *(LENGTH if size is None else size for size in sizes))
        if "mask" in tensor.name:
            each = (rows, *[1] * (len(shape) - 1))
            lengths = random.integers(1, shape[-1], size=each, endpoint=True)
            values = np.broadcast_to(np.arange(shape[-1]) < lengths, shape)
        elif "position" in tensor.name:
            values = np.broadcast_to(np.arange(shape[1]), shape)
        elif tensor.name == "boxes":  # of SAM 3: the image's place in the batch, and sizes
            values = random.uniform(0.3, 0.6, size=shape)
            values[..., 0] = 0
        elif "label" in tensor.name:
            values = random.integers(0, 2, size=shape)
        elif keras.backend.standardize_dtype(tensor.dtype).startswith("int"):
            values = random.integers(1, 2 if "segment" in tensor.name else VOCABULARY, size=shape)
        else:
            values = random.normal(size=shape)
        return values.astype(keras.backend.standardize_dtype(tensor.dtype))

    x = keras.tree.map_structure(of_input, model.input)
    return x, random.normal(size=(rows, 2)).astype("float32")
