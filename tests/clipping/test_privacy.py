"""One test or more per privacy rule of this room; each fails when the rule is broken."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf.clipping import check_model, clipped_gradients
from tests.clipping import reference, zoo

# "none" appears where the general path would also do: both paths must obey.
MODELS = pytest.mark.parametrize(
    "make", [zoo.mlp, zoo.cnn, zoo.conv_text, zoo.transformer, zoo.lstm], ids=lambda f: f.__name__
)
WAYS = pytest.mark.parametrize("way", ["eager", "graph", "microbatches"])


def run(way, model, x, y, weight=None, **options):
    if way == "microbatches":
        options["microbatch_size"] = 2
    if way == "eager":
        return clipped_gradients(model, x, y, weight, **options)
    return tf.function(lambda: clipped_gradients(model, x, y, weight, **options))()


def flat(sums):
    return np.concatenate([np.ravel(s) for s in sums])


@MODELS
@WAYS
def test_rule_2_one_example_moves_the_sum_by_at_most_the_clip(make, way):
    """A sum of clipped gradients: not a mean, and no example counts for more than the clip."""
    model, x, y, weight = make()
    clip = 0.01
    everyone = flat(run(way, model, x, y, weight, l2_norm_clip=clip).sums)
    mask = np.arange(zoo.ROWS) != 3
    without = flat(run(way, model, x, y, weight, l2_norm_clip=clip, mask=mask).sums)
    moved = np.linalg.norm(everyone - without)
    # Its gradient is far above the clip, so it moves the sum by exactly the clip.
    np.testing.assert_allclose(moved, clip, rtol=1e-4)
    assert np.linalg.norm(everyone) <= clip * zoo.ROWS * (1 + 1e-5)


def test_rule_2_the_norm_is_joint_over_all_variables():
    model, x, y, weight = zoo.mlp()
    one = [t[:1] for t in (x, y)]
    sums = clipped_gradients(model, *one, l2_norm_clip=0.01).sums
    np.testing.assert_allclose(np.linalg.norm(flat(sums)), 0.01, rtol=1e-5)


@WAYS
def test_rule_3_weights_scale_the_loss_of_their_example_only(way):
    """Weights act before the clip; the size of the batch and the other weights do not."""
    model, x, y, _ = zoo.mlp()
    weight = np.linspace(0, 2, zoo.ROWS).astype("float32")
    plain = run(way, model, x, y, l2_norm_clip=1e6)
    weighted = run(way, model, x, y, weight, l2_norm_clip=1e6)
    np.testing.assert_allclose(weighted.norms, weight * plain.norms, rtol=1e-4)
    np.testing.assert_allclose(weighted.losses, weight * plain.losses, rtol=1e-4)
    alone = run(way, model, x[2:3], y[2:3], weight[2:3], l2_norm_clip=1e6)
    np.testing.assert_allclose(weighted.norms[2], alone.norms[0], rtol=1e-4)


def test_rule_3_mean_by_weight_is_refused_with_weights():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile(loss=keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"))
    x, y, w = np.ones((3, 2)), np.ones((3, 1)), np.ones(3)
    clipped_gradients(model, x, y)
    for call in (clipped_gradients, check_model):
        with pytest.raises(ValueError, match="mean_with_sample_weight"):
            call(model, x, y, w)


def test_rule_3_weight_regularizers_are_not_in_the_loss_of_an_example():
    model = keras.Sequential(
        [keras.Input((2,)), layers.Dense(1, kernel_regularizer=keras.regularizers.L2(100.0))]
    )
    model.compile(loss="mse")
    x = np.ones((3, 2), "float32")
    y = np.asarray(model(x))
    check_model(model, x, y)
    assert np.abs(flat(clipped_gradients(model, x, y).sums)).max() < 1e-5


def spoiled(x, i, value):
    """`x` with example i full of NaN, inf or (token ids have none of these) unchanged."""
    x = np.array(x)
    x[i] = value
    return x


@pytest.mark.parametrize("make", [zoo.mlp, zoo.cnn, zoo.lstm], ids=lambda f: f.__name__)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@WAYS
def test_rule_4_a_non_finite_example_contributes_zero(make, value, way):
    model, x, y, weight = make()
    per_example, _ = reference.gradients(model, x, y, weight)
    clip = float(np.median(reference.clipped(per_example, 1.0)[0]))
    expected = reference.clipped(per_example, clip, np.arange(zoo.ROWS) != 2)[1]
    bad = spoiled(x, 2, value)
    # An infinite input can saturate into a finite gradient: then it is clipped like any other.
    alone = reference.gradients(model, bad[2:3], y[2:3], None if weight is None else weight[2:3])
    if np.isfinite(reference.clipped(alone[0], clip)[0]).all():
        pytest.skip("this gradient is finite")
    found = run(way, model, bad, y, weight, l2_norm_clip=clip)
    assert reference.error(found.sums, expected) < 1e-5
    assert not np.isfinite(found.norms[2])


@MODELS
@WAYS
def test_rule_4_a_non_finite_loss_weight_contributes_zero(make, way):
    """NaN in the gradients only: activations are fine."""
    model, x, y, weight = make()
    per_example, _ = reference.gradients(model, x, y, weight)
    clip = float(np.median(reference.clipped(per_example, 1.0)[0]))
    expected = reference.clipped(per_example, clip, np.arange(zoo.ROWS) != 2)[1]
    weight = np.ones(zoo.ROWS, "float32") if weight is None else np.array(weight)
    weight[2] = np.nan
    found = run(way, model, x, y, weight, l2_norm_clip=clip)
    assert reference.error(found.sums, expected) < 1e-5


@MODELS
@WAYS
def test_rule_4_an_empty_batch_gives_zero_sums(make, way):
    model, x, y, weight = make()
    none = [None if t is None else t[:0] for t in (x, y, weight)]
    found = run(way, model, *none)
    assert np.all(flat(found.sums) == 0)
    masked = run(way, model, x, y, weight, mask=np.zeros(zoo.ROWS, bool))
    assert np.all(flat(masked.sums) == 0)


@MODELS
@WAYS
def test_rule_5_masked_rows_have_factor_zero(make, way):
    """Whatever padding holds: it adds nothing, and the other rows stay as they were."""
    model, x, y, weight = make()
    mask = np.array([True, False, True, True, False, True, False])
    per_example, _ = reference.gradients(model, x, y, weight)
    clip = float(np.median(reference.clipped(per_example, 1.0)[0]))
    expected = reference.clipped(per_example, clip, mask)[1]
    found = run(way, model, x, y, weight, l2_norm_clip=clip, mask=mask)
    assert reference.error(found.sums, expected) < 1e-5
    np.testing.assert_array_equal(found.mask, mask)
    if x.dtype.kind == "f":
        x = np.where(mask.reshape([-1] + [1] * (x.ndim - 1)), x, np.nan)
        found = run(way, model, x, y, weight, l2_norm_clip=clip, mask=mask)
        assert reference.error(found.sums, expected) < 1e-5


def test_rule_5_the_mask_is_not_a_weight_of_the_loss():
    """A gradient that does not go through the loss weight must not slip past the mask."""
    model, x, y, _ = zoo.mlp()
    mask = np.zeros(zoo.ROWS, bool)
    found = clipped_gradients(model, x, y, mask=mask, l2_norm_clip=1e6)
    assert np.all(np.asarray(found.losses) > 0)
    assert np.all(flat(found.sums) == 0)


@pytest.mark.parametrize("make", [zoo.mlp, zoo.lstm], ids=lambda f: f.__name__)
@WAYS
def test_rule_6_dropout_masks_differ_by_example(make, way):
    base, x, y, weight = make()
    inputs = keras.Input(base.input_shape[1:])
    model = keras.Model(inputs, base(layers.Dropout(0.5)(inputs)))
    model.compile(loss=base.loss)
    same = [None if t is None else np.repeat(t[:1], 20, axis=0) for t in (x, y, weight)]
    norms = np.asarray(run(way, model, *same).norms)
    assert len(np.unique(np.round(norms, 6))) > 10


def test_rule_12_bfloat16_sums_are_float32(bfloat16):
    """A thousand equal contributions: bfloat16 would stop counting after 256."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
    model.compile(loss=lambda y, p: tf.reduce_sum(p))
    model.layers[0]._kernel.assign([[1.0]])
    found = clipped_gradients(model, np.ones((1000, 1), "float32"), np.ones((1000, 1)))
    assert found.sums[0].dtype == tf.float32
    np.testing.assert_allclose(found.sums[0], [[1000.0]])


