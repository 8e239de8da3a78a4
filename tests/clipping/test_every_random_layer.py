"""Random image layers that `tests/clipping/test_seeds.py` leaves out, and a count of them all."""

import inspect

import keras
import numpy as np
import pytest
from keras import layers

from keras_bandmf.clipping import check_model
from keras_bandmf.clipping.rowwise import known_layers
from tests.clipping import test_seeds
from tests.clipping.test_seeds import CLIP, EVERYONE, IMAGE, ROWS, clipping_function, data_of

RANGE = {"value_range": (0, 1)}
IMAGES = {
    "RandomColorDegeneration": lambda: layers.RandomColorDegeneration(0.9, **RANGE),
    "RandomColorJitter": lambda: layers.RandomColorJitter(
        **RANGE, brightness_factor=0.5, contrast_factor=0.5, saturation_factor=0.5, hue_factor=0.5
    ),
    "RandomErasing": lambda: layers.RandomErasing(1.0, **RANGE),
    "RandomGaussianBlur": lambda: layers.RandomGaussianBlur(1.0, 3, 1.0, **RANGE),
    "RandomGrayscale": lambda: layers.RandomGrayscale(0.5),
    "RandomHue": lambda: layers.RandomHue(0.9, **RANGE),
    "RandomInvert": lambda: layers.RandomInvert(0.5, **RANGE),
    "RandomPerspective": lambda: layers.RandomPerspective(1.0, 0.5),
    "RandomPosterization": lambda: layers.RandomPosterization((1, 6), **RANGE),
    "RandomSaturation": lambda: layers.RandomSaturation(0.9, **RANGE),
    "RandomSharpness": lambda: layers.RandomSharpness(0.9, **RANGE),
    "RandomShear": lambda: layers.RandomShear(0.5, 0.5),
    "Solarization": lambda: layers.Solarization(0.5, 0.5, **RANGE),
}
# They draw inside the layers that are tested.
CELLS = {"GRUCell", "LSTMCell", "SimpleRNNCell"}


def model_of(layer):
    """A random layer and a head."""
    model = keras.Sequential([keras.Input(IMAGE), layer, layers.Flatten(), layers.Dense(1)])
    model.compile(loss="mse")
    return model


def draws(kind):
    """Whether a layer of Keras takes a seed or a rate of dropout."""
    arguments = inspect.signature(kind.__init__).parameters
    return (
        "seed" in arguments or "dropout" in arguments or "SeedGenerator" in inspect.getsource(kind)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_a_row_moves_the_sum_by_its_own_clipped_gradient(name):
    """The same draws with and without the row; others in the next step; no generator moved."""
    if not hasattr(layers, name):
        pytest.skip("not in this Keras")
    model = model_of(IMAGES[name]())
    x, y = data_of(IMAGE)
    before = test_seeds.states(model)
    check_model(model, x, y)
    run = clipping_function(model, x, y)
    everyone, norms = run(EVERYONE, 3)
    for row in (0, 4):
        own = np.arange(ROWS) == row
        without, alone = run(~own, 3)[0], run(own, 3)[0]
        np.testing.assert_allclose(everyone - without, alone, atol=1e-6)
        assert np.linalg.norm(everyone - without) <= CLIP * (1 + 1e-4)
    assert any(np.abs(run(EVERYONE, step)[1] - norms).max() > 1e-4 for step in range(4, 14))
    for a, b in zip(before, test_seeds.states(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_random_layer_of_keras_is_forgotten():
    """Each that is known to treat rows independently is run with and without a row."""
    run = (
        {name.removeprefix("Image ").split()[0] for name in test_seeds.RANDOM} | set(IMAGES) | CELLS
    )
    for name, kind in vars(layers).items():
        if not inspect.isclass(kind) or not issubclass(kind, layers.Layer) or kind is layers.Layer:
            continue
        if draws(kind) and known_layers.condition_of(kind) is not None:
            assert name in run, name
