"""Privacy of users who bring several rows each: a plan that counts users, and its baseline.

    python examples/user_level.py

The users are made up from MNIST: each writes a few of the ten digits, at a slant of their own, from
one digit to a few hundred. Two models are trained to the same epsilon for a whole user:

1. `TrainingPlan(unit="user")` samples users; the mean gradient of up to 8 of their rows is clipped
   once.
2. The baseline samples rows, clips each of them, and accounts for all rows of a user at once
   (`group_epsilon`). Every user may keep 8 rows at most.

Fetches MNIST through `keras.datasets.mnist`; `--data` reads a file instead.
"""

from __future__ import annotations

import argparse
import math
import pathlib

import quiet  # noqa: F401 - first

import keras
import numpy as np
import scipy.optimize

import keras_bandmf as bandmf
from mnist import load, make_model

ROWS_PER_USER = 8


def slanted(x: np.ndarray, slant: np.ndarray) -> np.ndarray:
    """Moves line r of each picture by slant * (r - 14) pixels."""
    lines = np.round(slant[:, None] * (np.arange(28) - 14)).astype(int)
    columns = (np.arange(28) - lines[..., None]) % 28
    return np.take_along_axis(x, columns[..., None], axis=2)


def made_up_users(x: np.ndarray, y: np.ndarray, count: int, seed: int):
    """Returns pictures, labels and the number of the user who wrote each.

    A user writes 1 to 10 kinds of digits; how many digits in all has a heavy tail.
    """
    rng = np.random.default_rng(seed)
    sizes = np.minimum(1 + rng.pareto(1.2, count) * 4, 400).astype(int)
    of_class = [rng.permutation(np.flatnonzero(y == digit)) for digit in range(10)]
    rows, users = [], []
    for user, size in enumerate(sizes):
        kinds = rng.choice(10, rng.integers(1, 11), replace=False)
        digits = rng.choice(kinds, size)
        rows += [rng.choice(of_class[digit]) for digit in digits]
        users += [user] * size
    slant = rng.normal(0, 0.25, count)[users]
    return slanted(x[rows], slant), y[rows], np.array(users)


def trained(plan, batches, test, learning_rate: float, seed: int) -> float:
    """Returns the test accuracy of one run."""
    keras.utils.set_random_seed(seed)
    model = bandmf.privatize(make_model())
    model.compile(
        optimizer=bandmf.BandMFOptimizer(
            keras.optimizers.SGD(learning_rate, momentum=0.9), plan, l2_norm_clip=1.0
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(batches, verbose=0)
    return model.evaluate(*test, batch_size=1000, verbose=0)[1]


def baseline_plan(num_rows: int, batch_size: int, num_steps: int, epsilon: float, delta: float):
    """Returns the DP-SGD plan of rows whose `group_epsilon` for a user is epsilon at most."""

    def plan_of(log_sigma: float) -> bandmf.TrainingPlan:
        return bandmf.TrainingPlan(
            num_examples=num_rows,
            batch_size=batch_size,
            num_steps=num_steps,
            num_bands=1,
            noise_multiplier=math.exp(log_sigma),
            delta=delta,
        )

    def excess(log_sigma: float) -> float:
        return bandmf.group_epsilon(plan_of(log_sigma), ROWS_PER_USER) - epsilon

    root = scipy.optimize.brentq(excess, math.log(2.0), math.log(50.0), xtol=1e-3)
    while excess(root) > 0:
        root += 1e-3
    return plan_of(root)


def main() -> None:
    """Makes users, plans, trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=3_000)
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--users_in_batch", type=int, default=150)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each")
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs="+",
        default=[0.03, 0.06, 0.12, 0.25],
        help="the best is taken for each, by its mean over the runs",
    )
    parser.add_argument("--data", type=pathlib.Path, help="x_train, y_train, x_test, y_test")
    options = parser.parse_args()

    (x, y), (x_test, y_test) = load(options.data)
    x, y, users = made_up_users(x, y, options.users, seed=0)
    slant = np.random.default_rng(1).normal(0, 0.25, len(x_test))
    test = slanted(x_test, slant), y_test
    sizes = np.bincount(users)
    print(
        f"{len(x)} rows of {options.users} users: {sizes.min()} to {sizes.max()} each, "
        f"median {np.median(sizes):g}"
    )

    budget = {
        "unit": "user",
        "num_examples": options.users,
        "batch_size": options.users_in_batch,
        "epochs": options.epochs,
        "epsilon": options.epsilon,
        "delta": options.delta,
    }
    by_user = bandmf.TrainingPlan.calibrate(**budget)
    print(f"{by_user}\n\n{by_user.statement()}")
    # The baseline: at most 8 rows of each user, chosen once; as many rows a step.
    order = np.random.default_rng(2).permutation(len(x))
    rank = np.empty(len(x), int)
    seen = np.zeros(options.users, int)
    for row in order:
        rank[row] = seen[users[row]]
        seen[users[row]] += 1
    kept = np.flatnonzero(rank < ROWS_PER_USER)
    rows_in_batch = round(options.users_in_batch * len(kept) / options.users)
    by_row = baseline_plan(
        len(kept), rows_in_batch, by_user.num_steps, options.epsilon, options.delta
    )
    by_user_sgd = bandmf.TrainingPlan.calibrate(**budget, num_bands=1)
    arms = {
        "users, BandMF": (by_user, slice(None), users),
        "users, DP-SGD": (by_user_sgd, slice(None), users),
        f"rows, DP-SGD, at most {ROWS_PER_USER}": (by_row, kept, None),
    }
    print(f"\nEpsilon {options.epsilon:g} for a whole user, {by_user.num_steps} steps")
    print(f"{'what is sampled':<26}{'bands':>6}{'noise':>8}{'in a step':>11}   test accuracy")
    for label, (plan, rows, ids) in arms.items():
        best: tuple[float, list[float], float] = (-1.0, [], 0.0)
        for rate in options.learning_rates:
            accuracy = []
            for seed in range(options.seeds):
                if ids is None:
                    batches = plan.batches(x[rows], y[rows])
                else:
                    batches = plan.batches(x, y, unit=ids, rows_per_unit=ROWS_PER_USER)
                accuracy.append(trained(plan, batches, test, rate, seed))
            best = max(best, (float(np.mean(accuracy)), accuracy, rate))
        runs = ", ".join(f"{value:.3f}" for value in best[1])
        print(
            f"{label:<26}{plan.num_bands:>6}{plan.noise_multiplier:>8.2f}{plan.batch_size:>11}"
            f"   {runs} (learning rate {best[2]:g})",
            flush=True,
        )


if __name__ == "__main__":
    main()
