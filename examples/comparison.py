"""What the examples share: DP-SGD against BandMF at the same budget, as a table and a picture."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable

import keras
import numpy as np

import keras_bandmf as bandmf


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set, a model and how to train it."""

    name: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    make_model: Callable[[], keras.Model]
    epochs: int
    l2_norm_clip: float


@dataclasses.dataclass(frozen=True)
class Result:
    """The runs of one plan over several seeds of the model's initial weights."""

    label: str
    plan: bandmf.TrainingPlan
    accuracy: np.ndarray  # (seeds, epochs), on the test set
    statement: str


def run(
    task: Task,
    *,
    batch_size: int,
    epsilon: float,
    delta: float,
    learning_rates: dict[str, float],
    num_seeds: int,
    picture: pathlib.Path,
) -> None:
    """Plans and trains DP-SGD and BandMF under two sampling laws, at one (epsilon, delta).

    Prints a table and draws a picture.

    Args:
        task: what to train.
        batch_size: expected examples a step.
        epsilon: the target.
        delta: the target.
        learning_rates: of "DP-SGD" and "BandMF", whatever the sampling.
        num_seeds: runs of each.
        picture: where to draw.
    """
    started = time.time()
    budget = {
        "num_examples": len(task.train[0]),
        "batch_size": batch_size,
        "epochs": task.epochs,
        "epsilon": epsilon,
        "delta": delta,
    }
    # Poisson sampling, with the group of each example given away; and exactly one participation
    # for each epoch, in secret steps.
    plans = {}
    for suffix, sampling in (("", "cyclic_poisson"), (" allocated", "random_allocation")):
        for label, bands in (("DP-SGD", 1), ("BandMF", "auto")):
            plans[label + suffix] = bandmf.TrainingPlan.calibrate(
                **budget, num_bands=bands, sampling=sampling
            )
    print(plans["BandMF allocated"])
    results = [
        train(task, label, plan, learning_rates[label.split()[0]], num_seeds)
        for label, plan in plans.items()
    ]
    print(f"\n{results[-1].statement}\n\n{report(results)}")
    draw(task, results, picture)
    print(f"\nPicture: {picture}   ({time.time() - started:.0f} s)")


def train(
    task: Task, label: str, plan: bandmf.TrainingPlan, learning_rate: float, num_seeds: int
) -> Result:
    """Trains one model a seed; the noise of every run is fresh and secret.

    Args:
        task: what to train.
        label: the name of the mechanism.
        plan: its plan.
        learning_rate: of plain SGD with momentum 0.9.
        num_seeds: how many models.

    Returns:
        Test accuracy after each epoch, and the statement of the last run.
    """
    curves = []
    for seed in range(num_seeds):
        keras.utils.set_random_seed(seed)
        model = bandmf.privatize(task.make_model())
        model.compile(
            optimizer=bandmf.BandMFOptimizer(
                keras.optimizers.SGD(learning_rate, momentum=0.9),
                plan,
                l2_norm_clip=task.l2_norm_clip,
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        history = model.fit(
            plan.batches(*task.train),
            epochs=task.epochs,
            validation_data=task.test,
            validation_batch_size=1000,
            verbose=0,
        )
        curves.append(history.history["val_accuracy"])
        print(
            f"  {label}, run {seed + 1} of {num_seeds}: accuracy {curves[-1][-1]:.3f}", flush=True
        )
    return Result(label, plan, np.array(curves), str(bandmf.statement(model)))


def report(results: list[Result]) -> str:
    """Returns a table of the final test accuracies."""
    lines = [
        f"{'mechanism':<16} {'bands':>5} {'noise':>7} {'expected RMSE':>14} "
        f"{'epsilon':>8} {'delta':>8}   test accuracy"
        + " (mean +- sd over runs)"
        * (len(results[0].accuracy) > 1)
    ]
    for result in results:
        plan, final = result.plan, result.accuracy[:, -1]
        spread = f" +- {final.std(ddof=1):.4f}" if len(final) > 1 else ""
        lines.append(
            f"{result.label:<16} {plan.num_bands:>5} {plan.noise_multiplier:>7.3f} "
            f"{plan.expected_rmse:>14.3f} {plan.epsilon():>8.3f} {plan.delta:>8.0e}   "
            f"{final.mean():.4f}{spread}"
        )
    return "\n".join(lines)


def draw(task: Task, results: list[Result], path: pathlib.Path) -> None:
    """Draws the error of the noise and the accuracy over the run, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (errors, accuracies) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colors = "tab:gray", "tab:blue", "black", "tab:red"
    for result, color in zip(results, colors, strict=True):
        plan = result.plan
        deviation = plan.noise_stddev(1.0) * np.sqrt(plan.strategy.per_step_error())
        steps = np.arange(1, plan.num_steps + 1)
        label = f"{result.label} ({plan.num_bands} band{'s' * (plan.num_bands > 1)})"
        errors.plot(steps, deviation, color=color, label=label)
        mean = result.accuracy.mean(axis=0)
        epochs = np.arange(1, len(mean) + 1)
        accuracies.plot(epochs, mean, color=color, label=label)
        if len(result.accuracy) > 1:
            accuracies.fill_between(
                epochs,
                result.accuracy.min(axis=0),
                result.accuracy.max(axis=0),
                color=color,
                alpha=0.2,
            )
    errors.set(
        title="Noise in the sum of all updates so far",
        xlabel="step",
        ylabel="standard deviation / clip norm",
    )
    band = " (band: all runs)" * (len(results[0].accuracy) > 1)
    accuracies.set(title=f"Test accuracy on {task.name}{band}", xlabel="epoch", ylabel="accuracy")
    for axes in (errors, accuracies):
        axes.grid(alpha=0.3)
        axes.legend()
    plan = results[0].plan
    figure.suptitle(
        f"Same model, same data, same privacy: delta = {plan.delta:g}, "
        f"epsilon = {plan.epsilon():.2f}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
