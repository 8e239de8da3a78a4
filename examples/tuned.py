"""What the accuracy examples share: each mechanism is tuned alike, then trained with other seeds.

Each mechanism gets its learning rates once, judged on rows that are held out. The best one is
trained again with other seeds, and tested. (Epsilon is that of one run: the search is not counted,
for none of them.) Plans and runs are kept in the output folder, a file for each mechanism, and the
same command goes on where it was stopped. Give `--only` to train some mechanisms, each in a
process of its own, and run the command without it at the end for the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import quiet  # noqa: F401 - first

import keras
import numpy as np
import tensorflow as tf

import keras_bandmf as bandmf

HELD_OUT = 5_000
MOMENTUM = 0.9
ALLOCATED = {"sampling": "random_allocation"}
LAWS = {
    "DP-SGD": {"num_bands": 1},
    "BandMF": {"num_bands": "auto"},
    "DP-SGD allocated": {"num_bands": 1, **ALLOCATED},
    "BandMF allocated": {"num_bands": "auto", **ALLOCATED},
}


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One line of the table.

    Attributes:
        label: what the table calls it.
        plan: arguments of `TrainingPlan.calibrate` beside the budget, or a function that makes
            the plan; None is not private.
        rates: learning rates to choose from.
        method: what is trained, where a task knows several.
    """

    label: str
    plan: Mapping[str, object] | Callable[[], bandmf.TrainingPlan] | None
    rates: Sequence[float]
    method: str = ""


# (mechanism, its plan, learning rate) -> a trained model.
Train = Callable[[Mechanism, bandmf.TrainingPlan | None, float], keras.Model]


@dataclasses.dataclass(frozen=True)
class Task:
    """What all mechanisms are compared on.

    Attributes:
        name: for the folder of its results, with whatever options are the task's own.
        data: rows to "train", rows that are "held out", and "test"; each a pair of inputs and
            labels, or what `score` takes.
        train: trains one model.
        num_examples: rows that are trained on.
        score: (model, rows) -> what is compared.
        best: `max` or `min`, of scores.
        measure: the name of the score.
        workload: an optimizer whose momentum the strategies are to know; its learning rate has
            no part in it.
    """

    name: str
    data: Mapping[str, object]
    train: Train
    num_examples: int
    score: Callable[[keras.Model, object], float]
    best: Callable = max
    measure: str = "accuracy"
    workload: keras.optimizers.SGD | None = None


def accuracy(model: keras.Model, rows: tuple[object, np.ndarray]) -> float:
    """The second metric of a compiled model."""
    return float(model.evaluate(*rows, batch_size=500, verbose=0)[1])


def parts(train: tuple, test: tuple, held_out: int = HELD_OUT) -> dict[str, tuple]:
    """Rows to train on, the last `held_out` ones, and the test set, each (inputs, labels)."""

    def rows(some: slice) -> tuple:
        return keras.tree.map_structure(lambda array: array[some], train)

    return {"train": rows(slice(-held_out)), "held out": rows(slice(-held_out, None)), "test": test}


def fitted(
    options: argparse.Namespace,
    model: keras.Model,
    plan: bandmf.TrainingPlan | None,
    rate: float,
    **of_fit: object,
) -> keras.Model:
    """Trains a model that returns logits, by SGD with momentum.

    Args:
        options: of the command line.
        model: a fresh model.
        plan: None is not private.
        rate: the learning rate.
        **of_fit: arguments of `fit`, data among them.
    """
    optimizer = keras.optimizers.SGD(rate, momentum=MOMENTUM)
    if plan is not None:
        model = bandmf.privatize(model)
        optimizer = bandmf.BandMFOptimizer(
            optimizer, plan, options.l2_norm_clip, clipping=options.clipping
        )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    model.fit(**of_fit, verbose=0)
    return model


def classification(
    options: argparse.Namespace,
    name: str,
    data: Mapping[str, tuple[np.ndarray, np.ndarray]],
    make_model: Callable[[], keras.Model],
    **of_batches: object,
) -> Task:
    """The task of a model that returns logits, trained by SGD with momentum.

    Args:
        options: of the command line.
        name: of the task.
        data: what `parts` returns.
        make_model: a fresh model.
        of_batches: more arguments of `TrainingPlan.batches`, for the private mechanisms.
    """
    x, y = data["train"]

    def train(mechanism: Mechanism, plan: bandmf.TrainingPlan | None, rate: float) -> keras.Model:
        if plan is None:
            rows = {"x": x, "y": y, "batch_size": options.batch_size}
        else:
            rows = {"x": plan.batches(x, y, **of_batches)}
        return fitted(options, make_model(), plan, rate, **rows, epochs=options.epochs)

    workload = keras.optimizers.SGD(1.0, momentum=MOMENTUM)
    return Task(name, data, train, len(y), accuracy, workload=workload)


