"""`keras.utils.set_random_seed` repeats initial weights, and nothing that must stay secret."""

import keras
import numpy as np

import keras_bandmf as bandmf
from tests import runs

PLAN = runs.make_plan(num_steps=12)
X, Y = runs.noise_data()


def run():
    """Initial weights, final weights and keys of a private run that begins with the same seed."""
    keras.utils.set_random_seed(7)
    model = bandmf.privatize(
        keras.Sequential([keras.Input((2,)), keras.layers.Dropout(0.5), keras.layers.Dense(3)])
    )
    first = [weight.numpy() for weight in model.weights]
    model.compile(bandmf.BandMFOptimizer("sgd", PLAN), loss=runs.prediction_loss)
    model.optimizer.build(model.trainable_variables)
    keys = model.optimizer.run_state.to_arrays(replay=True)
    model.fit(X, Y, verbose=0)
    return first, [weight.numpy() for weight in model.weights], keys


def test_initial_weights_repeat_and_noise_sampling_and_dropout_do_not():
    first, last, keys = run()
    first_again, last_again, keys_again = run()
    for one, other in zip(first, first_again, strict=True):
        np.testing.assert_array_equal(one, other)
    # The gradients are zero, so that the weights are moved by the noise alone.
    assert all((one != other).all() for one, other in zip(last, last_again, strict=True))
    for name in ("noise_key", "sampler_key", "mask_key"):
        assert keys[name].size == keys_again[name].size > 0
        assert (keys[name] != keys_again[name]).any(), name
