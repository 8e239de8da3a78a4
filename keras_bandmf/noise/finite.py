"""The price in privacy of a finite number of random bits."""

from __future__ import annotations

import math

from keras_bandmf._checks import PrivacyError
from keras_bandmf.noise.normals import RADIUS_BITS

#: The share of a plan's delta that is set aside for the noise: epsilon is computed at the rest.
DELTA_SHARE = 1e-3


def tail_total_variation(num_values: float) -> float:
    """Returns the cost of cut tails, as a total variation distance over all values of a run.

    Formal guarantees:
        The radius of a pair of normals comes from 88 bits, so it ends at 11.1 sigma. Larger ones
        have probability 2^-88.9, and so does the smallest of the cells of its distribution. A row
        is beyond the range of the ring's int32 with probability below 2^-110 a value. Noise whose
        tail goes on differs from this one with at most the probability returned, whatever the
        data. At epsilon it adds (1 + e^epsilon) times that to delta: both neighbors are cut.

    Args:
        num_values: The number of coordinates times the number of steps.

    Returns:
        `num_values * 2^-88`, rounded up.

    Example:
        >>> f"{tail_total_variation(1e7 * 1e4):.2g}"
        '3.2e-16'
    """
    return num_values * 2.0**-RADIUS_BITS * (1.0 + 1e-9)


def affords_tail(tail: float, delta: float, epsilon: float) -> bool:
    """Returns whether `DELTA_SHARE` of delta pays for the noise's tail at an epsilon.

    Args:
        tail: The cost of the tail, of all runs together, as a total variation distance.
        delta: The delta of the plan; of several runs, the sum of theirs.
        epsilon: The epsilon of the steps that are charged, of all runs together. It may be
            infinite.
    """
    return tail * (1.0 + math.exp(min(epsilon, 700.0))) <= DELTA_SHARE * delta


def check_tail(num_values: float, delta: float) -> None:
    """Refuses a run whose delta cannot pay for the noise's tail, however small its epsilon.

    Args:
        num_values: The number of coordinates times the number of steps.
        delta: The delta of the plan.

    Raises:
        PrivacyError: If the charge is above `DELTA_SHARE` of `delta`.
    """
    tail = tail_total_variation(num_values)
    if not affords_tail(tail, delta, 0.0):
        charge = 2 * tail
        raise PrivacyError(
            "The noise has tails of finite length, which cost "
            f"{charge:.3g} of delta over all coordinates and steps: more than {DELTA_SHARE:g} of "
            f"it. Received: delta={delta:g} and {num_values:.3g} noise values. Use a larger "
            "delta, fewer steps, or fewer trained variables."
        )
