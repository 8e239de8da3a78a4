"""Passes through a sequence, with gradients that cost less than TensorFlow's own of a loop.

TensorFlow's keeps every tensor of every step and adds up the gradients of the weights in each.
Here a cell says what it keeps of a step, and how it goes back through the step with that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import tensorflow as tf

from keras_bandmf.clipping.shapes import dims, over_rows

States: TypeAlias = "tuple[tf.Tensor, ...]"
# So many points in time may share an iteration, if the length is a multiple.
_TOGETHER = (8, 7, 6, 5, 4, 3, 2, 1)


class Cell(Protocol):
    """One point in time, forward and back.

    Its weights are constant. What the inputs add to the pre-activations is computed before, for
    all points in time.
    """

    def forward(self, x: tf.Tensor, states: States) -> tuple[States, list[tf.Tensor]]:
        """Returns the states after the step, of which the first is the output, and what is kept.

        A loop takes longer the more tensors it carries: better one than several.

        Args:
            x: What the inputs add.
            states: The states before the step, each (batch, ...).
        """

    def kept(self, x: tf.TensorSpec, states: Sequence[tf.TensorSpec]) -> list[tf.TensorSpec]:
        """Returns the shapes and dtypes of what `forward` keeps, given those of its arguments."""

    def backward(self, kept: list[tf.Tensor], slopes: States) -> tuple[tf.Tensor, States]:
        """Returns the gradients by `x` and by the states before the step.

        Args:
            kept: What `forward` kept.
            slopes: The gradients by the states after the step.
        """


class Retraced:
    """Any cell: it keeps its inputs, and runs the step once more on the way back.

    Args:
        step: (x, states) -> states.
    """

    def __init__(self, step: Callable[[tf.Tensor, States], States]):
        self.step = step

    def forward(self, x: tf.Tensor, states: States) -> tuple[States, list[tf.Tensor]]:
        """Returns the states after the step, and its inputs."""
        return self.step(x, states), [x, *states]

    def kept(self, x: tf.TensorSpec, states: Sequence[tf.TensorSpec]) -> list[tf.TensorSpec]:
        """Returns those of the inputs."""
        return [x, *states]

    def backward(self, kept: list[tf.Tensor], slopes: States) -> tuple[tf.Tensor, States]:
        """Returns the gradients that a tape finds."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(kept)
            after = self.step(kept[0], tuple(kept[1:]))
        zero = tf.UnconnectedGradients.ZERO
        of_x, *of_states = tape.gradient(
            after, kept, output_gradients=list(slopes), unconnected_gradients=zero
        )
        return of_x, tuple(of_states)


class Passed(NamedTuple):
    """A pass through a sequence; time is axis 0.

    Attributes:
        hidden: The first state after each point in time.
        states: All states after the last one.
        previous: The first state before each point in time, without a gradient.
    """

    hidden: tf.Tensor
    states: States
    previous: tf.Tensor


def in_time(
    cell: Cell, mask: tf.Tensor | None, projected: tf.Tensor, states: Sequence[tf.Tensor]
) -> Passed:
    """Runs a cell over axis 0.

    Args:
        cell: One point in time.
        mask: Shape (time, batch), bool: where False, the states stay. None: everywhere True.
        projected: Shape (time, batch, ...): what the inputs add.
        states: The first states, each (batch, ...).
    """
    count = dims(projected)[0]
    of_one = tf.TensorSpec(projected.shape[1:], projected.dtype)
    of_states = [tf.TensorSpec(s.shape, s.dtype) for s in states]
    previous: list[tf.Tensor] = []

    @tf.custom_gradient
    def run(projected: tf.Tensor, *states: tf.Tensor) -> Any:
        inputs = _array(of_one, count).unstack(projected)

        def forward(t: tf.Tensor, before: Any, kept: list, *states: tf.Tensor) -> tuple:
            new, keeps = cell.forward(inputs.read(t), states)
            kept = [a.write(t, k) for a, k in zip(kept, keeps, strict=True)]
            return (t + 1, before.write(t, states[0]), kept, *_valid(mask, t, new, states))

        before = _array(of_states[0], count)
        kept = [_array(spec, count) for spec in cell.kept(of_one, of_states)]
        _, before, kept, *last = _loop(forward, count, before, kept, *states)
        previous[:] = [before.stack()]

        def gradient(of_hidden: tf.Tensor, *slopes: tf.Tensor) -> tuple:
            of_outputs = _array(of_states[0], count).unstack(of_hidden)

            def backward(i: tf.Tensor, written: tf.TensorArray, *slopes: tf.Tensor) -> tuple:
                t = count - 1 - i
                slopes = (slopes[0] + of_outputs.read(t), *slopes[1:])
                keeps = [a.read(t) for a in kept]
                if mask is None:
                    of_x, through = cell.backward(keeps, slopes)
                else:
                    zeros = tuple(map(tf.zeros_like, slopes))
                    of_x, through = cell.backward(keeps, _valid(mask, t, slopes, zeros))
                    through = tuple(map(tf.add, through, _valid(mask, t, zeros, slopes)))
                return (i + 1, written.write(t, of_x), *through)

            written = _array(of_one, count)
            _, written, *through = _loop(backward, count, written, *slopes)
            return (written.stack(), *through)

        hidden = tf.concat([previous[0][1:], last[0][None]], axis=0)
        return (hidden, *last), gradient

    hidden, *last = run(projected, *states)
    return Passed(hidden, tuple(last), tf.stop_gradient(previous[0]))


def unrolled(
    cell: Cell, mask: tf.Tensor | None, projected: tf.Tensor, states: Sequence[tf.Tensor]
) -> Passed:
    """Returns what `in_time` returns, with every step in the graph; the length must be known."""
    current, before, hidden = tuple(states), [], []
    for t in range(projected.shape[0]):
        before.append(current[0])
        current = _valid(mask, t, cell.forward(projected[t], current)[0], current)
        hidden.append(current[0])
    return Passed(tf.stack(hidden), current, tf.stop_gradient(tf.stack(before)))


def _valid(mask: tf.Tensor | None, t: Any, new: States, old: States) -> States:
    """Returns new values where the mask is True at time t, else old ones."""
    if mask is None:
        return new
    valid = over_rows(mask[t], old[0])
    return tuple(tf.where(valid, n, o) for n, o in zip(new, old, strict=True))


def _array(of_one: tf.TensorSpec, count: Any) -> tf.TensorArray:
    dtype, shape = of_one.dtype, of_one.shape
    return tf.TensorArray(dtype, count, element_shape=shape, clear_after_read=False)


def _loop(body: Callable[..., tuple], count: Any, *variables: Any) -> tuple:
    """Calls `body` with 0, 1 and so on up to `count`, and what it returned."""
    known = count if isinstance(count, int) else 1
    # An iteration costs as much as the few operations of a step.
    together = next(k for k in _TOGETHER if known % k == 0)

    def several(*variables: Any) -> tuple:
        for _ in range(together):
            variables = body(*variables)
        return variables

    return tf.while_loop(
        lambda t, *_: t < count,
        several,
        (tf.constant(0), *variables),
        maximum_iterations=count // together,
        parallel_iterations=1,
    )
