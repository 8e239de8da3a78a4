"""The gate of the private step: only Keras may call it, for a batch of a private `fit`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_bandmf._checks import PrivacyError
from keras_bandmf.clipping.checks.refusals import refuse_short_products
from keras_bandmf.optimizers.bandmf import BandMFOptimizer


@contextlib.contextmanager
def held(lock: threading.Lock) -> Iterator[None]:
    """Holds a lock, and does not wait for it.

    Raises:
        PrivacyError: If another `fit` holds it.
    """
    if not lock.acquire(blocking=False):
        raise PrivacyError(
            "The model, or its optimizer, is already being trained: a second `fit` would move the "
            "step of the first one away from its batches. Received: a call of `fit` during `fit`, "
            "from a callback or another thread. Call them one after the other."
        )
    try:
        yield
    finally:
        lock.release()


class StepGate(keras.callbacks.Callback):
    """Lets Keras, and nobody else, run the train function once for each batch of a private `fit`.

    Keras announces each batch to the callbacks and then calls the train function. This callback is
    the last one. It opens the gate, and the call closes it again.

    Formal guarantees:
        The function that `guarded` returns checks in Python at every call, not when it is traced,
        that a private `fit` has just announced a batch. So `model.train_function` (also if it was
        taken out during a `fit` and is called later) and `keras.Model.fit(model, ...)` raise before
        a gradient is computed; so does a callback that calls them during a `fit`. `check_running`
        refuses to run or trace the step elsewhere, so a `tf.function` of the user cannot hold it.
        The optimizer accepts gradients only during such a call. Each call also reads the settings
        of the process that make float32 products shorter (`refuse_short_products`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._fit: tuple[BandMFOptimizer, str] | None = None
        self._is_open = False
        self._is_running = False
        self._thread: int | None = None

    @contextlib.contextmanager
    def during_fit(self, optimizer: BandMFOptimizer, source: str) -> Iterator[None]:
        """Accepts announcements during a private `fit` on the batches named by `source`."""
        previous, self._fit = self._fit, (optimizer, source)
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._fit, self._is_open = previous, False

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Opens the gate for one call of the train function."""
        self._is_open = self._fit is not None

    def guarded(self, function: Callable) -> Callable:
        """Returns a train function that runs `function` only while the gate is open."""

        def train_function(iterator: Any) -> Any:
            elsewhere = self._thread != threading.get_ident()
            if self._fit is None or not self._is_open or elsewhere:
                raise PrivacyError(
                    "The private step runs once for each batch of `model.fit(plan.batches(x, y))` "
                    "of the private model. Received: a call from elsewhere (`train_function`, "
                    "`keras.Model.fit(model, ...)`, a callback), whose data is not accounted for."
                )
            self._is_open = False
            optimizer, source = self._fit
            optimizer.check_process()
            # Kernels of a graph read these settings when they run, long after it was traced.
            refuse_short_products()
            self._is_running = True
            try:
                with optimizer.accepting(source):
                    return function(iterator)
            finally:
                self._is_running = False

        return train_function

    def check_running(self) -> None:
        """Refuses a step that is run or traced outside a call of the guarded train function.

        Raises:
            PrivacyError: If no such call is in progress.
        """
        if not self._is_running:
            raise PrivacyError(
                "The sampling of a single step is not accounted for: this run trains on batches of "
                "its plan. Received: a call of `train_step`, or of a function that contains it, "
                "outside a private `fit`. Call `model.fit(plan.batches(x, y))` instead."
            )
