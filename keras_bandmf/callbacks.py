"""Callbacks of a private fit: epsilon so far, the step budget, and which others are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from keras_bandmf._printed import raised_for_progress
from keras_bandmf.optimizers.bandmf import BandMFOptimizer
from keras_bandmf.sampling import PrivateBatches

# They write, save or stop by rules that `check_callbacks` knows.
_KNOWN = (
    keras.callbacks.BackupAndRestore,
    keras.callbacks.CSVLogger,
    keras.callbacks.EarlyStopping,
    keras.callbacks.History,
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.ProgbarLogger,
    keras.callbacks.ReduceLROnPlateau,
    keras.callbacks.TensorBoard,
)


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


class ClippedFraction(keras.callbacks.Callback):
    """Adds the fraction of examples that were clipped to the logs of each epoch.

    Formal guarantees: none. The fraction is computed from the examples without noise, like every
    training metric: the name says so, callbacks may not monitor it, and the statement names it.
    """

    NAME = "clipped_fraction_not_private"

    def __init__(self) -> None:
        super().__init__()
        self.metric = keras.metrics.Mean(name=self.NAME)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Starts a new mean."""
        self.metric.reset_state()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes `logs["clipped_fraction_not_private"]`."""
        if logs is not None:
            logs[self.NAME] = float(self.metric.result())


class StepGuard(keras.callbacks.Callback):
    """Keeps batches and optimizer at the same step, and ends `fit` with the budget.

    It must be the last callback, so that a restore by an earlier one is seen.

    Args:
        optimizer: the optimizer whose counter is the position.
        batches: the batches of the plan, or None for data the plan's declaration covers.
        array_steps: the steps of a pass over arrays that Keras reads from the first row in each
            epoch, else None.
    """

    def __init__(
        self,
        optimizer: BandMFOptimizer,
        batches: PrivateBatches | None,
        array_steps: int | None = None,
    ):
        super().__init__()
        self._optimizer = optimizer
        self._batches = batches
        self._array_steps = array_steps
        self._epoch_start = 0
        self._position: int | None = None
        self._restores = 0

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Moves the batches to the optimizer's step.

        Raises:
            ValueError: if no step is left, the data is not that of the run, the counter moved
                while Keras holds an iterator, worker processes differ, or the last pass over
                arrays was not finished.
        """
        optimizer = self._optimizer
        if optimizer.built:
            optimizer.check_ready(self.model.distribute_strategy.num_replicas_in_sync)
        step = optimizer.steps_done
        if self._array_steps and step % self._array_steps:
            raise ValueError(
                "The last pass over the arrays ended early, and Keras would start again at the "
                "first row: its participations would be closer than the plan declares. Received: "
                f"step {step}, of passes of {self._array_steps} steps. Restore a checkpoint of the "
                "end of an epoch. (`plan.batches` goes on within an epoch.)"
            )
        if self._position is not None:
            self._check_position(step)
        elif self._batches is not None:
            # After any restore: a checkpoint brings its own sampler key.
            state = optimizer.run_state
            self._batches.bind(state.sampler_key)
            state.accept_data(self._batches.digest(), self._batches.seed is not None)
        if self._position is None and optimizer.built:
            self._restores = optimizer.run_state.restores
        if self._batches is not None:
            optimizer.run_state.check_workers()
            self._batches.cursor = step
        self._epoch_start = self._position = step

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Sees steps and restores by a callback before this one, before the next step is made.

        Raises:
            ValueError: if the counter is not where the batches are, or a state was restored.
        """
        self._check_position(self._optimizer.steps_done)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Ends `fit` after the last step of the plan.

        Raises:
            ValueError: if the counter is not where the batches are. The step may then have been
                made with rows of another one, and the run is not private from then on.
        """
        num_steps = self._optimizer.plan.num_steps
        self._position = min(self._epoch_start + batch + 1, num_steps)
        step = self._optimizer.steps_done
        restored = self._optimizer.run_state.restores != self._restores
        if step != self._position and not restored:
            self._optimizer.record.broken = (
                f"a step was made on rows of another one (step {step} at place {self._position})"
            )
        self._check_position(step)
        if step >= num_steps:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Sees a restore by a callback before this one.

        Raises:
            ValueError: if the counter is not where the batches are.
        """
        self._check_position(self._optimizer.steps_done)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Sees a step made by a callback before this one after the last epoch.

        Raises:
            ValueError: if the counter is not where the batches are.
        """
        if self._position is not None:
            self._check_position(self._optimizer.steps_done)

    def _check_position(self, step: int) -> None:
        optimizer = self._optimizer
        restored = optimizer.built and optimizer.run_state.restores != self._restores
        if step != self._position or restored:
            raise ValueError(
                "The optimizer's step changed during `fit` other than by training, which would "
                f"repeat or lose batches. Expected step {self._position}. Received: {step}"
                f"{', of a restored state' if restored else ''}. "
                "Restore checkpoints before `fit`, or at its beginning as BackupAndRestore does."
            )


