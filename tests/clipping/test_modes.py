"""Clipping modes against one example at a time, and the sensitivity each of them states."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf.clipping import (
    AutomaticClipping,
    FlatClipping,
    PerLayerClipping,
    check_model,
    clipped_gradients,
    explain,
)
from tests.clipping import reference, zoo

MODES = {
    "flat": "flat",
    "per_layer": "per_layer",
    "shares": PerLayerClipping({"first": 4.0, "third": 0.5}),
    "automatic": "automatic",
    "gamma": AutomaticClipping(2.0),
    "no_gamma": AutomaticClipping(0.0),
    "adaptive": "adaptive",
}
MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


class Plain(layers.Dense):
    """Dense by another class: it has no clipping rule and goes the general path."""


def towers(second=layers.Dense, dtype=None):
    """first and second see inputs of their own, third sees both: three layers, five variables."""
    a, b = (keras.Input((3,), name=name) for name in "ab")
    left = layers.Dense(4, "tanh", name="first", dtype=dtype)(a)
    right = second(2, "tanh", name="second", use_bias=False, dtype=dtype)(b)
    joined = layers.Concatenate(dtype=dtype)([left, right])
    outputs = layers.Dense(2, name="third", dtype=dtype)(joined)
    model = keras.Model({"a": a, "b": b}, {"y": outputs, "z": right})
    model.compile(loss={"y": "mse", "z": "mse"})
    x = {"a": zoo.floats(3), "b": 3 * zoo.floats(3)[::-1]}
    y = {"y": zoo.floats(2), "z": 5 * zoo.floats(2)[::-1]}
    clipped_gradients(model, {k: v[:1] for k, v in x.items()}, {k: v[:1] for k, v in y.items()})
    return model, x, y


def expected_sums(model, per_example, clip, mode, mask=None):
    """Dense NumPy, from the definitions of the modes."""
    mode = {"flat": FlatClipping(), "per_layer": PerLayerClipping()}.get(mode, mode)
    mode = AutomaticClipping() if mode == "automatic" else mode
    shares = dict(mode.shares) if isinstance(mode, PerLayerClipping) else None
    names = [v.path.split("/")[-2] for v in model.trainable_variables]
    groups = ["all"] * len(names) if shares is None else names
    total = sum((shares or {}).get(name, 1.0) for name in set(groups))
    everything = np.concatenate([g.reshape(len(g), -1) for g in per_example], 1)
    kept = np.isfinite(everything).all(axis=1) & (True if mask is None else mask)
    sums, limits = [], []
    for g, group in zip(per_example, groups, strict=True):
        own = [
            p.reshape(len(p), -1) for p, n in zip(per_example, groups, strict=True) if n == group
        ]
        norms = np.linalg.norm(np.concatenate(own, axis=1), axis=1)
        limit = clip * np.sqrt((shares or {}).get(group, 1.0) / total)
        if isinstance(mode, AutomaticClipping):
            factors = limit / np.maximum(norms + mode.gamma, 1e-6)
        else:
            factors = np.minimum(1, limit / np.maximum(norms, 1e-300))
        rows = g.reshape(len(g), -1)[kept]
        sums.append((factors[kept] @ rows).reshape(g.shape[1:]))
        limits.append(limit)
    return sums, limits


def median_norm(per_example):
    return float(np.median(reference.clipped(per_example, 1.0)[0]))


@MODE
@pytest.mark.parametrize("second", [layers.Dense, Plain])
@pytest.mark.parametrize("way", ["eager", "microbatches"])
def test_sums_equal_one_example_at_a_time(mode, second, way):
    model, x, y = towers(second)
    per_example, _ = reference.gradients(model, x, y, None)
    clip = median_norm(per_example)
    expected, _ = expected_sums(model, per_example, clip, mode)
    options = {"l2_norm_clip": clip, "clipping": mode}
    if way == "microbatches":
        options["microbatch_size"] = 3
    found = clipped_gradients(model, x, y, **options)
    assert reference.error(found.sums, expected) < 1e-5
    np.testing.assert_allclose(found.norms, reference.clipped(per_example, 1.0)[0], rtol=1e-5)
    route = explain(model).route
    assert route == ("general" if second is Plain else "book-keeping")


@MODE
def test_float64(mode, float64):
    model, x, y = towers()
    per_example, _ = reference.gradients(model, x, y, None)
    clip = median_norm(per_example)
    found = clipped_gradients(model, x, y, l2_norm_clip=clip, clipping=mode)
    expected, _ = expected_sums(model, per_example, clip, mode)
    assert all(s.dtype == tf.float64 for s in found.sums)
    assert reference.error(found.sums, expected) < 1e-9


@MODE
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_xla_bounds_in_float32(mode, dtype):
    model, x, y = towers(dtype=dtype)

    @tf.function(jit_compile=True, autograph=False)
    def norm_of_sums(a, b, c, d):
        found = clipped_gradients(
            model, {"a": a, "b": b}, {"y": c, "z": d}, l2_norm_clip=0.1, clipping=mode
        )
        assert all(s.dtype == tf.float32 for s in found.sums)
        return tf.linalg.global_norm(found.sums)

    for i in range(2):
        row = [t[i : i + 1] for t in (x["a"], x["b"], y["y"], y["z"])]
        assert 0.05 < norm_of_sums(*row) <= 0.1 * (1 + 1e-5)


@MODE
@pytest.mark.parametrize("second", [layers.Dense, Plain])
def test_removing_a_row_changes_the_sums_by_at_most_the_clip(mode, second):
    """The stated sensitivity, for gradients of any size; and it is reached by large ones."""
    model, x, y = towers(second)
    sizes = np.array([0, 1e-30, 1e-18, 1e-9, 1e-3, 1e3, 1e12], "float32")
    weight = {"y": sizes, "z": sizes}
    clip = 0.25

    @tf.function(autograph=False)
    def sums(mask):
        found = clipped_gradients(model, x, y, weight, l2_norm_clip=clip, clipping=mode, mask=mask)
        assert found.clipping.sensitivity(clip) == clip
        return found.sums

    everyone = sums(tf.constant([True] * zoo.ROWS))
    moved = []
    for i in range(zoo.ROWS):
        without = sums(tf.constant(np.arange(zoo.ROWS) != i))
        alone = sums(tf.constant(np.arange(zoo.ROWS) == i))
        moved.append(np.sqrt(sum(np.sum(np.square(s)) for s in alone)))
        for s, t, u in zip(everyone, without, alone, strict=True):
            np.testing.assert_allclose(s - t, u, atol=1e-6)
    assert np.all(np.isfinite(moved)) and np.max(moved) <= clip * (1 + 1e-5)
    # A little below with `gamma`, which is added to the norm.
    np.testing.assert_allclose(np.max(moved), clip, rtol=1e-2)
    assert moved[0] == 0


def test_a_norm_too_small_for_its_square_is_not_scaled_up_to_more_than_the_clip():
    """float32 loses the squares of half of this gradient: dividing by what is left would breach."""
    model = keras.Sequential([keras.Input((2000,)), layers.Dense(1, use_bias=False)])
    model.compile(loss=lambda y, p: tf.reduce_sum(p))
    x = np.full((1, 2000), 2.5e-23, "float32")
    x[0, 0] = 1.3e-22  # its square is a subnormal number, those of the others are zero
    for gamma in (0.0, 1e-12):
        found = clipped_gradients(
            model, x, np.ones((1, 1)), l2_norm_clip=1.0, clipping=AutomaticClipping(gamma)
        )
        assert np.linalg.norm(np.float64(found.sums[0])) <= 1.0


@pytest.mark.parametrize("second", [layers.Dense, Plain])
def test_per_layer_bounds_each_layer_and_spends_the_whole_budget(second):
    model, x, y = towers(second)
    mode = PerLayerClipping({"first": 4.0, "third": 0.5})
    one = [{k: t[:1] for k, t in part.items()} for part in (x, y)]
    found = clipped_gradients(model, *one, l2_norm_clip=1e-3, clipping=mode)
    squares = dict.fromkeys(("first", "second", "third"), 0.0)
    for variable, total in zip(model.trainable_variables, found.sums, strict=True):
        squares[variable.path.split("/")[-2]] += np.sum(np.square(total))
    expected = {"first": 4 / 5.5, "second": 1 / 5.5, "third": 0.5 / 5.5}
    for name, share in expected.items():
        np.testing.assert_allclose(squares[name], 1e-6 * share, rtol=1e-4)


@MODE
@pytest.mark.parametrize("second", [layers.Dense, Plain])
@pytest.mark.parametrize("way", ["eager", "microbatches"])
def test_a_gradient_not_finite_in_one_layer_drops_the_whole_example(mode, second, way):
    """Rule 4: also where the other layers' parts are finite and clipped by themselves."""
    model, x, y = towers(second)
    y["z"][2] = np.nan
    per_example, _ = reference.gradients(model, x, y, None)
    finite = [np.isfinite(g[2]).all() for g in per_example]
    assert any(finite) and not all(finite)
    clip = 1.0
    expected, _ = expected_sums(model, per_example, clip, mode)
    size = 2 if way == "microbatches" else None
    found = clipped_gradients(model, x, y, l2_norm_clip=clip, clipping=mode, microbatch_size=size)
    assert reference.error(found.sums, expected) < 1e-5
    assert found.was_clipped[2]


