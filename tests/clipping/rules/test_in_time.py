"""Passes through a sequence: gradients through outputs and last states, and shapes not known."""

import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf.clipping.rules.gated_cells import GRUCell, LSTMCell, SimpleCell
from keras_bandmf.clipping.rules.in_time import Retraced, in_time, unrolled

TIME, ROWS, WIDTH, UNITS = 6, 4, 3, 2
# Keras's cell, the cell of the rule, the number of gates and of states.
KINDS = (
    (layers.LSTMCell, LSTMCell, 4, 2),
    (layers.GRUCell, GRUCell, 3, 1),
    (layers.SimpleRNNCell, SimpleCell, 1, 1),
)


def pieces(kind):
    """A cell, what the inputs add at each point in time, and first states: float64."""
    of_keras, of_rule, gates, count = kind
    inner = of_keras(UNITS, dtype="float64")
    inner.build((None, WIDTH))
    random = np.random.default_rng(0)
    for v in inner.trainable_variables:
        v.assign(random.normal(size=v.shape))
    draws = [random.normal(size=(ROWS, UNITS)) for _ in range(count)]
    return of_rule(inner, None), random.normal(size=(TIME, ROWS, gates * UNITS)), draws


def gradients(run, cell, mask, projected, states):
    """Of a function of all that a pass returns and has a gradient: hidden and last states, both."""
    with tf.GradientTape() as tape:
        tape.watch([projected, *states])
        passed = run(cell, mask, projected, states)
        value = tf.reduce_sum(tf.sin(passed.hidden))
        value += tf.add_n([tf.reduce_sum((i + 2.0) * s**2) for i, s in enumerate(passed.states)])
    return tape.gradient(value, [projected, *states]), passed.previous


def mask_of(name):
    masks = {"none": None, "random": np.random.default_rng(1).random((TIME, ROWS)) < 0.5}
    masks["never"], masks["last"] = np.zeros((TIME, ROWS), bool), np.arange(TIME)[:, None] == 5
    return None if masks[name] is None else tf.constant(np.broadcast_to(masks[name], (TIME, ROWS)))


@pytest.mark.parametrize("mask", ["none", "random", "never", "last"])
@pytest.mark.parametrize("kind", KINDS, ids=["lstm", "gru", "simple"])
def test_written_derivatives_are_those_of_the_tape(kind, mask):
    """Through the outputs and the last states at once, of which the first is the last output."""
    cell, projected, states = pieces(kind)
    arguments = mask_of(mask), tf.constant(projected), [tf.constant(s) for s in states]
    expected, previous = gradients(unrolled, cell, *arguments)
    retraced = Retraced(lambda x, states: cell.forward(x, states)[0])
    for other in (cell, retraced):
        found, before = gradients(in_time, other, *arguments)
        np.testing.assert_array_equal(before, previous)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.max(np.abs(b)))


@pytest.mark.parametrize("shape", [(ROWS, UNITS), (None, UNITS), (None, None)])
@pytest.mark.parametrize("kind", KINDS, ids=["lstm", "gru", "simple"])
def test_first_states_of_a_shape_that_is_not_known(kind, shape):
    cell, projected, states = pieces(kind)
    arguments = mask_of("random"), tf.constant(projected), [tf.constant(s) for s in states]
    expected, _ = gradients(in_time, cell, *arguments)
    specs = [tf.TensorSpec(shape, tf.float64)] * len(states)

    @tf.function(autograph=False, input_signature=[specs])
    def run(states):
        return gradients(in_time, cell, arguments[0], arguments[1], states)[0]

    for a, b in zip(run(arguments[2]), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.max(np.abs(b)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", KINDS, ids=["lstm", "gru", "simple"])
def test_rows_do_not_reach_each_other(kind, bad):
    """A row that is not finite, masked or not, leaves every bit of the others."""
    cell, projected, states = pieces(kind)
    arguments = mask_of("random"), tf.constant(projected), [tf.constant(s) for s in states]
    expected, _ = gradients(in_time, cell, *arguments)
    projected[:, 1] = bad
    states[0][1] = bad
    arguments = arguments[0], tf.constant(projected), [tf.constant(s) for s in states]
    found, _ = gradients(in_time, cell, *arguments)
    for a, b, axis in zip(found, expected, [1, 0, 0], strict=False):
        a, b = (np.delete(t, 1, axis=axis) for t in (a, b))
        np.testing.assert_array_equal(a, b)
