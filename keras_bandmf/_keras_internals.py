"""The private names of Keras and TensorFlow that the library uses. No other file names one.

A private name can change in any release, so `tests/test_keras_internals.py` has a test for each
function, and a newer Keras than the tested ones is reported when this module is imported.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

#: The newest version of Keras that the tests run on: major and minor.
NEWEST_TESTED_KERAS = (3, 15)


def warn_if_untested(version: str) -> None:
    """Warns if a version of Keras is newer than the newest one that the tests run on.

    Args:
        version: The version of Keras, such as "3.15.1" or "3.16.0.dev2026010103".
    """
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if release > NEWEST_TESTED_KERAS:
        newest = ".".join(map(str, NEWEST_TESTED_KERAS))
        warnings.warn(
            f"keras_bandmf is tested with Keras up to {newest}, and uses private names of Keras "
            f"that may have changed since. Received: Keras {version}. Install a tested version, "
            "or run `python -m pytest tests/test_keras_internals.py` of keras_bandmf first.",
            stacklevel=2,
        )


warn_if_untested(keras.__version__)


# Distribution and compilation (used by the shared ground and noise).


def in_multi_worker_mode(distribution: tf.distribute.Strategy) -> bool:
    """Returns whether a (multi-worker) mirrored strategy runs in several worker processes."""
    return bool(distribution.extended._in_multi_worker_mode())


def inside_xla_program() -> bool:
    """Returns whether the graph that is being traced, or one around it, is compiled by XLA."""
    graph = tf.compat.v1.get_default_graph()
    return bool(control_flow_util.GraphOrParentsInXlaContext(graph))


# Training (used by optimizers and training).


def build_model(model: keras.Model, data_batch: Any) -> None:
    """Builds a compiled model with its metrics, loss and optimizer, without running it.

    Args:
        model: The model.
        data_batch: `(x, y, sample_weight)` of `keras.KerasTensor`s; the last two may be None.
    """
    model._symbolic_build(data_batch=data_batch)


def attributes_without_build_in_fit() -> dict[str, Callable[..., None]]:
    """Returns what to set on a model so that `fit` does not build it from its first batch."""
    return {"_maybe_symbolic_build": lambda *args, **kwargs: None}


def optimized_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Returns the variables of the model that an optimizer was built with, in their order."""
    return optimizer._trainable_variables


def own_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Returns the variables that the base class of an optimizer keeps, such as its counter.

    `optimizer.variables` is the public name. This one is for a class that overrides it.
    """
    return optimizer._variables


class CheckpointHooks:
    """A base class whose two methods are called when `tf.train.Checkpoint` saves and restores.

    It comes first among the base classes, before that of TensorFlow or Keras.
    """

    def _checkpoint_tensors(self) -> dict[str, tf.Tensor]:
        """Returns the tensors to save. A SavedModel calls it while a graph is traced."""
        raise NotImplementedError

    def _restore_checkpoint_tensors(self, tensors: Mapping[str, tf.Tensor]) -> None:
        """Takes over the tensors that `_checkpoint_tensors` returned in an earlier process."""
        raise NotImplementedError

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return self._checkpoint_tensors()

    def _restore_from_tensors(self, restored_tensors: Mapping[str, tf.Tensor]) -> None:
        self._restore_checkpoint_tensors(restored_tensors)


# Layers and models (used by clipping and rgp).


def trained_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Layers that own a trainable variable of `model`: the only ones that cost anything."""
    trainable = {id(v) for v in model.trainable_variables}
    return [
        layer
        for layer in model._flatten_layers()
        if any(id(v) in trainable for v in layer._trainable_variables)
    ]


def all_layers(layer: keras.layers.Layer, include_self: bool = True) -> list[keras.layers.Layer]:
    """Returns a layer or model and every layer inside it, at any depth, each once."""
    return list(layer._flatten_layers(include_self=include_self))


def own_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns all variables that a layer made itself, those of its inner layers left out."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]
