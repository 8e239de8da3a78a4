"""Steps of TF Privacy's vectorized clipping on the same Keras models, for `clipping.py`.

For an environment with `tensorflow-privacy`, `tf_keras` (whose optimizers it derives from) and
`keras-hub`. Its noise is drawn with a standard deviation of zero.
"""

from __future__ import annotations

import os
import sys

os.environ["TF_USE_LEGACY_KERAS"] = "1"
# Else vectorized products of rank 3 end the process on some CPUs.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
sys.skip_tf_privacy_import = True  # its __init__ does not import with TensorFlow 2.16 and later

import clipping_models as models
import keras
import tensorflow as tf
from clipping_measure import Sizes, Step, answer, data


def _step(name: str, batch: int, sizes: Sizes, optimizer, rows: bool) -> Step:
    model = models.compiled(name, sizes)
    x, y = keras.tree.map_structure(tf.constant, data(name, batch, sizes))
    variables = [v.value for v in model.trainable_variables]
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="none" if rows else "sum_over_batch_size"
    )

    @tf.function(autograph=False)
    def step(x, y):
        with tf.GradientTape() as tape:
            losses = loss(y, model(x, training=True))
        found = optimizer._compute_gradients(losses, variables, tape=tape)
        optimizer.apply_gradients(found)
        return tf.reduce_mean(losses)

    return lambda: step(x, y).numpy()


def plain(name: str, batch: int, sizes: Sizes) -> Step:
    """Forward, backward, update by the optimizer that TF Privacy's derives from."""
    return _step(name, batch, sizes, tf.keras.optimizers.legacy.SGD(1e-3), rows=False)


def clipped(name: str, batch: int, sizes: Sizes) -> Step:
    """The same with TF Privacy's vectorized optimizer."""
    from tensorflow_privacy.privacy.optimizers import dp_optimizer_keras_vectorized as vectorized

    optimizer = vectorized.VectorizedDPKerasSGDOptimizer(
        l2_norm_clip=1.0, noise_multiplier=0.0, learning_rate=1e-3
    )
    return _step(name, batch, sizes, optimizer, rows=True)


STEPS = {"plain": plain, "clipped": clipped}

if __name__ == "__main__":
    answer(STEPS, sys.argv[1])
