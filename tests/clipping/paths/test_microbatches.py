"""`microbatch_size="auto"`: the rule, and that it changes memory only."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf.clipping import clipped_gradients
from keras_bandmf.clipping.paths import chunks, microbatches
from tests import runs
from tests.clipping import reference, zoo


def tensors(data):
    return keras.tree.map_structure(lambda t: None if t is None else tf.constant(t), data)


def example_bytes(model, *data):
    """Bytes that an example adds, as the rule reckons."""
    memory = microbatches.step_memory(model, *tensors(list(data)), None)
    return (memory.peak(10**6) - memory.peak(0)) / 10**6


def linear(width, units):
    model = keras.Sequential([keras.Input((width,)), layers.Dense(units, use_bias=False)])
    model.compile(loss="mse")
    return model, zoo.floats(width), zoo.floats(units)


def test_the_rule_counts_what_grows_with_the_rows():
    """A layer ten times as wide needs about ten times the memory; more weights alone do not."""
    small = example_bytes(*linear(3, 500), None)
    wide = example_bytes(*linear(3, 5000), None)
    heavy = example_bytes(*linear(300, 500), None)
    # At least outputs, losses' squares and slopes, each a float32; and no more than 20 such.
    assert 3 * 4 * 500 < small < 20 * 4 * 500
    np.testing.assert_allclose(wide / small, 10, rtol=0.05)
    assert heavy < 1.5 * small


@pytest.mark.parametrize("make", [zoo.mlp, zoo.unknown_layer], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("budget", "at_once"), [(1, 1), (2**30, zoo.ROWS)])
@pytest.mark.parametrize("way", ["eager", "unknown rows", "xla"])
def test_auto_gives_the_sums_of_the_whole_batch(make, budget, at_once, way, monkeypatch):
    monkeypatch.setattr(microbatches, "_BUDGET", budget)
    model, x, y, weight = make()
    per_example, _ = reference.gradients(model, x, y, weight)
    clip = float(np.median(reference.clipped(per_example, 1.0)[0]))
    data = tensors([x, y, weight])
    leaves = [t for t in keras.tree.flatten(data) if t is not None]
    sizes = []
    original = chunks._parts
    monkeypatch.setattr(chunks, "_parts", lambda t, c, s: sizes.append(s) or original(t, c, s))

    def step(tensors):
        rows = iter(tensors)
        parts = keras.tree.map_structure(lambda t: None if t is None else next(rows), data)
        return clipped_gradients(model, *parts, l2_norm_clip=clip, microbatch_size="auto").sums

    if way != "eager":
        spec = [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in leaves]
        step = tf.function(step, input_signature=[spec], jit_compile=way == "xla", autograph=False)
    found = step(leaves)
    assert reference.error(found, reference.clipped(per_example, clip)[1]) < 1e-5
    if way == "eager":
        assert set(sizes) == {1 if make is zoo.unknown_layer else at_once}
    assert all(np.all(np.asarray(s) == 0) for s in step([t[:0] for t in leaves]))


@pytest.mark.parametrize(
    ("rows", "size", "expected"), [(7, 3, 3), (8, 7, 4), (9, 4, 3), (5, 20, 5), (4, 1, 1)]
)
def test_microbatches_are_of_equal_size(rows, size, expected, monkeypatch):
    """A row more than fits must not cost a microbatch of padding."""
    model, x, y = linear(3, 2)
    seen = []
    original = chunks._parts
    monkeypatch.setattr(chunks, "_parts", lambda t, c, s: seen.append(s) or original(t, c, s))
    data = [np.resize(t, (rows, *t.shape[1:])) for t in (x, y)]
    clipped_gradients(model, *data, microbatch_size=size)
    assert set(seen) == {expected}


def test_shapes_that_are_not_known_are_refused():
    model = keras.Sequential(
        [keras.Input((None, 3)), layers.Dense(2), layers.GlobalAveragePooling1D()]
    )
    model.compile(loss="mse")

    @tf.function(input_signature=[tf.TensorSpec([None, None, 3]), tf.TensorSpec([None, 2])])
    def step(x, y):
        return clipped_gradients(model, x, y, microbatch_size="auto").sums

    with pytest.raises(ValueError, match="fixed length"):
        step.get_concrete_function()


def test_auto_on_two_replicas():
    strategy = runs.mirrored()
    with strategy.scope():
        model, x, y = linear(3, 2)
    expected = clipped_gradients(model, x, y).sums[0]

    def replica():
        return clipped_gradients(model, x, y, microbatch_size="auto").sums[0]

    found = tf.function(lambda: strategy.run(replica))()
    for part in strategy.experimental_local_results(found):
        np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-6)
