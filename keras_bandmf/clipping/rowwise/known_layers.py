"""The layers that treat the rows of a batch independently: a table of exact types."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._keras_internals import attention_axes_of, call_that_made

# The rank of the first input where a functional model tells it, else None: inside a layer of this
# table, whose own code was read, or inside one whose author vouches for it.
Rank = int | None
# (layer, rank) -> why this layer may mix rows, or None.
Condition = Callable[[keras.layers.Layer, Rank], str | None]

GROUP_OR_LAYER_NORM = "keras.layers.GroupNormalization or keras.layers.LayerNormalization"
_AUGMENT = "single augmentations that act on one image (keras.layers.RandomFlip, RandomContrast)"

# Layers that mix rows, and what to use instead.
MIXERS: dict[str, str] = {
    "AugMix": _AUGMENT + "; its equalization takes one histogram of the whole batch",
    "CutMix": _AUGMENT,
    "Equalization": "keras.layers.AutoContrast; its histogram is that of the whole batch",
    "MelSpectrogram": "keras.layers.STFTSpectrogram, or compute it with `preprocess=`; its cut at "
    "`top_db` is below the loudest point of the whole batch",
    "MixUp": _AUGMENT,
    "RandAugment": _AUGMENT + "; its equalization takes one histogram of the whole batch",
    "RandomElasticTransform": _AUGMENT
    + "; where the number of rows is not known, as in `fit`, its "
    "first image takes the place of all",
}

# Nothing is known of these: they run whatever code they are given, or write state.
UNKNOWN = frozenset(
    {
        "ActivityRegularization",
        "FlaxLayer",
        "JaxLayer",
        "Lambda",
        "Layer",
        "MaxNumBoundingBoxes",
        "Pipeline",
        "SpectralNormalization",
        "TFSMLayer",
        "TextVectorization",
        "TorchModuleWrapper",
        "Wrapper",
    }
)


def _rank(least: int) -> Condition:
    def condition(layer: keras.layers.Layer, rank: Rank) -> str | None:
        if rank is not None and rank < least:
            return f"its input has {rank} axes, and it works along the last {least - 1} or more"
        return None

    return condition


def _axis(attribute: str = "axis") -> Condition:
    """Returns the condition that the layer does not work along the axis of the rows."""

    def condition(layer: keras.layers.Layer, rank: Rank) -> str | None:
        axes = getattr(layer, attribute)
        return axis_reason(axes, rank, attribute)

    return condition


def axis_reason(axes: Any, rank: Rank, name: str = "axis") -> str | None:
    """Returns why an operation along `axes` of a tensor of this rank may reach axis 0; None if not.

    With a rank that is not known, of the negative axes -1 alone is taken, which is that of the rows
    in a vector only: layers of the tables let no vector get to the layers inside them.
    """
    if axes is None:
        return f"`{name}` is None, which takes in axis 0"
    axes = keras.tree.flatten(axes)
    if not all(isinstance(a, int) and not isinstance(a, bool) for a in axes):
        return f"`{name}` is {axes!r}"
    for axis in axes:
        if axis == 0 or (rank is not None and (axis == -rank or not -rank <= axis < rank)):
            return f"`{name}` {axis} of {rank if rank is not None else 'its'} axes is that of rows"
        if rank is None and axis < -1:
            return f"`{name}` {axis} may be that of rows: the number of axes is not known"
    return None


def _all(*conditions: Condition) -> Condition:
    def condition(layer: keras.layers.Layer, rank: Rank) -> str | None:
        return next((why for c in conditions if (why := c(layer, rank))), None)

    return condition


def _concatenate(layer: Any, rank: Rank) -> str | None:
    return axis_reason(layer.axis, rank)


def _dot(layer: Any, rank: Rank) -> str | None:
    return _rank(2)(layer, rank) or axis_reason(layer.axes, rank, "axes")


def _einsum(layer: Any, rank: Rank) -> str | None:
    why = _rank(2)(layer, rank) or einsum_reason(layer.equation, [rank])
    if why is None and layer.activation is not keras.activations.linear:
        # It may work along the last axis.
        return _rank(2)(layer, einsum_rank(layer.equation, rank))
    return why


def einsum_rank(equation: str, rank: Rank) -> Rank:
    """Returns the rank of the result of an einsum of one operand of this rank, and of constants."""
    operands, result = equation.replace(" ", "").split("->")
    if "..." not in result:
        return len(result)
    if rank is None:
        return None
    return rank - len(_letters(operands.split(",")[0])) + len(_letters(result))


def _letters(operand: str) -> str:
    return operand.replace("...", "")


def einsum_reason(equation: str, ranks: Sequence[Rank]) -> str | None:
    """Returns why an einsum may mix rows: the first letter of operands and result must be the row.

    Args:
        equation: An equation of the form "abc,cd->abd" or "...x,xy->...y".
        ranks: The ranks of the operands, from the first on, that have rows on axis 0.
    """
    sides = equation.replace(" ", "").split("->")
    why = f"its equation {equation!r} does not keep the rows on the first axis of all"
    if len(sides) != 2 or not sides[1]:
        return why
    operands, result = sides[0].split(","), sides[1]
    rows, others = operands[: len(ranks)], operands[len(ranks) :]
    if any(not operand for operand in rows):
        return why
    if result.startswith("...") and len(ranks) == 1:
        fits = rows[0].startswith("...") and not any("..." in operand for operand in others)
        # The dots may stand for no axis at all.
        fits = fits and ranks[0] is not None and ranks[0] > len(_letters(rows[0]))
        return None if fits else why
    row = result[0]
    fits = row.isalpha() and "..." not in "".join(others) and row not in "".join(others)
    for operand in rows:
        fits = fits and operand[0] == row and row not in operand[1:]
    return None if fits and row not in result[1:] else why


def _scaled(layer: Any, rank: Rank) -> str | None:
    axes = max(np.ndim(layer.scale), np.ndim(layer.offset))
    if axes and keras.config.image_data_format() == "channels_first":
        axes = max(axes, 3)
    if axes and (rank is None or axes >= rank):
        return "its scale or offset may have an axis where the rows are"
    return None


def _attention_axes(layer: Any, rank: Rank) -> str | None:
    axes = attention_axes_of(layer)
    return _rank(3)(layer, rank) or (None if axes is None else axis_reason(axes, rank))


def _frozen(layer: Any, rank: Rank) -> str | None:
    if layer.trainable:
        return f"it normalizes by the batch: use {GROUP_OR_LAYER_NORM}, or freeze it"
    return _all(_rank(2), _axis())(layer, rank)


def _stateless(layer: Any, rank: Rank) -> str | None:
    if getattr(layer, "stateful", False):
        return "with `stateful=True` a row goes on where another row ended: use stateful=False"
    return _rank(3)(layer, rank)


def _integers(layer: Any, rank: Rank) -> str | None:
    # Other modes read a vector as the values of one example.
    return None if getattr(layer, "output_mode", "int") == "int" else _rank(2)(layer, rank)


def _any(layer: Any, rank: Rank) -> str | None:
    return None


_BY_NAME: dict[Condition, str] = {
    # Element by element, or row by row whatever the rank.
    _any: "InputLayer Identity Embedding ReversibleEmbedding Add Subtract Multiply "
    "Average Maximum Minimum Dropout AlphaDropout GaussianDropout GaussianNoise ReLU LeakyReLU ELU "
    "Flatten Reshape RepeatVector Hashing LSTMCell GRUCell SimpleRNNCell StackedRNNCells",
    _rank(3): "Conv1D Conv1DTranspose DepthwiseConv1D SeparableConv1D AveragePooling1D "
    "MaxPooling1D GlobalAveragePooling1D GlobalMaxPooling1D AdaptiveAveragePooling1D "
    "AdaptiveMaxPooling1D Cropping1D UpSampling1D ZeroPadding1D SpatialDropout1D Attention "
    "AdditiveAttention GroupQueryAttention TimeDistributed",
    # An array of three axes would be read as one image, not as a batch of rows.
    _rank(4): "Conv2D Conv2DTranspose DepthwiseConv2D SeparableConv2D AveragePooling2D "
    "MaxPooling2D GlobalAveragePooling2D GlobalMaxPooling2D AdaptiveAveragePooling2D "
    "AdaptiveMaxPooling2D Cropping2D UpSampling2D ZeroPadding2D SpatialDropout2D AutoContrast "
    "CenterCrop ContrastLimitedAdaptiveHistogramEqualization RandomBrightness "
    "RandomColorDegeneration RandomColorJitter RandomContrast RandomCrop "
    "RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHue RandomInvert "
    "RandomPerspective RandomPosterization RandomRotation RandomSaturation RandomSharpness "
    "RandomShear RandomTranslation RandomZoom Resizing Solarization",
    _rank(5): "Conv3D Conv3DTranspose AveragePooling3D MaxPooling3D GlobalAveragePooling3D "
    "GlobalMaxPooling3D AdaptiveAveragePooling3D AdaptiveMaxPooling3D Cropping3D UpSampling3D "
    "ZeroPadding3D SpatialDropout3D",
    _scaled: "Rescaling",
    _integers: "Discretization IntegerLookup StringLookup",
    _all(_rank(2), _axis()): "LayerNormalization GroupNormalization RMSNormalization Softmax "
    "UnitNormalization",
    _all(_rank(2), lambda layer, rank: axis_reason(layer.axis or -1, rank)): "Normalization",
    _rank(2): "Activation Dense Permute PReLU Masking CategoryEncoding HashedCrossing "
    "STFTSpectrogram",
    _concatenate: "Concatenate",
    _dot: "Dot",
    _einsum: "EinsumDense",
    _attention_axes: "MultiHeadAttention",
    _frozen: "BatchNormalization",
    _stateless: "RNN LSTM GRU SimpleRNN ConvLSTM1D ConvLSTM2D ConvLSTM3D Bidirectional",
}
_KERAS: dict[type, Condition] = {
    getattr(keras.layers, name): condition
    for condition, names in _BY_NAME.items()
    for name in names.split()
    if hasattr(keras.layers, name)  # the oldest Keras 3 does not have all
}
_MIXERS: dict[type, str] = {
    getattr(keras.layers, name): instead
    for name, instead in MIXERS.items()
    if hasattr(keras.layers, name)
}

# Cells that Keras does not export, and layers of keras_hub, by module and name: never imported.
_OTHERS = """
keras.src.layers.rnn.conv_lstm.ConvLSTMCell
keras_hub.src.layers.modeling: alibi_bias.AlibiBias
 cached_multi_head_attention.CachedMultiHeadAttention
 f_net_encoder.FNetEncoder masked_lm_head.MaskedLMHead position_embedding.PositionEmbedding
 reversible_embedding.ReversibleEmbedding rms_normalization.RMSNormalization
 rotary_embedding.RotaryEmbedding sine_position_encoding.SinePositionEncoding
 token_and_position_embedding.TokenAndPositionEmbedding transformer_decoder.TransformerDecoder
 transformer_encoder.TransformerEncoder
