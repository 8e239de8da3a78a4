"""Train a digit classifier under a stated (epsilon, delta): DP-SGD against BandMF.

    python examples/quickstart.py

The data ships with scikit-learn. Prints test accuracy and epsilon, and draws quickstart.png.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import quiet  # noqa: F401 - first

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import comparison

BATCH_SIZE = 25
EPOCHS = 4
# The best of 0.025, 0.05, 0.1, 0.2 and 0.4 for each, over six runs, under both sampling laws.
LEARNING_RATES = {"DP-SGD": 0.05, "BandMF": 0.1}


def make_model() -> keras.Model:
    """A small multi-layer perceptron on 8 x 8 pixels."""
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def main() -> None:
    """Plans, trains, prints, draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=6, help="runs of each mechanism")
    folder = pathlib.Path(tempfile.gettempdir()) / "keras_bandmf_quickstart"
    parser.add_argument("--output", type=pathlib.Path, default=folder, help="folder of the picture")
    options = parser.parse_args()

    digits = load_digits()
    x = (digits.data / 16.0).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(
        x, digits.target, test_size=297, random_state=0, stratify=digits.target
    )
    task = comparison.Task(
        "digits", (x_train, y_train), (x_test, y_test), make_model, EPOCHS, l2_norm_clip=1.0
    )

    comparison.run(
        task,
        batch_size=BATCH_SIZE,
        epsilon=options.epsilon,
        delta=options.delta,
        learning_rates=LEARNING_RATES,
        num_seeds=options.seeds,
        picture=options.output / "quickstart.png",
    )


if __name__ == "__main__":
    main()
