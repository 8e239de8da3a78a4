"""Every layer of Keras and every backbone of keras_hub as a small model, and the path it takes.

`tests/clipping/test_every_layer.py` compares each with one example at a time, and
`benchmarks/layer_paths.py` writes the table of docs/layers.md.
"""

import inspect
import re
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_bandmf import PrivacyError, clipping
from keras_bandmf.clipping.checks.refusals import refuse_model
from keras_bandmf.clipping.rowwise import known_layers
from keras_bandmf.clipping.rowwise.decision import rowwise
from tests.clipping import backbones

S, V, V3 = (6, 4), (8, 8, 3), (4, 4, 4, 2)
# Name -> arguments and shape of an example. Those that draw random numbers are among them.
ARGUMENTS = {
    "Activation": (("softmax",), S),
    "AdaptiveAveragePooling1D": ((4,), S),
    "AdaptiveAveragePooling2D": ((4,), V),
    "AdaptiveAveragePooling3D": ((3,), V3),
    "AdaptiveMaxPooling1D": ((4,), S),
    "AdaptiveMaxPooling2D": ((4,), V),
    "AdaptiveMaxPooling3D": ((3,), V3),
    "AlphaDropout": ((0.5,), S),
    "AveragePooling1D": ((2,), S),
    "AveragePooling2D": ((2,), V),
    "AveragePooling3D": ((2,), V3),
    "Bidirectional": ((lambda: layers.GRU(3),), S),
    "CenterCrop": ((3, 3), V),
    "Conv1D": ((3, 2), S),
    "Conv1DTranspose": ((3, 2), S),
    "Conv2D": ((3, 2), V),
    "Conv2DTranspose": ((3, 2), V),
    "Conv3D": ((3, 2), V3),
    "Conv3DTranspose": ((3, 2), V3),
    "ConvLSTM1D": ((2, 2), (5, 6, 2)),
    "ConvLSTM2D": ((2, 2), (3, 6, 6, 2)),
    "Cropping1D": ((), S),
    "Cropping2D": ((1,), V),
    "Cropping3D": ((1,), V3),
    "Dense": ((3,), S),
    "DepthwiseConv1D": ((2,), S),
    "DepthwiseConv2D": ((2,), V),
    "Dropout": ((0.5,), S),
    "EinsumDense": (("...tx,xy->...ty", (6, 3)), S),
    "Flatten": ((), V),
    "GRU": ((3,), S),
    "GaussianDropout": ((0.5,), S),
    "GaussianNoise": ((0.5,), S),
    "GlobalAveragePooling1D": ((), S),
    "GlobalAveragePooling2D": ((), V),
    "GlobalMaxPooling1D": ((), S),
    "GlobalMaxPooling2D": ((), V),
    "GroupNormalization": ((1,), V),
    "LSTM": ((3,), S),
    "LayerNormalization": (((1, 2),), V),
    "Masking": ((), S),
    "MaxPooling1D": ((), S),
    "MaxPooling2D": ((), V),
    "MaxPooling3D": ((), V3),
    "PReLU": ((), S),
    "Permute": (((2, 1),), S),
    "RMSNormalization": ((), S),
    "RandomBrightness": ((0.5,), V),
    "RandomColorDegeneration": ((0.5,), V),
    "RandomContrast": ((0.5,), V),
    "RandomCrop": ((3, 3), V),
    "RandomHue": ((0.5,), V),
    "RandomPosterization": ((4,), V),
    "RandomRotation": ((0.3,), V),
    "RandomSaturation": ((0.5,), V),
    "RandomSharpness": ((0.5,), V),
    "RandomShear": ((0.3, 0.3), V),
    "RandomTranslation": ((0.3, 0.3), V),
    "RandomZoom": ((0.3,), V),
    "RepeatVector": ((3,), (4,)),
    "Rescaling": ((2.0,), S),
    "Reshape": (((-1, 2),), S),
    "Resizing": ((3, 3), V),
    "STFTSpectrogram": ((), (600, 1)),
    "SeparableConv1D": ((3, 2), S),
    "SeparableConv2D": ((3, 2), V),
    "SimpleRNN": ((3,), S),
    "Softmax": ((), S),
    "SpatialDropout1D": ((0.5,), S),
    "SpatialDropout2D": ((0.5,), V),
    "SpatialDropout3D": ((0.5,), V3),
    "TimeDistributed": ((lambda: layers.GlobalMaxPooling1D(),), (3, 4, 2)),
    "UnitNormalization": ((), S),
    "UpSampling1D": ((), S),
    "UpSampling2D": ((2, None, "bilinear"), V),
    "UpSampling3D": ((), V3),
    "ZeroPadding1D": ((), S),
    "ZeroPadding2D": ((), V),
}
# Image layers that need no argument.
ARGUMENTS |= {
    name: ((), V)
    for name in dir(layers)
    if inspect.isclass(kind := getattr(layers, name))
    and "image_preprocessing" in kind.__module__
    and known_layers.condition_of(kind) is not None
    and name not in ARGUMENTS
}

