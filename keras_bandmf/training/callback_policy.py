"""Which callbacks a private `fit` accepts, and what the statement says about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from keras_bandmf._checks import PrivacyError
from keras_bandmf.callbacks import EpsilonSoFar, PrivacyLedger, StopAtEpsilon
from keras_bandmf.clipping.clipped import ClippedGradients
from keras_bandmf.record.ledger import ONE_OF_SEVERAL
from keras_bandmf.training import keras_tuner
from keras_bandmf.training.step_guard import StepGuard

#: What `fit` takes as callbacks: one, a list that may hold lists, or a `CallbackList`.
Callbacks: TypeAlias = keras.callbacks.Callback | Sequence[Any] | None

# They write, save, or stop by rules that `check_callbacks` knows.
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


class ClippedFraction(keras.callbacks.Callback):
    """Adds the fraction of examples that were clipped to the logs of each epoch.

    Formal guarantees:
        None. Like every training metric, the fraction is computed from the examples without noise:
        the name says so, callbacks may not monitor it, and the statement names it.
    """

    NAME = "clipped_fraction_not_private"

    def __init__(self) -> None:
        super().__init__()
        self.metric = keras.metrics.Mean(name=self.NAME)

    def note(self, clipped: ClippedGradients) -> None:
        """Counts the examples of a step."""
        was_clipped = tf.boolean_mask(clipped.was_clipped, clipped.example_mask)
        self.metric.update_state(tf.cast(was_clipped, tf.float32))

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Starts a new average."""
        self.metric.reset_state()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Sets `logs["clipped_fraction_not_private"]`."""
        if logs is not None:
            logs[self.NAME] = float(self.metric.result())


def flat_callbacks(callbacks: Callbacks) -> list[keras.callbacks.Callback]:
    """Returns the callbacks given to `fit` as a flat list, however they are nested.

    Raises:
        TypeError: If one is no callback.
    """
    inner = getattr(callbacks, "callbacks", callbacks)
    if isinstance(inner, (list, tuple)):
        return [callback for part in inner for callback in flat_callbacks(part)]
    if inner is None:
        return []
    if isinstance(inner, type) or not hasattr(inner, "set_model"):
        what = "the class " + inner.__name__ if isinstance(inner, type) else repr(inner)
        raise TypeError(
            "Expected `callbacks` to hold instances of keras.callbacks.Callback. Received: "
            f"{what}. Use for example `callbacks=[keras.callbacks.CSVLogger('log.csv')]`."
        )
    return [inner]


def with_epsilon(callbacks: list[keras.callbacks.Callback]) -> list[keras.callbacks.Callback]:
    """Returns the callbacks with `EpsilonSoFar` first, so that all others find it in the logs.

    Where there is a TensorBoard and no `EpsilonSoFar`, one is added.
    """
    first = [c for c in callbacks if isinstance(c, EpsilonSoFar)]
    rest = [c for c in callbacks if not isinstance(c, EpsilonSoFar)]
    if not first and any(isinstance(c, keras.callbacks.TensorBoard) for c in rest):
        first = [EpsilonSoFar()]
    return [*first, *rest]


def unknown_callbacks(callbacks: Iterable[keras.callbacks.Callback]) -> list[str]:
    """Returns the class names of callbacks that are not known to leave the run alone."""
    known = (ClippedFraction, EpsilonSoFar, PrivacyLedger, StepGuard, StopAtEpsilon, *_KNOWN)
    others = (c for c in callbacks if type(c) not in known and not keras_tuner.is_known(c))
    return sorted({type(c).__name__ for c in others})


def remarks(callbacks: Iterable[keras.callbacks.Callback], monitored: Iterable[str]) -> list[str]:
    """Returns what a statement says about the callbacks of a `fit`.

    Args:
        callbacks: The callbacks of the `fit`.
        monitored: What `check_callbacks` returned for them.

    Returns:
        Caveats: what the callbacks may have acted on, and what they must not have acted on.
    """
    callbacks = list(callbacks)
    found = [
        f"{each} acted on validation data, which must be public or disjoint from the training data"
        for each in monitored
    ]
    found += keras_tuner.remarks(callbacks)
    if any(isinstance(callback, PrivacyLedger) for callback in callbacks):
        found.append(ONE_OF_SEVERAL)
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
    """Returns the names in the logs of a step. Those of nested dicts count, as in Keras."""
    inner = [value for value in logs.values() if isinstance(value, Mapping)]
    return [*logs, *(name for each in inner for name in log_names(each))]


def refuse_validation_names(names: Iterable[str]) -> None:
    """Refuses training metrics that would pass for metrics of validation data.

    Args:
        names: The names of metrics and outputs, or of the logs of a training step.

    Raises:
        ValueError: If one begins with `val_`.
    """
    found = sorted({str(name) for name in names if str(name).startswith("val_")})
    if found:
        raise ValueError(
            "Names of metrics and outputs must not begin with 'val_': callbacks recognize metrics "
            "of validation data by that prefix, and metrics of training data are not private. "
            f"Received: {', '.join(found)}. Rename them."
        )


def check_callbacks(
    callbacks: Iterable[keras.callbacks.Callback], validates: bool = True
) -> list[str]:
    """Refuses callbacks that let a training metric influence the run.

    Formal guarantees:
        Training metrics are computed from examples without noise. A callback known to act on one
        is refused. A callback that acts on a `val_` metric is allowed, and named in the result so
        that the statement can say that validation data must be public or disjoint. Without
        validation data it is refused, and `refuse_validation_names` refuses training metrics with
        such a name. Callbacks of classes unknown to this library cannot be checked.

    Args:
        callbacks: The callbacks given to `fit`.
        validates: Whether `fit` is given validation data.

    Returns:
        The callbacks that act on validation metrics, as "EarlyStopping(val_loss)".

    Raises:
        PrivacyError: If a callback acts on a training metric.
        ValueError: If a callback monitors validation data that is not given.
    """
    callbacks = list(callbacks)
    monitored = keras_tuner.check(callbacks, validates)
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.TerminateOnNaN):
            raise PrivacyError(
                "TerminateOnNaN acts on the training loss, which is not private. Remove it: an "
                "example with a non-finite gradient contributes zero anyway."
            )
        acts = isinstance(
            callback, (keras.callbacks.EarlyStopping, keras.callbacks.ReduceLROnPlateau)
        ) or (isinstance(callback, keras.callbacks.ModelCheckpoint) and callback.save_best_only)
        if not acts:
            continue
        monitor = getattr(callback, "monitor", None)
        if not str(monitor).startswith("val_"):
            raise PrivacyError(
                f"{type(callback).__name__} must monitor a metric of validation data that is "
                "public or disjoint from the training data, such as monitor='val_loss': training "
                f"metrics are not private. Received: monitor={monitor!r}"
            )
        if not validates:
            raise ValueError(
                f"{type(callback).__name__} monitors {monitor!r}, which does not exist without "
                "validation data. Pass `validation_data` that is public or disjoint from the "
                "training data. Received: validation_data=None"
            )
        monitored.append(f"{type(callback).__name__}({monitor})")
    return monitored
