"""DP-SGD against BandMF on images: a linear model on scattering features, tuned alike.

Features that nobody has to learn privately are the strong baseline of Tramer and Boneh
("Differentially Private Learning Needs Better Features", 2021): the scattering transform of
`pip install kymatio`, normalized in 27 groups of channels for each image by itself, and then one
dense layer.

    python examples/scattering.py --data fashion_mnist.npz --output scattering --epsilon 3

`--data` is a file of the layout of `mnist.npz`, with images of 28 x 28, or 32 x 32 x 3, of which
5,000 are held out to choose learning rates. See tuned.py for how the mechanisms are tuned.
"""

from __future__ import annotations

import argparse
import pathlib

import tuned  # first, for it imports `quiet`

import keras
import numpy as np

GROUPS = 27


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


def load(data: pathlib.Path, output: pathlib.Path) -> dict[str, tuple]:
    """Features and labels, as `tuned.parts` has them."""
    with np.load(data) as file:
        found = []
        for part in ("train", "test"):
            kept = output / f"{data.stem}-{part}.npy"
            if not kept.exists():
                np.save(kept, scattered(file[f"x_{part}"]))
            found.append((np.load(kept), file[f"y_{part}"].astype("int32").ravel()))
    return tuned.parts(*found)


def make_model(num_features: int) -> keras.Model:
    """One dense layer."""
    return keras.Sequential(
        [
            keras.Input((num_features,), dtype="float16"),
            keras.layers.Dense(10, kernel_initializer="zeros"),
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Tunes, trains, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tuned.add_arguments(
        parser,
        epsilon=3.0,
        batch_size=500,
        epochs=10,
        l2_norm_clip=0.1,
        rates=[0.5, 1.0, 2.0, 4.0],
        plain_rates=[0.001, 0.003, 0.01, 0.03],
    )
    parser.add_argument("--data", type=pathlib.Path, required=True)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    data = load(options.data, options.output)
    num_features = data["train"][0].shape[1]
    task = tuned.classification(options, options.data.stem, data, lambda: make_model(num_features))
    tuned.compare(options, task, tuned.mechanisms(options))


if __name__ == "__main__":
    main()
