"""Audit the quickstart's run: attack it, and bound its epsilon from below.

    python examples/audit.py

Three attacks on the plan of examples/quickstart.py: on its noise and clipping alone, on the
released gradients of one training run, and on the final model of another one. Draws audit.png.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import quiet  # noqa: F401 - first

import keras
from sklearn.datasets import load_digits

import keras_bandmf as bandmf
import quickstart
from keras_bandmf.plots import plot_audit


def main(arguments: list[str] | None = None) -> None:
    """Plans, attacks, prints, draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--trials", type=int, default=20_000, help="canaries of the first attack")
    parser.add_argument("--canaries", type=int, default=500, help="of each run")
    folder = pathlib.Path(tempfile.gettempdir())
    parser.add_argument("--output", type=pathlib.Path, default=folder, help="folder of the picture")
    options = parser.parse_args(arguments)

    digits = load_digits()
    x, y = (digits.data[:1500] / 16.0).astype("float32"), digits.target[:1500]
    plan = bandmf.TrainingPlan.calibrate(
        num_examples=1500,
        batch_size=quickstart.BATCH_SIZE,
        epochs=quickstart.EPOCHS,
        epsilon=options.epsilon,
        delta=options.delta,
    )

    def build_model() -> keras.Model:
        model = bandmf.privatize(quickstart.make_model())
        inner = keras.optimizers.SGD(quickstart.LEARNING_RATES["BandMF"], momentum=0.9)
        model.compile(
            bandmf.BandMFOptimizer(inner, plan, l2_norm_clip=1.0),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        return model

    steps = bandmf.audit.audit_steps(plan, trials=options.trials)
    print(steps)
    for attack in ("white-box", "black-box"):
        report = bandmf.audit.audit_run(
            build_model, plan, x, y, num_canaries=options.canaries, attack=attack
        )
        print(f"\n{report}")
    picture = options.output / "audit.png"
    plot_audit(steps, plan, picture)
    print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
