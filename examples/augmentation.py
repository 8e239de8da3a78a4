"""Random augmentation under differential privacy: no views, one, and eight of each example.

    python examples/augmentation.py

Trains the MNIST model of mnist.py at one (epsilon, delta). The views of an example are its picture
moved by up to two pixels; the gradients of eight views are averaged and clipped once, so that they
count like one. Fetches MNIST through `keras.datasets.mnist`; `--data` reads a file instead.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import quiet  # noqa: F401 - first

import keras
import matplotlib
import numpy as np
import tensorflow as tf

import keras_bandmf as bandmf
from mnist import load, make_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ARMS = {
    "no augmentation": {},
    "1 view": {"augment_copies": 1},
    "8 views": {"augment_copies": 8},
}


def moved(x: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Moves a picture by up to two pixels in each direction; what comes in is background."""
    padded = tf.pad(x, [[2, 2], [2, 2], [0, 0]], constant_values=-0.5)
    return tf.image.stateless_random_crop(padded, (28, 28, 1), seed)


def train(plan, data, learning_rate: float, seed: int, options: dict) -> tuple[list[float], float]:
    """Returns test accuracy after each epoch, and the epsilon of the run."""
    (x_train, y_train), test = data
    keras.utils.set_random_seed(seed)
    model = bandmf.privatize(make_model())
    inner = keras.optimizers.SGD(learning_rate, momentum=0.9)
    model.compile(
        optimizer=bandmf.BandMFOptimizer(inner, plan, l2_norm_clip=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    if options:
        options = {"augment": moved, **options}
    history = model.fit(
        plan.batches(x_train, y_train, **options),
        validation_data=test,
        validation_batch_size=1000,
        verbose=0,
    )
    return history.history["val_accuracy"], bandmf.statement(model).epsilon


def draw(curves: dict[str, list[list[float]]], epsilon: float, picture: pathlib.Path) -> None:
    """Draws test accuracy against epochs, one thin line a run and a thick one for their mean."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for color, (label, runs) in zip(("#888888", "#d95f02", "#1b6ca8"), curves.items(), strict=True):
        accuracy = 100 * np.array(runs)
        epochs = np.arange(1, accuracy.shape[1] + 1)
        axes.plot(epochs, accuracy.T, color=color, linewidth=0.8, alpha=0.6)
        axes.plot(epochs, accuracy.mean(axis=0), color=color, linewidth=2.2, label=label)
        axes.annotate(
            f"{accuracy[:, -1].mean():.1f} %",
            (epochs[-1], accuracy[:, -1].mean()),
            xytext=(5, -3),
            textcoords="offset points",
            color=color,
        )
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", xticks=epochs)
    axes.set_title(f"MNIST at epsilon = {epsilon:g}: views of each example")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(picture, dpi=150)


def main() -> None:
    """Plans, trains, prints, draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--delta", type=float, default=1e-6)
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each")
    parser.add_argument("--learning_rate", type=float, default=0.25)
    parser.add_argument("--num_train", type=int, default=60_000, help="fewer for a quick look")
    parser.add_argument("--data", type=pathlib.Path, help="x_train, y_train, x_test, y_test")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("."))
    options = parser.parse_args()

    (x_train, y_train), test = load(options.data)
    data = (x_train[: options.num_train], y_train[: options.num_train]), test
    plan = bandmf.TrainingPlan.calibrate(
        num_examples=len(data[0][0]),
        batch_size=options.batch_size,
        epochs=options.epochs,
        epsilon=options.epsilon,
        delta=options.delta,
    )
    print(plan)
    curves: dict[str, list[list[float]]] = {label: [] for label in ARMS}
    for seed in range(options.seeds):
        for label, arm in ARMS.items():
            started = time.time()
            accuracy, epsilon = train(plan, data, options.learning_rate, seed, dict(arm))
            curves[label].append(accuracy)
            print(
                f"{label}, run {seed + 1} of {options.seeds}: accuracy {accuracy[-1]:.4f}, "
                f"epsilon {epsilon:.4f} ({time.time() - started:.0f} s)",
                flush=True,
            )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "augmentation.json").write_text(json.dumps(curves))
    draw(curves, options.epsilon, options.output / "augmentation.png")
    for label, runs in curves.items():
        final = np.array(runs)[:, -1]
        spread = f" +- {final.std(ddof=1):.4f}" if len(final) > 1 else ""
        print(f"{label:<16} {final.mean():.4f}{spread}")


if __name__ == "__main__":
    main()
