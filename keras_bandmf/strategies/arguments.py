"""Checks of arguments shared by the strategies."""

from __future__ import annotations

import numbers


def positive_integer(name: str, value: object) -> int:
    """Returns `value` as an int if it is an integer (Python's or NumPy's) of at least 1.

    Args:
      name: the argument's name, for the message.
      value: what was received; bools and floats with integral values are refused.

    Returns:
      The int.

    Raises:
      ValueError: anything else.
    """
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integral or value < 1:
        raise ValueError(
            f"`{name}` must be an integer of at least 1. Received: {name}={value!r} of type "
            f"{type(value).__name__}. Pass a positive int."
        )
    return int(value)


def choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    """Returns `value` if it is one of the `allowed` strings.

    Args:
      name: the argument's name, for the message.
      value: what was received.
      allowed: the strings that are understood.

    Returns:
      The string.

    Raises:
      ValueError: anything else.
    """
    if not isinstance(value, str) or value not in allowed:
        options = " or ".join(repr(option) for option in allowed)
        raise ValueError(
            f"`{name}` must be {options}. Received: {name}={value!r}. Pass one of these."
        )
    return value


def boolean(name: str, value: object) -> bool:
    """Returns `value` if it is True or False.

    Args:
      name: the argument's name, for the message.
      value: what was received.

    Returns:
      The bool.

    Raises:
      ValueError: anything else, also 0, 1 and NumPy's bools.
    """
    if not isinstance(value, bool):
        raise ValueError(
            f"`{name}` must be True or False. Received: {name}={value!r} of type "
            f"{type(value).__name__}. Pass a bool."
        )
    return value
