"""Which layers and operations are known to treat rows independently, and which path follows."""

import functools
import importlib
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_bandmf import clipping
from keras_bandmf.clipping import explain
from keras_bandmf.clipping.rowwise import known_layers
from keras_bandmf.clipping.rowwise.decision import may_be_row_wise, rowwise
from tests.clipping import zoo

LAYERS = {
    name: kind
    for name in dir(layers)
    if inspect.isclass(kind := getattr(layers, name)) and issubclass(kind, layers.Layer)
}


def reasons(outputs, inputs):
    return rowwise(keras.Model(inputs, outputs)).unknown


def test_every_layer_of_keras_is_in_exactly_one_of_the_tables():
    for name, kind in LAYERS.items():
        known = known_layers.condition_of(kind) is not None
        mixer = name in known_layers.MIXERS
        assert known + mixer + (name in known_layers.UNKNOWN) == 1, name


@pytest.mark.parametrize("name", sorted(known_layers.OTHER_NAMES))
def test_every_other_name_is_that_of_a_layer(name):
    if name.startswith("keras_hub"):
        pytest.importorskip("keras_hub")
    module, _, attribute = name.rpartition(".")
    kind = getattr(importlib.import_module(module), attribute)
    assert issubclass(kind, layers.Layer) and known_layers.condition_of(kind) is not None


@pytest.mark.parametrize("make", zoo.ZOO, ids=lambda make: make.__name__)
def test_the_models_of_the_zoo_need_no_bet_unless_they_have_code_of_their_own(make):
    found = rowwise(make()[0])
    assert bool(found.unknown) == (make is zoo.unknown_layer)
    assert bool(found.declared) == (make in (zoo.subclassed, zoo.by_example))


@pytest.mark.parametrize("name", sorted(known_layers.MIXERS))
def test_known_mixers_are_refused_with_the_replacement(name):
    if not hasattr(layers, name):
        pytest.skip("not in this Keras")
    shape = (400,) if name == "MelSpectrogram" else (4, 4, 3)
    model = keras.Sequential(
        [keras.Input(shape), getattr(layers, name)(), layers.Flatten(), layers.Dense(1)]
    )
    model.compile(loss="mse")
    x, y = np.ones((3, *shape), "float32"), np.ones((3, 1))
    for call in (clipping.check_model, clipping.clipped_gradients):
        with pytest.raises(ValueError, match=f"{name} mixes the examples.*Use "):
            call(model, x, y)


def test_state_that_goes_from_batch_to_batch_is_refused():
    inputs = keras.Input(batch_shape=(3, 4, 2))
    model = keras.Model(inputs, layers.LSTM(2, stateful=True)(inputs))
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="stateful=True"):
        clipping.clipped_gradients(model, np.ones((3, 4, 2)), np.ones((3, 2)))


X = keras.Input((4, 6))
V = keras.Input((6,))
S = keras.Input(())
LONG = keras.Input((None,))
ONES = np.ones((1, 1, 1), "float32")
TABLE = tf.constant(np.ones((6, 6), "float32"))

