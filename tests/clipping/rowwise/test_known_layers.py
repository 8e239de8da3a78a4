"""Each layer of the table, run as `fit` runs it: as a graph of a number of rows not known."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf.clipping.rowwise import known_layers

ROWS = 6
S, V, V3 = (6, 4), (8, 8, 3), (4, 4, 4, 2)
# Name -> arguments and shape of an example.
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
