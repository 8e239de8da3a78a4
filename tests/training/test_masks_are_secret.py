"""Who knows the user's seed does not know the masks of a private run."""

import keras
import numpy as np
from keras import layers

import keras_bandmf as bandmf
from tests import runs


def masks(width=200):
    """The mask of the first step, read off the update: rows of ones, no noise to speak of."""
    keras.utils.set_random_seed(1)
    plan = runs.make_plan(num_examples=8, num_bands=1, num_steps=1, noise_multiplier=1e-4)
    model = bandmf.privatize(
        keras.Sequential(
            [
                keras.Input((width,)),
                layers.Dropout(0.5),
                layers.Dense(1, kernel_initializer="zeros"),
            ]
        )
    )
    runs.compiled(model, plan, seed=None, clip=100.0)
    rows = np.ones((8, width), np.float32), np.zeros(8, np.float32)
    (update,) = runs.fit(model, plan.batches(*rows, seed=3), epochs=1)
    return update[:width]


def test_two_runs_of_one_script_draw_other_masks():
    """With `set_random_seed` in it: Keras's own masks would be the same, and known to anyone."""
    first, second = masks(), masks()
    assert np.mean(np.abs(first - second) > 0.1) > 0.5
