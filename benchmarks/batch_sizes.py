"""DP-SGD against BandMF on the digits, each at several batch sizes, for the same number of epochs.

    python benchmarks/batch_sizes.py --epsilon 4

Larger batches cost no more computation, and are better for DP-SGD up to a point; so the fair
question is what bands bring when both have the batch size, and the learning rate, that is best for
them. Training is simulated as in curvature.py, with cyclic Poisson sampling. Prints means over the
runs and their standard errors, in points of accuracy on the test set.
"""

from __future__ import annotations

import argparse

import curvature
import keras

import keras_bandmf as bandmf


def main() -> None:
    """Plans, trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--runs", type=int, default=48)
    parser.add_argument("--sizes", type=int, nargs="+", default=[12, 25, 50, 100, 200])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.025, 0.05, 0.1, 0.2, 0.4, 0.8])
    options = parser.parse_args()
    data = curvature.Digits()
    optimizer = keras.optimizers.SGD(0.1, momentum=curvature.MOMENTUM)
    for size in options.sizes:
        steps = options.epochs * (len(data.x) // size)
        for bands in (1, "auto"):
            plan = bandmf.TrainingPlan.calibrate(
                num_examples=len(data.x),
                batch_size=size,
                epochs=options.epochs,
                epsilon=options.epsilon,
                delta=1e-5,
                num_bands=bands,
                workload=bandmf.workload_from_optimizer(optimizer, steps),
            )
            found = (
                100.0 * curvature.accuracies(plan, data, rate, options.runs)
                for rate in options.rates
            )
            cells = "   ".join(
                f"{rate:g}: {curvature.with_error(each)}"
                for rate, each in zip(options.rates, found, strict=True)
            )
            error = f"RMSE {plan.expected_rmse:.3f}"
            print(f"batch {size:<4} {plan.num_bands:>3} bands  {error}  {cells}", flush=True)


if __name__ == "__main__":
    main()