def flat_callbacks(callbacks: Any) -> list[keras.callbacks.Callback]:
    """Returns the callbacks given to `fit`, out of any nested lists."""
    inner = getattr(callbacks, "callbacks", callbacks)
    if isinstance(inner, (list, tuple)):
        return [callback for part in inner for callback in flat_callbacks(part)]
    return [] if inner is None else [inner]


def unknown_callbacks(callbacks: Iterable[keras.callbacks.Callback]) -> list[str]:
    """Returns the classes of callbacks that are not known to leave the run alone."""
    known = (ClippedFraction, EpsilonSoFar, StepGuard, *_KNOWN)
    return sorted({type(c).__name__ for c in callbacks if type(c) not in known})


def remarks(callbacks: Iterable[keras.callbacks.Callback], monitored: Iterable[str]) -> list[str]:
    """Returns what a statement says of the callbacks of a `fit`: of what they may have acted on.

    Args:
        callbacks: the callbacks of the `fit`.
        monitored: what `check_callbacks` returned for them.
    """
    callbacks = list(callbacks)
    found = [
        f"{each} acted on validation data, which must be public or disjoint from the training data"
        for each in monitored
    ]
    if any(isinstance(callback, keras.callbacks.LearningRateScheduler) for callback in callbacks):
        found.append(
            "LearningRateScheduler called a function of the user: it must be a function of the "
            "epoch alone, and must not have read training metrics or data, which are not private"
        )
    unknown = unknown_callbacks(callbacks)
    if unknown:
        found.append(
            f"callbacks of the user ran: {', '.join(unknown)}; they must not have acted on "
            "training metrics or data, which are not private"
        )
    if any(isinstance(callback, ClippedFraction) for callback in callbacks):
        found.append(
            f"the logs hold {ClippedFraction.NAME}, computed without noise: it must be neither "
            "released nor acted on"
        )
    return found


def log_names(logs: Mapping[str, Any]) -> list[str]:
    """Returns the names in the logs of a step, of inner ones too: Keras flattens them."""
    inner = [value for value in logs.values() if isinstance(value, Mapping)]
    return [*logs, *(name for each in inner for name in log_names(each))]


def refuse_validation_names(names: Iterable[str]) -> None:
    """Refuses training metrics that would pass for metrics of validation data.

    Args:
        names: of metrics and outputs, or of the logs of a training step.

    Raises:
        ValueError: if one begins with `val_`.
    """
    found = sorted({str(name) for name in names if str(name).startswith("val_")})
    if found:
        raise ValueError(
            "Names of metrics and outputs must not begin with 'val_', by which callbacks tell "
            "metrics of validation data: those of training are not private. "
            f"Received: {', '.join(found)}. Rename them."
        )


def check_callbacks(
    callbacks: Iterable[keras.callbacks.Callback], validates: bool = True
) -> list[str]:
    """Refuses callbacks that let a training metric influence the run.

    Formal guarantees:
        Training metrics are computed from examples without noise. A callback known to act on one
        is refused; one that acts on a `val_` metric is allowed and named in the result, for the
        statement to say that validation data must be public or disjoint. Without validation
        data it is refused, and `refuse_validation_names` refuses training metrics of such a name.
        Callbacks of classes unknown to this library cannot be checked.

    Args:
        callbacks: the callbacks given to `fit`.
        validates: whether `fit` is given validation data.

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
        if not validates:
            raise ValueError(
                f"{type(callback).__name__} monitors {monitor!r}, of which there is none without "
                "validation data. Pass `validation_data` that is public or disjoint from the "
                "training data. Received: validation_data=None"
            )
        monitored.append(f"{type(callback).__name__}({monitor})")
    return monitored