keras_hub.src.models: bloom.bloom_attention.BloomAttention bloom.bloom_decoder.BloomDecoder
 deberta_v3.disentangled_attention_encoder.DisentangledAttentionEncoder
 deberta_v3.disentangled_self_attention.DisentangledSelfAttention
 deberta_v3.relative_embedding.RelativeEmbedding
 deit.deit_layers.DeiTEmbeddings deit.deit_layers.DeiTEncoder deit.deit_layers.DeiTEncoderBlock
 deit.deit_layers.DeiTIntermediate deit.deit_layers.DeiTOutput
 dinov2.dinov2_layers.DINOV2Attention dinov2.dinov2_layers.DINOV2Embedding
 dinov2.dinov2_layers.DINOV2Encoder dinov2.dinov2_layers.DINOV2Layer
 dinov2.dinov2_layers.DINOV2LayerScale dinov2.dinov2_layers.DINOV2MLP
 dinov2.dinov2_layers.DINOV2PatchEmbedding dinov2.dinov2_layers.DINOV2SwiGLUFFN
 dinov3.dinov3_layers.DINOV3Attention dinov3.dinov3_layers.DINOV3Embedding
 dinov3.dinov3_layers.DINOV3Encoder dinov3.dinov3_layers.DINOV3GatedMLP
 dinov3.dinov3_layers.DINOV3Layer dinov3.dinov3_layers.DINOV3LayerScale
 dinov3.dinov3_layers.DINOV3MLP dinov3.dinov3_layers.DINOV3PatchEmbedding
 dinov3.dinov3_layers.DINOV3RopePositionEmbedding
 esm.esm_attention.EsmSelfAttention esm.esm_attention.ESMRotaryEmbedding esm.esm_encoder.ESMEncoder
 falcon.falcon_attention.FalconAttention
 falcon.falcon_transformer_decoder.FalconTransformerDecoder
 gemma.gemma_attention.CachedGemmaAttention gemma.gemma_decoder_block.GemmaDecoderBlock
 gemma.rms_normalization.RMSNormalization gemma3.gemma3_attention.CachedGemma3Attention
 gemma3.gemma3_decoder_block.Gemma3DecoderBlock gemma3.gemma3_layers.RMSNormalization
 gpt_neo_x.gpt_neo_x_attention.GPTNeoXAttention gpt_neo_x.gpt_neo_x_decoder.GPTNeoXDecoder
 gpt_oss.gpt_oss_layer_norm.GptOssLayerNormalization
 llama.llama_attention.LlamaAttention llama.llama_decoder.LlamaTransformerDecoder
 llama.llama_layernorm.LlamaLayerNorm llama.llama_rotary_embedding.LlamaRotaryEmbedding
 mistral.mistral_attention.CachedMistralAttention
 mistral.mistral_layer_norm.MistralLayerNormalization
 mistral.mistral_transformer_decoder.MistralTransformerDecoder
 mit.mit_layers.DropPath mit.mit_layers.HierarchicalTransformerEncoder mit.mit_layers.MixFFN
 mit.mit_layers.OverlappingPatchingAndEmbedding mit.mit_layers.SegFormerMultiheadAttention
 mixtral.mixtral_layer_norm.MixtralLayerNormalization
 pali_gemma.pali_gemma_decoder_block.PaliGemmaDecoderBlock
 pali_gemma.pali_gemma_vit.PaliGemmaVitAttention pali_gemma.pali_gemma_vit.PaliGemmaVitEmbeddings
 pali_gemma.pali_gemma_vit.PaliGemmaVitEncoder pali_gemma.pali_gemma_vit.PaliGemmaVitEncoderBlock
 phi3.phi3_attention.Phi3Attention phi3.phi3_decoder.Phi3Decoder phi3.phi3_layernorm.Phi3LayerNorm
 qwen.qwen_attention.QwenAttention qwen.qwen_decoder.QwenTransformerDecoder
 qwen.qwen_layernorm.QwenLayerNorm qwen3.qwen3_attention.Qwen3Attention
 qwen3.qwen3_decoder.Qwen3TransformerDecoder qwen3.qwen3_layernorm.Qwen3LayerNorm
 roformer_v2.roformer_v2_attention.RoformerAttention
 roformer_v2.roformer_v2_attention.RoformerNorm
 roformer_v2.roformer_v2_attention.RoformrPositionalEmbedding
 roformer_v2.roformer_v2_encoder.RoformerV2Encoder
 smollm3.smollm3_layers.SmolLM3Attention smollm3.smollm3_layers.SmolLM3DecoderLayer
 smollm3.smollm3_layers.SmolLM3MLP smollm3.smollm3_layers.SmolLM3RotaryEmbedding
 t5.t5_layer_norm.T5LayerNorm t5.t5_multi_head_attention.T5MultiHeadAttention
 t5.t5_transformer_layer.T5TransformerLayer t5gemma.t5gemma_attention.T5GemmaAttention
 t5gemma.t5gemma_decoder.T5GemmaDecoderLayer t5gemma.t5gemma_encoder.T5GemmaEncoderLayer
 t5gemma.t5gemma_layers.T5GemmaMLP
 t5gemma2.t5gemma2_attention.T5Gemma2Attention
 t5gemma2.t5gemma2_attention.T5Gemma2MergedAttention
 t5gemma2.t5gemma2_decoder.T5Gemma2DecoderLayer t5gemma2.t5gemma2_encoder.T5Gemma2EncoderLayer
 t5gemma2.t5gemma2_layers.T5Gemma2MLP
 vit.vit_layers.MLP vit.vit_layers.ViTEncoder vit.vit_layers.ViTEncoderBlock
 vit.vit_layers.ViTPatchingAndEmbedding
 whisper.whisper_backbone.Padder
 whisper.whisper_cached_multi_head_attention.WhisperCachedMultiHeadAttention
 whisper.whisper_decoder.WhisperDecoder whisper.whisper_encoder.WhisperEncoder
