"""The coordinates in which the gradient of a variable is clipped, summed and released.

By default in its own: one number for each weight. A variable may carry others, such as those of
RGP's low-rank carriers; clipped sums then hold a vector of these in place of the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

_ATTRIBUTE = "_keras_bandmf_coordinates"


class Coordinates(Protocol):
    """The coordinates of one variable's gradient over a run: clipping, noise, and back.

    Clipping needs `shape` and `of`; the optimizer needs the rest. What is released in a step is
    the clipped sum plus noise in these coordinates.

    Formal guarantees: whatever implements this must have `of` linear in the gradient, fixed before
    the batch of a step is drawn, and a function of nothing but the weights after noisy steps, of
    public values and of a key of its own.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is released, fixed for the run."""

    @property
    def description(self) -> list[Any]:
        """What must be equal for a checkpoint to fit, as JSON."""

    def of(self, gradient: tf.Tensor) -> tf.Tensor:
        """Returns the coordinates of a gradient: linear in it, and no function of the data."""

    def reconstruct(self, coordinates: tf.Tensor) -> tf.Tensor:
        """Returns the gradient, in the variable's shape, from noisy coordinates."""

    def start(self, kernel: keras.Variable, key: np.ndarray, index: int) -> None:
        """Begins a run.

        Args:
            kernel: The variable.
            key: Shape (2,), uint64, of all coordinates of the run.
            index: The number of the variable among those of the run.
        """

    def refresh(self, kernel: keras.Variable, step: tf.Tensor, replica: int) -> None:
        """Moves the coordinates after a step if they are due, in a replica context.

        Args:
            kernel: The variable, after the update.
            step: Scalar int64, the number of steps made so far.
            replica: The replica in whose context this is called.
        """

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns the state, to be saved with the run."""

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes over what `to_arrays` returned."""


def set_coordinates(variable: keras.Variable, coordinates: Coordinates | None) -> None:
    """Puts coordinates on a variable; None goes back to the variable's own."""
    if coordinates is None:
        vars(variable).pop(_ATTRIBUTE, None)
    else:
        # Bypasses Keras's attribute tracking.
        object.__setattr__(variable, _ATTRIBUTE, coordinates)


def coordinates_of(variable: Any) -> Coordinates | None:
    """Returns the coordinates on a variable, or None if they are the variable's own."""
    return getattr(variable, _ATTRIBUTE, None)


def released_shape(variable: keras.Variable) -> tuple[int, ...]:
    """Returns the shape of a variable's entry in a clipped sum."""
    coordinates = coordinates_of(variable)
    return tuple(variable.shape if coordinates is None else coordinates.shape)


def released(variable: keras.Variable, gradient: tf.Tensor) -> tf.Tensor:
    """Returns a gradient in the coordinates in which it is released."""
    coordinates = coordinates_of(variable)
    return gradient if coordinates is None else coordinates.of(gradient)
