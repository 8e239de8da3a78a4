"""Clipped sums equal a per-example loop on varied models, on every way to run them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf.clipping import ClippedGradients, check_model, clipped_gradients, explain
from tests.clipping import reference, zoo

GENERAL = {"unknown_layer"}
HEAVY = {"bert", "resnet"}
# XLA compiles for seconds: two small models stand for the others in a quick run.
COMPILED = {"mlp", "transformer"}


def cases(*options, quick=lambda name, *option: name not in HEAVY):
    """Every model with every option; those that are not `quick` are marked slow."""
    return [
        pytest.param(
            make,
            *option,
            id="-".join(map(str, (make.__name__, *option))),
            marks=() if quick(make.__name__, *option) else pytest.mark.slow,
        )
        for make in zoo.ZOO
        for option in (options or [()])
    ]


def quick_compiled(name, *option):
    return name in COMPILED if True in option else name not in HEAVY


ALL = pytest.mark.parametrize("make", cases(quick=lambda name: True))
CASES = pytest.mark.parametrize("make", cases())


def tensors(*data):
    return [
        keras.tree.map_structure(lambda t: None if t is None else tf.constant(t), d) for d in data
    ]


def expectation(make):
    model, x, y, weight = make()
    per_example, losses = reference.gradients(model, x, y, weight)
    clip = float(np.median(reference.clipped(per_example, 1.0)[0]))
    norms, sums = reference.clipped(per_example, clip)
    return model, x, y, weight, clip, losses, norms, sums


@ALL
def test_eager(make):
    model, x, y, weight, clip, losses, norms, sums = expectation(make)
    check_model(model, x, y, weight)
    assert explain(model).route == ("general" if make.__name__ in GENERAL else "book-keeping")
    found = clipped_gradients(model, x, y, weight, l2_norm_clip=clip)
    assert reference.error(found.sums, sums) < 1e-5
    assert len(found.sums) == len(model.trainable_variables)
    for s, v in zip(found.sums, model.trainable_variables, strict=True):
        assert s.shape == v.shape and s.dtype == tf.float32
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5, atol=1e-6 * norms.max())
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5, atol=1e-6)
    assert found.mask.dtype == tf.bool and bool(tf.reduce_all(found.mask))
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found.outputs,
        model(*tensors(x), training=True),
    )


@pytest.mark.parametrize(("make", "jit_compile"), cases((False,), (True,), quick=quick_compiled))
def test_compiled(make, jit_compile):
    model, x, y, weight, clip, _, norms, sums = expectation(make)

    @tf.function(jit_compile=jit_compile)
    def step(x, y, weight):
        return clipped_gradients(model, x, y, weight, l2_norm_clip=clip)

    found = step(*tensors(x, y, weight))
    assert isinstance(found, ClippedGradients) and found.l2_norm_clip == clip
    assert reference.error(found.sums, sums) < 1e-5
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5, atol=1e-6 * norms.max())


@pytest.mark.parametrize(
    ("make", "size", "jit_compile"),
    cases((1, False), (3, False), (3, True), (20, False), quick=quick_compiled),
)
def test_microbatches(make, size, jit_compile):
    model, x, y, weight, clip, losses, norms, sums = expectation(make)
    data = tensors(x, y, weight)
    outputs = model(data[0], training=True)

    @tf.function(jit_compile=jit_compile)
    def step(x, y, weight):
        return clipped_gradients(model, x, y, weight, l2_norm_clip=clip, microbatch_size=size)

    found = step(*data)
    assert reference.error(found.sums, sums) < 1e-5
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5, atol=1e-6 * norms.max())
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5, atol=1e-6)
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found.outputs, outputs
    )


@CASES
@pytest.mark.parametrize("size", [None, 3])
def test_rows_unknown_to_the_graph(make, size):
    model, x, y, weight, clip, _, _, sums = expectation(make)
    data = tensors(x, y, weight)
    leaves = [t for t in keras.tree.flatten(data) if t is not None]

    @tf.function(input_signature=[[tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in leaves]])
    def graph(tensors):
        rows = iter(tensors)
        parts = keras.tree.map_structure(lambda t: None if t is None else next(rows), data)
        return clipped_gradients(model, *parts, l2_norm_clip=clip, microbatch_size=size).sums

    def step(*data):
        return graph([t for t in keras.tree.flatten(data) if t is not None])

    assert reference.error(step(*data), sums) < 1e-5
    none = [keras.tree.map_structure(lambda t: None if t is None else t[:0], d) for d in data]
    assert all(np.all(np.asarray(s) == 0) for s in step(*none))
    five = [keras.tree.map_structure(lambda t: None if t is None else t[:5], d) for d in data]
    expected = reference.clipped(reference.gradients(model, *five)[0], clip)[1]
    assert reference.error(step(*five), expected) < 1e-5


@CASES
@pytest.mark.parametrize("size", [None, 3])
def test_microbatches_and_empty_batches_eagerly(make, size):
    model, x, y, weight, clip, _, _, sums = expectation(make)
    data = tensors(x, y, weight)
    found = clipped_gradients(model, *data, l2_norm_clip=clip, microbatch_size=size)
    assert reference.error(found.sums, sums) < 1e-5
    none = [keras.tree.map_structure(lambda t: None if t is None else t[:0], d) for d in data]
    found = clipped_gradients(model, *none, l2_norm_clip=clip, microbatch_size=size)
    assert all(np.all(np.asarray(s) == 0) for s in found.sums)
    assert found.norms.shape == (0,) and found.losses.shape == (0,)


@ALL
def test_float64(make, float64):
    model, x, y, weight, clip, _, norms, sums = expectation(make)
    check_model(model, x, y, weight)
    found = clipped_gradients(model, x, y, weight, l2_norm_clip=clip)
    assert all(s.dtype == tf.float64 for s in found.sums)
    assert reference.error(found.sums, sums) < 1e-9
    np.testing.assert_allclose(found.norms, norms, rtol=1e-9)


@CASES
def test_bfloat16(make, bfloat16):
    if make.__name__ == "lstm" and tf.config.get_visible_devices("GPU"):
        pytest.skip("refused there: cuDNN's gradients in bfloat16 are wrong, also in the reference")
    model, x, y, weight, clip, _, norms, sums = expectation(make)
    check_model(model, x, y, weight)
    assert explain(model).route == ("general" if make.__name__ in GENERAL else "book-keeping")
    found = clipped_gradients(model, x, y, weight, l2_norm_clip=clip)
    assert all(s.dtype == tf.float32 for s in found.sums) and found.norms.dtype == tf.float32
    # bfloat16 keeps eight bits: the reference itself is no better than this.
    assert reference.error(found.sums, sums) < 5e-2
    np.testing.assert_allclose(found.norms, norms, rtol=5e-2, atol=1e-2 * norms.max())
