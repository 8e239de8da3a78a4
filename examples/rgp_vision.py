"""MNIST: gradient perturbation of all weights against low-rank carriers (RGP), at one epsilon.

A wide convolutional network with GroupNormalization has 20 times as many weights as numbers that
carriers of rank 4 release. One configuration a command; each goes on where it was stopped:

    for method in non_private dp_sgd rgp rgp_banded; do
        python examples/rgp_vision.py --output vision --method $method
    done
    python examples/rgp_vision.py --output vision          # table and picture
"""

from __future__ import annotations

import argparse
import pathlib

import configurations
import keras
from mnist import load


def make_model() -> keras.Model:
    """A wide network of 28 x 28 images."""

    def block(filters: int) -> list[keras.layers.Layer]:
        return [
            keras.layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False),
            keras.layers.GroupNormalization(16, scale=False, center=False),
            keras.layers.Activation("relu"),
        ]

    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            *block(64),
            *block(128),
            *block(256),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10),
        ]
    )


def main() -> None:
    """Trains one configuration, or reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    configurations.add_arguments(
        parser,
        epochs=5,
        batch_size=500,
        learning_rate=0.5,
        plain_learning_rate=0.05,
        plain_batch_size=100,
        l2_norm_clip=1.0,
        rank=4,
        epsilon=2.0,
        refresh_every=8,
        carriers_of="updates",
        head_scale=1.0,
    )
    parser.add_argument("--num_train", type=int, default=60_000, help="fewer for a quick look")
    parser.add_argument("--data", type=pathlib.Path, help="x_train, y_train, x_test, y_test")
    options = parser.parse_args()
    if options.method is None:
        configurations.report(options.output, f"MNIST, epsilon = {options.epsilon:g}")
        return
    (x_train, y_train), test = load(options.data)
    configurations.run(
        options,
        make_model,
        lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
        (x_train[: options.num_train], y_train[: options.num_train]),
        test,
    )


if __name__ == "__main__":
    main()
