"""Privacy of users who bring several rows each: a plan that counts users, and its baseline.

    python examples/user_level.py --output users

The users are made up from MNIST: each writes a few of the ten digits, at a slant of their own, from
one digit to a few hundred. Two kinds of models are trained to the same epsilon for a whole user:

1. `TrainingPlan(unit="user")` samples users; the mean gradient of up to 8 of their rows is clipped
   once.
2. The baseline samples rows, clips each of them, and accounts for all rows of a user at once
   (`group_epsilon`). Every user may keep 8 rows at most.

Learning rates are chosen on every other digit of MNIST's test set, and the rest is the test set:
see tuned.py. Fetches MNIST through `keras.datasets.mnist`; `--data` reads a file instead.
"""

from __future__ import annotations

import argparse
import math
import pathlib

import tuned  # first, for it imports `quiet`

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


def rows_of_users(users: np.ndarray, most: int) -> np.ndarray:
    """Returns the numbers of at most so many rows of each user, chosen at random."""
    order = np.random.default_rng(2).permutation(len(users))
    rank, seen = np.empty(len(users), int), np.zeros(users.max() + 1, int)
    for row in order:
        rank[row] = seen[users[row]]
        seen[users[row]] += 1
    return np.flatnonzero(rank < most)


def main(arguments: list[str] | None = None) -> None:
    """Makes users, tunes, trains, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tuned.add_arguments(
        parser,
        epsilon=4.0,
        batch_size=150,
        epochs=10,
        l2_norm_clip=1.0,
        rates=[0.03, 0.06, 0.12, 0.25],
        plain_rates=[],
    )
    parser.set_defaults(delta=1e-4)
    parser.add_argument("--users", type=int, default=3_000)
    parser.add_argument("--data", type=pathlib.Path, help="x_train, y_train, x_test, y_test")
    options = parser.parse_args(arguments)

    (x, y), (x_test, y_test) = load(options.data)
    x, y, users = made_up_users(x, y, options.users, seed=0)
    x_test = slanted(x_test, np.random.default_rng(1).normal(0, 0.25, len(x_test)))
    sizes = np.bincount(users)
    kept = rows_of_users(users, ROWS_PER_USER)
    rows_in_batch = round(options.batch_size * len(kept) / options.users)
    num_steps = options.epochs * (options.users // options.batch_size)
    print(
        f"{len(x)} rows of {options.users} users: {sizes.min()} to {sizes.max()} each, median "
        f"{np.median(sizes):g}. {num_steps} steps of {options.batch_size} users, or of "
        f"{rows_in_batch} of the {len(kept)} rows of the baseline"
    )

    def train(mechanism: tuned.Mechanism, plan: bandmf.TrainingPlan, rate: float) -> keras.Model:
        if mechanism.method == "rows":
            batches = plan.batches(x[kept], y[kept])
        else:
            batches = plan.batches(x, y, unit=users, rows_per_unit=ROWS_PER_USER)
        return tuned.fitted(options, make_model(), plan, rate, x=batches)

    def baseline() -> bandmf.TrainingPlan:
        return baseline_plan(len(kept), rows_in_batch, num_steps, options.epsilon, options.delta)

    mechanisms = [
        tuned.Mechanism(f"users, {label}", {**law, "unit": "user"}, options.rates)
        for label, law in tuned.LAWS.items()
    ]
    mechanisms.append(tuned.Mechanism("rows, DP-SGD", baseline, options.rates, "rows"))
    data = {
        # Not halves: the first 5,000 were written by other people than the rest.
        "held out": (x_test[::2], y_test[::2]),
        "test": (x_test[1::2], y_test[1::2]),
    }
    task = tuned.Task(
        f"users-{options.users}",
        data,
        train,
        options.users,
        tuned.accuracy,
        workload=keras.optimizers.SGD(1.0, momentum=tuned.MOMENTUM),
    )
    tuned.compare(options, task, mechanisms)


if __name__ == "__main__":
    main()
