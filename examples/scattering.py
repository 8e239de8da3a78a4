"""DP-SGD against BandMF on images: a linear model on scattering features, tuned alike.

Features that nobody has to learn privately are the strong baseline of Tramer and Boneh
("Differentially Private Learning Needs Better Features", 2021): the scattering transform of
`pip install kymatio`, normalized in 27 groups of channels for each image by itself, and then one
dense layer.

    python examples/scattering.py --data fashion_mnist.npz --output scattering --epsilon 3

Each mechanism gets the same learning rates; the one that is best on 5,000 held-out images is
trained again with other seeds, and tested. (Epsilon is that of one run: the search is not counted,
for none of them.) `--data` is a file of the layout of `mnist.npz`, with images of 28 x 28, or
32 x 32 x 3. Every run is kept in the output folder, and the same command goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import quiet  # noqa: F401 - first

import keras
import numpy as np

import keras_bandmf as bandmf

HELD_OUT = 5_000
GROUPS = 27
MECHANISMS = {
    "DP-SGD": {"num_bands": 1},
    "BandMF": {"num_bands": "auto"},
    "DP-SGD allocated": {"num_bands": 1, "sampling": "random_allocation"},
    "BandMF allocated": {"num_bands": "auto", "sampling": "random_allocation"},
}


def scattered(images: np.ndarray) -> np.ndarray:
    """Features of images, each by itself.

    Args:
        images: (count, side, side) or (count, side, side, channels), uint8.

    Returns:
        (count, features), float16.
    """
    # Not `kymatio.numpy`, which also imports transforms that newer SciPy does not support.
    from kymatio.scattering2d.frontend.numpy_frontend import ScatteringNumPy2D

    if images.ndim == 4:
        images = np.moveaxis(images, 3, 1)
    transform = ScatteringNumPy2D(J=2, shape=images.shape[-2:])
    rows = []
    for start in range(0, len(images), 250):
        part = transform(images[start : start + 250].astype("float32") / 255.0)
        part = part.reshape(len(part), GROUPS, -1)
        part -= part.mean(axis=-1, keepdims=True)
        part /= part.std(axis=-1, keepdims=True) + 1e-5
        rows.append(part.reshape(len(part), -1).astype("float16"))
    return np.concatenate(rows)


def load(data: pathlib.Path, output: pathlib.Path) -> tuple:
    """Returns (features, labels) to train, to choose learning rates, and to test."""
    with np.load(data) as file:
        parts = {}
        for part in ("train", "test"):
            kept = output / f"{data.stem}-{part}.npy"
            if not kept.exists():
                np.save(kept, scattered(file[f"x_{part}"]))
            parts[part] = np.load(kept), file[f"y_{part}"].astype("int32").ravel()
    x, y = parts["train"]
    return (x[:-HELD_OUT], y[:-HELD_OUT]), (x[-HELD_OUT:], y[-HELD_OUT:]), parts["test"]


def accuracy(
    plan: bandmf.TrainingPlan | None, options: argparse.Namespace, train, test, rate: float
) -> float:
    """Trains one model and returns its accuracy on `test`; without a plan it is not private."""
    model = keras.Sequential(
        [
            keras.Input(train[0].shape[1:], dtype="float16"),
            keras.layers.Dense(10, kernel_initializer="zeros"),
        ]
    )
    optimizer = keras.optimizers.SGD(rate, momentum=0.9)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if plan is None:
        data = {"x": train[0], "y": train[1], "batch_size": options.batch_size}
    else:
        bandmf.privatize(model)
        optimizer = bandmf.BandMFOptimizer(optimizer, plan, options.l2_norm_clip)
        data = {"x": plan.batches(*train)}
    model.compile(optimizer, loss, metrics=["accuracy"])
    model.fit(**data, epochs=options.epochs, verbose=0)
    return float(model.evaluate(*test, batch_size=1_000, verbose=0)[1])


def main(arguments: list[str] | None = None) -> None:
    """Tunes, trains, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--l2_norm_clip", type=float, default=0.1)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--plain_rates", type=float, nargs="+", default=[0.001, 0.003, 0.01, 0.03])
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    train, held_out, test = load(options.data, options.output)
    settings = f"{options.epsilon:g}-{options.batch_size}-{options.epochs}-{options.l2_norm_clip:g}"
    kept = options.output / f"{options.data.stem}-{settings}.json"
    runs = json.loads(kept.read_text()) if kept.exists() else {}

    def run(name: str, plan: bandmf.TrainingPlan | None, rate: float, seed: int, on: str) -> float:
        key = f"{name}, rate {rate:g}, seed {seed}, {on}"
        if key not in runs:
            keras.utils.set_random_seed(seed)
            rows = {"held out": held_out, "test": test}[on]
            runs[key] = accuracy(plan, options, train, rows, rate)
            kept.write_text(json.dumps(runs, indent=1))
            print(f"{key}: {runs[key]:.4f}", flush=True)
        return runs[key]

    lines = []
    for name, mechanism in {"not private": None, **MECHANISMS}.items():
        plan, words = None, f"{'':>5} {'':>7} {'':>7}"
        if mechanism is not None:
            plan = bandmf.TrainingPlan.calibrate(
                num_examples=len(train[1]),
                batch_size=options.batch_size,
                epochs=options.epochs,
                epsilon=options.epsilon,
                delta=options.delta,
                **mechanism,
            )
            words = f"{plan.num_bands:>5} {plan.noise_multiplier:>7.3f} {plan.expected_rmse:>7.3f}"
        rates = options.plain_rates if plan is None else options.rates
        best = max(rates, key=lambda rate: run(name, plan, rate, 0, "held out"))
        found = np.array([run(name, plan, best, 1 + i, "test") for i in range(options.seeds)])
        error = f" +- {found.std(ddof=1) / len(found) ** 0.5:.4f}" if len(found) > 1 else ""
        lines.append(f"{name:<17} {words} {best:>6g}  {found.mean():.4f}{error}")
    print(f"\n{'mechanism':<17} bands   noise    RMSE   rate  test accuracy (mean +- its error)")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