"""
# The library's own layers compute what the Keras layers that they derive from compute.
_OWN = {
    "keras_bandmf.rgp.model.RGPDense": keras.layers.Dense,
    "keras_bandmf.rgp.model.RGPEinsumDense": keras.layers.EinsumDense,
    "keras_bandmf.rgp.model.RGPConv2D": keras.layers.Conv2D,
    "keras_bandmf.rgp.model.RGPEmbedding": keras.layers.Embedding,
}


# The arrays of these layers are tables, or along axes that `build` determined.
_WITH_ARRAYS = tuple(
    getattr(keras.layers, name)
    for name in "Rescaling Normalization Discretization IntegerLookup StringLookup Hashing "
    "HashedCrossing CategoryEncoding".split()
)
# The layers inside these get inputs with as many axes as these themselves.
_KEEP_RANK = frozenset(
    "Activation Dense Bidirectional Conv1D Conv2D Conv3D Conv1DTranspose Conv2DTranspose "
    "Conv3DTranspose DepthwiseConv1D DepthwiseConv2D SeparableConv1D SeparableConv2D LSTMCell "
    "GRUCell SimpleRNNCell StackedRNNCells".split()
)


def _names() -> frozenset[str]:
    found, package = set(), ""
    for word in _OTHERS.split():
        if word.endswith(":"):
            package = word[:-1] + "."
        else:
            found.add(word if word.startswith("keras.") else package + word)
    return frozenset(found)


OTHER_NAMES = _names()
# The axes that the `attention_mask` of these must have; that of others has at least three. Those of
# RoFormer reshape it to the axes of scores, those of T5Gemma and DINOv3 use it for them as it is.
MASK_AXES = {
    "keras_hub.src.models.dinov3.dinov3_layers.DINOV3Attention": 4,
    "keras_hub.src.models.dinov3.dinov3_layers.DINOV3Encoder": 4,
    "keras_hub.src.models.dinov3.dinov3_layers.DINOV3Layer": 4,
    "keras_hub.src.models.esm.esm_attention.EsmSelfAttention": 2,
    "keras_hub.src.models.esm.esm_encoder.ESMEncoder": 2,
    "keras_hub.src.models.roformer_v2.roformer_v2_attention.RoformerAttention": 2,
    "keras_hub.src.models.roformer_v2.roformer_v2_encoder.RoformerV2Encoder": 2,
    "keras_hub.src.models.pali_gemma.pali_gemma_vit.PaliGemmaVitAttention": 4,
    "keras_hub.src.models.t5gemma.t5gemma_attention.T5GemmaAttention": 4,
    "keras_hub.src.models.t5gemma2.t5gemma2_attention.T5Gemma2Attention": 4,
    "keras_hub.src.models.t5gemma2.t5gemma2_attention.T5Gemma2MergedAttention": 4,
}
# Arguments with which these may not be called. Of one an entry for each layer is taken by axis 0;
# the others are added to scores as they are, and Keras passes masks of any number of axes.
REFUSED_ARGUMENTS = {
    "keras_hub.src.models.pali_gemma.pali_gemma_vit.PaliGemmaVitEncoder": "mask",
    "keras_hub.src.models.pali_gemma.pali_gemma_vit.PaliGemmaVitEncoderBlock": "mask",
    "keras_hub.src.models.deit.deit_layers.DeiTEncoder": "attention_masks",
}
# Layers whose outputs depend on the sizes of their input and on no row, and arguments for such.
_WITHOUT_ROWS = frozenset({"keras_hub.src.models.dinov3.dinov3_layers.DINOV3RopePositionEmbedding"})
ARGUMENTS_WITHOUT_ROWS = {
    f"keras_hub.src.models.dinov3.dinov3_layers.{name}": "position_embeddings"
    for name in ("DINOV3Attention", "DINOV3Encoder", "DINOV3Layer")
}


def _known_function(layer: Any, rank: Rank) -> str | None:
    # Of another name it may look up a function of the user's. What it holds: `function_reason`.
    if layer.hidden_activation != "gelu_approximate":
        return "its hidden_activation is not 'gelu_approximate'"
    return _rank(2)(layer, rank)


# By the name of the class.
_OTHER_CONDITIONS: dict[str, Condition] = {
    "AlibiBias": _rank(4),
    "DINOV2Embedding": _rank(4),
    "DINOV2PatchEmbedding": _rank(4),
    "DINOV3Embedding": _rank(4),
    "DINOV3PatchEmbedding": _rank(4),
    "DINOV3RopePositionEmbedding": _rank(4),
    "DeiTEmbeddings": _rank(4),
    "ESMRotaryEmbedding": _rank(4),
    "OverlappingPatchingAndEmbedding": _rank(4),
    "PaliGemmaVitEmbeddings": _rank(4),
    "PaliGemmaVitEncoder": _rank(4),
    "ReversibleEmbedding": _any,
    "RotaryEmbedding": _all(_rank(3), _axis("sequence_axis"), _axis("feature_axis")),
    "LlamaRotaryEmbedding": _all(_rank(3), _axis("sequence_axis"), _axis("feature_axis")),
    "T5GemmaMLP": _known_function,
    "T5Gemma2MLP": _known_function,
    "ViTPatchingAndEmbedding": _rank(4),
}


def _other_rank(name: str) -> int:
    """Returns the axes a keras_hub layer needs: rows of vectors, or for most rows of sequences."""
    vectors = "Norm" in name or name in ("MLP", "TokenAndPositionEmbedding")
    return 2 if vectors else 3


def is_the_one(thing: Any) -> bool:
    """Returns whether a class or function is the object that its module holds under its name."""
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    return getattr(module, getattr(thing, "__qualname__", ""), None) is thing


def condition_of(layer_class: type) -> Condition | None:
    """Returns the condition under which layers of this class treat rows independently, or None."""
    name = f"{layer_class.__module__}.{layer_class.__qualname__}"
    if name in OTHER_NAMES and is_the_one(layer_class):
        return _OTHER_CONDITIONS.get(layer_class.__name__, _rank(_other_rank(layer_class.__name__)))
    if name in _OWN and is_the_one(layer_class):
        layer_class = _OWN[name]
    return _KERAS.get(layer_class)


def holds_no_row(tensor: keras.KerasTensor) -> bool:
    """Returns whether a tensor of a functional model is the same for all rows, or empty."""
    size = tensor.shape[0] if len(tensor.shape) else None
    kind = type(call_that_made(tensor)[0])
    name = f"{kind.__module__}.{kind.__qualname__}"
    return size == 0 or (size is not None and name in _WITHOUT_ROWS and is_the_one(kind))


def replaced_reason(operation: Any) -> str | None:
    """Returns why a layer or operation is not what its class says, if a method was replaced."""
    for name in vars(operation):
        # Keras itself wraps these two on each layer.
        if name not in ("build", "quantize") and callable(getattr(type(operation), name, None)):
            return f"its `{name}` was replaced on the instance"
    return None


def array_reason(layer: keras.layers.Layer) -> str | None:
    """Returns why a Keras layer may mix rows, if it holds an array in place of a number."""
    if type(layer) not in _KERAS or isinstance(layer, _WITH_ARRAYS):
        return None
    for name, value in vars(layer).items():
        if isinstance(value, (np.ndarray, tf.Tensor)) and len(value.shape):
            return f"its {name.lstrip('_')} is an array, which may have an axis where the rows are"
    return None


# Functions by these names are called on weights alone.
_OF_WEIGHTS = ("initializer", "regularizer", "constraint")


def function_reason(layer: keras.layers.Layer) -> str | None:
    """Returns why a layer of the table may mix rows, if it holds a function that it did not make.

    Its code calls what it holds: a function in the place of a layer inside is not seen as a layer.
    """
    for name, held in vars(layer).items():
        if name in ("build", "quantize", "inputs_quantizer") or "activation" in name:
            continue  # wrapped by Keras itself, or looked at by others
        if name.endswith(_OF_WEIGHTS):
            continue
        values = held.values() if isinstance(held, dict) else held
        for value in values if isinstance(held, (dict, list, tuple)) else (held,):
            known = not callable(value) or isinstance(value, (keras.layers.Layer, type))
            if not known and not _made_by(type(layer), value):
                return f"a function of your own is in its {name.lstrip('_')}"
    return None


def _made_by(kind: type, function: Any) -> bool:
    """Returns whether a function was written in the `__init__` of this class, as its lambda."""
    code = getattr(function, "__code__", None)
    init = getattr(inspect.unwrap(kind.__init__), "__code__", None)  # type: ignore[misc]
    return any(constant is code for constant in getattr(init, "co_consts", ()) if constant)


# The kernels of these in int8 are frozen arrays, and their inputs are scaled along axes alone.
_IN_INT8 = frozenset("Dense EinsumDense Embedding ReversibleEmbedding".split())


def quantized_reason(layer: keras.layers.Layer, rank: Rank) -> str | None:
    """Returns why a quantized layer may mix rows, or None; None for all others."""
    mode = getattr(layer, "quantization_mode", None)
    if mode is None:
        return None
    kind = type(layer)
    if mode != "int8" or kind.__name__ not in _IN_INT8 or condition_of(kind) is None:
        return f"it is quantized, and nothing is known of {kind.__name__} in {mode}"
    if isinstance(layer, keras.layers.EinsumDense) and layer.lora_enabled:
        # Keras computes einsum(x, A) B, which is along the last axis whatever that is: in a result
        # of one axis it is that of the rows, in others it need not be that of the kernel's outputs.
        _, kernel, result = layer.equation.replace(" ", "").replace("->", ",").split(",")
        if kernel[-1] != result[-1]:
            return "it is quantized, and LoRA's product is not along the last axis of its kernel"
    quantizer = getattr(layer, "inputs_quantizer", None)
    if quantizer is None:
        return None
    if type(quantizer) is not keras.quantizers.AbsMaxQuantizer:
        return f"it is quantized, and {type(quantizer).__name__} of its inputs is not known"
    # By the release of Keras, and by the layer, one of these is taken, or the last axis.
    for axes in (quantizer.axis, getattr(layer, "quantization_axis", None), -1):
        why = None if axes is None else axis_reason(axes, rank, "axis of its quantizer")
        if why is not None:
            return why
    return None


def inner_rank(layer: keras.layers.Layer, rank: Rank) -> Rank:
    """Returns the rank of what the layers inside a layer get, or None where it is not known."""
    if rank is None or type(layer) not in _KERAS:
        return None
    if isinstance(layer, (keras.layers.TimeDistributed, keras.layers.RNN)):
        return rank - 1  # one point in time
    if isinstance(layer, keras.layers.EinsumDense):
        return einsum_rank(layer.equation, rank)
    return rank if type(layer).__name__ in _KEEP_RANK else None


def replacement_of(layer: keras.layers.Layer) -> str | None:
    """Returns what to use in place of a layer that mixes rows; None for any other layer."""
    return next((new for kind, new in _MIXERS.items() if isinstance(layer, kind)), None)


_ACTIVATIONS = "relu relu6 gelu tanh sigmoid softmax log_softmax elu selu silu swish softplus "
_ACTIVATIONS += "softsign leaky_relu hard_sigmoid hard_silu celu glu identity exp"
_KNOWN_ACTIVATIONS = {
    id(function)
    for module in (tf.nn, tf, tf.math, keras.ops)
    for name in _ACTIVATIONS.split()
    if (function := getattr(module, name, None)) is not None
}


def activation_reason(layer: keras.layers.Layer) -> str | None:
    """Returns why an activation may mix rows, if it is not one of Keras or TensorFlow, or None."""
    for name, value in vars(layer).items():
        if "activation" not in name or not callable(value) or isinstance(value, keras.layers.Layer):
            continue
        if isinstance(value, functools.partial) and not value.args and "axis" not in value.keywords:
            if any(np.ndim(setting) for setting in value.keywords.values()):
                return f"its {name.lstrip('_')} is called with an array"
            value = value.func
        module = getattr(value, "__module__", "")
        known = module == "keras.src.activations.activations" and is_the_one(value)
        known = known or (
            module == "keras_hub.src.utils.keras_utils"
            and getattr(value, "__name__", "") == "gelu_approximate"
            and is_the_one(value)
        )
        if not known and id(value) not in _KNOWN_ACTIVATIONS:
            return f"its {name.lstrip('_')} is a function of your own"
    return None
