"""The rules of convolutions, tables, scales and LoRA: float64, tied weights, bad input."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf import clipping
from keras_bandmf.clipping.rules.registry import rule_of
from tests.clipping import reference

RNG = np.random.default_rng(0)
ROWS = 4


def floats(*shape):
    return RNG.normal(size=(ROWS, *shape)).astype(keras.config.floatx())


def integers(*shape):
    return RNG.integers(-7, 7, size=(ROWS, *shape)).astype("int32")


@clipping.declare_row_wise
class Tied(layers.Layer):
    """Tokens in, logits over the same table out: both ways the table is used add up."""

    def __init__(self, cap=None, lora_rank=None):
        super().__init__()
        self.table = layers.ReversibleEmbedding(7, 4, logit_soft_cap=cap, lora_rank=lora_rank)
        self.middle = layers.Dense(4, "tanh")

    def build(self, shape):
        self.table.build(shape)
        self.middle.build((*shape, 4))

    def call(self, ids):
        first = self.table(ids)
        again = self.table(ids[:, ::2])
        x = self.middle(first + keras.ops.mean(again, axis=1, keepdims=True))
        return keras.ops.concatenate([self.table(x, reverse=True)] * 2, axis=-1)


OPTIONS = [
    {"padding": padding, "strides": strides, "dilation_rate": dilation}
    for padding in ("valid", "same")
    for strides, dilation in ((1, 1), (2, 1), (3, 1), (1, 2))
]
UNDILATED = [options for options in OPTIONS if options["dilation_rate"] == 1]


def convolutions():
    """Every kind of convolution with its options, as (layer, shape of an example)."""
    for o in OPTIONS:
        yield lambda o=o: layers.Conv3D(3, (2, 3, 2), **o), (7, 6, 8, 3)
        yield lambda o=o: layers.DepthwiseConv1D(3, depth_multiplier=2, **o), (11, 3)
        yield lambda o=o: layers.DepthwiseConv2D((3, 2), depth_multiplier=2, **o), (11, 8, 3)
        yield lambda o=o: layers.SeparableConv1D(4, 3, depth_multiplier=2, **o), (11, 3)
        yield lambda o=o: layers.SeparableConv2D(4, (3, 2), **o), (11, 8, 3)
        yield lambda o=o: layers.Conv1D(4, 3, lora_rank=2, **o), (11, 3)
    for o in UNDILATED:  # TensorFlow has no dilated transposed convolution on CPU
        for padding in (None, o["strides"] - 1) if o["strides"] > 1 else (None,):
            o = {**o, "output_padding": padding}
            yield lambda o=o: layers.Conv1DTranspose(4, 3, **o), (6, 3)
            yield lambda o=o: layers.Conv2DTranspose(4, (3, 2), **o), (6, 5, 3)
            yield lambda o=o: layers.Conv3DTranspose(3, (3, 2, 2), **o), (4, 3, 3, 2)
    first = {"data_format": "channels_first"}
    yield lambda: layers.DepthwiseConv1D(3, **first), (3, 8)
    yield lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, **first), (3, 8, 7)
    yield lambda: layers.SeparableConv1D(4, 3, **first), (3, 8)
    yield lambda: layers.SeparableConv2D(4, 3, use_bias=False, **first), (3, 8, 7)


EINSUMS = [
    ("abc,cde->abde", (4, 2, 5), (4, 6)),
    ("abde,dec->abc", (4, 6), (4, 2, 5)),
    ("...x,xy->...y", 3, (4, 6)),
    ("abc,bcd->abd", (4, 2), (4, 6)),
    ("btd,ndh->btnh", (None, 2, 3), (4, 6)),
    ("abc,dc->abd", (None, 2), (4, 6)),
]
LAYERS = {
    "dense": (lambda: layers.Dense(3, "tanh"), floats, (4, 5)),
    "dense_lora": (lambda: layers.Dense(6, lora_rank=2, lora_alpha=3), floats, (4, 5)),
    "embedding_lora": (lambda: layers.Embedding(7, 4, lora_rank=2), integers, (5,)),
    "reversible": (lambda: layers.ReversibleEmbedding(7, 4), integers, (5,)),
    "untied": (lambda: layers.ReversibleEmbedding(7, 4, tie_weights=False), integers, (5,)),
    "tied": (Tied, integers, (5,)),
    "tied_capped": (lambda: Tied(cap=2.0), integers, (5,)),
    "tied_lora": (lambda: Tied(lora_rank=2), integers, (5,)),
    "rms": (layers.RMSNormalization, floats, (4, 5)),
    "rms_axes": (lambda: layers.RMSNormalization(axis=[1, 2]), floats, (4, 5)),
    "prelu": (layers.PReLU, floats, (4, 5)),
    "prelu_shared": (lambda: layers.PReLU(shared_axes=[1]), floats, (4, 3, 5)),
    "conv3d": (lambda: layers.Conv3D(3, 2, strides=2), floats, (5, 4, 5, 2)),
    "conv1d_lora": (lambda: layers.Conv1D(4, 3, lora_rank=2, padding="causal"), floats, (8, 3)),
    "depthwise1d": (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), floats, (8, 3)),
    "depthwise2d": (lambda: layers.DepthwiseConv2D(3, 2, padding="same"), floats, (8, 7, 3)),
    "separable": (lambda: layers.SeparableConv2D(4, 3, activation="relu"), floats, (6, 5, 3)),
    "transpose": (lambda: layers.Conv2DTranspose(4, 3, 2, padding="same"), floats, (4, 3, 3)),
    "attention": (lambda: SelfAttention(layers.MultiHeadAttention(2, 3)), floats, (4, 6)),
    "grouped": (lambda: SelfAttention(layers.GroupQueryAttention(3, 4, 2)), floats, (4, 6)),
}


@clipping.declare_row_wise
class SelfAttention(layers.Layer):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x, use_causal_mask=True)


def randomised(layer, *args, **kwargs):
    """`layer`, built, with random weights: ones and zeros would hide mistakes."""
    layer(*args, **kwargs)
    for v in layer.trainable_variables:
        v.assign(RNG.normal(size=v.shape))
    return layer


@pytest.fixture(params=["product", "gram"])
def way(request, monkeypatch):
    """Force one way to the norm, whatever the shapes say."""
    wanted = request.param == "product"
    for module in ("factors", "rules.conv", "merge"):
        monkeypatch.setattr(
            f"keras_bandmf.clipping.{module}.prefers_product", lambda *sizes: wanted
        )
    return request.param


def model_of(name):
    """The layer in a model with a head, and data."""
    make, data, shape = LAYERS[name]
    x = data(*shape)
    inputs = keras.Input(shape, dtype=x.dtype)
    layer = randomised(make(), x)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layer(inputs))))
    model.compile(loss="mse")
    return model, x, floats(2)


def expectation(model, x, y):
    per_example, _ = reference.gradients(model, x, y, None)
    clip = float(np.median(reference.clipped(per_example, 1.0)[0]))
    return (clip, *reference.clipped(per_example, clip))


@pytest.mark.parametrize("name", LAYERS)
def test_float64(name, way, float64):
    model, x, y = model_of(name)
    clip, norms, sums = expectation(model, x, y)
    found = clipping.clipped_gradients(model, x, y, l2_norm_clip=clip)
    assert clipping.explain(model).route == "book-keeping"
    # Keras keeps LoRA's weights in float32, whatever the layer's dtype, and rounds their gradients.
    tolerance = 1e-6 if "lora" in name else 1e-9
    assert reference.error(found.sums, sums) < tolerance
    np.testing.assert_allclose(found.norms, norms, rtol=tolerance)


@pytest.mark.parametrize("name", ["tied", "depthwise2d", "prelu", "transpose", "dense_lora"])
def test_a_bad_example_contributes_nothing(name):
    model, x, y = model_of(name)
    y[1] = np.nan
    clip = 1.0
    _, sums = reference.clipped(reference.gradients(model, x, y, None)[0], clip)
    found = clipping.clipped_gradients(model, x, y, l2_norm_clip=clip)
    assert not np.isfinite(found.norms[1])
    assert reference.error(found.sums, sums) < 1e-5


def before(operation):
    """All operations that must have run before this one."""
    found, waiting = set(), [operation]
    while waiting:
        last = waiting.pop()
        needed = {*(t.op for t in last.inputs), *last.control_inputs} - found
        found |= needed
        waiting += needed
    return found


@pytest.mark.parametrize("groups", [1, 2])
def test_slices_of_a_convolution_are_alive_two_at_a_time(groups):
    """Each is cut after the last product but one, or nine copies of the inputs add up."""
    layer = layers.Conv2D(16, 3, groups=groups)
    layer.build((None, 12, 12, 32))
    kernel_shape = tuple(layer.kernel.shape)

    def factor(x, g):
        rule, _ = rule_of(layer)
        return rule.kernel_factor(layer, x, g, kernel_shape).values

    specs = [tf.TensorSpec((ROWS, 12, 12, 32)), tf.TensorSpec((ROWS, 10, 10, 16))]
    graph = tf.function(factor, autograph=False).get_concrete_function(*specs).graph
    products = [op for op in graph.get_operations() if "BatchMatMul" in op.type]
    assert len(products) == 9
    large = ROWS * 10 * 10 * 32
    for last, product in zip(products, products[2:], strict=False):
        own = [
            op
            for op in before(product) - before(last) - {last}
            if op.type == "StridedSlice" and op.outputs[0].shape.num_elements() == large
        ]
        assert own and all(last in before(op) for op in own)


@pytest.mark.parametrize("case", list(convolutions()))
def test_convolutions(case, float64):
    make, shape = case
    x = floats(*shape)
    layer = make()
    try:
        randomised(layer, x)
    except tf.errors.UnimplementedError:
        if layer.data_format != "channels_first":
            raise
        pytest.skip(f"Keras {keras.__version__} has no channels_first {layer.name} on CPU")
    assert clipping.check_rule(layer, x) < (1e-6 if layer.__class__ is layers.Conv1D else 1e-9)


@pytest.mark.parametrize("lora", [None, 2])
@pytest.mark.parametrize("case", EINSUMS, ids=lambda case: case[0])
def test_einsum_dense(case, lora, way):
    equation, outputs, shape = case
    x = floats(*shape)
    layer = layers.EinsumDense(equation, outputs, lora_rank=lora, lora_alpha=3)
    assert clipping.check_rule(randomised(layer, x), x) < 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_float32(name):
    make, data, shape = LAYERS[name]
    x = data(*shape)
    assert clipping.check_rule(randomised(make(), x), x) < 1e-5


@pytest.mark.parametrize("lora", [None, 2])
@pytest.mark.parametrize("tie", [True, False])
def test_reverse_projection_alone(tie, lora, way):
    layer = layers.ReversibleEmbedding(7, 4, tie_weights=tie, reverse_dtype="float32")
    layer.build()
    if lora:
        layer.enable_lora(lora)
    x = floats(3, 4)
    assert clipping.check_rule(randomised(layer, x, reverse=True), x, reverse=True) < 1e-5


def test_reversible_embedding_keeps_its_mask():
    inputs = keras.Input((5,), dtype="int32")
    x = layers.ReversibleEmbedding(7, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.Dense(2)(x))
    model.compile(loss="mse")
    x, y = integers(5) % 7, floats(5, 2)
    x[:, 3:] = 0
    clip, norms, sums = expectation(model, x, y)
    found = clipping.clipped_gradients(model, x, y, l2_norm_clip=clip)
    assert clipping.explain(model).route == "book-keeping"
    assert reference.error(found.sums, sums) < 1e-5


@pytest.mark.parametrize(
    "name",
    ["tied", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tied_lora", "separable"))],
)
def test_xla(name):
    model, x, y = model_of(name)
    clip, norms, sums = expectation(model, x, y)

    @tf.function(jit_compile=True)
    def step(x, y):
        return clipping.clipped_gradients(model, x, y, l2_norm_clip=clip)

    found = step(tf.constant(x), tf.constant(y))
    assert reference.error(found.sums, sums) < 1e-5
    np.testing.assert_allclose(found.norms, norms, rtol=1e-4)


def test_only_biases_are_trained():
    model, x, y = model_of("separable")
    for layer in model.layers:
        for v in layer.trainable_variables:
            v.trainable = "bias" in v.path
    assert len(model.trainable_variables) == 2
    clip, _, sums = expectation(model, x, y)
    found = clipping.clipped_gradients(model, x, y, l2_norm_clip=clip)
    assert clipping.explain(model).route == "book-keeping"
    assert reference.error(found.sums, sums) < 1e-5


def test_lora_trains_only_its_own_weights():
    model, x, y = model_of("dense_lora")
    assert [v.name for v in model.layers[1].trainable_variables] == [
        "bias",
        "lora_kernel_a",
        "lora_kernel_b",
    ]
    found = clipping.clipped_gradients(model, x, y)
    assert [tuple(s.shape) for s in found.sums[:3]] == [(6,), (5, 2), (2, 6)]


def share_kernel(one, other):
    other._tracker.unlock()
    other._kernel = one._kernel


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_weight_shared_with_a_frozen_layer(when, float64):
    """Frozen first, the shared kernel trains through both layers, as it does in Keras' own step."""
    inputs = keras.Input((4,))
    one, other = layers.Dense(4, name="one"), layers.Dense(4, name="other", use_bias=False)
    outputs = layers.Dense(2)(other(one(inputs)))
    if when == "before":
        other.trainable = False
    share_kernel(one, other)
    if when == "after":
        other.trainable = False
    model = keras.Model(inputs, outputs)
    model.compile(loss="mse")
    x, y = floats(4), floats(2)
    clip, _, sums = expectation(model, x, y)
    found = clipping.clipped_gradients(model, x, y, l2_norm_clip=clip)
    assert len(sums) == len(model.trainable_variables)
    assert reference.error(found.sums, sums) < 1e-9


