"""Workarounds for faults of Keras, on one model instance and for the duration of a `fit`.

Each has a test that fails when Keras no longer needs the workaround.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf import _distribution
from keras_bandmf._keras_internals import attributes_without_build_in_fit


@contextlib.contextmanager
def worked_around(model: keras.Model, symbolic_build: bool) -> Iterator[None]:
    """Replaces, for the duration of a `fit`, what fails in Keras.

    Args:
        model: The model, built.
        symbolic_build: False where Keras's symbolic build fails: it can read neither batches that
            are dicts with a mask, nor any batch of several worker processes.
    """
    load = model.load_weights
    replaced: dict[str, Any] = {
        "load_weights": lambda *args, **kwargs: _load_readable(load, *args, **kwargs)
    }
    if not symbolic_build:
        replaced |= attributes_without_build_in_fit()
    if _distribution.is_multi_worker(model.distribute_strategy):
        step = model.test_step
        replaced["test_step"] = lambda data: reducible_logs(model, step(data))
        model.test_function = None
    previous = {name: model.__dict__[name] for name in replaced if name in model.__dict__}
    for name, replacement in replaced.items():
        setattr(model, name, replacement)
    try:
        yield
    finally:
        for name in replaced:
            del model.__dict__[name]
        model.__dict__.update(previous)
        if "test_step" in replaced:
            model.test_function = None


def _load_readable(load: Callable, *args: Any, **kwargs: Any) -> Any:
    """Loads weights, and raises OSError for a damaged file, whatever h5py raises.

    `BackupAndRestore(double_checkpoint=True)` falls back to the previous file upon OSError only. A
    job that was killed while it saved would otherwise never start again.
    """
    try:
        return load(*args, **kwargs)
    except (RuntimeError, KeyError) as error:
        damage = str(error)
    # Not `from error`: what the error refers to keeps the file open, and HDF5 would take the next
    # file of this name for the damaged one.
    gc.collect()
    raise OSError(f"The weights cannot be read because the file is damaged: {damage}")


def reducible_logs(model: keras.Model, logs: dict[str, Any]) -> dict[str, Any]:
    """Adds to logs the axis over which Keras averages them when there are several workers."""
    if not _distribution.is_multi_worker(model.distribute_strategy):
        return logs
    return keras.tree.map_structure(lambda value: tf.reshape(value, [1]), logs)
