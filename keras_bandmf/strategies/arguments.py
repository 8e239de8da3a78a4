"""Checks of arguments shared by the strategies."""

from __future__ import annotations

from keras_bandmf._checks import checked_bool, checked_choice, checked_int

# Entries of C where each column is worked with: 16 GiB of float64 in the search.
MAX_ENTRIES = 10**8


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
    count = checked_int("max_participations", max_participations)
    fixed_order = checked_bool("fixed_order", fixed_order)
    if min_separation is None:
        if count > 1:
            raise ValueError(
                "`min_separation` must be given when an example takes part more than once. "
                f"Received: max_participations={count}, min_separation=None. "
                "Pass the least number of steps between two participations."
            )
        return count, 1, fixed_order
    return count, checked_int("min_separation", min_separation), fixed_order


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
    checked_choice("class_name", config["class_name"], (class_name,))
    return config
