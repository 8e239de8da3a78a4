"""Callbacks for a private `fit`."""

from __future__ import annotations

import keras

from keras_bandmf._checks import checked_float
from keras_bandmf._printed import raised_for_progress
from keras_bandmf.record.ledger import PrivacyLedger

__all__ = ["EpsilonSoFar", "PrivacyLedger", "StopAtEpsilon"]


class EpsilonSoFar(keras.callbacks.Callback):
    """Adds `epsilon`, the epsilon of the steps taken so far in this run, to the logs of each epoch.

    The plan's accountant computes the number. It is rounded up to the digits that Keras's progress
    bar shows. It shows progress and is not a guarantee: earlier runs on the same weights come on
    top of it, and a run that ends early is charged in full. `keras_bandmf.statement` counts all of
    that. `fit` runs it before all other callbacks, wherever it stands in the list, and adds one
    where there is a `keras.callbacks.TensorBoard`.

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


class StopAtEpsilon(keras.callbacks.Callback):
    """Ends `fit` after the last epoch at whose end `plan.epsilon(steps taken)` is within a target.

    The decision depends on the number of steps alone, not on the data, and is made at the end of
    each epoch: training ends if one more epoch would exceed the target. The first epoch always
    runs, and may exceed it by itself. It saves time and not privacy: the plan was fixed in advance,
    and a run that ends early is charged in full, so `keras_bandmf.statement` says the epsilon of
    the whole plan. For a guarantee at the target, make a plan with fewer epochs or more noise.

    Args:
        epsilon: The target, above 0.

    Raises:
        TypeError: `epsilon` is not a number.
        ValueError: It is not finite and above 0.

    Example:
        >>> import keras, numpy as np
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100, batch_size=10, epochs=3, noise_multiplier=2.0, delta=1e-5,
        ...     num_bands=1)
        >>> model = bandmf.privatize(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
        >>> model.compile(bandmf.BandMFOptimizer("sgd", plan), loss="mse")
        >>> history = model.fit(
        ...     plan.batches(np.zeros((100, 3)), np.zeros((100, 1))), epochs=3, verbose=0,
        ...     callbacks=[bandmf.callbacks.StopAtEpsilon(plan.epsilon(20))])
        >>> len(history.epoch)
        2
    """

    def __init__(self, epsilon: float):
        super().__init__()
        self._epsilon = checked_float("epsilon", epsilon, above=0.0)
        self._steps_before = 0

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Notes where the epoch begins."""
        self._steps_before = self.model.optimizer.steps_done

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Ends training if one more epoch would exceed the target."""
        optimizer = self.model.optimizer
        done = optimizer.steps_done
        after = min(2 * done - self._steps_before, optimizer.plan.num_steps)
        if optimizer.plan.epsilon(after) > self._epsilon:
            self.model.stop_training = True


def __dir__() -> list[str]:
    return __all__
