"""Clipping of carried kernels against gradients of one example at a time, projected by NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.clipping.coordinates import coordinates_of
from keras_bandmf.clipping.factors import Layout, Outer, Rows, Unsupported
from keras_bandmf.rgp.carrier import Carrier
from keras_bandmf.rgp.head import HeadScale
from keras_bandmf.rgp.layouts import MatrixLayout
from keras_bandmf.rgp.rules import CarrierFactor
from keras_bandmf.rgp.run import RunCarriers

RANK = 2


@pytest.fixture(autouse=True)
def _float64():
    """Everything in float64."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


class Unknown(keras.layers.Dense):
    """A layer type without a clipping rule: the model goes the general path."""


def sequential(shape, *layers, dtype="float64"):
    """A model with a scalar head."""
    head = [keras.layers.Flatten(), keras.layers.Dense(1, name="head")]
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers, *head])


def twice():
    """One Dense layer used in two places."""
    x = keras.Input((5, 4), dtype="float64")
    shared = keras.layers.Dense(4, activation="tanh")
    return keras.Model(x, keras.layers.Dense(1)(keras.layers.Flatten()(shared(shared(x)))))


def einsum(equation, output_shape, shape):
    """One EinsumDense."""
    layer = keras.layers.EinsumDense(equation, output_shape, activation="tanh")
    return sequential(shape, layer)


def conv(**options):
    """One Conv2D."""
    return sequential((6, 5, 3), keras.layers.Conv2D(4, (3, 2), **options))


MODELS = {
    "dense": lambda: sequential((5,), keras.layers.Dense(4, activation="tanh")),
    "dense_positions": lambda: sequential((7, 5), keras.layers.Dense(4, activation="tanh")),
    "dense_one_position": lambda: sequential((1, 5), keras.layers.Dense(4)),
    "shared": twice,
    "heads": lambda: einsum("abc,cde->abde", (4, 2, 3), (4, 5)),
    "output_of_heads": lambda: einsum("abcd,cde->abe", (4, 5), (4, 3, 2)),
    "kernel_transposed": lambda: einsum("abc,dc->abd", (4, 5), (4, 6)),
    "ellipsis": lambda: einsum("...x,xy->...y", 5, (4, 6)),
    "positions_summed": lambda: einsum("abc,cd->ad", (5,), (4, 6)),
    "outputs_permuted": lambda: einsum("abc,cde->adbe", (2, 4, 3), (4, 5)),
    "conv": lambda: conv(padding="same", strides=2),
    "conv_dilated": lambda: conv(padding="valid", dilation_rate=2),
    "embedding": lambda: sequential(
        (6,), keras.layers.Embedding(9, 4), keras.layers.Dense(3), dtype="int32"
    ),
    "general": lambda: sequential((5,), keras.layers.Dense(4), Unknown(3)),
}


def started(model, rank=RANK, **options):
    """Carriers on a model, drawn."""
    bandmf.enable_rgp(model, rank, **options)
    strategy = bandmf.strategies.ToeplitzStrategy.optimize(4, 1)
    carriers = RunCarriers(model.trainable_variables, strategy)
    carriers.start(np.array([5, 6], np.uint64))
    return carriers


def data(model, count=4):
    """Inputs of the model's kind; ids repeat."""
    rng = np.random.default_rng(1)
    shape = (count, *model.input_shape[1:])
    if model.inputs[0].dtype == "int32":
        return rng.integers(0, 4, shape).astype(np.int32), rng.normal(size=(count, 1))
    return rng.normal(size=shape), rng.normal(size=(count, 1))


def expected_coordinates(model, x, y, head_scale=1.0):
    """Per variable (batch, ...): gradients of one example at a time, projected densely."""
    columns = [[] for _ in model.trainable_variables]
    for i in range(len(x)):
        with tf.GradientTape() as tape:
            loss = keras.losses.mean_squared_error(y[i : i + 1], model(x[i : i + 1]))
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        for column, variable, g in zip(columns, model.trainable_variables, gradients, strict=True):
            carrier = coordinates_of(variable)
            g = tf.convert_to_tensor(g).numpy()
            if isinstance(carrier, HeadScale):
                g = g * head_scale
            elif carrier is not None:
                left, right = (c.numpy() for c in carrier.pair())
                rows, cols = carrier.layout.rows, carrier.layout.columns
                w = np.transpose(g, rows + cols).reshape(left.shape[0], right.shape[1])
                d_left = (w - left @ left.T @ w) @ right.T
                g = np.concatenate([d_left.ravel(), (left.T @ w).ravel()])
            column.append(g)
    return [np.array(column) for column in columns]