@MODE
def test_zero_gradients_empty_batches_and_padding(mode):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, use_bias=False)])
    model.compile(loss=lambda y, p: tf.reduce_sum(p))
    mode = mode if not isinstance(mode, PerLayerClipping) else PerLayerClipping()
    x, y = np.zeros((3, 3), "float32"), np.zeros((3, 1))
    for data in ((x, y), (x[:0], y[:0])):
        assert np.all(clipped_gradients(model, *data, clipping=mode).sums[0] == 0)
    mask = np.array([False, False, False])
    found = clipped_gradients(model, x + 9, y, clipping=mode, mask=mask)
    assert np.all(found.sums[0] == 0) and not np.any(found.was_clipped)


def test_was_clipped_says_whose_gradient_became_smaller():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
    model.compile(loss=lambda y, p: tf.reduce_sum(p))
    x = np.array([[0.0], [0.5], [0.995], [1.5], [np.nan], [9.0]], "float32")
    mask = np.arange(6) < 5
    for mode, expected in (
        ("flat", [0, 0, 0, 1, 1, 0]),
        ("per_layer", [0, 0, 0, 1, 1, 0]),
        ("automatic", [0, 0, 1, 1, 1, 0]),
    ):
        found = clipped_gradients(model, x, x, clipping=mode, mask=mask, microbatch_size=4)
        np.testing.assert_array_equal(found.was_clipped, np.array(expected, bool))


