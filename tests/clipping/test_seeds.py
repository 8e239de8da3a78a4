"""Random layers: masks from a secret key, and no seed generator is moved (rule 15)."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_bandmf.clipping import MaskSeeds, check_model, clipped_gradients
from keras_bandmf.clipping.seeds import drawing, seed_generators
from tests import runs

ROWS, CLIP = 6, 0.1
SEQUENCE, IMAGE = (5, 4), (8, 8, 3)


class OnItself(layers.Layer):
    """Attention of a sequence to itself."""

    def __init__(self, attention, listed=False):
        super().__init__()
        self.attention, self.listed = attention, listed

    def build(self, shape):
        if self.listed:
            self.attention.build([shape, shape])
        else:
            self.attention.build(shape, shape)

    def call(self, x, training=None):
        inputs = ([x, x],) if self.listed else (x, x)
        return self.attention(*inputs, training=training)


HALVES = {"dropout": 0.5, "recurrent_dropout": 0.5}
RANDOM = {
    "Dropout": (SEQUENCE, lambda: layers.Dropout(0.5)),
    "Dropout seed": (SEQUENCE, lambda: layers.Dropout(0.5, seed=1)),
    "Dropout shared": (SEQUENCE, lambda: layers.Dropout(0.5, noise_shape=(1, 5, 4))),
    "SpatialDropout1D": (SEQUENCE, lambda: layers.SpatialDropout1D(0.5)),
    "SpatialDropout2D": (IMAGE, lambda: layers.SpatialDropout2D(0.5)),
    "SpatialDropout3D": ((2, 4, 4, 3), lambda: layers.SpatialDropout3D(0.5)),
    "GaussianDropout": (SEQUENCE, lambda: layers.GaussianDropout(0.5)),
    "GaussianNoise": (SEQUENCE, lambda: layers.GaussianNoise(0.5)),
    "AlphaDropout": (SEQUENCE, lambda: layers.AlphaDropout(0.5)),
    "MultiHeadAttention": (
        SEQUENCE,
        lambda: OnItself(layers.MultiHeadAttention(2, 3, dropout=0.5)),
    ),
    "GroupQueryAttention": (
        SEQUENCE,
        lambda: OnItself(layers.GroupQueryAttention(3, 2, 1, dropout=0.5)),
    ),
    "Attention": (SEQUENCE, lambda: OnItself(layers.Attention(dropout=0.5), True)),
    "AdditiveAttention": (SEQUENCE, lambda: OnItself(layers.AdditiveAttention(dropout=0.5), True)),
    "LSTM": (SEQUENCE, lambda: layers.LSTM(3, **HALVES)),
    "GRU": (SEQUENCE, lambda: layers.GRU(3, **HALVES)),
    "SimpleRNN": (SEQUENCE, lambda: layers.SimpleRNN(3, **HALVES)),
    "ConvLSTM1D": ((2, 6, 2), lambda: layers.ConvLSTM1D(2, 3, **HALVES)),
    "ConvLSTM2D": ((2, 4, 4, 2), lambda: layers.ConvLSTM2D(2, 3, **HALVES)),
    "ConvLSTM3D": ((2, 3, 3, 3, 1), lambda: layers.ConvLSTM3D(2, 2, **HALVES)),
    "StackedRNNCells": (
        SEQUENCE,
        lambda: layers.RNN([layers.LSTMCell(3, dropout=0.5), layers.GRUCell(3, **HALVES)]),
    ),
    "Bidirectional": (SEQUENCE, lambda: layers.Bidirectional(layers.LSTM(3, dropout=0.5))),
    "Image RandomBrightness": (IMAGE, lambda: layers.RandomBrightness(0.5, (0, 1))),
    "Image RandomContrast": (IMAGE, lambda: layers.RandomContrast(0.5, (0, 1))),
    "Image RandomCrop": (IMAGE, lambda: layers.RandomCrop(5, 5)),
    "Image RandomFlip": (IMAGE, lambda: layers.RandomFlip()),
    "Image RandomRotation": (IMAGE, lambda: layers.RandomRotation(0.5)),
    "Image RandomTranslation": (IMAGE, lambda: layers.RandomTranslation(0.5, 0.5)),
    "Image RandomZoom": (IMAGE, lambda: layers.RandomZoom(0.5)),
    "TimeDistributed": (SEQUENCE, lambda: layers.TimeDistributed(layers.Dropout(0.5))),
}


def model_of(layer, shape):
    model = keras.Sequential([keras.Input(shape), layer, layers.Flatten(), layers.Dense(1)])
    model.compile(loss="mse")
    return model


def data_of(shape, rows=ROWS):
    x = np.random.default_rng(0).uniform(size=(rows, *shape)).astype("float32")
    return x, np.full((rows, 1), 3.0, "float32")


def clipping_function(model, x, y, jit=False, **options):
    """(mask, step) -> flat clipped sum, a graph with the key in a variable."""
    key = tf.Variable([5, 7], dtype=tf.int64)

    def run(mask, step):
        seeds = MaskSeeds(key.read_value(), tf.cast(step, tf.int64))
        found = clipped_gradients(
            model, x, y, mask=mask, l2_norm_clip=CLIP, mask_seeds=seeds, **options
        )
        return tf.concat([tf.reshape(s, [-1]) for s in found.sums], 0), found.norms

    return tf.function(run, jit_compile=jit, autograph=False)


def states(model):
    return [np.array(generator.state) for generator in seed_generators(model)]


EVERYONE = np.ones(ROWS, bool)


SLOW = ("GRU", "SimpleRNN", "ConvLSTM", "Stacked", "Bidirectional", "Image")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name.startswith(SLOW) else name
        for name in RANDOM
    ],
)
def test_a_row_moves_the_sum_by_its_own_clipped_gradient(name):
    """The same masks with and without the row; others in the next step; no generator moved."""
    shape, make = RANDOM[name]
    model = model_of(make(), shape)
    x, y = data_of(shape)
    before = states(model)
    check_model(model, x, y)
    run = clipping_function(model, x, y)
    everyone, norms = run(EVERYONE, 3)
    for row in (0, 4):
        own = np.arange(ROWS) == row
        without, alone = run(~own, 3)[0], run(own, 3)[0]
        np.testing.assert_allclose(everyone - without, alone, atol=1e-6)
        assert np.linalg.norm(everyone - without) <= CLIP * (1 + 1e-4)
    again, other = run(EVERYONE, 3), run(EVERYONE, 4)
    # GPUs may add in another order; other masks change far more.
    np.testing.assert_allclose(again[0], everyone, rtol=1e-5, atol=1e-7)
    assert np.abs(other[1] - norms).max() > 1e-4
    for a, b in zip(before, states(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_keras_own_masks_go_by_position_from_a_public_seed():
    """Why: one row more in front moves the sum by several clips, for whoever knows the seed."""
    model = model_of(layers.Dropout(0.5), SEQUENCE)
    x, y = data_of(SEQUENCE, 40)

    def total(rows):
        keras.utils.set_random_seed(1)
        layer = layers.Dropout(0.5)
        model.layers[0].seed_generator.state.assign(layer.seed_generator.state)
        return clipped_gradients(model, x[rows], y[rows], l2_norm_clip=CLIP).sums

    moved = [a - b for a, b in zip(total(np.arange(40)), total(np.arange(1, 40)), strict=True)]
    assert np.sqrt(sum(np.sum(m**2) for m in moved)) > 1.5 * CLIP


@pytest.mark.parametrize("size", [None, 2, "one by one"])
def test_masks_of_equal_rows_differ_in_chunks_and_on_both_paths(size):
    options = {"microbatch_size": size}
    middle = layers.Dropout(0.5)
    if size == "one by one":
        options = {}
        middle = OnItself(layers.MultiHeadAttention(1, 3, dropout=0.5))

        class Plain(layers.Dense):
            """No rule: the general path."""

        middle = keras.Sequential([layers.Dropout(0.5), Plain(4)])
    model = model_of(middle, SEQUENCE)
    x, y = data_of(SEQUENCE)
    x = np.repeat(x[:1], ROWS, axis=0)
    norms = clipping_function(model, x, y, **options)(EVERYONE, 0)[1]
    assert len(np.unique(np.round(norms, 5))) == ROWS


def test_seeds_are_distinct_and_the_same_everywhere():
    key = tf.constant([5, 7], tf.int64)

    def first(step, row):
        return MaskSeeds(key, tf.cast(step, tf.int64)).of_pass(row)

    eager = [int(first(step, row)) for step in range(30) for row in range(30)]
    assert len(set(eager)) == 900 and all(seed % 2**10 == 0 for seed in eager)
    for jit in (False, True):
        compiled = tf.function(first, jit_compile=jit, autograph=False)
        found = [int(compiled(tf.constant(s), tf.constant(r))) for s in range(3) for r in range(30)]
        assert found == eager[:90]
    other = MaskSeeds(tf.constant([5, 8], tf.int64), tf.constant(0, tf.int64))
    assert int(other.of_pass(0)) != eager[0]
    # Bits of the 54 are fair: 900 values, five standard deviations, false alarm 3e-5.
    bits = np.array([[seed >> k & 1 for k in range(10, 64)] for seed in eager])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / 30


def test_the_same_masks_eagerly_and_compiled():
    """Under XLA the seeds are the same, but TensorFlow may turn them into other numbers."""
    model = model_of(layers.Dropout(0.5), SEQUENCE)
    x, y = data_of(SEQUENCE)
    check_model(model, x, y)
    expected = clipping_function(model, x, y)(EVERYONE, 2)[0]
    seeds = MaskSeeds(tf.constant([5, 7], tf.int64), tf.constant(2, tf.int64))
    eager = clipped_gradients(model, x, y, l2_norm_clip=CLIP, mask_seeds=seeds).sums
    np.testing.assert_allclose(np.concatenate([np.ravel(s) for s in eager]), expected, 1e-5)


def test_xla_adds_the_clipped_gradient_of_a_row():
    model = model_of(layers.Dropout(0.5), SEQUENCE)
    run = clipping_function(model, *data_of(SEQUENCE), jit=True)
    own = np.arange(ROWS) == 2
    (everyone, norms), (without, _), (alone, _) = (run(m, 3) for m in (EVERYONE, ~own, own))
    np.testing.assert_allclose(everyone - without, alone, atol=1e-6)
    assert np.abs(run(EVERYONE, 4)[1] - norms).max() > 1e-4


class Draws(layers.Layer):
    """Adds what a function draws."""

    def __init__(self, draw, **kwargs):
        super().__init__(**kwargs)
        self.draw, self.generator = draw, keras.random.SeedGenerator(1)

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        return x + self.draw(x, self.generator)


HIDDEN = []


def hidden_generator(x, generator):
    if not HIDDEN:
        HIDDEN.append(keras.random.SeedGenerator(1))
    return keras.random.normal(tf.shape(x), seed=HIDDEN[0])


def shared_seed(x, generator):
    seed = generator.next()
    wide = tf.random.stateless_normal([tf.shape(x)[0], 5, 4], seed)
    return wide + tf.random.stateless_normal([tf.shape(x)[0], 1, 1], seed)


def in_a_loop(x, generator):
    def body(i, total):
        return i + 1, total + keras.random.normal(tf.shape(x), seed=generator)

    return tf.while_loop(lambda i, t: i < 2, body, (0, tf.zeros_like(x)))[1]


def in_a_function(x, generator):
    return tf.function(lambda x: keras.random.normal(tf.shape(x), seed=generator))(x)


REFUSED = {
    "RandomStandardNormal": lambda x, g: tf.random.normal(tf.shape(x)),
    "RandomUniform": lambda x, g: tf.nn.dropout(x, 0.5),
    "RandomUniform ": lambda x, g: tf.cond(
        tf.reduce_max(x) > 1e6, lambda: tf.random.uniform(tf.shape(x)), lambda: x
    ),
    "Rng": lambda x, g: tf.random.get_global_generator().normal(tf.shape(x)),
    "fixed or public seed": lambda x, g: keras.random.normal(tf.shape(x), seed=3),
    "fixed or public seed ": lambda x, g: tf.random.stateless_uniform(tf.shape(x), [1, 2]),
    "fixed or public seed  ": hidden_generator,
    "One seed serves": shared_seed,
    "inside a loop": in_a_loop,
    "inside a loop ": in_a_function,
}


@pytest.mark.parametrize("message", list(REFUSED))
@pytest.mark.parametrize("check", [False, True])
def test_random_numbers_of_other_origin_are_refused(message, check):
    HIDDEN[:] = [keras.random.SeedGenerator(1)]
    model = model_of(Draws(REFUSED[message]), SEQUENCE)
    x, y = data_of(SEQUENCE)
    with pytest.raises(ValueError, match=message.strip()):
        if check:
            check_model(model, x, y)
        else:
            clipping_function(model, x, y)(EVERYONE, 0)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x, g: keras.random.normal(ops.shape(x), seed=None),
        lambda x, g: keras.random.beta(ops.shape(x), 1.0, 2.0, seed=g),
        lambda x, g: tf.cond(
            tf.reduce_max(x) > 0.5,
            lambda: keras.random.normal(tf.shape(x), seed=g),
            lambda: keras.random.uniform(tf.shape(x), seed=g),
        ),
    ],
    ids=["global generator", "beta", "branches"],
)
def test_draws_by_generators_of_keras_are_fine(draw):
    model = model_of(Draws(draw), SEQUENCE)
    x, y = data_of(SEQUENCE)
    before = states(model)
    run = clipping_function(model, x, y)
    found = [run(EVERYONE, step)[1] for step in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-4
    for a, b in zip(before, states(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_generators_are_given_back_and_not_taken_twice():
    model = model_of(layers.Dropout(0.5), SEQUENCE)
    first = tf.zeros([], tf.uint64)
    with drawing(model, first):
        with pytest.raises(ValueError, match="replaced already"), drawing(model, first):
            pass
        with pytest.raises(ValueError, match="at most 1024"):
            for _ in range(1025):
                model.layers[0].seed_generator.next()
    assert not any("next" in vars(generator) for generator in seed_generators(model))


def test_replicas_draw_masks_of_their_own():
    """And the mask key is read from a variable on each."""
    strategy = runs.mirrored()

    def make():
        return runs.compiled(model_of(layers.Dropout(0.5), SEQUENCE), runs.make_plan(), loss="mse")

    with strategy.scope():
        model = make()
        model.optimizer.build(model.trainable_variables)
    x, y = (tf.constant(np.repeat(part[:1], ROWS, axis=0)) for part in data_of(SEQUENCE))

    def replica():
        seeds = model.optimizer.run_state.mask_seeds(model.optimizer.iterations)
        return clipped_gradients(model, x, y, mask_seeds=seeds, microbatch_size=3).norms

    norms = tf.function(lambda: strategy.run(replica), autograph=False)()
    norms = np.concatenate([n.numpy() for n in strategy.experimental_local_results(norms)])
    assert len(np.unique(np.round(norms, 5))) == 2 * ROWS