_IDS = (6,)
# Further layers: name -> (function of a symbolic input or several, shapes, dtype of the inputs).
_FURTHER = {
    "Add": (lambda a, b: layers.Add()([a, b]), (S, S), "float32"),
    "AdditiveAttention": (lambda a, b: layers.AdditiveAttention()([a, b]), (S, S), "float32"),
    "Attention": (
        lambda a, b: layers.Attention(use_scale=True, score_mode="concat")([a, b]),
        (S, S),
        "float32",
    ),
    "Average": (lambda a, b: layers.Average()([a, b]), (S, S), "float32"),
    "BatchNormalization": (lambda a: layers.BatchNormalization()(a), (S,), "float32"),
    "CategoryEncoding": (lambda a: layers.CategoryEncoding(7)(a), (_IDS,), "int32"),
    "Concatenate": (lambda a, b: layers.Concatenate()([a, b]), (S, S), "float32"),
    "ConvLSTM3D": (lambda a: layers.ConvLSTM3D(2, 2)(a), ((2, 3, 3, 3, 1),), "float32"),
    "Discretization": (lambda a: layers.Discretization([0.0, 0.5])(a), (S,), "float32"),
    "Dot": (lambda a, b: layers.Dot(2)([a, b]), (S, S), "float32"),
    "ELU": (lambda a: layers.ELU()(a), (S,), "float32"),
    "Embedding": (lambda a: layers.Embedding(7, 3)(a), (_IDS,), "int32"),
    "GlobalAveragePooling3D": (lambda a: layers.GlobalAveragePooling3D()(a), (V3,), "float32"),
    "GlobalMaxPooling3D": (lambda a: layers.GlobalMaxPooling3D()(a), (V3,), "float32"),
    "GroupQueryAttention": (
        lambda a, b: layers.GroupQueryAttention(2, 4, 2)(a, b),
        (S, S),
        "float32",
    ),
    "Hashing": (lambda a: layers.Hashing(3)(a), (_IDS,), "int32"),
    "HashedCrossing": (lambda a, b: layers.HashedCrossing(3)((a, b)), ((1,), (1,)), "int32"),
    "Identity": (lambda a: layers.Identity()(a), (S,), "float32"),
    "IntegerLookup": (
        lambda a: layers.IntegerLookup(vocabulary=[1, 2, 3])(a),
        (_IDS,),
        "int32",
    ),
    "LeakyReLU": (lambda a: layers.LeakyReLU()(a), (S,), "float32"),
    "Maximum": (lambda a, b: layers.Maximum()([a, b]), (S, S), "float32"),
    "Minimum": (lambda a, b: layers.Minimum()([a, b]), (S, S), "float32"),
    "MultiHeadAttention": (lambda a, b: layers.MultiHeadAttention(2, 3)(a, b), (S, S), "float32"),
    "Multiply": (lambda a, b: layers.Multiply()([a, b]), (S, S), "float32"),
    "Normalization": (
        lambda a: layers.Normalization(mean=0.5, variance=2.0)(a),
        (S,),
        "float32",
    ),
    "RNN": (lambda a: layers.RNN(layers.GRUCell(3))(a), (S,), "float32"),
    "ReLU": (lambda a: layers.ReLU()(a), (S,), "float32"),
    "ReversibleEmbedding": (lambda a: layers.ReversibleEmbedding(7, 3)(a), (_IDS,), "int32"),
    "SpectralNormalization": (
        lambda a: layers.SpectralNormalization(layers.Dense(3))(a),
        (S,),
        "float32",
    ),
    "Subtract": (lambda a, b: layers.Subtract()([a, b]), (S, S), "float32"),
    "ZeroPadding3D": (lambda a: layers.ZeroPadding3D()(a), (V3,), "float32"),
}
KERAS = {
    name: kind
    for name in dir(layers)
    if inspect.isclass(kind := getattr(layers, name))
    and issubclass(kind, layers.Layer)
    and kind.__name__ == name  # else it is another name of a layer
}
BUILT = sorted(name for name in KERAS if name in ARGUMENTS or name in _FURTHER)