def test_one_kernel_in_layers_of_different_kinds_is_not_mistaken_for_two_calls():
    """Square: shapes agree, the arrangement does not."""
    inputs = keras.Input((4,))
    one = layers.Dense(4, use_bias=False)
    other = layers.EinsumDense("ab,cb->ac", 4)
    outputs = layers.Dense(2)(other(one(inputs)))
    share_kernel(one, other)
    model = keras.Model(inputs, outputs)
    model.compile(loss="mse")
    x, y = floats(4), floats(2)
    clip, _, sums = expectation(model, x, y)
    found = clipping.clipped_gradients(model, x, y, l2_norm_clip=clip)
    route = clipping.explain(model)
    assert route.route == "general" and "tied" in route.why
    assert reference.error(found.sums, sums) < 1e-5


def test_an_empty_sequence_has_a_gradient_of_zero():
    inputs = keras.Input((None,), dtype="int32")
    x = layers.PReLU(shared_axes=[1])(layers.Dense(3)(layers.Embedding(7, 4)(inputs)))
    model = keras.Model(inputs, layers.Dense(2)(keras.ops.sum(x, axis=1)))
    model.compile(loss="mse")
    y = floats(2)
    found = clipping.clipped_gradients(model, np.zeros((ROWS, 0), "int32"), y, l2_norm_clip=1.0)
    assert clipping.explain(model).route == "book-keeping"
    _, sums = reference.clipped(
        reference.gradients(model, tf.zeros((ROWS, 0), tf.int32), y, None)[0], 1.0
    )
    assert reference.error(found.sums, sums) < 1e-5
    assert not np.any(found.sums[0])


