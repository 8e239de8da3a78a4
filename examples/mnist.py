"""The comparison of quickstart.py on MNIST with a small convolutional network.

    python examples/mnist.py

Fetches MNIST through `keras.datasets.mnist`; `--data mnist.npz` reads a file of the same layout.
"""

from __future__ import annotations

import argparse
import pathlib

import quiet  # noqa: F401 - first

import keras
import numpy as np

import comparison


def make_model() -> keras.Model:
    """Two convolutions, 26 thousand parameters."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(16, 8, strides=2, padding="same", activation="tanh"),
            keras.layers.MaxPooling2D(2, strides=1),
            keras.layers.Conv2D(32, 4, strides=2, activation="tanh"),
            keras.layers.MaxPooling2D(2, strides=1),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="tanh"),
            keras.layers.Dense(10),
        ]
    )


def load(path: pathlib.Path | None) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Returns (pictures, labels) to train and to test on; values lie in [-0.5, 0.5].

    Pictures without an axis of colors get one.

    Args:
        path: A file of the layout of `mnist.npz`; None fetches it through Keras.
    """
    if path is None:
        train, test = keras.datasets.mnist.load_data()
    else:
        with np.load(path) as data:
            train = data["x_train"], data["y_train"]
            test = data["x_test"], data["y_test"]

    def scaled(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        x = x[..., None] if x.ndim == 3 else x
        return (x / 255.0 - 0.5).astype("float32"), y.ravel()

    return scaled(*train), scaled(*test)


def main() -> None:
    """Plans, trains, prints, draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--delta", type=float, default=1e-6)
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each mechanism")
    parser.add_argument("--learning_rate", type=float, default=0.25)
    parser.add_argument("--num_train", type=int, default=60_000, help="fewer for a quick look")
    parser.add_argument("--data", type=pathlib.Path, help="x_train, y_train, x_test, y_test")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("."))
    options = parser.parse_args()

    (x_train, y_train), test = load(options.data)
    task = comparison.Task(
        "MNIST",
        (x_train[: options.num_train], y_train[: options.num_train]),
        test,
        make_model,
        options.epochs,
        l2_norm_clip=1.0,
    )
    comparison.run(
        task,
        batch_size=options.batch_size,
        epsilon=options.epsilon,
        delta=options.delta,
        learning_rates={"DP-SGD": options.learning_rate, "BandMF": options.learning_rate},
        num_seeds=options.seeds,
        picture=options.output / "mnist.png",
    )


if __name__ == "__main__":
    main()