ROW_WISE = {
    "add": lambda: X + 2 * X,
    "constant": lambda: X * tf.ones([4, 6]),
    "mean": lambda: ops.mean(X, axis=1),
    "einsum of more axes than letters": lambda: ops.einsum("...ab->...ba", X),
    "softmax": lambda: ops.softmax(X, axis=-1),
    "slice": lambda: X[:, 0],
    "ellipsis": lambda: X[..., None],
    "reshape": lambda: ops.reshape(X, (-1, 24)),
    "transpose": lambda: ops.transpose(X, (0, 2, 1)),
    "matmul": lambda: ops.matmul(X, TABLE),
    "scores": lambda: ops.matmul(X, ops.transpose(X, (0, 2, 1))),
    "einsum": lambda: ops.einsum("btd,bsd->bts", X, X),
    "concatenate": lambda: ops.concatenate([X, X], axis=-1),
    "stack": lambda: ops.stack([X, X], axis=1),
    "where": lambda: ops.where(X > 0, X, 0.0),
    "cast": lambda: ops.cast(X, "float16"),
    "expand": lambda: ops.expand_dims(X, 1),
    "take": lambda: ops.take(X, [0, 1], axis=1),
}
NOT_ROW_WISE = {
    "mean": lambda: X - ops.mean(X, axis=0, keepdims=True),
    "max of all": lambda: X * ops.max(X),
    "mean of all": lambda: X - ops.mean(X, keepdims=True),
    "minus rank": lambda: X - ops.mean(X, axis=-3, keepdims=True),
    "softmax of rows": lambda: ops.softmax(S),
    "rows with rows": lambda: V + ops.reshape(X, (-1, 24))[:, :1] * X[:, :, 0][:, None],
    "ranks": lambda: X + V,
    "reverse": lambda: X[::-1],
    "one row": lambda: X[0],
    "flip": lambda: ops.flip(X, axis=0),
    "roll": lambda: ops.roll(X, 1),
    "roll rows": lambda: ops.roll(X, 1, axis=0),
    "cumsum": lambda: ops.cumsum(X, axis=0),
    "sort": lambda: ops.sort(X, axis=0),
    "transpose": lambda: ops.transpose(X, (1, 0, 2)),
    "transpose all": lambda: ops.transpose(V),
    "fold": lambda: ops.reshape(X, (-1, 6)),
    "gram": lambda: ops.matmul(V, ops.transpose(V)),
    "square": lambda: ops.matmul(V, V),
    "einsum": lambda: ops.einsum("bd,cd->bc", V, V),
    "einsum of no more axes": lambda: ops.einsum("...ab->...ba", LONG)[:, :1],
    "array as bound": lambda: ops.clip(V, -ONES, ONES),
    "array as slope": lambda: ops.leaky_relu(V, negative_slope=ONES),
    "array as threshold": lambda: ops.threshold(V, ONES, 0.0),
    "einsum sum": lambda: ops.einsum("btd,bsd->ts", X, X),
    "concatenate": lambda: ops.concatenate([X, X], axis=0),
    "take": lambda: ops.take(V, ops.cast(V, "int32"), axis=0),
    "constant by row": lambda: X * tf.ones([3, 4, 6]),
    "unknown": lambda: ops.fft((X, X))[0],
    "vectorized map": lambda: ops.vectorized_map(lambda t: t, X),
}


@pytest.mark.parametrize("name", ROW_WISE)
def test_operations_that_keep_rows_apart(name):
    assert reasons(ROW_WISE[name](), [X]) == []


@pytest.mark.parametrize("name", NOT_ROW_WISE)
def test_operations_that_may_mix_rows(name):
    try:
        output = NOT_ROW_WISE[name]()
    except (ValueError, TypeError):
        pytest.skip("Keras itself refuses")
    inputs = [t for t in (X, V, S, LONG) if t in keras.Function([X, V, S, LONG], output).inputs]
    try:
        model = keras.Model(inputs, output)
    except ValueError:
        model = keras.Model([X, V, S, LONG], [output])
    assert rowwise(model).unknown


BAD_LAYERS = {
    "Concatenate": lambda: layers.Concatenate(axis=0)([X, X]),
    "Softmax": lambda: layers.Softmax(axis=0)(X),
    "Softmax of rows": lambda: layers.Softmax()(S),
    "Activation of rows": lambda: layers.Activation("softmax")(S),
    "LayerNormalization": lambda: layers.LayerNormalization(axis=-1)(S),
    "UnitNormalization": lambda: layers.UnitNormalization(axis=0)(X),
    "MultiHeadAttention": lambda: layers.MultiHeadAttention(1, 2, attention_axes=(0,))(X, X),
    "EinsumDense": lambda: layers.EinsumDense("abc,cd->bad", (4, None, 3))(X),
    "Lambda": lambda: layers.Lambda(lambda t: t)(X),
    "own activation": lambda: layers.Dense(2, activation=lambda t: t - tf.reduce_mean(t))(X),
    "activation that reduces": lambda: layers.Dense(2, activation=ops.mean)(X),
    "unbatched image": lambda: layers.RandomFlip()(X),
    "TimeDistributed": lambda: layers.TimeDistributed(layers.Softmax())(V),
    "layer as activation": lambda: layers.Activation(layers.UnitNormalization(axis=-2))(V),
    "Dense with a layer": lambda: layers.Dense(4, activation=layers.Softmax(axis=-2))(V),
    "LSTM with a layer": lambda: layers.LSTM(3, activation=layers.Softmax(axis=-2))(X),
    "inside TimeDistributed": lambda: layers.TimeDistributed(
        layers.Activation(layers.UnitNormalization(axis=-2))
    )(X),
    "a vector of results": lambda: layers.EinsumDense("bd,d->b", (), activation="softmax")(V),
    "dots for nothing": lambda: layers.EinsumDense("...ab,bc->...ac", (4, 3))(V),
    "Rescaling": lambda: layers.Rescaling(ONES)(V),
    "GaussianNoise": lambda: layers.GaussianNoise(0.1 * ONES)(V),
    "LeakyReLU": lambda: layers.LeakyReLU(ONES)(V),
    "bounded activation": lambda: layers.Activation(
        functools.partial(keras.activations.relu, max_value=ONES)
    )(V),
    "mask of Softmax": lambda: layers.Softmax()(X, mask=V > 0),
    "mask of MultiHeadAttention": lambda: layers.MultiHeadAttention(1, 2)(
        X[:, :1], X, attention_mask=X[:, :, 0] > 0
    ),
    "replaced method": lambda: replaced()(2 * [V]),
}
GOOD_LAYERS = {
    "layer as activation": lambda: layers.Activation(layers.UnitNormalization(axis=-1))(V),
    "along time": lambda: layers.Activation(layers.UnitNormalization(axis=-2))(X),
    "LSTM with a layer": lambda: layers.LSTM(3, activation=layers.Softmax(axis=-1))(X),
    "EinsumDense": lambda: layers.EinsumDense("...b,bc->...c", (4, 3), activation="relu")(X),
    "Rescaling": lambda: layers.Rescaling(np.ones(6), np.ones((4, 6)))(X),
    "mask of attention": lambda: layers.MultiHeadAttention(1, 2)(
        X, X, attention_mask=X[:, :, :4] > 0
    ),
}
HUB_LAYERS = {
    "FNetEncoder": lambda hub: hub.FNetEncoder(8)(V),
    "PositionEmbedding": lambda hub: hub.PositionEmbedding(2048)(V),
    "SinePositionEncoding": lambda hub: hub.SinePositionEncoding()(V),
    "sequence axis": lambda hub: hub.RotaryEmbedding(sequence_axis=0)(X),
    "feature axis": lambda hub: hub.RotaryEmbedding(sequence_axis=1, feature_axis=0)(X),
    "positions": lambda hub: hub.RotaryEmbedding()(X[:, :1], positions=V[:, 0]),
}


