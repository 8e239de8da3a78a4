"""Keeps, compares and puts back the variables that a forward pass touches."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf.clipping.passes import traced_pass
from keras_bandmf.clipping.paths.book_keeping import forward
from keras_bandmf.clipping.seeds import seed_generators


class Snapshot:
    """Values of every variable of a model, and of those its forward pass uses without owning.

    Args:
        model: A built model.
        x: The inputs, tensors, of which only shapes and dtypes are used. The forward pass is
            traced once, to see what it captures.

    Attributes:
        untraceable: The error if the pass cannot be traced, or None.

    Raises:
        Refused: If the pass writes, reads or draws what no private pass may (`captures.Watch`).
    """

    def __init__(self, model: keras.Model, x: Any):
        seeds = [generator.state for generator in seed_generators(model)]
        known = [*model.variables, *model.metrics_variables, *seeds]
        owned = {id(v.value): v.path for v in known}
        metrics = {id(v.value) for v in model.metrics_variables}
        found = {id(v.value): v.value for v in known}
        graph = traced_pass(lambda x: forward(model, x), model, x)
        self.untraceable = graph if isinstance(graph, Exception) else None
        if not isinstance(graph, Exception):
            found.update((id(v), v) for v in graph.variables)
        self._variables = list(found.values())
        self._kept = self._values = [v.numpy() for v in self._variables]
        self._trained = {id(v.value) for v in model.trainable_variables}
        self._names = [owned.get(id(v), v.name) for v in self._variables]
        self._seeds = [v for v in self._variables if "seed_generator_state" in v.name]
        self._free = [id(v) in metrics or "seed_generator_state" in v.name for v in self._variables]

    def written(self) -> list[str]:
        """Returns paths of variables, seed generators and metrics apart, that have changed."""
        return [
            name
            for v, value, name, free in zip(
                self._variables, self._values, self._names, self._free, strict=True
            )
            if not free and not np.array_equal(v.numpy(), value)
        ]

    def randomize(self) -> None:
        """Moves every trainable variable; from here on `restore` goes back to these values.

        A kernel that is zero hides from what comes after it what layers before it do.
        """
        random = np.random.default_rng(0)
        self._values = [
            _moved(value, random) if id(v) in self._trained and v.dtype.is_floating else value
            for v, value in zip(self._variables, self._kept, strict=True)
        ]
        self.restore()

    def restore(self) -> None:
        """Puts every variable back, seed generators too: the next pass draws the same masks."""
        for v, value in zip(self._variables, self._values, strict=True):
            v.assign(value)

    def put_back(self) -> None:
        """Puts every variable back to its value before all checks."""
        self._values = self._kept
        self.restore()

    def reseed(self, seed: int) -> None:
        """Gives every seed generator a state that is derived from `seed`."""
        random = np.random.default_rng(seed)
        for v in self._seeds:
            words = random.integers(2**31, size=v.shape)
            v.assign(tf.cast(tf.constant(words), v.dtype))


def _moved(value: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns other values of that size. What has one sign keeps it: it may be under a root."""
    wide = np.asarray(value, np.float64)
    drawn = random.normal(size=wide.shape)
    if np.all(wide > 0) or np.all(wide < 0):
        moved = wide * np.exp(0.3 * drawn)
    else:
        moved = wide + drawn / np.sqrt(max(1, math.prod(wide.shape[:-1])))
    return moved.astype(value.dtype)
