"""Accuracy on the digits under strategies that know more or less about the optimizer and the loss.

    python benchmarks/curvature.py --sampling fixed_order --epsilon 4

Plans are those of the library. Training is simulated in NumPy, many runs at once, so that the runs
of different workloads can have the same initial weights, the same normals and, in a fixed order,
the same batches: their difference is then known far better than the accuracy itself. NumPy's
generator is no secret, so nothing here protects anybody. Prints means over the runs and their
standard errors, in points of accuracy on the test set.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_bandmf as bandmf

BATCH_SIZE, MOMENTUM, CLIP, HIDDEN, CLASSES = 25, 0.9, 1.0, 32, 10


class Digits:
    """The data of examples/quickstart.py."""

    def __init__(self) -> None:
        digits = load_digits()
        x = (digits.data / 16.0).astype(np.float32)
        split = train_test_split(
            x, digits.target, test_size=297, random_state=0, stratify=digits.target
        )
        self.x, self.x_test, labels, self.y_test = split
        self.y = np.eye(CLASSES, dtype=np.float32)[labels]


def batches(plan: bandmf.TrainingPlan, runs: int, random: np.random.Generator):
    """Yields indices `(runs, m)` of the examples of each step, and 1 where one is there, else 0."""
    n, steps, size = plan.num_examples, plan.steps_per_epoch, plan.batch_size
    order = np.stack([random.permutation(n) for _ in range(runs)])
    if plan.sampling == "fixed_order":
        fixed = order[:, : steps * size].reshape(runs, steps, size)
        for step in range(plan.num_steps):
            yield fixed[:, step % steps], np.ones((runs, size), np.float32)
        return
    # Cyclic Poisson: step i samples from group i mod b, at b times the rate.
    group, rate = order % plan.num_bands, size * plan.num_bands / n
    for step in range(plan.num_steps):
        chosen = (group == step % plan.num_bands) & (random.random((runs, n)) < rate)
        counts = chosen.sum(axis=1)
        run, example = np.nonzero(chosen)
        place = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
        indices = np.zeros((runs, counts.max()), np.int64)
        present = np.zeros(indices.shape, np.float32)
        indices[run, place], present[run, place] = example, 1.0
        yield indices, present


def accuracies(
    plan: bandmf.TrainingPlan, data: Digits, learning_rate: float, runs: int
) -> np.ndarray:
    """Returns the test accuracy of each run, `(runs,)`, after DP training by SGD with momentum."""
    random = np.random.default_rng(0)
    shapes = [(64, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,)]
    sizes = [int(np.prod(shape)) for shape in shapes]
    weights = [np.zeros((runs, *shape), np.float32) for shape in shapes]
    for kernel in (weights[0], weights[2]):
        limit = np.sqrt(6.0 / sum(kernel.shape[1:]))
        kernel[:] = random.uniform(-limit, limit, kernel.shape)
    velocities = [np.zeros_like(weight) for weight in weights]
    noise = correlated_noise(plan, runs, sum(sizes), random)
    for of_step, (indices, present) in zip(noise, batches(plan, runs, random), strict=True):
        x, y = data.x[indices], data.y[indices]
        hidden, logits = forward(weights, x)
        d_logits = logit_gradients(logits, y)
        d_hidden = (d_logits @ weights[2].transpose(0, 2, 1)) * (hidden > 0.0)
        # The squared norm of the gradient of each example, from the factors of its two kernels.
        squares = np.sum(d_hidden**2, axis=2) * (1.0 + np.sum(x**2, axis=2))
        squares += np.sum(d_logits**2, axis=2) * (1.0 + np.sum(hidden**2, axis=2))
        clip = (present * np.minimum(1.0, CLIP / np.sqrt(np.maximum(squares, 1e-12))))[:, :, None]
        d_hidden, d_logits = clip * d_hidden, clip * d_logits
        sums = [
            x.transpose(0, 2, 1) @ d_hidden,
            d_hidden.sum(axis=1),
            hidden.transpose(0, 2, 1) @ d_logits,
            d_logits.sum(axis=1),
        ]
        parts = np.split(of_step, np.cumsum(sizes)[:-1], axis=1)
        for weight, velocity, total, part in zip(weights, velocities, sums, parts, strict=True):
            gradient = (total + part.reshape(total.shape)) / plan.batch_size
            velocity *= MOMENTUM
            velocity -= learning_rate * gradient
            weight += velocity
    _, logits = forward(weights, data.x_test)
    return np.mean(logits.argmax(axis=2) == data.y_test, axis=1)


def correlated_noise(
    plan: bandmf.TrainingPlan, runs: int, size: int, random: np.random.Generator
) -> np.ndarray:
    """Returns the noise of every step, `(steps, runs, size)`, for gradients clipped to `CLIP`."""
    normals = random.standard_normal((plan.num_steps, runs * size), dtype=np.float32)
    correlated = np.linalg.inv(plan.strategy.materialize()) * plan.noise_stddev(CLIP)
    return (correlated.astype(np.float32) @ normals).reshape(plan.num_steps, runs, size)


def logit_gradients(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the gradients of the cross-entropy of each row, given one-hot labels."""
    probability = np.exp(logits - logits.max(axis=2, keepdims=True))
    probability /= probability.sum(axis=2, keepdims=True)
    return probability - y


def with_error(values: np.ndarray, sign: str = "") -> str:
    """Returns the mean of the runs and its standard error; with `sign="+"`, as a difference."""
    return f"{values.mean():{sign}.2f} +- {values.std(ddof=1) / len(values) ** 0.5:.2f}"


def forward(weights: list[np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hidden layer and the logits of each run."""
    hidden = np.maximum(x @ weights[0] + weights[1][:, None], 0.0)
    return hidden, hidden @ weights[2] + weights[3][:, None]


def main() -> None:
    """Plans, trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sampling", default="fixed_order")
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--runs", type=int, default=48)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.025, 0.05, 0.1, 0.2])
    options = parser.parse_args()
    data = Digits()
    steps = options.epochs * (len(data.x) // BATCH_SIZE)
    # Strategies do not depend on the scale of a constant learning rate, so any will do.
    optimizer = keras.optimizers.SGD(0.1, momentum=MOMENTUM)
    workloads = {
        "prefix sums": None,
        "momentum": bandmf.workload_from_optimizer(optimizer, steps),
        "curvatures": bandmf.workload_from_optimizer(optimizer, steps, curvatures="auto"),
    }
    print(f"{options.sampling}, epsilon {options.epsilon:g}, {options.epochs} epochs")
    first: dict[float, np.ndarray] = {}
    for name, workload in workloads.items():
        started = time.time()
        plan = bandmf.TrainingPlan.calibrate(
            num_examples=len(data.x),
            batch_size=BATCH_SIZE,
            epochs=options.epochs,
            epsilon=options.epsilon,
            delta=1e-5,
            sampling=options.sampling,
            max_bands=60,
            workload=workload,
            amplification="known_group",
        )
        cells = []
        for rate in options.rates:
            found = 100.0 * accuracies(plan, data, rate, options.runs)
            gain = found - first.setdefault(rate, found)
            cells.append(f"{rate:g}: {with_error(found)} ({with_error(gain, '+')})")
        print(f"{name:<12} {plan.num_bands:>3} bands  " + "   ".join(cells), flush=True)
        print(f"{'':<12} {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
