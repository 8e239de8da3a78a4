"""Each layer of Keras and each backbone of keras_hub equals one example at a time, on its path."""

import pathlib
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf import clipping
from tests.clipping import backbones, every_layer, reference

PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "layers.md"
ROWS = 4
# A second run draws other numbers: `tests/clipping/test_every_random_layer.py` has these.
EXACT = [
    name
    for name in every_layer.BUILT
    if not name.startswith("Random") and "Dropout" not in name and "Noise" not in name
]
# The general path and its rules are tested elsewhere too; a few show that these tests work.
QUICK = ("AdditiveAttention", "Attention", "Conv1D", "Masking", "SpectralNormalization")


@pytest.fixture(autouse=True)
def same_weights():
    """The weights of a model are the same in each run."""
    keras.utils.set_random_seed(0)


def written_with_these_versions():
    hub = sys.modules.get("keras_hub")
    versions = f"Keras {keras.__version__} and keras_hub {getattr(hub, '__version__', '')}"
    return versions in PAGE.read_text()


def test_every_layer_and_every_backbone_is_in_the_table():
    models = pytest.importorskip("keras_hub").models
    if not written_with_these_versions():
        pytest.skip("written with other versions")
    names = re.findall(r"^\| (\w+) \| ", PAGE.read_text(), re.MULTILINE)
    kinds = {n for n in dir(models) if n.endswith("Backbone") and n != "Backbone"}
    titles = ["Layer", "Layer"]  # of the two tables
    assert sorted(names) == sorted([*titles, *every_layer.KERAS, *kinds])


def compare(name, model, x, y):
    """`clipped_gradients` on the path that `explain` names against the definition."""
    expected = every_layer.path_of(name, model, x, y)
    if written_with_these_versions():
        assert "| {} | {} | {} |".format(*expected) in PAGE.read_text()
    model.compile(loss="mse")
    if expected.path == "refused":
        refusals = "mixes (the )?examples|add_loss|overwrites the kernel"
        if "fails on several rows" in expected.why:
            refusals = None
        with pytest.raises(ValueError if refusals else tf.errors.OpError, match=refusals):
            clipping.check_model(model, x, y)
        return
    random = np.random.default_rng(1)
    for v in model.trainable_variables:
        v.assign(v + 0.2 * random.normal(size=v.shape))
    clipping.check_model(model, x, y)
    assert every_layer.path_of(name, model, x, y) == expected
    reference.compare(clipping.clipped_gradients, model, x, y)


def marked(names):
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(EXACT))
def test_layers_of_keras(name):
    compare(name, *every_layer.keras_model(name))


@pytest.mark.parametrize("name", marked(backbones.NAMES))
def test_backbones_of_keras_hub(name):
    models = pytest.importorskip("keras_hub").models
    model = backbones.model_of(getattr(models, name))
    compare(name, model, *backbones.data_of(model, ROWS))
