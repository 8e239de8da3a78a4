"""LSTM, GRU and SimpleRNN: both kernels of every example, with masks, states and dropout."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf import clipping
from keras_bandmf.clipping import MaskSeeds, check_model, clipped_gradients, explain
from tests.clipping import reference

ROWS, TIME, WIDTH, UNITS = 4, 5, 3, 4
KINDS = (layers.LSTM, layers.GRU, layers.SimpleRNN)
CELLS = (layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell)
OPTIONS = (
    {},
    {"return_sequences": True, "go_backwards": True},
    {"return_state": True, "use_bias": False},
    {"return_sequences": True, "return_state": True, "zero_output_for_mask": True},
    {"unroll": True, "return_sequences": True},
    {"activation": "softmax", "recurrent_activation": "softmax"},
)
# Gaps at the start, in the middle and at the end, and a sequence without a single point in time.
MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)


def data(*shape):
    return np.random.default_rng(0).normal(size=(ROWS, *shape))


def built(layer, *args, **kwargs):
    """The layer with random weights, biases too."""
    layer(*args, **kwargs)
    random = np.random.default_rng(1)
    for v in layer.trainable_variables:
        v.assign(random.normal(size=v.shape) / 2)
    return layer


def options_of(kind):
    for options in OPTIONS:
        if kind is layers.SimpleRNN and "recurrent_activation" in options:
            options = {"activation": "softmax"}
        yield options
    if kind is layers.GRU:
        yield {"reset_after": False}
        yield {"reset_after": False, "use_bias": False, "return_sequences": True}


CASES = [
    pytest.param(kind, options, id="-".join([kind.__name__, *map(str, options)]))
    for kind in KINDS
    for options in options_of(kind)
]


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_rule(kind, options, masked):
    x = data(TIME, WIDTH)
    layer = built(kind(UNITS, dtype="float64", **options), x)
    assert clipping.check_rule(layer, x, **({"mask": MASK} if masked else {})) < 1e-12


@pytest.mark.parametrize("time", [1, 10, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind, time):
    """Points in time share iterations: these lengths need one, two, and as many as there are."""
    x = data(time, WIDTH)
    layer = built(kind(UNITS, dtype="float64", return_sequences=True), x)
    assert clipping.check_rule(layer, x) < 1e-12
    mask = np.random.default_rng(3).random((ROWS, time)) < 0.6
    assert clipping.check_rule(layer, x, mask=mask) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS[:2])
def test_first_states_and_a_mask(kind, options):
    x = data(TIME, WIDTH)
    states = [data(UNITS) for _ in range(1 + (kind is layers.LSTM))]
    layer = built(kind(UNITS, dtype="float64", **options), x)
    assert clipping.check_rule(layer, x, initial_state=states, mask=MASK) < 1e-12


@pytest.mark.parametrize("cell", CELLS)
def test_cells_in_a_plain_rnn(cell):
    x = data(TIME, WIDTH)
    layer = built(layers.RNN(cell(UNITS, dtype="float64"), dtype="float64"), x)
    assert clipping.check_rule(layer, x) < 1e-12


@pytest.mark.parametrize("merge_mode", ["concat", "mul", None])
def test_bidirectional(merge_mode):
    x = data(TIME, WIDTH)
    inner = layers.GRU(UNITS, dtype="float64", return_sequences=True)
    layer = layers.Bidirectional(inner, merge_mode=merge_mode, dtype="float64")
    assert clipping.check_rule(built(layer, x, mask=MASK), x, mask=MASK) < 1e-12


@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        (layers.ConvLSTM1D, (3, 6, 2), {}),
        (layers.ConvLSTM1D, (3, 6, 2), {"dilation_rate": 2, "go_backwards": True}),
        (layers.ConvLSTM2D, (3, 5, 4, 2), {"strides": 2, "return_sequences": True}),
        (layers.ConvLSTM2D, (3, 5, 4, 2), {"padding": "same", "return_state": True}),
        (layers.ConvLSTM2D, (3, 2, 5, 4), {"data_format": "channels_first", "use_bias": False}),
        (layers.ConvLSTM3D, (2, 3, 4, 3, 1), {"unroll": True}),
    ],
)
def test_convolutions(kind, shape, options):
    if "data_format" in options and not tf.config.list_physical_devices("GPU"):
        pytest.skip("TensorFlow convolves channels first on a GPU only")
    x = data(*shape)
    layer = built(kind(2, 2, dtype="float64", **options), x)
    assert clipping.check_rule(layer, x) < 1e-12
    mask = MASK[:, : shape[0]]
    assert clipping.check_rule(layer, x, mask=mask) < 1e-12


def test_convolutions_with_dropout_go_the_general_path():
    layer = layers.ConvLSTM1D(2, 2, dropout=0.5)
    model = keras.Sequential([keras.Input((3, 6, 2)), layer, layers.Flatten(), layers.Dense(1)])
    model.compile(loss="mse")
    x, y = data(3, 6, 2).astype("float32"), data(1).astype("float32")
    clipped_gradients(model, x, y)
    assert explain(model).route == "general" and "draws random" in explain(model).why


def test_stacked_cells_run_by_example():
    x = data(TIME, WIDTH)
    cells = [layers.LSTMCell(UNITS, dtype="float64"), layers.GRUCell(2, dtype="float64")]
    layer = built(layers.RNN(cells, dtype="float64"), x)
    assert clipping.check_rule(layer, x) < 1e-12
    model = keras.Sequential([keras.Input((TIME, WIDTH)), layer, layers.Dense(1)])
    rows = explain(model).rows
    assert [row[2] for row in rows] == ["by example", "by example", "book-keeping"]


def test_a_layer_used_twice():
    layer = layers.LSTM(UNITS, return_sequences=True)
    inputs = keras.Input((TIME, UNITS))
    model = keras.Model(inputs, layer(layer(inputs)))
    assert_equal_to_one_by_one(model, data(TIME, UNITS), data(TIME, UNITS))


def test_states_of_one_layer_start_another():
    inputs = keras.Input((TIME, WIDTH))
    _, *states = layers.LSTM(UNITS, return_state=True)(inputs)
    outputs = layers.LSTM(UNITS, return_sequences=True)(inputs, initial_state=states)
    assert_equal_to_one_by_one(keras.Model(inputs, outputs), data(TIME, WIDTH), data(TIME, UNITS))


def test_masks_of_an_embedding():
    model = keras.Sequential(
        [
            keras.Input((TIME,), dtype="int32"),
            layers.Embedding(6, WIDTH, mask_zero=True),
            layers.Bidirectional(layers.GRU(UNITS, return_sequences=True)),
            layers.LSTM(UNITS),
        ]
    )
    tokens = np.random.default_rng(0).integers(0, 3, size=(ROWS, TIME)).astype("int32")
    assert_equal_to_one_by_one(model, tokens, data(UNITS))


def test_length_that_is_not_known():
    model = keras.Sequential([keras.Input((None, WIDTH)), layers.GRU(UNITS)])
    assert_equal_to_one_by_one(model, data(TIME, WIDTH), data(UNITS))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind, jit):
    model = keras.Sequential([keras.Input((TIME, WIDTH)), kind(UNITS)])
    assert_equal_to_one_by_one(model, data(TIME, WIDTH), data(UNITS), jit)


def assert_equal_to_one_by_one(model, x, y, jit=None):
    model.compile(loss="mse")
    x = x.astype("float32") if x.dtype == "float64" else x
    y = y.astype("float32")
    for v in model.trainable_variables:
        v.assign(np.random.default_rng(2).normal(size=v.shape) / 2)
    per_example, _ = reference.gradients(model, x, y, None)
    clip = float(np.median(reference.clipped(per_example, 1.0)[0]))
    norms, sums = reference.clipped(per_example, clip)
    check_model(model, x, y)
    assert explain(model).route == "book-keeping", explain(model)

    def run(x, y):
        found = clipped_gradients(model, x, y, l2_norm_clip=clip)
        return found.sums, found.norms

    if jit is not None:
        run = tf.function(run, jit_compile=jit, autograph=False)
    got_sums, got_norms = run(tf.constant(x), tf.constant(y))
    assert reference.error(got_sums, sums) < 1e-5
    np.testing.assert_allclose(got_norms, norms, rtol=1e-5, atol=1e-5 * norms.max())


def takes_a_rate_of_one():
    try:
        keras.random.dropout(np.ones(1, "float32"), 1.0, seed=1)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.5},
        {"recurrent_dropout": 0.5},
        {"dropout": 0.5, "recurrent_dropout": 0.5},
        {"dropout": 0.5, "implementation": 1, "use_cudnn": False},
        {"dropout": 1.0, "recurrent_dropout": 1.0},
    ],
)
@pytest.mark.parametrize("kind", [*KINDS, "before"])
def test_dropout_draws_what_keras_draws(kind, options):
    """Outputs with the masks of one seed are those of Keras, and gradients those of its tape."""
    if 1.0 in options.values() and not takes_a_rate_of_one():
        pytest.skip("this TensorFlow drops some units, but not all")
    x = data(TIME, WIDTH).astype("float32")
    if kind == "before":
        layer = layers.GRU(UNITS, reset_after=False, **options)
    elif kind is layers.SimpleRNN and "implementation" in options:
        pytest.skip("not an argument of SimpleRNN")
    else:
        layer = kind(UNITS, **options)
    model = keras.Sequential([keras.Input((TIME, WIDTH)), layer])
    model.compile(loss="mse")
    y = data(UNITS).astype("float32")
    check_model(model, x, y)
    assert explain(model).why == "checked against one example at a time", explain(model)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_dropped_without_training(kind):
    x = data(TIME, WIDTH)
    layer = kind(UNITS, dropout=0.5, recurrent_dropout=0.5, dtype="float64")
    assert clipping.check_rule(built(layer, x), x, training=False) < 1e-12


def test_masks_belong_to_rows():
    """One row more or less moves the sum by its own clipped gradient, whatever the masks."""
    layer = layers.LSTM(UNITS, dropout=0.5, recurrent_dropout=0.5)
    model = keras.Sequential([keras.Input((TIME, WIDTH)), layer])
    model.compile(loss="mse")
    x, y = data(TIME, WIDTH).astype("float32"), data(UNITS).astype("float32")
    key = tf.Variable([5, 7], dtype=tf.int64)

    @tf.function(autograph=False)
    def run(mask):
        seeds = MaskSeeds(key.read_value(), tf.constant(3, tf.int64))
        found = clipped_gradients(model, x, y, mask=mask, l2_norm_clip=0.1, mask_seeds=seeds)
        return tf.concat([tf.reshape(s, [-1]) for s in found.sums], 0)

    everyone = run(np.ones(ROWS, bool))
    own = np.arange(ROWS) == 2
    np.testing.assert_allclose(everyone - run(~own), run(own), atol=1e-6)


def test_a_row_that_is_not_finite_harms_no_other():
    model = keras.Sequential([keras.Input((TIME, WIDTH)), layers.LSTM(UNITS)])
    model.compile(loss="mse")
    x, y = data(TIME, WIDTH).astype("float32"), data(UNITS).astype("float32")
    expected = clipped_gradients(model, x[1:], y[1:]).sums
    x[0, 2, 1] = np.nan
    found = clipped_gradients(model, x, y).sums
    assert reference.error(found, [np.asarray(t) for t in expected]) < 1e-5


def test_states_that_stay_are_refused():
    layer = layers.LSTM(UNITS, stateful=True)
    model = keras.Sequential([keras.Input((TIME, WIDTH), batch_size=ROWS), layer])
    assert explain(model).route == "general"


def assert_as_one_by_one(model, x, y, route, tolerance=1e-5):
    model.compile(loss="mse")
    per_example, _ = reference.gradients(model, x, y, None)
    _, sums = reference.clipped(per_example, 1.0)
    found = tf.function(lambda x, y: clipped_gradients(model, x, y), autograph=False)(x, y)
    assert explain(model).route == route
    assert reference.error(found.sums, sums) < tolerance


@clipping.declare_row_wise
class TwiceTheInputs(layers.LSTMCell):
    def call(self, inputs, states, training=False):
        return super().call(2.0 * inputs, states, training=training)


@pytest.mark.parametrize("what", ["cell", "activation", "unrolled"])
def test_cells_that_are_not_those_of_keras_run_by_example(what):
    """The rule would compute something else, or not know the weights of the activation."""
    activation = layers.PReLU()
    activation.build((None, UNITS))
    options = {} if what == "cell" else {"activation": activation, "unroll": what == "unrolled"}
    layer = layers.LSTM(UNITS, **options)
    if what == "cell":
        layer.cell = TwiceTheInputs(UNITS)
    model = keras.Sequential([keras.Input((TIME, WIDTH)), layer, layers.Dense(2)])
    x, y = (tf.constant(data(*s), tf.float32) for s in ((TIME, WIDTH), (2,)))
    assert_as_one_by_one(model, x, y, "book-keeping")
    assert "ByExampleRule" in str(explain(model))


@pytest.mark.parametrize(
    ("inside", "around"), [("float64", "float32"), ("float32", "mixed_bfloat16")]
)
def test_a_cell_of_another_dtype_than_its_layer_runs_by_example(inside, around):
    """Keras casts the inputs when it calls the cell; the rule does not call it."""
    layer = layers.RNN(layers.LSTMCell(UNITS, dtype=inside), dtype=around)
    model = keras.Sequential([keras.Input((TIME, WIDTH)), layer, layers.Dense(2, dtype="float32")])
    x, y = (tf.constant(data(*s), tf.float32) for s in ((TIME, WIDTH), (2,)))
    tolerance = 1e-2 if around == "mixed_bfloat16" else 1e-5
    assert_as_one_by_one(model, x, y, "book-keeping", tolerance)
    assert "ByExampleRule" in str(explain(model))


def test_a_mask_with_an_axis_of_features_goes_the_general_path():
    """Its transpose would have time where the examples are expected."""
    inputs = keras.Input((TIME, WIDTH))
    mask = keras.ops.any(keras.ops.not_equal(inputs, 0.0), axis=-1, keepdims=True)
    model = keras.Model(inputs, layers.Dense(2)(layers.LSTM(UNITS)(inputs, mask=mask)))
    x = tf.constant(data(TIME, WIDTH) * MASK[:, :, None], tf.float32)
    assert_as_one_by_one(model, x, tf.constant(data(2), tf.float32), "general")
