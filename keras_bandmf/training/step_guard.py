"""The callback that keeps batches, noise and budget at the same step."""

from __future__ import annotations

import keras

from keras_bandmf._checks import PrivacyError
from keras_bandmf.optimizers import BandMFOptimizer
from keras_bandmf.sampling import PrivateBatches


class StepGuard(keras.callbacks.Callback):
    """Keeps batches and optimizer at the same step, and ends `fit` with the budget.

    It comes after the user's callbacks, so that it detects a restore by one of them.

    Args:
        optimizer: The optimizer whose step counter is the position.
        batches: The batches of the plan. None for the user's own data, whose participations the
            plan declares.
        array_steps: The steps of a pass over arrays that Keras reads from the first row in each
            epoch. None for other data.
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
            PrivacyError: If no step is left, the data is not that of the run, the counter moved
                while Keras holds an iterator, worker processes differ, or the last pass over
                arrays was not finished.
        """
        optimizer = self._optimizer
        if optimizer.built:
            optimizer.check_ready(self.model.distribute_strategy.num_replicas_in_sync)
        step = optimizer.steps_done
        if self._array_steps and step % self._array_steps:
            raise PrivacyError(
                "The last pass over the arrays ended early, and Keras would start again at the "
                "first row: its participations would be closer together than the plan declares. "
                f"Received: step {step}, with passes of {self._array_steps} steps. Restore a "
                "checkpoint from the end of an epoch, or use `plan.batches`, which can continue "
                "within an epoch."
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
        """Detects, before the next step, steps and restores by a callback before this one.

        Raises:
            PrivacyError: If the counter is not where the batches are, or a state was restored.
        """
        self._check_position(self._optimizer.steps_done)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Ends `fit` after the last step of the plan.

        Raises:
            PrivacyError: If the counter is not where the batches are. The step may then have been
                made with the rows of another one, and the run is not private from then on.
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
        """Detects a restore by a callback that ran before this one.

        Raises:
            PrivacyError: If the counter is not where the batches are.
        """
        self._check_position(self._optimizer.steps_done)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Detects a step that a callback before this one made after the last epoch.

        Raises:
            PrivacyError: If the counter is not where the batches are.
        """
        if self._position is not None:
            self._check_position(self._optimizer.steps_done)

    def _check_position(self, step: int) -> None:
        optimizer = self._optimizer
        restored = optimizer.built and optimizer.run_state.restores != self._restores
        if step != self._position or restored:
            raise PrivacyError(
                "The optimizer's step changed during `fit` by something other than training, which "
                f"would repeat or skip batches. Expected step {self._position}. Received: {step}"
                f"{', of a restored state' if restored else ''}. "
                "Restore checkpoints before `fit`, or at its beginning as BackupAndRestore does."
            )
