"""Callbacks for a private `fit`."""

from __future__ import annotations

import keras

from keras_bandmf._printed import raised_for_progress

__all__ = ["EpsilonSoFar"]


class EpsilonSoFar(keras.callbacks.Callback):
    """Adds `epsilon`, what the steps of this run have spent so far, to the logs of each epoch.

    The number is that of the plan's accountant for the steps taken, rounded up to what Keras's
    progress bar shows of it. It shows progress and is no guarantee: earlier runs on the same
    weights come on top, and a run that ends early is charged in full. `keras_bandmf.statement`
    counts all of it.
    """

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes `logs["epsilon"]`."""
        if logs is not None:
            optimizer = self.model.optimizer
            epsilon = optimizer.plan.epsilon(optimizer.steps_done)
            logs["epsilon"] = raised_for_progress(epsilon)


def __dir__() -> list[str]:
    return __all__
