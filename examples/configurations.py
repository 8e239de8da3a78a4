"""What the RGP examples share: one configuration a command, resumable; then a table and a picture.

A run leaves `<name>.json` in the output folder when it is done, and until then a backup from which
the same command goes on. The backup holds the secret state of the noise: keep it to yourself.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence

import quiet  # noqa: F401 - first

import keras

import keras_bandmf as bandmf

METHODS = ("non_private", "dp_sgd", "rgp", "rgp_banded")
Arrays = tuple[object, object]


def add_arguments(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Adds the options of every RGP example.

    Args:
        parser: of the example.
        defaults: epochs, batch_size, learning_rate, plain_learning_rate,
            plain_batch_size, l2_norm_clip, rank, epsilon, refresh_every, carriers_of, head_scale.
    """
    parser.add_argument("--method", choices=METHODS, help="what to train; without it: report")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of results")
    parser.add_argument("--epsilon", type=float, default=defaults["epsilon"])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--epochs", type=int, default=defaults["epochs"])
    parser.add_argument("--batch_size", type=int, default=defaults["batch_size"])
    parser.add_argument("--learning_rate", type=float, default=defaults["learning_rate"])
    parser.add_argument(
        "--plain_learning_rate",
        type=float,
        default=defaults["plain_learning_rate"],
        help="of non_private, whose gradients are not clipped",
    )
    parser.add_argument(
        "--plain_batch_size",
        type=int,
        default=defaults["plain_batch_size"],
        help="of non_private, which no noise asks for large batches",
    )
    parser.add_argument("--l2_norm_clip", type=float, default=defaults["l2_norm_clip"])
    parser.add_argument("--rank", type=int, default=defaults["rank"])
    parser.add_argument("--num_bands", type=int, default=4, help="of rgp_banded")
    parser.add_argument(
        "--refresh_every",
        type=int,
        default=defaults["refresh_every"],
        help="steps between two refreshes of the carriers, of rgp_banded",
    )
    parser.add_argument(
        "--carriers_of",
        choices=["weights", "updates"],
        default=defaults["carriers_of"],
        help="what the carriers follow: the weights W_t (pre-trained; each refresh begins at new "
        "random carriers), or W_t - W_0",
    )
    parser.add_argument("--head_scale", type=float, default=defaults["head_scale"])
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights only")


def make_plan(options: argparse.Namespace, num_examples: int) -> bandmf.TrainingPlan:
    """The plan of a private configuration: all of them at one (epsilon, delta)."""
    budget = {
        "num_examples": num_examples,
        "batch_size": options.batch_size,
        "epochs": options.epochs,
        "epsilon": options.epsilon,
        "delta": options.delta,
    }
    if options.method != "rgp_banded":
        return bandmf.TrainingPlan.calibrate(**budget, num_bands=1)
    num_steps = options.epochs * (num_examples // options.batch_size)
    strategy = bandmf.strategies.BlockDiagonalStrategy.optimize(
        num_steps, options.num_bands, options.refresh_every
    )
    return bandmf.TrainingPlan.calibrate(**budget, num_bands=None, strategy=strategy)


def run(
    options: argparse.Namespace,
    make_model: Callable[[], keras.Model],
    make_optimizer: Callable[..., keras.optimizers.Optimizer],
    train: Arrays,
    test: Arrays,
) -> None:
    """Trains one configuration, or goes on with it, and writes its result.

    Args:
        options: of the command line; `options.method` is one of `METHODS`.
        make_model: a fresh model that returns logits.
        make_optimizer: the inner optimizer of a learning rate, which falls to zero.
        train: inputs and labels.
        test: inputs and labels, public: the accuracy on them is printed.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    result = options.output / f"{options.method}.json"
    if result.exists():
        print(f"{result} is there already: delete it to train again.")
        return
    keras.utils.set_random_seed(options.seed)
    model = make_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain = options.method == "non_private"
    num_examples = len(train[1])
    batch_size = options.plain_batch_size if plain else options.batch_size
    rate = options.plain_learning_rate if plain else options.learning_rate
    num_steps = options.epochs * (num_examples // batch_size)
    optimizer = make_optimizer(keras.optimizers.schedules.PolynomialDecay(rate, num_steps, 0.0))
    facts = {"method": options.method, "parameters": _trained(model)}
    if plain:
        data = {"x": train[0], "y": train[1], "batch_size": batch_size}
    else:
        plan = make_plan(options, num_examples)
        print(plan)
        if options.method.startswith("rgp"):
            bandmf.enable_rgp(
                model,
                options.rank,
                refresh_every=options.refresh_every if options.method == "rgp_banded" else 1,
                warmup_steps=plan.num_steps if options.carriers_of == "weights" else 0,
                head_scale=options.head_scale,
                restart=options.carriers_of == "weights",
            )
        bandmf.privatize(model)
        optimizer = bandmf.BandMFOptimizer(optimizer, plan, options.l2_norm_clip)
        data = {"x": plan.batches(*train)}
        facts |= {"epsilon": plan.epsilon(), "noise_multiplier": plan.noise_multiplier}
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    optimizer.build(model.trainable_variables)
    if not plain:
        layout = optimizer.run_state.noise.layout
        facts |= {"noised": layout.size, "ring": layout.size * (plan.num_bands - 1)}
    backup = options.output / f"{options.method}-backup"
    started = time.time()
    history = model.fit(
        **data,
        epochs=options.epochs,
        validation_data=test,
        validation_batch_size=500,
        callbacks=[keras.callbacks.BackupAndRestore(backup)],
    )
    facts |= {
        "accuracy": history.history["val_accuracy"],
        "seconds_per_epoch": (time.time() - started) / max(1, len(history.epoch)),
    }
    if not plain:
        print(bandmf.statement(model))
    result.write_text(json.dumps(facts, indent=2))
    shutil.rmtree(backup, ignore_errors=True)


def report(folder: pathlib.Path, title: str) -> None:
    """Prints the table of the results in a folder and draws their accuracies.

    Args:
        folder: where `run` left them.
        title: of the picture.
    """
    found = [folder / f"{method}.json" for method in METHODS]
    results = [json.loads(path.read_text()) for path in found if path.exists()]
    if not results:
        print(f"No results in {folder} yet: run the command with --method, one of {METHODS}.")
        return
    print(table(results))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for facts in results:
        curve = facts["accuracy"]
        axes.plot(range(1, len(curve) + 1), curve, marker="o", label=facts["method"])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel="accuracy on the test set", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "accuracy.png", dpi=150)
    print(f"Picture: {folder / 'accuracy.png'}")


def table(results: Sequence[dict]) -> str:
    """Returns the results, one a line."""
    lines = [
        f"{'method':<12} {'epsilon':>8} {'noise':>7} {'trained':>12} {'noised':>12} "
        f"{'noise state':>12} {'s / epoch':>10}  accuracy"
    ]
    for facts in results:
        private = "epsilon" in facts
        columns = (
            f"{facts['epsilon']:>8.3f} {facts['noise_multiplier']:>7.3f}"
            if private
            else f"{'-':>8} {'-':>7}"
        )
        noised = f"{facts['noised']:>12,} {facts['ring']:>12,}" if private else f"{'-':>12} " * 2
        lines.append(
            f"{facts['method']:<12} {columns} {facts['parameters']:>12,} {noised.rstrip():<25} "
            f"{facts['seconds_per_epoch']:>10.1f}  {facts['accuracy'][-1]:.4f}"
        )
    return "\n".join(lines)


def _trained(model: keras.Model) -> int:
    return sum(int(variable.value.shape.num_elements()) for variable in model.trainable_variables)
