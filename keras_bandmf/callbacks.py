"""Callbacks for a private `fit`."""

from __future__ import annotations

import keras

from keras_bandmf._printed import raised_for_progress

__all__ = ["EpsilonSoFar"]


class EpsilonSoFar(keras.callbacks.Callback):
    """Adds `epsilon`, the epsilon of the steps taken so far in this run, to the logs of each epoch.

    The plan's accountant computes the number. It is rounded up to the digits that Keras's progress
    bar shows. It shows progress and is not a guarantee: earlier runs on the same weights come on
    top of it, and a run that ends early is charged in full. `keras_bandmf.statement` counts all of
    that.

    Example:
        >>> import keras, numpy as np
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100, batch_size=10, epochs=2, noise_multiplier=2.0, delta=1e-5,
        ...     num_bands=1)
        >>> model = bandmf.privatize(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
        >>> model.compile(bandmf.BandMFOptimizer("sgd", plan), loss="mse")
        >>> history = model.fit(
        ...     plan.batches(np.zeros((100, 3)), np.zeros((100, 1))), epochs=2, verbose=0,
        ...     callbacks=[bandmf.callbacks.EpsilonSoFar()])
        >>> first, second = history.history["epsilon"]
        >>> 0 < first < second
        True
        >>> plan.epsilon() <= second <= plan.epsilon() + 1e-4
        True
    """

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Sets `logs["epsilon"]`."""
        if logs is not None:
            optimizer = self.model.optimizer
            epsilon = optimizer.plan.epsilon(optimizer.steps_done)
            logs["epsilon"] = raised_for_progress(epsilon)


def __dir__() -> list[str]:
    return __all__
