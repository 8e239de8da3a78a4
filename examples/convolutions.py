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
import tensorflow as tf


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
    data = tuned.parts(*mnist.load(options.data))
    copies = options.augment_copies
    task = tuned.classification(
        options,
        options.data.stem + (f"-{copies}" if copies else ""),
        data,
        lambda: make_model(data["train"][0].shape[1:]),
        **({"augment": view, "augment_copies": copies} if copies else {}),
    )
    tuned.compare(options, task, tuned.mechanisms(options))


if __name__ == "__main__":
    main()
