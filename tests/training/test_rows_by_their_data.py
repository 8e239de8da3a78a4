"""What a row holds reaches no other row's gradient: masking it out would not show that."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf import clipping
from tests import runs
from tests.training.test_mixing_rows import LargeValue, Mixing, MoreThanThree, model_with

CLIP = 0.1


@pytest.mark.parametrize("kind", [Mixing, MoreThanThree, LargeValue])
def test_another_content_of_a_masked_row_changes_nothing(kind):
    """The sum of the others, with one row's data and with zeros in its place."""
    model = model_with(kind(), private=False)
    model.compile(loss=runs.prediction_loss)
    x = np.random.default_rng(0).normal(size=(24, 6)).astype("float32")
    y, other = np.zeros(24, np.float32), x.copy()
    other[5] = 0.0

    @tf.function
    def total(x):
        mask = tf.range(24) != 5
        found = clipping.clipped_gradients(model, x, y, mask=mask, l2_norm_clip=CLIP).sums
        return tf.concat([tf.reshape(s, [-1]) for s in found], axis=0)

    moved = np.linalg.norm(total(x).numpy() - total(other).numpy()) / CLIP
    assert moved <= 1e-4, f"{moved:.2f} clip norms"


@pytest.mark.parametrize("probability", [0.5, 0.1])
def test_random_mixing_with_a_seed_of_its_own_is_never_trusted(probability):
    """Each try has another seed: with one seed twenty tries are one."""
    x = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    for seed in range(20):
        layer = Mixing(probability)
        layer.seeds = keras.random.SeedGenerator(seed)
        model = model_with(layer, private=False)
        model.compile(loss=runs.prediction_loss)
        try:
            clipping.check_model(model, x, np.zeros(5, np.float32))
        except ValueError as error:
            assert "mixes examples" in str(error)
        assert clipping.explain(model).route == "general"
