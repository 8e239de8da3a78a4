"""The path does not depend on a private row, be it large and finite."""

import keras
import numpy as np
import pytest

from keras_bandmf import clipping


@pytest.mark.parametrize("value", [1e10, 1e12, 1e15])
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_no_large_row_chooses_the_path(value, loss):
    """`zoo.mlp` bears 1e10; a layer and a loss that square it did not."""
    routes = []
    for spoiled in (False, True):
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
        model.compile(loss=loss)
        x = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
        if spoiled:
            x[1] = value
        clipping.check_model(model, x, np.zeros((5, 1), "float32"))
        routes.append((clipping.explain(model).route, clipping.explain(model).why))
    assert routes[0] == routes[1] and routes[0][0] == "book-keeping"
