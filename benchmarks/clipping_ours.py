"""Plain and clipped steps in this library, for `clipping.py`: one task a process.

Both end in the same SGD update; the clipped one adds no noise and divides the clipped sum by the
batch size. Keras updates only the rows of a table that were read; a private step cannot, since the
noise has every row. "dense" is the plain step with the table's gradient written out.
"""

from __future__ import annotations

import sys

import clipping_models as models
import keras
import tensorflow as tf
from clipping_measure import Sizes, Step, answer, data

from keras_bandmf.clipping import check_model, clipped_gradients


def _tensors(name: str, batch: int, sizes: Sizes) -> tuple:
    return keras.tree.map_structure(tf.constant, data(name, batch, sizes))


def plain(name: str, batch: int, sizes: Sizes, dense: bool = False) -> Step:
    """The step of `fit`: forward, backward, update."""
    model, (x, y) = models.compiled(name, sizes), _tensors(name, batch, sizes)
    variables = model.trainable_variables
    model.optimizer.build(variables)

    @tf.function(autograph=False)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        gradients = tape.gradient(loss, [v.value for v in variables])
        if dense:
            gradients = [tf.convert_to_tensor(g) for g in gradients]
        model.optimizer.apply(gradients, variables)
        return loss

    return lambda: step(x, y).numpy()


def plain_dense(name: str, batch: int, sizes: Sizes) -> Step:
    """`plain` with every gradient written out."""
    return plain(name, batch, sizes, dense=True)


def clipped(name: str, batch: int, sizes: Sizes) -> Step:
    """Per-example clipping, then the update."""
    model, (x, y) = models.compiled(name, sizes), _tensors(name, batch, sizes)
    variables = model.trainable_variables
    model.optimizer.build(variables)
    check_model(model, x, y)

    @tf.function(autograph=False)
    def step(x, y):
        found = clipped_gradients(model, x, y, l2_norm_clip=1.0)
        model.optimizer.apply([s / batch for s in found.sums], variables)
        return tf.reduce_mean(found.losses)

    return lambda: step(x, y).numpy()


STEPS = {"plain": plain, "dense": plain_dense, "clipped": clipped}

if __name__ == "__main__":
    answer(STEPS, sys.argv[1])