@pytest.mark.parametrize("name", MODELS)
def test_clipped_sums_are_projected_gradients(name):
    """Float64 to 1e-9: coordinates, joint norms, and the sum clipped by them."""
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    started(model)
    assert any(coordinates_of(v) is not None for v in model.trainable_variables)
    x, y = data(model)
    expected = expected_coordinates(model, x, y)
    flat = np.concatenate([g.reshape(len(x), -1) for g in expected], axis=1)
    norms = np.linalg.norm(flat, axis=1)
    clip = float(np.median(norms))
    got = bandmf.clipped_gradients(model, x, y, l2_norm_clip=clip, loss="mse")
    np.testing.assert_allclose(got.norms, norms, rtol=1e-9)
    factors = np.minimum(1.0, clip / norms)
    for g, total in zip(expected, got.sums, strict=True):
        np.testing.assert_allclose(total, np.tensordot(factors, g, 1), atol=1e-9 * clip)
    route = bandmf.clipping.explain(model).route
    assert route == ("general" if name == "general" else "book-keeping")
    bandmf.clipping.check_model(model, x, y, loss="mse")
    assert bandmf.clipping.explain(model).route == route


@pytest.mark.parametrize("name", MODELS)
def test_several_rows_of_one_example_count_as_their_mean(name):
    """Float64 to 1e-9, and a masked row adds nothing to its example, whatever it holds."""
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    started(model)
    x, y = data(model, count=6)
    mask = np.array([1, 1, 1, 0, 0, 1], bool)
    weights = np.where(mask, 1.0, 0.0).reshape(3, 2)
    weights /= weights.sum(1, keepdims=True)
    means = [
        np.einsum("ek,ek...->e...", weights, g.reshape(3, 2, *g.shape[1:]))
        for g in expected_coordinates(model, x, y)
    ]
    flat = np.concatenate([g.reshape(3, -1) for g in means], axis=1)
    norms = np.linalg.norm(flat, axis=1)
    clip = float(np.median(norms))
    if x.dtype != np.int32:
        x[~mask] = np.nan
    got = bandmf.clipped_gradients(
        model, x, y, l2_norm_clip=clip, loss="mse", mask=mask, rows_per_example=2
    )
    np.testing.assert_allclose(got.norms, norms, rtol=1e-9)
    factors = np.minimum(1.0, clip / norms)
    for g, total in zip(means, got.sums, strict=True):
        np.testing.assert_allclose(total, np.tensordot(factors, g, 1), atol=1e-9 * clip)


def test_the_head_can_be_scaled_before_clipping():
    """Its gradients count a tenth in the joint norm, and stay a tenth."""
    model = MODELS["dense"]()
    carriers = started(model, head_scale=0.1)
    x, y = data(model)
    expected = expected_coordinates(model, x, y, 0.1)
    flat = np.concatenate([g.reshape(len(x), -1) for g in expected], axis=1)
    got = bandmf.clipped_gradients(model, x, y, l2_norm_clip=1e9, loss="mse")
    np.testing.assert_allclose(got.norms, np.linalg.norm(flat, axis=1), rtol=1e-9)
    for g, total in zip(expected, got.sums, strict=True):
        np.testing.assert_allclose(total, g.sum(axis=0), atol=1e-9)
    np.testing.assert_allclose(carriers.gradients(got.sums)[-1], expected[-1].sum(axis=0))
    assert bandmf.clipping.explain(model).route == "book-keeping"
    bandmf.merge_rgp(model)
    assert all(coordinates_of(v) is None for v in model.variables)


def test_reconstruction_of_a_clipped_sum_is_the_projection_of_the_gradient():
    """Zero noise: the sum of gradients, projected on the carriers' tangent space."""
    model = MODELS["dense_positions"]()
    carriers = started(model)
    x, y = data(model)
    got = bandmf.clipped_gradients(model, x, y, l2_norm_clip=1e9, loss="mse")
    rebuilt = carriers.gradients(got.sums)[0].numpy()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(model(x) - y))
    dw = tf.convert_to_tensor(tape.gradient(loss, model.trainable_variables[0].value)).numpy()
    left, right = (c.numpy() for c in coordinates_of(model.trainable_variables[0]).pair())
    outside = (np.eye(5) - left @ left.T) @ dw @ (np.eye(4) - right.T @ right)
    np.testing.assert_allclose(rebuilt, dw - outside, atol=1e-9)