def replaced():
    layer = layers.Average()
    layer._merge_function = lambda tensors: tensors[0][::-1]
    return layer


@pytest.mark.parametrize("name", GOOD_LAYERS)
def test_settings_that_do_not_reach_the_rows(name):
    assert not rowwise(keras.Model([X, V, S], GOOD_LAYERS[name]())).unknown


@pytest.mark.parametrize("name", HUB_LAYERS)
def test_layers_of_keras_hub_need_their_axes(name):
    hub = pytest.importorskip("keras_hub")
    try:
        output = HUB_LAYERS[name](hub.layers)
    except Exception:
        pytest.skip("keras_hub itself refuses")
    assert rowwise(keras.Model([X, V, S], output)).unknown


def t5_with_biases(*shape):
    module = pytest.importorskip("keras_hub.src.models.t5.t5_transformer_layer")
    settings = {"is_decoder": False, "hidden_dim": 6, "intermediate_dim": 4, "key_value_dim": 3}
    settings |= {"dropout": 0.0, "activation": "relu", "layer_norm_epsilon": 1e-6, "num_heads": 4}
    bias = keras.Input(shape)
    outputs = module.T5TransformerLayer(**settings)(X, position_bias=bias)[0]
    return rowwise(keras.Model([X, bias], outputs)).unknown


def test_biases_of_t5_have_the_axes_of_scores():
    """With an axis less they would be read along the heads."""
    assert not t5_with_biases(4, 4, 4)
    assert t5_with_biases(4, 4)


def hub_layer(name, **settings):
    module, _, kind = f"keras_hub.src.models.{name}".rpartition(".")
    pytest.importorskip("keras_hub")
    return getattr(importlib.import_module(module), kind)(**settings)


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_masks_that_are_reshaped_or_added_as_they_are_have_the_axes_for_it(axes):
    mask = keras.Input({2: (4,), 3: (4, 4), 4: (1, 4, 4)}[axes])
    roformer = {"heads": 4, "head_size": 2}
    masked = {
        "esm.esm_attention.EsmSelfAttention": (2, roformer),
        "roformer_v2.roformer_v2_attention.RoformerAttention": (2, roformer),
        "pali_gemma.pali_gemma_vit.PaliGemmaVitAttention": (
            4,
            {"hidden_dim": 6, "num_heads": 2},
        ),
        "dinov3.dinov3_layers.DINOV3Attention": (4, {"hidden_dim": 6, "num_heads": 2}),
        "t5gemma.t5gemma_attention.T5GemmaAttention": (
            4,
            {"hidden_size": 6, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 2}
            | {"query_pre_attn_scalar": 1.0, "attention_bias": False},
        ),
    }
    for name, (expected, settings) in masked.items():
        try:
            output = hub_layer(name, **settings)(X, attention_mask=mask)
        except Exception:  # keras_hub itself refuses
            assert axes != expected
            continue
        output = output[0] if isinstance(output, tuple) else output
        assert bool(rowwise(keras.Model([X, mask], output)).unknown) == (axes != expected), name


