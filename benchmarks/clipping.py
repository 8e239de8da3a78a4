"""Time of a clipped step over a plain Keras step: `python benchmarks/clipping.py`.

Both steps end in the same SGD update; the clipped one adds no noise and divides the clipped sum by
the batch size. Runs are interleaved, so that a busy machine slows both alike; the table shows
medians and their ratio, with the quartiles of the ratio over pairs of neighbouring runs.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_bandmf.clipping import check_model, clipped_gradients

LIMITS = {"MLP 784-1024-1024-10": 1.25, "CNN 32-64": 1.5}


def mlp():
    """Three dense layers on flat images."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(1024, "relu"),
            layers.Dense(1024, "relu"),
            layers.Dense(10),
        ]
    )


def cnn():
    """Two convolutions, a pooling and two dense layers on images of MNIST's size."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, "relu"),
            layers.Dense(10),
        ]
    )


def steps(model, x, y, jit_compile):
    """(plain step, clipped step), compiled: functions without arguments."""
    optimizer = keras.optimizers.SGD(1e-3)
    optimizer.build(model.trainable_variables)
    variables = model.trainable_variables

    @tf.function(jit_compile=jit_compile)
    def plain(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        return loss

    @tf.function(jit_compile=jit_compile)
    def clipped(x, y):
        found = clipped_gradients(model, x, y, l2_norm_clip=1.0)
        optimizer.apply([s / len(y) for s in found.sums], variables)
        return tf.reduce_mean(found.losses)

    return lambda: plain(x, y).numpy(), lambda: clipped(x, y).numpy()


def compare(build, batch, repeats, jit_compile=False):
    """Seconds of both steps, one pair of columns a repeat: (repeats, 2)."""
    keras.utils.set_random_seed(0)
    model = build()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(batch, *model.input_shape[1:])).astype("float32"))
    y = tf.constant(rng.integers(0, 10, size=batch))
    check_model(model, x, y)
    both = steps(model, x, y, jit_compile)
    for _ in range(3):
        for step in both:
            step()
    times = np.empty((repeats, 2))
    for r in range(repeats):
        for k, step in enumerate(both):
            start = time.perf_counter()
            step()
            times[r, k] = time.perf_counter() - start
    return times


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--jit_compile", action="store_true")
    args = parser.parse_args()
    header = ("model", "plain ms", "clipped ms", "ratio", "quartiles", "at most")
    print("{:<22}{:>10}{:>12}{:>8}{:>14}{:>9}".format(*header))
    for (name, limit), build in zip(LIMITS.items(), (mlp, cnn), strict=True):
        times = compare(build, args.batch, args.repeats, args.jit_compile)
        plain, clipped = np.median(times, axis=0) * 1e3
        low, high = np.percentile(times[:, 1] / times[:, 0], [25, 75])
        print(
            f"{name:<22}{plain:>10.1f}{clipped:>12.1f}{clipped / plain:>8.2f}"
            f"{f'{low:.2f}-{high:.2f}':>14}{limit:>9.2f}"
        )


if __name__ == "__main__":
    main()