def test_an_argument_the_rule_does_not_know_sends_the_model_the_general_path():
    class Louder(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],))

        def call(self, inputs, times=1.0):
            return inputs * self.scale * times

    class Rule(clipping.LayerRule):
        def forward(self, layer, inputs):
            return inputs * clipping.constant(layer.scale), inputs

        def gradients(self, layer, saved, g):
            return [(layer.scale, clipping.Rows(saved * g))]

    clipping.register_rule(Louder, Rule())
    assert clipping.check_rule(Louder(), floats(3)) < 1e-6
    assert clipping.check_rule(Louder(), floats(3), times=1.0) < 1e-6
    with pytest.raises(ValueError, match="`times`"):
        clipping.check_rule(Louder(), floats(3), times=2.0)


@pytest.mark.parametrize(
    "layer",
    [
        layers.LayerNormalization(axis=0),
        layers.LayerNormalization(axis=[1, 0]),
        layers.GroupNormalization(2, axis=0),
    ],
    ids=["one axis", "two axes", "groups"],
)
def test_a_normalisation_over_the_rows_has_no_rule(layer):
    rule, why = rule_of(layer)
    assert rule is None and "axis 0" in why


def test_a_layer_that_recomputes_its_activations_has_no_rule():
    """Its `call` runs a second time in the backward pass, where no tap sees it."""
    with keras.RematScope(mode="full"):
        layer = layers.Dense(3)
    rule, why = rule_of(layer)
    assert rule is None and "remat" in why