def test_every_contribution_is_bounded_and_bad_rows_contribute_nothing():
    """Rules 2, 4 and 5 hold in the coordinates: clip, NaN rows, padding."""
    model = MODELS["dense_positions"]()
    started(model)
    x, y = data(model)
    alone = bandmf.clipped_gradients(model, x[:1], y[:1], l2_norm_clip=1e-3, loss="mse").sums
    norm = np.sqrt(sum(np.sum(np.square(total)) for total in alone))
    np.testing.assert_allclose(norm, 1e-3, rtol=1e-9)
    x[1], x[3, 0] = np.nan, np.inf
    mask = np.array([True, True, False, True])
    got = bandmf.clipped_gradients(model, x, y, l2_norm_clip=1e-3, mask=mask, loss="mse").sums
    for a, b in zip(got, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_contributions_are_bounded_where_positions_cancel():
    """In float32, where the product is rounding error: still no longer than its norm."""
    m, n, rank, count = 8, 8, 4, 12
    rng = np.random.default_rng(0)
    carrier = Carrier(MatrixLayout((m, n), (0,), (1,)), "kernel", "float32", rank)
    carrier.start(keras.Variable(np.zeros((m, n)), dtype="float32"), np.zeros(2, np.uint64), 0)
    left, right = carrier.pair()
    g = rng.normal(size=(count, n)).astype(np.float32)
    zero = np.linalg.svd(g.T.astype(np.float64))[2][n:]  # x'g = 0 for all x of these rows
    x = np.einsum("bmk,kt->btm", rng.normal(size=(100, m, count - n)), zero) * 1e9
    x, g = tf.constant(x, tf.float32), tf.constant(np.broadcast_to(g, (100, count, n)))
    thin, a = tf.matmul(g, right[None], transpose_b=True), tf.matmul(x, left[None])
    whole = Outer(x[:, None], thin[:, None], Layout((m, rank)))
    factor = CarrierFactor(carrier, whole, a[:, None], thin[:, None], g[:, None])
    factor = factor.joined([factor])
    norms = np.sqrt(factor.squared_norms())
    assert isinstance(factor.whole, Rows)
    released = [np.linalg.norm(factor.weighted_sum(tf.one_hot(i, 100))) for i in range(100)]
    assert np.min(released) > 1.0
    assert np.max(released / norms) < 1 + 1e-5


def test_the_norm_is_at_least_that_of_either_carrier():
    """Whatever rounding made of the part that is subtracted: here it is four times too large."""
    carrier = Carrier(MatrixLayout((6, 5), (0,), (1,)), "kernel", "float32", 2)
    carrier.start(keras.Variable(np.zeros((6, 5)), dtype="float32"), np.zeros(2, np.uint64), 0)
    left, right = carrier.pair()
    x = tf.matmul(tf.random.stateless_normal([3, 1, 2], [0, 1]), left[None], transpose_b=True)
    g = tf.matmul(tf.random.stateless_normal([3, 1, 2], [0, 2]), right[None])
    thin, a = tf.matmul(g, right[None], transpose_b=True), 2.0 * tf.matmul(x, left[None])
    whole = Outer(x[:, None], thin[:, None], Layout((6, 2)))
    factor = CarrierFactor(carrier, whole, a[:, None], thin[:, None], g[:, None])
    factor = factor.joined([factor])
    floors = factor.whole.squared_norms(), factor._right().squared_norms()
    assert np.all(factor.squared_norms() >= np.maximum(*floors))


def test_coordinates_are_not_joined_with_plain_gradients():
    """A gradient that is not in the carriers' coordinates would be lost in the sum."""
    carrier = Carrier(MatrixLayout((6, 5), (0,), (1,)), "kernel", "float32", 2)
    ends = [tf.ones((3, 1, 4, width), tf.float32) for width in (6, 2, 2, 5)]
    whole = Outer(ends[0], ends[2], Layout((6, 2)))
    factor = CarrierFactor(carrier, whole, *ends[1:])
    with pytest.raises(Unsupported, match="tied"):
        factor.joined([factor, whole])
    assert factor.joined([factor, factor]).a.shape[2] == 8


def test_microbatches_and_graphs_give_the_same():
    model = MODELS["conv"]()
    started(model)
    x, y = data(model)
    whole = bandmf.clipped_gradients(model, x, y, l2_norm_clip=0.5, loss="mse")

    @tf.function(autograph=False)
    def parts(x, y):
        options = {"l2_norm_clip": 0.5, "loss": "mse", "microbatch_size": 3}
        return bandmf.clipped_gradients(model, x, y, **options)

    for a, b in zip(whole.sums, parts(x, y).sums, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_tied_table_with_carriers_goes_the_general_path():
    """Read by look-up and as a matrix: the sum of both, projected."""

    class Tied(keras.Model):
        """An embedding whose table is also the last matrix."""

        def __init__(self):
            super().__init__()
            self.table = keras.layers.Embedding(7, 4)

        def call(self, ids):
            hidden = keras.ops.mean(self.table(ids), axis=1)
            return keras.ops.matmul(hidden, keras.ops.transpose(self.table.embeddings))[:, :1]

    model = Tied()
    model(np.zeros((1, 5), np.int32))
    started(model, layers=[model.table])
    x = np.random.default_rng(0).integers(0, 7, (3, 5)).astype(np.int32)
    y = np.ones((3, 1))
    expected = expected_coordinates(model, x, y)
    got = bandmf.clipped_gradients(model, x, y, l2_norm_clip=1e9, loss="mse")
    assert bandmf.clipping.explain(model).route == "general"
    np.testing.assert_allclose(got.sums[0], expected[0].sum(axis=0), atol=1e-9)
