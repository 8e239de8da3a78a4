"""DP-SGD against BandMF on images: a small convolutional network, trained from scratch.

    python examples/convolutions.py --data mnist.npz --output convolutions --epsilon 1

`--data` is a file of the layout of `mnist.npz`, with images of 28 x 28, or 32 x 32 x 3. The former
get the network of mnist.py, the latter that of Papernot et al. ("Tempered Sigmoid Activations for
Deep Learning with Differential Privacy", 2021), with six convolutions and tanh. `--augment_copies`
shows as many shifted and mirrored views of each example in a step (mirrored only if in color); it
is for the private mechanisms alone. See tuned.py for how the mechanisms are tuned.
"""

from __future__ import annotations

import argparse
import pathlib

import tuned  # first, for it imports `quiet`

import keras
import mnist
import numpy as np
import tensorflow as tf

import keras_bandmf as bandmf

HELD_OUT = 5_000
MOMENTUM = 0.9


def make_model(shape: tuple[int, int, int]) -> keras.Model:
    """The network for images of a shape."""
    if shape[-1] == 1:
        return mnist.make_model()
    layers = [keras.Input(shape)]
    for filters in (32, 64, 128):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", activation="tanh"),
            keras.layers.Conv2D(filters, 3, padding="same", activation="tanh"),
            keras.layers.AveragePooling2D(2),
        ]
    layers += [
        keras.layers.Flatten(),
        keras.layers.Dense(128, activation="tanh"),
        keras.layers.Dense(10),
    ]
    return keras.Sequential(layers)


def load(path: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images in [-0.5, 0.5] and labels: to train, to choose learning rates, and to test."""
    with np.load(path) as file:
        parts = {}
        for part in ("train", "test"):
            images = (file[f"x_{part}"] / np.float32(255.0) - np.float32(0.5)).astype("float32")
            images = images[..., None] if images.ndim == 3 else images
            parts[part] = images, file[f"y_{part}"].astype("int32").ravel()
    x, y = parts["train"]
    return {
        "train": (x[:-HELD_OUT], y[:-HELD_OUT]),
        "held out": (x[-HELD_OUT:], y[-HELD_OUT:]),
        "test": parts["test"],
    }


def view(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """The image, moved by up to two pixels (four in color, which may also be mirrored)."""
    by = 4 if image.shape[-1] == 3 else 2
    padded = tf.pad(image, [[by, by], [by, by], [0, 0]], "REFLECT")
    moved = tf.image.stateless_random_crop(padded, image.shape, seed)
    if image.shape[-1] == 1:
        return moved
    return tf.image.stateless_random_flip_left_right(moved, seed + 1)


def main(arguments: list[str] | None = None) -> None:
    """Tunes, trains, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tuned.add_arguments(
        parser,
        epsilon=3.0,
        batch_size=500,
        epochs=6,
        l2_norm_clip=1.0,
        rates=[0.125, 0.25, 0.5, 1.0],
        plain_rates=[0.02, 0.05, 0.1, 0.2],
    )
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--augment_copies", type=int, default=0)
    options = parser.parse_args(arguments)
    data = load(options.data)
    shape = data["train"][0].shape[1:]

    def train(
        mechanism: tuned.Mechanism, plan: bandmf.TrainingPlan | None, rate: float
    ) -> keras.Model:
        model = make_model(shape)
        optimizer = keras.optimizers.SGD(rate, momentum=MOMENTUM)
        if plan is None:
            rows = {
                "x": data["train"][0],
                "y": data["train"][1],
                "batch_size": options.batch_size,
            }
        else:
            model = bandmf.privatize(model)
            optimizer = bandmf.BandMFOptimizer(optimizer, plan, options.l2_norm_clip)
            views = {"augment": view, "augment_copies": options.augment_copies}
            rows = {"x": plan.batches(*data["train"], **(views if options.augment_copies else {}))}
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
        model.fit(**rows, epochs=options.epochs, verbose=0)
        return model

    copies = f"-{options.augment_copies}" if options.augment_copies else ""
    task = tuned.Task(
        options.data.stem + copies,
        data,
        train,
        len(data["train"][1]),
        tuned.accuracy,
        workload=keras.optimizers.SGD(1.0, momentum=MOMENTUM),
    )
    tuned.compare(options, task, tuned.mechanisms(options))


if __name__ == "__main__":
    main()
