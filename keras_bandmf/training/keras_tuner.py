"""What a private `fit` asks of KerasTuner: a ledger of all trials, and a choice by public data.

KerasTuner itself is not imported: its callbacks are recognized by the package of their class.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from keras_bandmf._checks import PrivacyError
from keras_bandmf.callbacks import PrivacyLedger

# Of an objective that the user leaves out: `HyperModel.fit` returns the value to choose by.
_RETURNED = "default_objective"


def is_known(callback: Any) -> bool:
    """Returns whether a callback is KerasTuner's own, and runs no code of the user."""
    return _is_own(callback) and _is_own(getattr(callback, "tuner", callback))


def check(callbacks: Iterable[Any], validates: bool) -> list[str]:
    """Refuses a search whose price would not be counted, or that chooses by a training metric.

    Formal guarantees:
        Where a callback of KerasTuner shows that this `fit` is a trial, there is a `PrivacyLedger`,
        and every metric that trials and epochs are chosen by is one of validation data. A `fit`
        that a tuner runs without its callbacks is not recognized.

    Args:
        callbacks: The callbacks of the `fit`.
        validates: Whether it is given validation data.

    Returns:
        What acts on validation metrics, as "KerasTuner(val_loss)".

    Raises:
        PrivacyError: There is no ledger, or a metric is of training data.
        ValueError: There is no validation data.
    """
    callbacks = list(callbacks)
    if not any(_is_own(callback) for callback in callbacks):
        return []
    if not any(isinstance(callback, PrivacyLedger) for callback in callbacks):
        raise _ending(
            PrivacyError,
            "Every trial of KerasTuner trains on the private data, and all of them together cost "
            "more than the one that is chosen. Received: a search without a PrivacyLedger. Use "
            "`ledger = keras_bandmf.callbacks.PrivacyLedger(folder)`, then "
            "`tuner.search(..., callbacks=[ledger])`, and print `ledger.statement()`.",
        )
    names = _objectives(callbacks)
    for name in names:
        if not name.startswith("val_"):
            raise _ending(
                PrivacyError,
                "KerasTuner must choose by a metric of validation data that is public or disjoint "
                "from the training data, such as objective='val_loss': training metrics are not "
                f"private. Received: objective={name!r}",
            )
    if names and not validates:
        raise _ending(
            ValueError,
            f"KerasTuner chooses by {names[0]!r}, which does not exist without validation data. "
            "Pass `validation_data` to `tuner.search` that is public or disjoint from the training "
            "data. Received: validation_data=None",
        )
    return [f"KerasTuner({name})" for name in names]


def remarks(callbacks: Iterable[Any]) -> list[str]:
    """Returns what a statement says of a choice that cannot be looked at."""
    callbacks = list(callbacks)
    if not any(_is_own(callback) for callback in callbacks) or _objectives(callbacks):
        return []
    return [
        "KerasTuner chose by a value that code of the user returned: it must not have been "
        "computed from training metrics or data, which are not private"
    ]


def _ending(kind: type[Exception], message: str) -> Exception:
    """Returns an error that ends the search: after others KerasTuner goes on with a new trial."""
    fatal = getattr(sys.modules.get("keras_tuner.errors"), "FatalError", None)
    if fatal is None:
        return kind(message)
    return type(kind.__name__, (kind, fatal), {})(message)


def _is_own(value: Any) -> bool:
    return type(value).__module__.split(".")[0] in ("keras_tuner", "kerastuner")


def _objectives(callbacks: Iterable[Any]) -> list[str]:
    """Returns the names of the metrics that the callbacks of KerasTuner choose by."""
    found = []
    for callback in callbacks:
        tuner = getattr(callback, "tuner", None)
        holders = [callback, getattr(tuner, "oracle", None)] if _is_own(callback) else []
        for holder in holders:
            objective = getattr(holder, "objective", None)
            found += [each.name for each in getattr(objective, "objectives", [objective]) if each]
    return [name for name in dict.fromkeys(found) if name != _RETURNED]