_ONE_LAYER = {"num_layers": 1, "num_heads": 4, "hidden_dim": 6, "intermediate_dim": 4}


def test_masks_of_which_a_layer_takes_one_by_axis_0_are_refused():
    for masks in (None, X[:, None, :, :4] > 0):
        encoder = hub_layer("deit.deit_layers.DeiTEncoder", **{**_ONE_LAYER, "num_heads": 2})
        output = encoder(X, **({} if masks is None else {"attention_masks": masks}))[0]
        assert bool(rowwise(keras.Model(X, output)).unknown) == (masks is not None)


@pytest.mark.parametrize("explicit", [None, True, False])
def test_masks_that_are_added_to_scores_whatever_their_axes_are_refused(explicit):
    """Also those that Keras passes of itself: `Masking` makes one of two axes."""
    block = hub_layer(
        "pali_gemma.pali_gemma_vit.PaliGemmaVitEncoderBlock", num_heads=2, intermediate_dim=4
    )
    options = {"mask": X[:, None, :, :4] > 0} if explicit else {}
    output = block(layers.Masking()(X) if explicit is False else X, **options)
    assert bool(rowwise(keras.Model(X, output)).unknown) == (explicit is not None)


def test_what_is_added_to_the_inputs_has_their_axes():
    for other, same in ((X, True), (V, False)):
        output = hub_layer("deit.deit_layers.DeiTOutput", hidden_dim=6)(X, other)
        assert bool(rowwise(keras.Model([X, V], output)).unknown) != same


def test_positions_that_come_from_rows_are_refused_where_positions_without_rows_are_expected():
    image, tokens = keras.Input((4, 4, 3)), keras.Input((4, 8))
    settings = {**_ONE_LAYER, "num_heads": 2, "hidden_dim": 8}
    positions = hub_layer(
        "dinov3.dinov3_layers.DINOV3RopePositionEmbedding",
        **{"hidden_dim": 8, "num_heads": 2, "rope_theta": 100.0, "patch_size": 2},
    )(image)
    for given, known in ((positions, True), ((tokens[:, 0, :4], tokens[:, 0, :4]), False)):
        encoder = hub_layer("dinov3.dinov3_layers.DINOV3Encoder", **settings)
        output = encoder(tokens, position_embeddings=given)[0]
        assert bool(rowwise(keras.Model([image, tokens], output)).unknown) != known
    added = keras.Model([image, tokens], tokens[:, :, :4] + positions[0])
    assert rowwise(added).unknown


def test_a_function_that_is_looked_up_by_name_is_not_known():
    settings = {"hidden_size": 6, "intermediate_size": 4, "dropout_rate": 0.0}
    for activation in ("gelu_approximate", "relu"):
        name = "t5gemma.t5gemma_layers.T5GemmaMLP"
        output = hub_layer(name, hidden_activation=activation, **settings)(X)
        assert bool(rowwise(keras.Model(X, output)).unknown) == (activation == "relu")


@pytest.mark.parametrize(
    "name", ["t5gemma.t5gemma_layers.T5Gemma", "t5gemma2.t5gemma2_layers.T5Gemma2"]
)
def test_a_function_in_the_place_of_the_one_that_a_layer_made_is_seen(name):
    """Their `act_fn` is no activation by its name, and its class has no method of that name."""
    settings = {"hidden_size": 6, "intermediate_size": 4, "dropout_rate": 0.0}
    layer = hub_layer(f"{name}MLP", hidden_activation="gelu_approximate", **settings)
    model = keras.Model(X, layer(X))
    assert not rowwise(model).unknown
    layer.act_fn = centred
    x = np.random.default_rng(0).normal(size=(3, 4, 6))
    one, other = (np.array(layer(x * scale)) for scale in (1, np.array([1, 2, 2])[:, None, None]))
    assert np.abs(one[0] - other[0]).max() > 1e-6
    assert "a function of your own is in its act_fn" in rowwise(model).unknown[0]
    assert not may_be_row_wise(layer)


