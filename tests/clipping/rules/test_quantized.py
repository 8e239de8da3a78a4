"""LoRA over kernels in int8: the rules, and which quantized layers may mix rows."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf import clipping
from keras_bandmf.clipping.rowwise.decision import rowwise
from keras_bandmf.clipping.rules.registry import rule_of
from tests import hub
from tests.clipping import reference

RNG = np.random.default_rng(0)
WEIGHTS_ALONE = {"activation_quantizer": None}


def moved_away(model):
    for v in model.trainable_variables:
        v.assign(v + 0.3 * RNG.normal(size=v.shape))


def quantized(layer, shape, rank=2, dtype="float32", **config):
    """A model of one quantized layer between two that are not, and its data."""
    inputs = keras.Input(shape)
    x = inputs
    if not isinstance(layer, layers.Embedding):
        x = layers.Dense(shape[-1], name="before")(x)
    outputs = layers.Dense(1)(layers.Flatten()(layer(x)))
    model = keras.Model(inputs, outputs)
    layer.quantize("int8", config=keras.quantizers.Int8QuantizationConfig(**config))
    if rank:
        layer.enable_lora(rank)
    model.compile(loss="mse")
    moved_away(model)
    x = RNG.normal(size=(5, *shape)).astype("float32")
    if isinstance(layer, layers.Embedding):
        x = RNG.integers(0, 7, (5, *shape))
    return model, x, RNG.normal(size=(5, 1)).astype("float32")


LAYERS = {
    "dense": (lambda: layers.Dense(6), (4, 5), "DenseRule"),
    "dense_of_vectors": (lambda: layers.Dense(6, use_bias=False), (5,), "DenseRule"),
    "queries": (lambda: layers.EinsumDense("btd,dnh->btnh", (4, 2, 3), bias_axes="nh"), (4, 5),
                "EinsumDenseRule"),
    "outputs": (lambda: layers.EinsumDense("btnh,nhd->btd", (4, 3)), (4, 2, 5), "EinsumDenseRule"),
    "activation": (lambda: layers.Dense(6, activation="gelu"), (4, 5), "ByExampleRule"),
    "table": (lambda: layers.Embedding(7, 5), (4,), "ByExampleRule"),
}  # fmt: skip


@pytest.mark.parametrize("config", [{}, WEIGHTS_ALONE], ids=["inputs", "weights alone"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_row_has_the_gradient_of_its_own(name, config):
    make, shape, rule = LAYERS[name]
    layer = make()
    model, x, y = quantized(layer, shape, **config)
    assert rule in rule_of(layer)[1]
    clipping.check_model(model, x, y)
    explanation = clipping.explain(model)
    assert explanation.why == "checked against one example at a time", str(explanation)
    assert sum("lora" in v.name for v in model.trainable_variables) == 2
    reference.compare(clipping.clipped_gradients, model, x, y)


@pytest.mark.parametrize("name", ["dense", "queries"])
def test_the_same_in_a_program_of_xla(name):
    make, shape, _ = LAYERS[name]
    model, x, y = quantized(make(), shape)
    eager = clipping.clipped_gradients(model, x, y, l2_norm_clip=0.5)
    compiled = tf.function(
        lambda x, y: clipping.clipped_gradients(model, x, y, l2_norm_clip=0.5).sums,
        jit_compile=True,
    )
    for a, b in zip(eager.sums, compiled(tf.constant(x), tf.constant(y)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_bias_alone_is_trained_without_lora():
    layer = layers.Dense(6)
    model, x, y = quantized(layer, (4, 5), rank=None)
    assert [v.name for v in layer.trainable_variables] == ["bias"]
    assert rule_of(layer)[1] == "DenseRule"
    reference.compare(clipping.clipped_gradients, model, x, y)


class OfTheBatch(keras.quantizers.AbsMaxQuantizer):
    """A quantizer of a user, who may scale by the largest entry of the batch."""

    def __call__(self, x, axis=None, to_numpy=False):
        return super().__call__(x, axis=(0, -1), to_numpy=to_numpy)


def test_quantizers_that_may_mix_rows_send_the_model_to_the_general_path():
    for quantizer in (OfTheBatch(), keras.quantizers.AbsMaxQuantizer(axis=0)):
        layer = layers.Dense(6)
        model, x, y = quantized(layer, (4, 5), activation_quantizer=quantizer)
        assert "quantizer" in rowwise(model).unknown[0] or "OfTheBatch" in rowwise(model).unknown[0]
        assert clipping.explain(model).route == "general"
    layer = layers.EinsumDense("btd,dnh->btnh", (4, 2, 3))
    model, x, y = quantized(layer, (4, 5))
    assert not rowwise(model).unknown
    layer.quantization_axis = (0, 2)
    assert "axis of its quantizer" in rowwise(model).unknown[0]


def test_a_quantized_layer_that_mixes_rows_is_named():
    layer = layers.Dense(6, name="culprit")
    model, x, y = quantized(layer, (4, 5), activation_quantizer=OfTheBatch())
    with pytest.raises(ValueError, match="layer '.*culprit'"):
        clipping.check_model(model, x, y)


def test_lora_along_the_axis_of_the_rows_is_refused():
    """In int8 Keras multiplies with B along the last axis, here that of the rows."""
    inputs = keras.Input((3,))
    layer = layers.EinsumDense("ab,b->a", ())
    model = keras.Model(inputs, layer(inputs))
    layer.quantize("int8", config=keras.quantizers.Int8QuantizationConfig(**WEIGHTS_ALONE))
    assert not rowwise(model).unknown
    layer.enable_lora(3)
    moved_away(model)
    x = RNG.normal(size=(3, 3)).astype("float32")
    one, other = np.array(layer(x)), np.array(layer(x * np.array([[1], [2], [2]])))
    assert abs(one[0] - other[0]) > 1e-3
    assert "LoRA's product is not along the last axis" in rowwise(model).unknown[0]


@pytest.mark.parametrize(
    ("equation", "outputs", "shape"),
    [("abc,cde->abed", (4, 3, 3), (4, 5)), ("abc,dc->abd", (4, 3), (4, 3))],
)
def test_lora_along_an_axis_that_is_not_the_last_has_its_true_gradient(equation, outputs, shape):
    layer = layers.EinsumDense(equation, outputs)
    model, x, y = quantized(layer, shape, rank=3)
    assert "LoRA's product is not along the last axis" in rowwise(model).unknown[0]
    reference.compare(clipping.clipped_gradients, model, x, y)


def test_four_bits_and_subclasses_take_the_general_path():
    class Own(layers.Dense):
        pass

    for layer, mode in ((layers.Dense(6), "int4"), (Own(6), "int8")):
        inputs = keras.Input((5,))
        model = keras.Model(inputs, layer(inputs))
        layer.quantize(mode, type_check=False)
        layer.enable_lora(2)
        assert f"nothing is known of {type(layer).__name__} in {mode}" in rowwise(model).unknown[0]
        assert rule_of(layer)[0] is None


def test_a_method_replaced_on_a_quantized_layer_is_seen():
    layer = layers.Dense(6)
    model, _, _ = quantized(layer, (4, 5))
    vars(layer)["quantized_call"] = lambda inputs: inputs
    assert "`quantized_call` was replaced" in rule_of(layer)[1]
    assert "`quantized_call` was replaced" in rowwise(model).unknown[0]


@pytest.mark.parametrize("name", ["gpt2", "bert_classifier", "gemma", "llama"])
def test_tasks_of_keras_hub_over_a_quantized_base(name):
    pytest.importorskip("keras_hub")
    pytest.importorskip("sentencepiece")
    model = getattr(hub, name)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that Keras does not quantize
        model.backbone.quantize(
            "int8", filters=lambda layer: not isinstance(layer, keras.layers.Embedding)
        )
    model.backbone.enable_lora(2)
    model.compile()
    moved_away(model)
    rows = (hub.TEXTS.tolist(), hub.LABELS) if name == "bert_classifier" else (hub.LINES,)
    x, y, weights = keras.utils.unpack_x_y_sample_weight(model.preprocess_samples(*rows))
    clipping.check_model(model, x, y, weights)
    explanation = clipping.explain(model)
    assert explanation.route == "book-keeping", str(explanation)
    assert {route for _, _, route, _ in explanation.rows} <= {"book-keeping", "none"}
    small = [keras.tree.map_structure(lambda t: np.asarray(t)[:4], part) for part in (x, y)]
    reference.compare(clipping.clipped_gradients, model, *small)
