"""The backbones of keras_hub in their smallest sizes, none of which loads anything."""

import keras
import numpy as np

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
    "WhisperBackbone": {**_TEXT, "num_mels": 4, "max_encoder_sequence_length": 16},
    "XceptionBackbone": {
        "stackwise_conv_filters": [[4, 8], [8, 8]],
        "stackwise_pooling": [True, False],
        "image_shape": (32, 32, 3),
    },
}


def model_of(kind):
    """A backbone of this class with a head of two outputs; dropout is off.

    Raises:
        KeyError: If the catalog has no arguments for it.
    """
    backbone = kind(**ARGUMENTS[kind.__name__])
    for layer in backbone._flatten_layers():
        if isinstance(getattr(layer, "rate", None), float):
            layer.rate = 0.0
    pooled = []
    for output in keras.tree.flatten(backbone.output):
        between = list(range(1, len(output.shape) - 1))
        pooled.append(keras.ops.mean(output, axis=between) if between else output)
    features = keras.layers.Concatenate()(pooled) if len(pooled) > 1 else pooled[0]
    return keras.Model(backbone.input, keras.layers.Dense(2)(features))


def data_of(model, rows):
    """Random (x, y) for a model of `model_of`: the last place of masks is padding."""
    random = np.random.default_rng(0)

    def of_input(tensor):
        shape = (rows, *(LENGTH if size is None else size for size in tensor.shape[1:]))
        if "mask" in tensor.name:
            values = np.ones(shape, "int32")
            values[..., -1] = 0
        elif "position" in tensor.name:
            values = np.broadcast_to(np.arange(shape[1]), shape)
        elif keras.backend.standardize_dtype(tensor.dtype).startswith("int"):
            values = random.integers(1, 2 if "segment" in tensor.name else VOCABULARY, size=shape)
        else:
            values = random.normal(size=shape)
        return values.astype(keras.backend.standardize_dtype(tensor.dtype))

    x = keras.tree.map_structure(of_input, model.input)
    return x, random.normal(size=(rows, 2)).astype("float32")
