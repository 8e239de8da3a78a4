"""Checks of arguments: what was expected, what was received, and the way out.

A wrong type is a `TypeError`, a wrong value a `ValueError`. NumPy's scalars count as Python's.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, TypeVar

import numpy as np

_Choice = TypeVar("_Choice", bound=str)


class PrivacyError(ValueError):
    """Raised where the stated guarantee would not hold, so that the run must be refused.

    It is a `ValueError`, so that code which catches that keeps working. A slip in an argument that
    has nothing to do with the guarantee is a plain `TypeError` or `ValueError`.

    Example:
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100, batch_size=10, epochs=1, noise_multiplier=1.0, delta=1e-5,
        ...     num_bands=1)
        >>> optimizer = bandmf.BandMFOptimizer("sgd", plan)
        >>> try:
        ...     optimizer.apply([], [])
        ... except bandmf.PrivacyError as error:
        ...     print(str(error).split(",")[0])
        BandMFOptimizer received plain gradients
    """

    # AutoGraph keeps the type of an exception made like this one, and hides that of others.
    __init__ = Exception.__init__


def checked_int(name: str, value: Any, minimum: int = 1, hint: str = "") -> int:
    """Returns `value` as a Python int of at least `minimum`.

    Args:
        name: The argument's name, for the message.
        value: An integer of any library; a bool or a float is not one.
        minimum: The smallest value allowed.
        hint: The way out, appended to the message.

    Returns:
        The value as an `int`.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is below `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(_message(name, f"an integer of at least {minimum}", value, hint))
    if value < minimum:
        raise ValueError(_message(name, f"an integer of at least {minimum}", value, hint))
    return int(value)


def checked_float(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> float:
    """Returns `value` as a finite Python float within the given bounds.

    Args:
        name: The argument's name, for the message.
        value: A real number of any library; a bool, NaN or infinity is refused.
        above: An exclusive lower bound.
        minimum: An inclusive lower bound.
        below: An exclusive upper bound.
        hint: The way out, appended to the message.

    Returns:
        The value as a `float`.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is not finite or out of bounds.
    """
    bounds = [
        f"{words} {bound:g}"
        for words, bound in (("above", above), ("of at least", minimum), ("below", below))
        if bound is not None
    ]
    expected = " ".join(["a finite number", " and ".join(bounds)]).strip()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(_message(name, expected, value, hint))
    try:
        number = float(value)
    except OverflowError:  # an integer or a fraction beyond all floats
        number = math.inf
    if (
        not math.isfinite(number)
        or (above is not None and number <= above)
        or (minimum is not None and number < minimum)
        or (below is not None and number >= below)
    ):
        raise ValueError(_message(name, expected, value, hint))
    return number


def checked_choice(name: str, value: Any, choices: tuple[_Choice, ...], hint: str = "") -> _Choice:
    """Returns `value` if it is one of `choices`.

    Args:
        name: The argument's name, for the message.
        value: The string to check.
        choices: The allowed strings.
        hint: The way out, appended to the message.

    Returns:
        The value.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it is not one of `choices`.
    """
    expected = "one of " + ", ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(_message(name, expected, value, hint))
    for choice in choices:
        if choice == value:
            return choice
    raise ValueError(_message(name, expected, value, hint))


def checked_bool(name: str, value: Any, hint: str = "") -> bool:
    """Returns `value` as a Python bool.

    Args:
        name: The argument's name, for the message.
        value: True or False, Python's or NumPy's; 0 and 1 are refused.
        hint: The way out, appended to the message.

    Returns:
        The value as a `bool`.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(_message(name, "True or False", value, hint))
    return bool(value)


def checked_function(name: str, value: Any, hint: str = "") -> Any:
    """Returns `value` if it can be called, or is None.

    Raises:
        TypeError: If it is anything else.
    """
    if value is not None and not callable(value):
        raise TypeError(_message(name, "a function or None", value, hint))
    return value


def _message(name: str, expected: str, value: Any, hint: str) -> str:
    return f"Expected `{name}` to be {expected}. Received: {name}={value!r}. {hint}".strip()
