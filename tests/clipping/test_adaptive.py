"""Adaptive clipping of one batch: what an example adds, and where the clip norm goes next."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf.clipping import AdaptiveClipping, clipped_gradients
from keras_bandmf.clipping.modes import COUNT_SHARE, SMALL_SHARE

# Gradient norms from nothing to more than any clip norm, and both sides of each threshold.
SIZES = np.array([0, 1e-30, 1e-9, 0.01, 0.3, 0.9499, 0.9501, 1, 1.0001, 30, 1e12], np.float32)


class Plain(layers.Dense):
    """Dense by another class: it has no clipping rule and goes the general path."""


def model_of(kind=layers.Dense, dtype=None):
    """The gradient of a row is the row."""
    model = keras.Sequential([keras.Input((4,)), kind(1, use_bias=False, dtype=dtype)])
    model.compile(loss=lambda y, p: p)
    return model


def rows_of(sizes):
    """Rows of these norms."""
    directions = np.random.default_rng(0).normal(size=(len(sizes), 4))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return (directions * np.asarray(sizes)[:, None]).astype(np.float32)


def clipped(model, x, current, clip=0.5, mode="adaptive", **options):
    y = np.zeros((x.shape[0], 1), np.float32)
    return clipped_gradients(
        model, x, y, l2_norm_clip=clip, clipping=mode, current_norm=current, **options
    )


@pytest.mark.parametrize("current", [1.0, 0.5, 0.003, 31.6])
@pytest.mark.parametrize("kind", [layers.Dense, Plain])
def test_an_example_adds_a_vector_of_at_most_the_first_clip_norm(current, kind):
    """The sensitivity, count included; and the largest gradients reach it."""
    model, x, clip = model_of(kind), rows_of(SIZES * current), 0.5

    @tf.function(autograph=False)
    def contribution(mask):
        found = clipped(model, x, current, mask=mask)
        return tf.cast(found.sums[0], tf.float64), found.adaptation[1]

    added = []
    for i in range(len(x)):
        gradient, count = contribution(tf.constant(np.arange(len(x)) == i))
        added.append(np.hypot(np.linalg.norm(gradient), count))
    assert np.max(added) <= clip * (1 + 1e-6)
    np.testing.assert_allclose(added[-1], clip, rtol=1e-6)
    np.testing.assert_allclose(added[3], clip * np.hypot(0.01, COUNT_SHARE), rtol=1e-5)


@pytest.mark.parametrize("blank", ["masked", "of weight zero"])
@pytest.mark.parametrize("kind", [layers.Dense, Plain])
def test_neighbors_differ_by_at_most_the_first_clip_norm(blank, kind):
    """In both adjacencies: a row more or less, and one whose gradient becomes zero."""
    # A zero beside an activation of 1e12 may be found not to be zero.
    sizes = SIZES if blank == "masked" else np.minimum(SIZES, 1e5)
    model, x, clip = model_of(kind), rows_of(sizes), 0.5

    @tf.function(autograph=False)
    def release(kept):
        if blank == "masked":
            found = clipped(model, x, 1.0, mask=kept > 0)
        else:
            found = clipped(model, x, 1.0, sample_weight=kept)
        return tf.cast(found.sums[0], tf.float64), found.adaptation[1]

    everyone = release(tf.ones(len(x)))
    for i in range(len(x)):
        without = release(tf.constant(np.arange(len(x)) != i, tf.float32))
        moved = [np.linalg.norm(a - b) for a, b in zip(everyone, without, strict=True)]
        assert np.linalg.norm(moved) <= clip * (1 + 1e-5)
    # A large gradient and the count of a blanked row would differ by 4 % more.
    assert clip * np.hypot(1.0, COUNT_SHARE) > 1.04 * clip


def test_the_two_shares_leave_room_for_each_other():
    """Far more than float32 rounds by."""
    assert COUNT_SHARE**2 + SMALL_SHARE**2 < 0.995


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 3}, {"float64_sums": True}])
@pytest.mark.parametrize("kind", [layers.Dense, Plain])
@pytest.mark.parametrize("jit", [False, True])
def test_sums_and_count_are_those_of_dense_numpy(options, kind, jit):
    model, clip, current = model_of(kind), 0.5, 1.7
    sizes = np.array([0.2, 1.0, 1.6, 1.65, 1.9, 40.0, np.nan, 0.3, 5.0])
    x, mask = rows_of(sizes), np.arange(9) < 7

    @tf.function(jit_compile=jit, autograph=False)
    def compute(x, norm):
        found = clipped(model, x, norm, mask=mask, **options)
        return found.sums, found.adaptation, found.was_clipped

    (total,), (norm, count), was_clipped = compute(x, tf.constant(current, tf.float32))
    factors = clip / np.maximum(sizes, current)
    expected = np.nansum((factors * mask)[:, None] * x, axis=0)
    np.testing.assert_allclose(total[:, 0], expected, rtol=1e-5, atol=1e-7)
    assert float(norm) == np.float32(current)
    assert float(count) == pytest.approx(COUNT_SHARE * clip * 3)
    np.testing.assert_array_equal(was_clipped, [0, 0, 0, 0, 1, 1, 1, 0, 0])


def test_rows_of_one_example_are_counted_once():
    model, x = model_of(), rows_of([0.5, 0.5, 3.0, 3.0, 0.1, 9.0])
    mask = np.array([True, True, True, True, True, False])
    found = clipped(model, x, 1.0, mask=mask, rows_per_example=2)
    norms = np.array([np.linalg.norm(x[:2].mean(0)), np.linalg.norm(x[2:4].mean(0)), 0.1])
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
    expected = np.sum(norms <= 0.95)
    assert float(found.adaptation[1]) == pytest.approx(0.15 * expected)


@pytest.mark.parametrize(("dtype", "error"), [("mixed_bfloat16", 1e-2), ("float64", 1e-6)])
def test_other_dtypes(dtype, error):
    sizes = np.array([0.0, 0.2, 0.9, 1.1, 40.0])
    found = clipped(model_of(dtype=dtype), rows_of(sizes), 1.0)
    expected = (0.5 / np.maximum(sizes, 1.0)) @ rows_of(sizes)
    np.testing.assert_allclose(found.sums[0][:, 0], expected, atol=error)
    assert float(found.adaptation[1]) == pytest.approx(0.15 * 2)


@pytest.mark.parametrize("given", [1e-20, 1e30])
def test_a_norm_out_of_range_is_brought_into_it(given):
    mode = AdaptiveClipping()
    found = clipped(model_of(), rows_of(SIZES), given)
    least, largest = mode.least_norm(0.5), mode.largest_norm(0.5)
    assert least * (1 - 1e-6) <= float(found.adaptation[0]) <= largest
    assert np.isfinite(found.sums[0]).all()


@pytest.mark.parametrize("clip", [1e-6, 1e-4, 0.5, 100.0, 2.0**60])
def test_the_bounds_hold_the_first_norm(clip):
    mode = AdaptiveClipping()
    assert mode.least_norm(clip) <= clip <= mode.largest_norm(clip) <= 2.0**60
    for share in (-1e6, -3.0, 0.5, 2.0, 1e6):
        norm = tf.constant(clip, tf.float32)
        for _ in range(60):
            norm = mode.next_norm(norm, tf.constant(share), clip)
            assert mode.least_norm(clip) <= float(norm) <= mode.largest_norm(clip)


def test_the_next_norm_is_that_of_the_formula():
    mode = AdaptiveClipping(target_unclipped_quantile=0.3, learning_rate=0.5)
    found = mode.next_norm(tf.constant(2.0), tf.constant(0.7), 1.0)
    assert float(found) == pytest.approx(2.0 * np.exp(-0.5 * 0.4), rel=1e-6)
    for share in (np.nan, np.inf, -np.inf):
        assert float(mode.next_norm(tf.constant(2.0), tf.constant(share), 1.0)) == 2.0
    huge = AdaptiveClipping(0.5, learning_rate=1e39)
    assert float(huge.next_norm(tf.constant(2.0), tf.constant(0.5), 1.0)) == 2.0


def test_without_the_norm_of_the_step_it_is_the_first_one():
    model, x = model_of(), rows_of(SIZES[1:])
    found = clipped(model, x, None)
    assert found.adaptation is None
    expected = clipped(model, x, None, mode="flat").sums
    np.testing.assert_allclose(found.sums[0], expected[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "mode", "error", "words"),
    [
        (1.0, "flat", ValueError, "Only adaptive.*Received: current_norm=1.0"),
        ([1.0], "adaptive", ValueError, "scalar.*Received: a tensor of shape"),
        ("x", "adaptive", TypeError, "current_norm.*Received"),
        *((bad, "adaptive", ValueError, "positive.*Received") for bad in (0.0, -1.0, np.nan)),
        *((bad, "adaptive", ValueError, "positive.*Received") for bad in (np.inf, True)),
    ],
)
def test_bad_norms_are_refused(given, mode, error, words):
    with pytest.raises(error, match=words):
        clipped(model_of(), rows_of(SIZES), given, mode=mode)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, np.nan, "0.5", None, True])
def test_bad_targets(value):
    with pytest.raises((TypeError, ValueError), match="target_unclipped_quantile"):
        AdaptiveClipping(value)


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, "1", None, True])
def test_bad_learning_rates(value):
    with pytest.raises((TypeError, ValueError), match="learning_rate"):
        AdaptiveClipping(0.5, value)
