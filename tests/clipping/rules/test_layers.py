"""Every rule against a per-example loop, over the options of its layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf.clipping import LayerRule, check_model, clipped_gradients, explain, register_rule
from keras_bandmf.clipping import factors as factors_module
from tests.clipping import reference

CONV2D = [
    {"padding": p, "strides": s, "dilation_rate": d}
    for p in ("valid", "same")
    for s, d in ((1, 1), (2, 1), ((3, 2), 1), (1, 2), (1, (1, 3)))
]
CONV1D = [
    {"padding": p, "strides": s, "dilation_rate": d}
    for p in ("valid", "same", "causal")
    for s, d in ((1, 1), (2, 1), (3, 1), (1, 2))
]


def compare(layer, shape, rows=4, integers=None, route="book-keeping", dtype="float32"):
    inputs = keras.Input(shape, dtype=dtype)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layer(inputs))))
    model.compile(loss="mse")
    rng = np.random.default_rng(0)
    for v in model.trainable_variables:  # gamma = 1 and beta = 0 would hide mistakes
        v.assign(rng.normal(size=v.shape))
    x = rng.normal(size=(rows, *shape)).astype("float32")
    if integers:
        x = rng.integers(*integers, size=(rows, *shape)).astype(dtype)
    y = rng.normal(size=(rows, 2)).astype("float32")
    per_example, _ = reference.gradients(model, x, y, None)
    clip = float(np.median(reference.clipped(per_example, 1.0)[0]))
    norms, sums = reference.clipped(per_example, clip)
    check_model(model, x, y)
    assert explain(model).route == route
    found = clipped_gradients(model, x, y, l2_norm_clip=clip)
    assert reference.error(found.sums, sums) < 1e-5
    np.testing.assert_allclose(found.norms, norms, rtol=2e-5)


@pytest.fixture(params=["product", "gram"])
def way(request, monkeypatch):
    """Force one way to the norm, whatever the shapes say."""
    wanted = request.param == "product"
    for module in ("factors", "rules.conv"):
        monkeypatch.setattr(
            f"keras_bandmf.clipping.{module}.prefers_product", lambda *sizes: wanted
        )
    return request.param


@pytest.mark.parametrize("options", CONV2D, ids=str)
@pytest.mark.parametrize("channels", [3, 17])
def test_conv2d(options, channels, way):
    compare(layers.Conv2D(4, (3, 2), **options), (8, 9, channels))


@pytest.mark.parametrize("options", CONV1D, ids=str)
def test_conv1d(options, way):
    compare(layers.Conv1D(4, 3, **options), (11, 3))


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_conv(groups, way):
    compare(layers.Conv2D(6, 3, groups=groups, strides=2), (8, 9, 4))
    compare(layers.Conv1D(6, 3, groups=groups, padding="same"), (8, 4))


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_channels_first_norm(padding):
    # Keras transposes channels_first itself on a CPU, where TensorFlow cannot train it.
    try:
        compare(layers.Conv2D(4, 3, padding=padding, data_format="channels_first"), (3, 8, 9))
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
        pytest.skip("TensorFlow has no channels_first convolution on this CPU")


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_dense(shape, way):
    compare(layers.Dense(6, "tanh"), shape)
    compare(layers.Dense(6, use_bias=False), shape)


@pytest.mark.parametrize("shape", [(5,), (3, 2)])
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_embedding(shape, dtype):
    compare(layers.Embedding(7, 3), shape, integers=(-7, 7), dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": [1, 2]},
        {"axis": [1]},
        {"axis": [-2]},
        {"center": False},
        {"scale": False},
        {"rms_scaling": True},
    ],
    ids=str,
)
def test_layer_normalization(options):
    compare(layers.LayerNormalization(**options), (4, 6))


@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 1}, {"groups": -1}, {"axis": 1, "groups": 2}, {"center": False}],
    ids=str,
)
def test_group_normalization(options):
    compare(layers.GroupNormalization(**{"groups": 3, **options}), (4, 5, 6))


def test_subclasses_and_replaced_calls_take_the_general_path():
    class Twice(layers.Dense):
        def call(self, inputs, training=None):
            return 2 * super().call(inputs)

    compare(Twice(3), (4,), route="general")
    layer = layers.Dense(3)
    layer.call = lambda inputs, training=None: layers.Dense.call(layer, 2 * inputs)
    compare(layer, (4,), route="general")


def test_layer_without_a_rule_takes_the_general_path():
    class Unknown(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, inputs):
            return inputs * self.scale

    compare(Unknown(), (4, 5), route="general")


def test_layer_inside_another_layer():
    compare(layers.TimeDistributed(layers.Dense(3)), (4, 5))


def test_register_rule():
    class Scale(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, inputs):
            return inputs * self.scale

    class ScaleRule(LayerRule):
        factor = 1.0

        def forward(self, layer, inputs):
            return inputs * tf.stop_gradient(tf.convert_to_tensor(layer.scale)), inputs

        def gradients(self, layer, saved, g):
            return [(layer.scale, factors_module.Rows(self.factor * saved * g))]

    rule = ScaleRule()
    with pytest.raises(ValueError, match="layer_class"):
        register_rule("Scale", rule)
    with pytest.raises(ValueError, match="rule"):
        register_rule(Scale, ScaleRule)
    with pytest.raises(ValueError, match="already"):
        register_rule(layers.Dense, rule)
    compare(Scale(), (4,), route="general")
    register_rule(Scale, rule)
    compare(Scale(), (4,))
    # A wrong rule costs time, never correctness: the check sends the model the general path.
    rule.factor = 0.9
    compare(Scale(), (4,), route="general")