def test_rule_12_bfloat16_norms_are_float32(bfloat16):
    """1 + 2^-10 is not a bfloat16: the norm of two such entries shows the dtype it is taken in."""
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False)])
    model.compile(loss=lambda y, p: tf.reduce_sum(p))
    x = np.array([[1.0, 2.0**-5]], "float32")
    found = clipped_gradients(model, x, np.ones((1, 1)), l2_norm_clip=10.0)
    assert found.norms.dtype == tf.float32
    np.testing.assert_allclose(found.norms, np.linalg.norm(x, axis=1), rtol=1e-6)


def test_rule_12_float16_is_refused():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(loss="mse")
    for call in (clipped_gradients, check_model):
        with pytest.raises(ValueError, match="mixed_bfloat16"):
            call(model, np.ones((3, 2)), np.ones((3, 1)))


@pytest.mark.parametrize("capability, refused", [((8, 0), True), (None, True), ((7, 5), False)])
def test_rule_12_float32_products_of_ten_bits_are_refused(monkeypatch, capability, refused):
    """TensorFloat-32, the default: a norm of vectors that cancel came out a sixteenth."""
    details = {} if capability is None else {"compute_capability": capability}
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [gpu])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: details)
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile(loss="mse")
    tf.config.experimental.enable_tensor_float_32_execution(True)
    try:
        for call in (clipped_gradients, check_model):
            with contextlib.ExitStack() as stack:
                if refused:
                    stack.enter_context(pytest.raises(ValueError, match="TensorFloat-32"))
                call(model, np.ones((3, 2)), np.ones((3, 1)))
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(False)
    for override, stricter in (("0", False), ("", False), ("1", refused), ("true", refused)):
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
        with contextlib.ExitStack() as stack:
            if stricter:
                match = f"Received: NVIDIA_TF32_OVERRIDE={override}"
                stack.enter_context(pytest.raises(ValueError, match=match))
            clipped_gradients(model, np.ones((3, 2)), np.ones((3, 1)))