def add_arguments(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Adds the options that all accuracy examples have.

    Args:
        parser: of the example.
        defaults: epsilon, batch_size, epochs, l2_norm_clip, rates, plain_rates.
    """
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of results")
    parser.add_argument("--epsilon", type=float, default=defaults["epsilon"])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--batch_size", type=int, default=defaults["batch_size"])
    parser.add_argument("--epochs", type=int, default=defaults["epochs"])
    parser.add_argument("--l2_norm_clip", type=float, default=defaults["l2_norm_clip"])
    parser.add_argument("--clipping", default="flat", help='"adaptive", for example')
    parser.add_argument("--rates", type=float, nargs="+", default=defaults["rates"])
    parser.add_argument("--plain_rates", type=float, nargs="+", default=defaults["plain_rates"])
    parser.add_argument("--seeds", type=int, default=5, help="runs with the best learning rate")
    parser.add_argument("--only", nargs="+", help="mechanisms to train, as the table calls them")
    parser.add_argument("--plans", action="store_true", help="find the plans, and train nothing")


def mechanisms(options: argparse.Namespace) -> list[Mechanism]:
    """Not private, DP-SGD and BandMF, under two sampling laws."""
    plain = Mechanism("not private", None, options.plain_rates)
    return [plain, *(Mechanism(label, plan, options.rates) for label, plan in LAWS.items())]


def compare(options: argparse.Namespace, task: Task, found: Sequence[Mechanism]) -> None:
    """Tunes and trains mechanisms, and prints a table.

    Args:
        options: of the command line.
        task: what they are compared on.
        found: the mechanisms.
    """
    # All that a run depends on beside its learning rate and seed: others get another folder.
    budget = f"{options.epsilon:g}-{options.delta:g}"
    training = f"{options.batch_size}-{options.epochs}-{options.l2_norm_clip:g}"
    if options.clipping != "flat":
        training += f"-{options.clipping}"
    folder = options.output / f"{task.name}-{budget}-{training}"
    folder.mkdir(parents=True, exist_ok=True)
    # Private training on a GPU is refused with it, and the baseline has the same arithmetic.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    lines = []
    for mechanism in found:
        if options.only and mechanism.label not in options.only:
            continue
        plan, words = None, f"{'':>5} {'':>7} {'':>7}"
        if mechanism.plan is not None:
            plan = make_plan(options, mechanism, task, folder)
            words = f"{plan.num_bands:>5} {plan.noise_multiplier:>7.3f} {plan.expected_rmse:>7.3f}"
        if options.plans:
            continue
        runs = Runs(folder / f"{_slug(mechanism.label)}.json", mechanism, plan, task)
        held_out = {rate: runs.get(rate, seed=0)["held out"] for rate in mechanism.rates}
        rate = task.best(mechanism.rates, key=held_out.__getitem__)
        scores = np.array([runs.get(rate, 1 + i)["test"] for i in range(options.seeds)])
        error = f" +- {scores.std(ddof=1) / len(scores) ** 0.5:.4f}" if len(scores) > 1 else ""
        lines.append(f"{mechanism.label:<18} {words} {rate:>8g}  {scores.mean():.4f}{error}")
    print(f"\n{'mechanism':<18} bands   noise    RMSE     rate  {task.measure} (mean +- its error)")
    print("\n".join(lines))


class Runs:
    """Results of one mechanism, in a file; a run that is not there is trained."""

    def __init__(
        self,
        path: pathlib.Path,
        mechanism: Mechanism,
        plan: bandmf.TrainingPlan | None,
        task: Task,
    ) -> None:
        self._path, self._mechanism, self._plan, self._task = path, mechanism, plan, task
        self._found = json.loads(path.read_text()) if path.exists() else {}

    def get(self, rate: float, seed: int) -> dict[str, float]:
        """The score on the rows that are held out, and on the test set."""
        key = f"rate {rate:g}, seed {seed}"
        if key not in self._found:
            keras.backend.clear_session()
            keras.utils.set_random_seed(seed)
            started = time.time()
            model = self._task.train(self._mechanism, self._plan, rate)
            self._found[key] = {
                on: self._task.score(model, self._task.data[on]) for on in ("held out", "test")
            }
            self._path.write_text(json.dumps(self._found, indent=1))
            words = ", ".join(f"{on} {value:.4f}" for on, value in self._found[key].items())
            seconds = f"{time.time() - started:.0f} s"
            print(f"{self._mechanism.label}, {key}: {words} ({seconds})", flush=True)
        return self._found[key]


def make_plan(
    options: argparse.Namespace,
    mechanism: Mechanism,
    task: Task,
    folder: pathlib.Path,
) -> bandmf.TrainingPlan:
    """The plan of a mechanism, as calibrated the first time that it is asked for."""
    made = mechanism.plan
    name = mechanism.label if callable(made) else "-".join(map(str, made.values()))
    kept = folder / f"plan-{_slug(name)}.json"
    if not kept.exists():
        if callable(made):
            plan = made()
        else:
            plan = bandmf.TrainingPlan.calibrate(
                num_examples=task.num_examples,
                batch_size=options.batch_size,
                epochs=options.epochs,
                epsilon=options.epsilon,
                delta=options.delta,
                workload=task.workload,
                **made,
            )
        kept.write_text(plan.to_json())
    return bandmf.TrainingPlan.from_json(kept.read_text())


def _slug(label: str) -> str:
    return label.replace(" ", "_").replace(",", "")
