"""Checks of what `PrivateBatches` is made of: its schedule, its key, and what may go together."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_bandmf._checks import checked_int
from keras_bandmf.sampling.schedule import Schedule

#: What `repr` of batches says to who gave them to something else than a private `fit`.
WHERE_TO_PASS = (
    "only `fit` of a private model takes them, as x: call `keras_bandmf.privatize(model)` first, "
    "also after loading or cloning it. `evaluate`, `predict` and `validation_data` take arrays"
)

_DATASET_METHODS = frozenset(
    name for name in dir(tf.data.Dataset) if not name.startswith("_") and name != "element_spec"
)


def checked_schedule(schedule: Schedule) -> Schedule:
    """Returns a schedule that batches can be drawn by.

    Args:
        schedule: The schedule of a plan.

    Returns:
        The schedule.

    Raises:
        TypeError: It is not a `Schedule`.
        ValueError: It declares participations that the sampler would exceed.
    """
    if type(schedule) is not Schedule:
        raise TypeError(
            "Expected `schedule` to be the `Schedule` of a plan. Received: "
            f"schedule={schedule!r}. Use `plan.batches(x, y)`, which passes its own."
        )
    schedule.check_own_batches()
    return schedule


def refuse_alone(name: str, value: Any, needed: str, given: Any) -> None:
    """Refuses a number of rows or views without what it counts.

    Args:
        name: The name of the number.
        value: The number; 1 is the default.
        needed: The name of the argument that it needs.
        given: That argument.

    Raises:
        TypeError: The number is no integer.
        ValueError: It is below 1, or it is given and the argument is not.
    """
    if checked_int(name, value) != 1 and given is None:
        raise ValueError(
            f"Expected `{needed}` together with `{name}`. Received: {name}={value!r} and "
            f"{needed}=None."
        )


def refuse_rows_that_count_as_one(schedule: Schedule, unit: Any, augment_copies: int) -> None:
    """Refuses several rows an example where nobody sees to it that they are clipped once.

    Args:
        schedule: The schedule.
        unit: The argument of `PrivateBatches`.
        augment_copies: The argument of `PrivateBatches`.

    Raises:
        ValueError: There may be several rows an example, and the schedule declares participations.
    """
    if schedule.min_separation is not None and (unit is not None or augment_copies != 1):
        raise ValueError(
            "Expected one row for each example, because a schedule that declares participations "
            "may be used in a loop that clips row by row. Received: "
            f"unit of type {type(unit).__name__}, augment_copies={augment_copies!r}. Make the "
            "plan without `min_separation` and `max_participations`."
        )


def missing_attribute(kind: str, name: str) -> AttributeError:
    """Returns the error about an attribute that batches do not have.

    Args:
        kind: The name of their class.
        name: The attribute; for one of `tf.data.Dataset` the error says what to do in its place.
    """
    if name not in _DATASET_METHODS:
        return AttributeError(f"{kind!r} object has no attribute {name!r}")
    return AttributeError(
        f"Private batches have no `.{name}`, because any change of the batches of a plan would "
        "change which examples a step sees, and its privacy statement would no longer hold. "
        f"Received: .{name}. Change the data before `plan.batches` (or with its `preprocess=`), "
        "and the batch size or the number of steps in the plan; `fit` takes a smaller "
        "`steps_per_epoch`."
    )


def checked_key(key: np.ndarray) -> np.ndarray:
    """Returns a copy of a valid key; errors never show its value.

    Args:
        key: (2,) uint64.

    Raises:
        TypeError: It is not an array of uint64.
        ValueError: Its shape is another one, or it is all zeros.
    """
    if not isinstance(key, np.ndarray) or key.dtype != np.uint64:
        received = f"an array of {key.dtype}" if isinstance(key, np.ndarray) else type(key).__name__
        raise TypeError(
            f"Expected `key` to be a NumPy array of two uint64. Received: key is {received}."
        )
    if key.shape != (2,):
        raise ValueError(f"Expected `key` to have the shape (2,). Received: key.shape={key.shape}.")
    if not key.any():
        raise ValueError(
            "Expected `key` to be drawn at random. Received: a key of zeros, such as a variable "
            "that was never initialized holds."
        )
    return key.copy()


def key_from_seed(seed: int) -> np.ndarray:
    """Returns the key of a test.

    Args:
        seed: An integer, at least 0.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is negative.
    """
    seed = checked_int("seed", seed, 0, "None draws a secret key.")
    return np.random.SeedSequence(seed).generate_state(2, np.uint64)
