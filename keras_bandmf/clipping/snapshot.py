"""The variables a forward pass touches: kept, compared, put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf


class Snapshot:
    """Values of every variable of a model, and of those its forward pass uses without owning.

    Args:
        model: built.
        run: a training forward pass; traced once, to see which variables it captures.
    """

    def __init__(self, model: keras.Model, run: Callable[[], Any]):
        owned = {id(v.value): v.path for v in [*model.variables, *model.metrics_variables]}
        metrics = {id(v.value) for v in model.metrics_variables}
        found = {id(v.value): v.value for v in [*model.variables, *model.metrics_variables]}
        found.update((id(v), v) for v in _captured(run))
        self._variables = list(found.values())
        self._values = [v.numpy() for v in self._variables]
        self._names = [owned.get(id(v), v.name) for v in self._variables]
        self._seeds = [v for v in self._variables if "seed_generator_state" in v.name]
        self._free = [id(v) in metrics or "seed_generator_state" in v.name for v in self._variables]

    def written(self) -> list[str]:
        """Paths of variables, seed generators and metrics apart, that have changed."""
        return [
            name
            for v, value, name, free in zip(
                self._variables, self._values, self._names, self._free, strict=True
            )
            if not free and not np.array_equal(v.numpy(), value)
        ]

    def restore(self) -> None:
        """Put every variable back, seed generators included: the next pass draws the same masks."""
        for v, value in zip(self._variables, self._values, strict=True):
            v.assign(value)

    def reseed(self, seed: int) -> None:
        """Give every seed generator a state that follows from `seed`."""
        random = np.random.default_rng(seed)
        for v in self._seeds:
            words = random.integers(2**31, size=v.shape)
            v.assign(tf.cast(tf.constant(words), v.dtype))


def _captured(run: Callable[[], Any]) -> list[tf.Variable]:
    try:
        return list(tf.function(run, autograph=False).get_concrete_function().graph.variables)
    except Exception:  # a model that runs only eagerly: its own variables will have to do
        return []
