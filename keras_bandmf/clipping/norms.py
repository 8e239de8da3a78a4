"""The clip norms that float32 can guarantee."""

from __future__ import annotations

import math
from typing import Any

from keras_bandmf._checks import PrivacyError, checked_float
from keras_bandmf.clipping.factors import VANISHING

#: Ten times the norm that squares too small for float32 may hide in one variable.
LEAST_CLIP_NORM = 10.0 * math.sqrt(VANISHING)

#: The square of a norm 2^3 times as large is still a float32, and so is a sum of 2^67 gradients.
LARGEST_CLIP_NORM = 2.0**60


def largest_contribution(bound: float, least_norm: float, num_variables: int) -> float:
    """Returns the largest norm of an example's contribution, with what squares may hide.

    Formal guarantees:
        A squared norm is understated by squares below the smallest normal number of float32
        (gradients below 1e-19), and where only one factor of a product is that small: by at most
        `factors.VANISHING` in each variable, because what may lose more is bounded coarsely
        (`Outer.gram`). Understated norms are clipped too little by just that, and what is clipped
        to `bound` has a norm of `least_norm` at least.

    Args:
        bound: The `sensitivity(l2_norm_clip)` of the clipping mode.
        least_norm: The `least_norm(l2_norm_clip)` of the mode.
        num_variables: The number of trainable variables.
    """
    return bound * math.sqrt(1.0 + num_variables * VANISHING / least_norm**2)


def checked_clip_norm(l2_norm_clip: Any) -> float:
    """Returns a clip norm that float32 can hold.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not finite and positive.
        PrivacyError: If it is too small or too large.
    """
    l2_norm_clip = checked_float(
        "l2_norm_clip", l2_norm_clip, above=0.0, hint="It is fixed before training."
    )
    if not LEAST_CLIP_NORM * (1 - 1e-12) <= l2_norm_clip <= LARGEST_CLIP_NORM:
        raise PrivacyError(
            f"Expected `l2_norm_clip` to be from {LEAST_CLIP_NORM:.3g} to "
            f"{LARGEST_CLIP_NORM:.3g}. Outside that range squares of gradients are lost in "
            "float32, and an example could count for more than the clip norm. Scale the loss and "
            "the clip norm by the same factor, and the learning rate by its inverse. "
            f"Received: l2_norm_clip={l2_norm_clip!r}"
        )
    return l2_norm_clip