class Borrowed(layers.Layer):
    """Uses the kernel of another layer."""

    def __init__(self, owner):
        super().__init__()
        self.kernel = owner.kernel

    def call(self, x):
        return keras.ops.matmul(x, self.kernel)


def test_a_variable_of_two_layers_is_clipped_once():
    inputs = keras.Input((3,))
    first = layers.Dense(3, name="one")
    hidden = first(inputs)
    model = keras.Model(inputs, layers.Dense(1)(Borrowed(first)(hidden)))
    groups, shares = PerLayerClipping().variable_groups(model)
    assert len(groups) == len(model.trainable_variables) == 4
    assert len(shares) == len(set(groups)) and sum(shares) == 1


@MODE
def test_check_model_compares_in_the_mode_of_the_run(mode):
    model, x, y = towers()
    check_model(model, x, y, clipping=mode)
    assert explain(model).route == "book-keeping"


@pytest.mark.parametrize(
    "shares", [{"fourth": 1.0}, {"first": 1.0, "nothing": 2.0}, {"concatenate": 1.0}]
)
def test_unknown_layers_are_refused_by_name(shares):
    model, x, y = towers()
    mode = PerLayerClipping(shares)
    for call in (clipped_gradients, check_model):
        with pytest.raises(ValueError, match="first, .*Received: '(fourth|nothing|concatenate)'"):
            call(model, x, y, clipping=mode)


def test_names_must_be_clear():
    inputs = keras.Input((2,))
    inner = [keras.Sequential([layers.Dense(2, name="dense")], name=name) for name in "ab"]
    model = keras.Model(inputs, inner[1](inner[0](inputs)))
    with pytest.raises(ValueError, match="fits 2 layers"):
        PerLayerClipping({"dense": 2.0}).variable_groups(model)
    with pytest.raises(ValueError, match="already named"):
        PerLayerClipping((("a/dense", 2.0), ("a/dense", 1.0))).variable_groups(model)
    _, shares = PerLayerClipping({"a/dense": 3.0}).variable_groups(model)
    assert sorted(shares) == [0.25, 0.75]
    model.layers[1].trainable = False
    with pytest.raises(ValueError, match="a/dense"):
        PerLayerClipping({"a/dense": 3.0}).variable_groups(model)


@pytest.mark.parametrize(
    "shares", [3, "first", {"a": 0.0}, {"a": -1.0}, {"a": np.nan}, {"a": True}, {1: 1.0}]
)
def test_bad_shares(shares):
    with pytest.raises(ValueError, match="shares"):
        PerLayerClipping(shares)


@pytest.mark.parametrize("gamma", [-0.1, np.nan, np.inf, "1", None, True])
def test_bad_gamma(gamma):
    with pytest.raises((TypeError, ValueError), match="gamma"):
        AutomaticClipping(gamma)


class Unbounded(FlatClipping):
    """A subclass that bounds nothing."""


@pytest.mark.parametrize("mode", ["Flat", "none", None, 1.0, PerLayerClipping, Unbounded()])
def test_unknown_modes_are_refused(mode):
    model, x, y = towers()
    with pytest.raises(ValueError, match="clipping"):
        clipped_gradients(model, x, y, clipping=mode)


@pytest.mark.parametrize("mode", [m for m in MODES.values() if not isinstance(m, str)])
def test_modes_are_compared_whole_and_survive_keras_serialization(mode):
    config = keras.saving.serialize_keras_object(mode)
    again = keras.saving.deserialize_keras_object(config)
    assert again == mode and hash(again) == hash(mode)
    assert len({*MODES.values(), again}) == len(MODES)
    assert PerLayerClipping({"first": 2.0}) != PerLayerClipping({"first": 3.0})
