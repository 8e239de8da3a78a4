"""Noise that is drawn again against the ring: error, memory and time of a step of 10^7 parameters.

    python benchmarks/regenerated_noise.py [--parameters 10000000] [--steps 6]

Each row trains a dense layer in a process of its own, in a fixed order of 800 examples, 8 a step,
10 epochs: n = 1,000 steps, participations 100 steps apart, epsilon 4 at delta 1e-6. The error is
the plan's expected RMSE over that of DP-SGD, the memory the peak of the process (`getrusage`), the
time the median of the steps after the second. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES, BATCH, EPOCHS = 800, 8, 10
ROWS = [
    ("ring", 1),
    ("taps", 2),
    ("ring", 4),
    ("taps", 4),
    ("ring", 16),
    ("taps", 16),
    ("ring", 64),
    ("taps", 64),
]


def plan_of(kind: str, count: int):
    """The plan of a row: BandMF of so many bands, or a banded inverse of so many taps."""
    import keras_bandmf as bandmf

    options = {"num_bands": count}
    if kind == "taps":
        period = EXAMPLES // BATCH
        options = {
            "strategy": bandmf.strategies.BandedInverseStrategy.optimize(
                EPOCHS * period, count, EPOCHS, period
            )
        }
    return bandmf.TrainingPlan.calibrate(
        num_examples=EXAMPLES,
        batch_size=BATCH,
        epochs=EPOCHS,
        epsilon=4.0,
        delta=1e-6,
        sampling="fixed_order",
        **options,
    )


def measure(kind: str, count: int, parameters: int, steps: int) -> dict:
    """Trains a few steps in this process."""
    import keras
    import numpy as np

    import keras_bandmf as bandmf

    class Clock(keras.callbacks.Callback):
        """Notes when steps end."""

        def __init__(self):
            super().__init__()
            self.times = []

        def on_train_batch_end(self, batch, logs=None):
            """Notes the time."""
            keras.ops.convert_to_numpy(self.model.trainable_variables[-1].value)
            self.times.append(time.perf_counter())

    plan = plan_of(kind, count)
    model = keras.Sequential(
        [keras.Input((1000,)), keras.layers.Dense(parameters // 1000, use_bias=False)]
    )
    model = bandmf.privatize(model)
    model.compile(bandmf.BandMFOptimizer(keras.optimizers.SGD(0.1), plan), loss="mse")
    x = np.zeros((EXAMPLES, 1000), np.float32)
    y = np.zeros((EXAMPLES, 1), np.float32)
    clock = Clock()
    model.fit(plan.batches(x, y), epochs=1, steps_per_epoch=steps, verbose=0, callbacks=[clock])
    return {
        "rmse": plan.expected_rmse,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "state": model.optimizer.run_state.noise.state_bytes / 1e6,
        "seconds": float(np.median(np.diff(clock.times)[1:])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=10**7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, count = options.one
        print(json.dumps(measure(kind, int(count), options.parameters, options.steps)))
        return
    head = f"{'noise':<22}{'RMSE / DP-SGD':>14}{'kept, MB':>10}{'peak, MB':>10}{'s a step':>10}"
    print(head, flush=True)
    base = None
    for kind, count in ROWS:
        command = [sys.executable, __file__, "--one", kind, str(count)]
        command += ["--parameters", str(options.parameters), "--steps", str(options.steps)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command} failed:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        base = base or found
        words = {"ring": f"ring, {count} bands", "taps": f"drawn again, {count} taps"}[kind]
        name = "DP-SGD" if (kind, count) == ROWS[0] else words
        print(
            f"{name:<22}{found['rmse'] / base['rmse']:>14.3f}{found['state']:>10.0f}"
            f"{found['megabytes']:>10.0f}{found['seconds']:>10.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
