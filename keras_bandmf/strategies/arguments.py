"""Checks of arguments that the strategies share, and the values that those arguments may take."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from keras_bandmf._checks import checked_bool, checked_choice, checked_int

#: How the errors of the steps become one number: their mean, or the largest of them.
ErrorMeasure = Literal["mean", "max"]
ERRORS: tuple[str, ...] = get_args(ErrorMeasure)
# The most entries of C where each column is stored: 16 GiB of float64 in the search.
MAX_ENTRIES = 10**8
MAX_MATERIALIZED_STEPS = 10_000


def check_bands(num_bands: int, num_steps: int) -> None:
    """Raises a `ValueError` if there are more bands than steps."""
    if num_bands > num_steps:
        raise ValueError(
            "Expected at most as many bands as steps. Received: "
            f"num_bands={num_bands}, num_steps={num_steps}. Use at most {num_steps} bands."
        )


def check_shape(num_steps: int, num_bands: int, num_curvatures: int = 1) -> None:
    """Refuses more bands than steps, and more entries of C than memory can hold.

    Args:
      num_steps: n.
      num_bands: b.
      num_curvatures: those of the workload: each has its own share of the memory.

    Raises:
      ValueError: if b is above n, or the product of all above `MAX_ENTRIES`.
    """
    check_bands(num_bands, num_steps)
    if num_curvatures > 1 and num_steps * num_bands * num_curvatures > MAX_ENTRIES:
        raise ValueError(
            "Expected num_steps * num_bands * the number of curvatures to be at most "
            f"{MAX_ENTRIES}. Received: num_steps={num_steps}, num_bands={num_bands}, a workload "
            f"with {num_curvatures} curvatures. Use fewer of them, or fewer bands."
        )
    if num_steps * num_bands > MAX_ENTRIES:
        raise ValueError(
            "Expected num_steps * num_bands to be at most "
            f"{MAX_ENTRIES} entries, for a `BandedStrategy` or for a `workload`. "
            f"Received: num_steps={num_steps}, num_bands={num_bands}. Use fewer bands, or a "
            "`ToeplitzStrategy` for prefix sums."
        )


def check_materialized(num_steps: int) -> None:
    """Raises a `ValueError` if a dense C would have too many columns."""
    if num_steps > MAX_MATERIALIZED_STEPS:
        raise ValueError(
            f"Expected at most {MAX_MATERIALIZED_STEPS} steps, since a dense C is an (n, n) "
            f"matrix. Received: num_steps={num_steps}. Use fewer steps; `noise_rows()` and "
            "`tail_scale()` define C^-1 of a banded strategy for any number of steps."
        )


def reduced(errors: np.ndarray, error: str) -> float:
    """Returns the mean of the errors if `error` is "mean", else the largest of them."""
    return float(np.mean(errors) if error == "mean" else np.max(errors))


def participation_schema(
    max_participations: object, min_separation: object, fixed_order: object = False
) -> tuple[int, int, bool]:
    """Returns the checked participation schema of a sensitivity.

    Args:
      max_participations: the most steps in which an example takes part.
      min_separation: the least distance, in steps, between two of them. None is allowed only for
        one participation, where there is no such distance.
      fixed_order: whether it is the exact distance instead of the least one.

    Returns:
      The three values, the separation as an int.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if an argument is out of its range.
    """
    count = checked_int("max_participations", max_participations)
    fixed_order = checked_bool("fixed_order", fixed_order)
    if min_separation is None:
        if count > 1:
            raise ValueError(
                "Expected `min_separation` to be an integer when an example takes part more than "
                f"once. Received: max_participations={count}, min_separation=None. "
                "Pass the least number of steps between two participations."
            )
        return count, 1, fixed_order
    return count, checked_int("min_separation", min_separation), fixed_order


def config_of(
    config: object, class_name: str, fields: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Returns `config` if it is a dict of that class with exactly those keys.

    Args:
      config: what was received.
      class_name: the expected value of its "class_name".
      fields: the other keys that it must have.
      optional: the keys that it may have.

    Returns:
      The dict.

    Raises:
      ValueError: if it is anything else.
    """
    expected = {"class_name", *fields}
    if not isinstance(config, dict) or set(config) - set(optional) != expected:
        received = sorted(map(str, config)) if isinstance(config, dict) else config
        raise ValueError(
            f"Expected the config of a {class_name} to be a dict with the keys "
            f"{sorted(expected)}. Received: config with {received!r}. Pass what `get_config()` "
            "returned."
        )
    checked_choice("class_name", config["class_name"], (class_name,))
    return config