LINEAR = {
    "dense": (lambda: layers.Dense(5), floats, (3, 4)),
    "einsum": (lambda: layers.EinsumDense("abc,cd->abd", (3, 5)), floats, (3, 4)),
    "conv": (lambda: layers.Conv2D(5, (2, 3), strides=2, padding="same"), floats, (6, 5, 4)),
    "causal": (lambda: layers.Conv1D(5, 2, padding="causal"), floats, (6, 4)),
    "embedding": (lambda: layers.Embedding(7, 5), integers, (3,)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_rule_answers_for_any_kernel(name):
    """Another kernel with fewer outputs: what the layer computes, and its gradients."""
    make, data, shape = LINEAR[name]
    layer, x = make(), data(*shape)
    x = x % 7 if data is integers else x
    layer(x)
    rule, _ = rule_of(layer)
    weight = layer.embeddings if data is integers else layer.kernel
    shape = (*weight.shape[:-1], 2)
    kernel = tf.constant(RNG.normal(size=shape), weight.dtype)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(kernel)
        outputs = rule.linear(layer, tf.constant(x), kernel)
        g = tf.constant(RNG.normal(size=outputs.shape), outputs.dtype)
        loss = tf.reduce_sum(outputs * g, axis=list(range(1, outputs.shape.rank)))
    expected = tape.jacobian(loss, kernel, experimental_use_pfor=False)
    expected = tf.reshape(tf.convert_to_tensor(expected), [ROWS, -1])
    factor = rule.kernel_factor(layer, tf.constant(x), g, shape)
    norms = tf.reduce_sum(tf.square(expected), axis=1)
    np.testing.assert_allclose(factor.squared_norms(), norms, rtol=1e-4)
    for i in range(ROWS):
        row = np.reshape(factor.weighted_sum(tf.one_hot(i, ROWS, dtype=g.dtype)), [-1])
        np.testing.assert_allclose(row, expected[i], atol=1e-4)
