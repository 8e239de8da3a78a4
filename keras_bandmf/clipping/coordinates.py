"""In which coordinates the gradient of a variable is clipped, summed and released.

By default in its own: one number for each weight. A variable may carry others, such as those of
RGP's low-rank carriers; clipped sums then hold a vector of these in place of the gradient.
"""

from __future__ import annotations

from typing import Any, Protocol

import keras
import tensorflow as tf

_ATTRIBUTE = "_keras_bandmf_coordinates"


class Coordinates(Protocol):
    """What clipping needs to know of coordinates.

    Attributes:
        shape: of the released vector, fixed for the run.
    """

    shape: tuple[int, ...]

    def of(self, gradient: tf.Tensor) -> tf.Tensor:
        """The coordinates of a gradient: linear in it, and no function of the data beside."""


def set_coordinates(variable: keras.Variable, coordinates: Coordinates | None) -> None:
    """Puts coordinates on a variable; None goes back to its own."""
    if coordinates is None:
        vars(variable).pop(_ATTRIBUTE, None)
    else:
        object.__setattr__(variable, _ATTRIBUTE, coordinates)


def coordinates_of(variable: Any) -> Any:
    """The coordinates on a variable, or None if they are its own."""
    return getattr(variable, _ATTRIBUTE, None)


def released_shape(variable: keras.Variable) -> tuple[int, ...]:
    """Shape of the entry of a variable in a clipped sum."""
    coordinates = coordinates_of(variable)
    return tuple(variable.shape if coordinates is None else coordinates.shape)


def released(variable: keras.Variable, gradient: tf.Tensor) -> tf.Tensor:
    """A gradient of a variable's shape, in the coordinates in which it is released."""
    coordinates = coordinates_of(variable)
    return gradient if coordinates is None else coordinates.of(gradient)