def keras_model(name):
    """(a model around a layer of Keras, x, y) with random inputs of four examples."""
    if name in _FURTHER:
        call, shapes, dtype = _FURTHER[name]
    else:
        arguments, shape = ARGUMENTS[name]
        layer = KERAS[name](*(a() if callable(a) else a for a in arguments))
        call, shapes, dtype = layer, (shape,), "float32"
    inputs = [keras.Input(shape, dtype=dtype) for shape in shapes]
    # What comes before it has weights of its own, so that its inputs have gradients, too.
    before = inputs
    if dtype == "float32":
        before = [
            layers.Dense(shape[-1], name=f"before_{i}")(t)
            for i, (shape, t) in enumerate(zip(shapes, inputs, strict=True))
        ]
    outputs = call(*before)
    features = layers.Flatten()(outputs) if len(outputs.shape) > 1 else outputs[:, None]
    if not keras.backend.standardize_dtype(features.dtype).startswith("float"):
        features = keras.ops.cast(features, "float32")
    inputs = inputs[0] if len(inputs) == 1 else inputs
    model = keras.Model(inputs, layers.Dense(2, name="after")(features))
    random = np.random.default_rng(0)
    x = [
        random.integers(0, 7, size=(4, *shape)).astype("int32")
        if dtype == "int32"
        else random.normal(size=(4, *shape)).astype("float32")
        for shape in shapes
    ]
    return model, x[0] if len(x) == 1 else x, random.normal(size=(4, 2)).astype("float32")


class Path(NamedTuple):
    """One line of the table."""

    name: str
    path: str
    why: str


def path_of(name, model, x, y):
    """The path that a model takes, as `explain` says it, and the rules of its layers."""
    try:
        refuse_model(model)
        with keras.StatelessScope(collect_losses=True) as scope:
            model(
                keras.tree.map_structure(lambda t: t[:1], x), training=True
            )  # SAM 3 fails on more
    except PrivacyError as refusal:
        return Path(name, "refused", str(refusal).split(":")[0].split(". ")[0])
    if scope.losses:
        return Path(name, "refused", "`add_loss`: a loss of the whole batch")
    if any(id(v) in scope.state_mapping for v in model.non_trainable_weights):
        return Path(name, "refused", "it writes a variable, which carries data past the noise")
    explanation = clipping.explain(model)
    if explanation.route == "general":
        try:
            clipping.check_model(model, x, y, loss="mse")
        except PrivacyError as refusal:
            mixer = re.search(r"of type (\w+) mixes examples", str(refusal))
            return Path(
                name, "refused", f"{mixer[1]} mixes the examples" if mixer else str(refusal)
            )
        except tf.errors.OpError:
            return Path(name, "refused", "its own forward pass fails on several rows")
        return Path(name, "whole model by example", _classes(rowwise(model).unknown))
    rows = [row for row in explanation.rows if row[0].split("/")[0] not in _AROUND]
    by_example = sorted({kind for _, kind, route, _ in rows if route == "by example"})
    if by_example:
        return Path(name, "book-keeping", f"by example: {', '.join(by_example)}")
    rules = sorted({why.split(" of ")[0] for _, _, route, why in rows if route == "book-keeping"})
    return Path(name, "book-keeping", ", ".join(rules) or "no weights to train")


_AROUND = ("before_0", "before_1", "after")


def _classes(unknown):
    """The classes that may mix rows, and of those that could keep them apart why they may not."""
    reasons = [reason.split(" of type ")[-1].split(": ", 1) for reason in unknown]
    found = {kind: f"{kind} ({why})" for kind, why in sorted(reasons)}
    found |= {kind: kind for kind, why in reasons if "not known to treat rows" in why}
    return ", ".join(sorted(found.values()))


def keras_paths():
    """A line for each layer of Keras."""
    for name, kind in KERAS.items():
        if name in BUILT:
            yield path_of(name, *keras_model(name))
        elif name in known_layers.MIXERS:
            yield Path(name, "refused", f"mixes the examples: use {known_layers.MIXERS[name]}")
        elif known_layers.condition_of(kind) is not None:
            yield Path(name, "book-keeping", "no weights, or part of another layer")
        else:
            yield Path(name, "whole model by example", "runs code that is not known")


def backbone_paths():
    """A line for each backbone of keras_hub."""
    import keras_hub

    for name in dir(keras_hub.models):
        if not name.endswith("Backbone") or name == "Backbone":
            continue
        model = backbones.model_of(getattr(keras_hub.models, name))
        yield path_of(name, model, *backbones.data_of(model, 4))
