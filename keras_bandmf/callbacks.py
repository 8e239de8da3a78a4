"""Callbacks of a private fit: epsilon so far, the step budget, and which others are refused."""

from __future__ import annotations

from collections.abc import Iterable

import keras

from keras_bandmf.optimizers import BandMFOptimizer
from keras_bandmf.sampling import PrivateBatches


class EpsilonSoFar(keras.callbacks.Callback):
    """Adds `epsilon`, the privacy spent so far, to the logs of each epoch.

    The number is that of the plan's accountant for the steps taken. It may be charged for an
    unfinished run only if the number of steps was fixed in advance.
    """

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes `logs["epsilon"]`."""
        if logs is not None:
            optimizer = self.model.optimizer
            logs["epsilon"] = optimizer.plan.epsilon(steps_done(optimizer))


class StepGuard(keras.callbacks.Callback):
    """Keeps batches and optimizer at the same step, and ends `fit` with the budget.

    It must be the last callback, so that a restore by an earlier one is seen.

    Args:
        optimizer: the optimizer whose counter is the position.
        batches: the batches of the plan, or None for data the plan's declaration covers.
    """

    def __init__(self, optimizer: BandMFOptimizer, batches: PrivateBatches | None):
        super().__init__()
        self._optimizer = optimizer
        self._batches = batches
        self._position: int | None = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Moves the batches to the optimizer's step.

        Raises:
            ValueError: if no step is left, or the counter moved while Keras holds an iterator.
        """
        step = steps_done(self._optimizer)
        if step >= self._optimizer.plan.num_steps:
            raise ValueError(self._optimizer.budget_message())
        if self._batches is None:
            return
        if self._position is None:
            # After any restore: a checkpoint brings its own sampler key.
            self._batches.bind(self._optimizer.run_state.sampler_key)
        elif self._position != step:
            raise ValueError(
                "The optimizer's step changed between two epochs of one `fit`, which would repeat "
                f"or lose batches. Expected step {self._position}. Received: {step}. Restore "
                "checkpoints before `fit`, or at its beginning as BackupAndRestore does."
            )
        self._batches.cursor = step

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Remembers where the iterator stands."""
        self._position = steps_done(self._optimizer)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Ends `fit` after the last step of the plan."""
        if steps_done(self._optimizer) >= self._optimizer.plan.num_steps:
            self.model.stop_training = True


def steps_done(optimizer: BandMFOptimizer) -> int:
    """Returns the number of updates made, also under a distribution strategy."""
    return int(keras.ops.convert_to_numpy(optimizer.iterations))


def check_callbacks(callbacks: Iterable[keras.callbacks.Callback]) -> list[str]:
    """Refuses callbacks that let a training metric influence the run.

    Formal guarantees:
        Training metrics are computed from examples without noise. A callback known to act on one
        is refused; one that acts on a `val_` metric is allowed and named in the result, for the
        statement to say that validation data must be public or disjoint. Callbacks of classes
        unknown to this library cannot be checked.

    Args:
        callbacks: the callbacks given to `fit`.

    Returns:
        The monitored validation metrics.

    Raises:
        ValueError: naming the callback and what to do.
    """
    monitored = []
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.TerminateOnNaN):
            raise ValueError(
                "TerminateOnNaN acts on the training loss, which is not private. Remove it: an "
                "example with a non-finite gradient contributes zero."
            )
        acts = isinstance(
            callback, (keras.callbacks.EarlyStopping, keras.callbacks.ReduceLROnPlateau)
        ) or (isinstance(callback, keras.callbacks.ModelCheckpoint) and callback.save_best_only)
        if not acts:
            continue
        monitor = getattr(callback, "monitor", None)
        if not str(monitor).startswith("val_"):
            raise ValueError(
                f"{type(callback).__name__} must monitor a metric of validation data that is "
                "public or disjoint from the training data, such as monitor='val_loss': training "
                f"metrics are not private. Received: monitor={monitor!r}"
            )
        monitored.append(f"{type(callback).__name__}({monitor})")
    return monitored