def test_functions_in_the_place_of_layers_inside_are_seen():
    layer = hub_layer(
        "dinov2.dinov2_layers.DINOV2Layer", hidden_dim=6, num_heads=2, intermediate_dim=4
    )
    model = keras.Model(X, layer(X))
    assert not rowwise(model).unknown
    layer.drop_path = lambda x, training: centred(x)
    assert "a function of your own is in its drop_path" in rowwise(model).unknown[0]
    encoder = hub_layer("dinov2.dinov2_layers.DINOV2Encoder", **{**_ONE_LAYER, "num_heads": 2})
    model = keras.Model(X, encoder(X)[0])
    assert not rowwise(model).unknown
    encoder.layers = [lambda x, training: centred(x)]
    assert "a function of your own is in its layers" in rowwise(model).unknown[0]


def centred(x):
    return x - keras.ops.mean(x, axis=0, keepdims=True)


def test_functions_of_weights_alone_may_be_of_your_own():
    own = {"kernel_initializer": lambda shape, dtype: keras.ops.ones(shape, dtype)}
    own |= {"kernel_constraint": lambda kernel: kernel}
    assert not rowwise(keras.Model(X, layers.Dense(2, **own)(X))).unknown


def test_what_a_layer_works_on_may_be_given_by_its_name():
    """All of its tensors once counted, masks too."""
    hub = pytest.importorskip("keras_hub")
    mask = keras.Input((4,), dtype="int32")
    decoder = hub.layers.TransformerDecoder(4, 2)
    named = decoder(decoder_sequence=X, decoder_padding_mask=mask)
    assert not rowwise(keras.Model([X, mask], named)).unknown
    vectors = layers.Softmax()(inputs=layers.Reshape((24,))(X))
    assert not rowwise(keras.Model(X, vectors)).unknown
    assert rowwise(keras.Model([X, S], layers.Softmax()(inputs=S))).unknown


MASKED = {
    "pooling": lambda t: layers.GlobalAveragePooling1D()(t),
    "TimeDistributed": lambda t: layers.TimeDistributed(layers.Dense(2))(t)[:, 0],
    "Bidirectional": lambda t: layers.Bidirectional(layers.LSTM(2))(t),
    "attention": lambda t: layers.MultiHeadAttention(1, 2)(t, t)[:, 0],
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_two_axes_is_not_what_a_layer_works_on(name):
    words = keras.Input((6,), dtype="int32")
    output = MASKED[name](layers.Embedding(5, 3, mask_zero=True)(words))
    assert not rowwise(keras.Model(words, output)).unknown


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_settings_that_reach_the_rows(name):
    try:
        output = BAD_LAYERS[name]()
    except Exception:
        pytest.skip("Keras itself refuses")
    assert rowwise(keras.Model([X, V, S], output)).unknown


def test_trainable_batch_normalization_is_not_row_wise_and_a_frozen_one_is():
    layer = layers.BatchNormalization()
    model = keras.Model(X, layer(X))
    assert rowwise(model).unknown
    layer.trainable = False
    assert not rowwise(model).unknown


def test_a_subclass_of_a_known_layer_is_unknown_and_can_be_declared():
    class Own(layers.Dense):
        pass

    model = keras.Sequential([keras.Input((6,)), Own(2)])
    model.compile(loss="mse")
    assert rowwise(model).unknown and explain(model).route == "general"
    assert clipping.declare_row_wise(Own) is Own
    assert rowwise(model).declared
    for wrong in (Own(2), int, None):
        with pytest.raises(ValueError, match="subclass of `keras.layers.Layer`.*Received"):
            clipping.declare_row_wise(wrong)


def test_a_functional_subclass_with_a_call_of_its_own_is_unknown():
    class Own(keras.Model):
        def call(self, x):
            return super().call(x)[::-1]

    assert rowwise(Own(X, layers.Dense(2)(X))).unknown

    class Harmless(keras.Model):
        pass

    assert not rowwise(Harmless(X, layers.Dense(2)(X))).unknown


def test_nested_models_and_a_call_replaced_on_an_instance():
    inner = keras.Sequential([keras.Input((6,)), layers.Lambda(lambda t: t[::-1])])
    assert rowwise(keras.Sequential([keras.Input((6,)), inner, layers.Dense(1)])).unknown
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
    assert not rowwise(model).unknown
    model.layers[0].call = lambda t: t[::-1]
    assert rowwise(model).unknown


@pytest.mark.parametrize("value", [1e10, np.inf, np.nan])
def test_no_value_of_a_row_chooses_the_path(value):
    """With 1e10 in one of the first three rows book-keeping once went away for all rows."""
    routes = []
    for spoiled in (False, True):
        model, x, y, weight = zoo.mlp()
        x = np.array(x)
        if spoiled:
            x[1] = value
        clipping.check_model(model, x, y, weight)
        routes.append((explain(model).route, explain(model).why))
    assert routes[0] == routes[1] and routes[0][0] == "book-keeping"
