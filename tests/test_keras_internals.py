"""Every private name of Keras and TensorFlow does what the library takes it to do."""

import runpy
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy

from keras_bandmf import _keras_internals
from tests import runs


def small_model():
    """A subclassed model: Keras knows its shapes only when it builds it."""

    class Small(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    model = Small()
    model.compile("sgd", "mse", metrics=["mae"])
    return model


@pytest.mark.parametrize("version", ["3.12.0", "3.15.1", "3.15.9", "2.99.0"])
def test_tested_versions_of_keras_are_taken_without_a_word(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _keras_internals.warn_if_untested(version)


@pytest.mark.parametrize("version", ["3.16.0", "3.100.0.dev2026010103", "4.0.0"])
def test_a_newer_keras_is_reported(version):
    with pytest.warns(UserWarning, match=f"Received: Keras {version}"):
        _keras_internals.warn_if_untested(version)


def test_the_import_reports_a_newer_keras(monkeypatch):
    monkeypatch.setattr(keras, "__version__", "99.0.0")
    with pytest.warns(UserWarning, match="Received: Keras 99.0.0"):
        runpy.run_path(_keras_internals.__file__)


def test_multi_worker_mode():
    assert not _keras_internals.in_multi_worker_mode(runs.mirrored())
    # tests/training/test_workers.py runs it in several processes.
    extended = collective_all_reduce_strategy.CollectiveAllReduceExtended
    assert callable(extended._in_multi_worker_mode)


def test_programs_of_xla_are_told_from_others():
    found = {}

    def trace(name):
        found[name] = _keras_internals.inside_xla_program()
        return tf.zeros([])

    @tf.function(jit_compile=True)
    def outer():
        return tf.function(trace)("nested")

    outer()
    tf.function(trace, jit_compile=True)("compiled")
    tf.function(trace)("graph")
    trace("eager")
    assert found == {"nested": True, "compiled": True, "graph": False, "eager": False}


def test_build_model_builds_everything_and_runs_nothing():
    model = small_model()
    x, y = keras.KerasTensor((None, 3)), keras.KerasTensor((None, 1))
    _keras_internals.build_model(model, (x, y, None))
    assert model.built and model.optimizer.built
    assert model.dense.kernel.shape == (3, 1)
    assert int(model.optimizer.iterations) == 0
    assert {"loss", "mae"} <= set(model.get_metrics_result())


def test_fit_does_not_build_a_model_with_these_attributes():
    data = np.zeros((4, 3), np.float32), np.zeros((4, 1), np.float32)

    def refuse(*args, **kwargs):
        raise RuntimeError("built in fit")

    attributes = _keras_internals.attributes_without_build_in_fit()
    model = small_model()
    for name in attributes:
        setattr(model, name, refuse)
    with pytest.raises(RuntimeError, match="built in fit"):
        model.fit(*data, verbose=0)
    for name, value in attributes.items():
        setattr(model, name, value)
    model.fit(*data, verbose=0)


def test_variables_of_an_optimizer():
    optimizer = keras.optimizers.SGD(momentum=0.9)
    weights = [keras.Variable(np.zeros(2), name="a"), keras.Variable(np.zeros(3), name="b")]
    optimizer.build(weights)
    found = _keras_internals.optimized_variables(optimizer)
    assert [id(variable) for variable in found] == [id(variable) for variable in weights]
    own = _keras_internals.own_variables(optimizer)
    assert [id(variable) for variable in own] == [id(v) for v in optimizer.variables]
    assert len(own) >= 3  # the counter, and a momentum for each weight


def test_checkpoints_call_the_hooks(tmp_path):
    class Counter(_keras_internals.CheckpointHooks, tf.Module):
        def __init__(self, count):
            super().__init__()
            self.count = count

        def _checkpoint_tensors(self):
            return {"count": tf.constant(self.count)}

        def _restore_checkpoint_tensors(self, tensors):
            self.count = int(tensors["count"])

    path = tf.train.Checkpoint(counter=Counter(7)).write(str(tmp_path / "checkpoint"))
    restored = Counter(0)
    tf.train.Checkpoint(counter=restored).read(path).assert_consumed()
    assert restored.count == 7


# Layers and models (used by clipping and rgp).


def test_trained_layers_own_a_trainable_variable():
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(3, name="frozen"),
            keras.layers.ReLU(),
            keras.layers.Dense(1, name="trained"),
        ]
    )
    model.get_layer("frozen").trainable = False
    assert [layer.name for layer in _keras_internals.trained_layers(model)] == ["trained"]
