"""Opacus on the task of `examples/scattering.py`, tuned as that example tunes every mechanism.

For an environment with `torch` and `opacus`. It reads the features that the example left in its
output folder, and trains the same linear layer: DP-SGD with Poisson sampling, the same batch size,
epochs, momentum, clip norm, learning rates, held-out rows and seeds. The noise multiplier is that
of Opacus's own accountant.

    python benchmarks/scattering_opacus.py --data fashion_mnist.npz --output scattering --epsilon 3

With `--ours`, DP-SGD of this package trains too, in turns with Opacus and in the same process, to
compare the time of training; the environment then needs the package and its examples' libraries.
PyTorch is slower once TensorFlow is loaded: its first run, before ours, shows by how much.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Mapping

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import numpy as np
import torch
from opacus import PrivacyEngine

HELD_OUT = 5_000

Rows = Mapping[str, tuple[np.ndarray, np.ndarray]]


def load(options: argparse.Namespace) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Features and labels of the rows to train on, of those held out, and of the test set."""
    with np.load(options.data) as file:
        rows = {
            part: (
                np.load(options.output / f"{options.data.stem}-{part}.npy"),
                file[f"y_{part}"].astype("int64").ravel(),
            )
            for part in ("train", "test")
        }
    rows["held out"] = tuple(each[-HELD_OUT:] for each in rows["train"])
    rows["train"] = tuple(each[:-HELD_OUT] for each in rows["train"])
    return rows


def opacus_run(options: argparse.Namespace, rows: Rows, rate: float, seed: int) -> dict[str, float]:
    """Accuracies, the noise multiplier, and the seconds of planning and of training."""
    torch.manual_seed(seed)
    train = torch.utils.data.TensorDataset(*map(torch.from_numpy, rows["train"]))
    model = torch.nn.Linear(rows["train"][0].shape[1], 10)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    started = time.time()
    loss = torch.nn.CrossEntropyLoss()
    mode = {"grad_sample_mode": "ghost", "criterion": loss} if options.ghost else {}
    model, optimizer, *rest = PrivacyEngine(accountant="prv").make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), rate, momentum=0.9),
        data_loader=torch.utils.data.DataLoader(train, batch_size=options.batch_size),
        target_epsilon=options.epsilon,
        target_delta=options.delta,
        epochs=options.epochs,
        max_grad_norm=options.l2_norm_clip,
        **mode,
    )
    if options.ghost:
        loss = rest[0]
    loader = rest[-1]
    planned = time.time()
    for _ in range(options.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x.float()), y).backward()
            optimizer.step()
    ended = time.time()

    def accuracy(x: np.ndarray, y: np.ndarray) -> float:
        with torch.no_grad():
            parts = torch.from_numpy(x).split(1_000)
            found = torch.cat([model(part.float()).argmax(1) for part in parts])
        return float(np.mean(found.numpy() == y))

    return {
        **{on: accuracy(*rows[on]) for on in ("held out", "test")},
        "noise": optimizer.noise_multiplier,
        "planning": planned - started,
        "training": ended - planned,
    }


def our_run(options: argparse.Namespace, rows: Rows, rate: float, seed: int) -> dict[str, float]:
    """The same of this package: `compile` and `fit`."""
    import tuned  # first, for it imports `quiet`

    import keras
    import scattering

    import keras_bandmf as bandmf

    keras.utils.set_random_seed(seed)
    x, y = rows["train"]
    started = time.time()
    plan = bandmf.TrainingPlan.calibrate(
        num_examples=len(y),
        batch_size=options.batch_size,
        epochs=options.epochs,
        epsilon=options.epsilon,
        delta=options.delta,
        num_bands=1,
    )
    planned = time.time()
    batches = plan.batches(x, y.astype("int32"))
    model = scattering.make_model(x.shape[1])
    model = tuned.fitted(options, model, plan, rate, x=batches, epochs=options.epochs)
    ended = time.time()
    return {
        **{on: tuned.accuracy(model, rows[on]) for on in ("held out", "test")},
        "noise": plan.noise_multiplier,
        "planning": planned - started,
        "training": ended - planned,
    }


def main() -> None:
    """Tunes, trains, and prints lines of the example's table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--l2_norm_clip", type=float, default=0.1)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ghost", action="store_true", help="Opacus's fast gradient clipping")
    parser.add_argument("--ours", action="store_true", help="train DP-SGD of this package, too")
    options = parser.parse_args()
    options.clipping = "flat"  # which the example's `fitted` asks for
    # Opacus warns of its generator, and PyTorch of the hooks of Opacus, in every run.
    warnings.filterwarnings("ignore", module=r"opacus|torch")
    warnings.filterwarnings("ignore", message="Full backward hook")
    rows = load(options)
    budget = f"{options.epsilon:g}-{options.delta:g}"
    training = f"{options.batch_size}-{options.epochs}-{options.l2_norm_clip:g}"
    training += "-ghost" if options.ghost else ""
    kept = options.output / f"{options.data.stem}-{budget}-{training}-opacus.json"
    runs = json.loads(kept.read_text()) if kept.exists() else {}
    trained: dict[str, Callable] = {"opacus": opacus_run}
    if options.ours:
        trained["ours"] = our_run

    def run(name: str, rate: float, seed: int) -> dict[str, float]:
        key = f"{name}, rate {rate:g}, seed {seed}"
        if key not in runs:
            runs[key] = trained[name](options, rows, rate, seed)
            kept.write_text(json.dumps(runs, indent=1))
            print(f"{key}: {runs[key]}", flush=True)
        return runs[key]

    # One after the other at each rate and seed, so that both have the machine as it is then.
    tried = {(rate, name): run(name, rate, 0) for rate in options.rates for name in trained}
    best = {
        name: max(options.rates, key=lambda rate, of=name: tried[rate, of]["held out"])
        for name in trained
    }
    found = {
        (seed, name): run(name, best[name], 1 + seed)
        for seed in range(options.seeds)
        for name in trained
    }
    for name in trained:
        each = [found[seed, name] for seed in range(options.seeds)]
        scores = np.array([one["test"] for one in each])
        error = f" +- {scores.std(ddof=1) / len(scores) ** 0.5:.4f}" if len(scores) > 1 else ""
        training, planning = (
            np.mean([one[part] for one in each]) for part in ("training", "planning")
        )
        print(
            f"{name:<7}  noise {each[0]['noise']:.3f}   rate {best[name]:g}   "
            f"accuracy {scores.mean():.4f}{error}   "
            f"{training:.1f} s of training, {planning:.1f} s of planning"
        )


if __name__ == "__main__":
    main()
