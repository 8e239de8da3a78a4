"""Checks of arguments shared by the strategies."""

from __future__ import annotations

import numbers

# Entries of C where each column is worked with: 16 GiB of float64 in the search.
MAX_ENTRIES = 10**8


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


def check_gain(gain: object) -> None:
    """Refuses a `gain` that is not a float above 0 and below 1.

    Raises:
      ValueError: it is not.
    """
    if isinstance(gain, bool) or not isinstance(gain, float) or not 0.0 < gain < 1.0:
        raise ValueError(
            "`gain` must be a float above 0 and below 1. "
            f"Received: gain={gain!r}. Use 1e-9, the default, or more for a shorter search."
        )


def check_callback(callback: object) -> None:
    """Refuses a `callback` that is neither callable nor None.

    Raises:
      ValueError: it is not.
    """
    if callback is not None and not callable(callback):
        raise ValueError(
            "`callback` must be a function of one argument, or None. "
            f"Received: callback={callback!r}. Pass a function that takes a `Progress`."
        )


def check_seconds(name: str, value: object) -> None:
    """Refuses a time that is not a number of seconds, not negative.

    Raises:
      ValueError: it is not.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not value >= 0:
        raise ValueError(
            f"`{name}` must be a number that is not negative. Received: {name}={value!r}. Pass "
            "seconds."
        )


def check_bands(num_bands: int, num_steps: int) -> None:
    """Refuses more bands than steps, by a `ValueError`."""
    if num_bands > num_steps:
        raise ValueError(
            "A strategy cannot have more bands than steps. Received: "
            f"num_bands={num_bands}, num_steps={num_steps}. Use at most {num_steps} bands."
        )


def check_shape(num_steps: int, num_bands: int) -> None:
    """Refuses more bands than steps, and more entries than can be worked with one by one.

    Args:
      num_steps: n.
      num_bands: b.

    Raises:
      ValueError: b is above n, or n b above `MAX_ENTRIES`.
    """
    check_bands(num_bands, num_steps)
    if num_steps * num_bands > MAX_ENTRIES:
        raise ValueError(
            f"A banded strategy, or one for a `workload`, has at most {MAX_ENTRIES} entries. "
            f"Received: num_steps={num_steps}, num_bands={num_bands}. Use fewer bands, or a "
            "`ToeplitzStrategy` for prefix sums."
        )


def participation_schema(
    max_participations: object, min_separation: object, fixed_order: object = False
) -> tuple[int, int, bool]:
    """Returns the participation schema of a sensitivity, checked.

    Args:
      max_participations: most steps an example takes part in.
      min_separation: least distance, in steps, between two of them; None only for one
        participation, where it means nothing.
      fixed_order: whether it is the distance, not the least one.

    Returns:
      The three, the separation as an int.

    Raises:
      ValueError: an argument is out of its range.
    """
    count = positive_integer("max_participations", max_participations)
    boolean("fixed_order", fixed_order)
    if min_separation is None:
        if count > 1:
            raise ValueError(
                "`min_separation` must be given when an example takes part more than once. "
                f"Received: max_participations={count}, min_separation=None. "
                "Pass the least number of steps between two participations."
            )
        return count, 1, fixed_order
    return count, positive_integer("min_separation", min_separation), fixed_order


def config_of(
    config: object, class_name: str, fields: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict:
    """Returns `config` if it is a strategy's: a dict of that class with exactly those keys.

    Args:
      config: what was received.
      class_name: the value of its "class_name".
      fields: the other keys that must be there.
      optional: keys that may be there.

    Returns:
      The dict.

    Raises:
      ValueError: anything else.
    """
    expected = {"class_name", *fields}
    if not isinstance(config, dict) or set(config) - set(optional) != expected:
        received = sorted(map(str, config)) if isinstance(config, dict) else config
        raise ValueError(
            f"The config of a {class_name} must be a dict with the keys {sorted(expected)}. "
            f"Received: config with {received!r}. Pass what `get_config()` returned."
        )
    choice("class_name", config["class_name"], (class_name,))
    return config
