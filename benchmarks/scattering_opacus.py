"""Opacus on the task of `examples/scattering.py`, tuned as that example tunes every mechanism.

For an environment with `torch` and `opacus`. It reads the features that the example left in its
output folder, and trains the same linear layer: DP-SGD with Poisson sampling, the same batch size,
epochs, momentum, clip norm, learning rates, held-out rows and seeds. The noise multiplier is that
of Opacus's own accountant.

    python benchmarks/scattering_opacus.py --data fashion_mnist.npz --output scattering --epsilon 3
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
import warnings

import numpy as np
import torch
from opacus import PrivacyEngine

HELD_OUT = 5_000


def fitted(
    options: argparse.Namespace, rows: tuple[torch.Tensor, torch.Tensor], rate: float, seed: int
) -> tuple[torch.nn.Module, float]:
    """A trained model and its noise multiplier."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(rows[0].shape[1], 10)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*rows), batch_size=options.batch_size
    )
    model, optimizer, loader = PrivacyEngine(accountant="prv").make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), rate, momentum=0.9),
        data_loader=loader,
        target_epsilon=options.epsilon,
        target_delta=options.delta,
        epochs=options.epochs,
        max_grad_norm=options.l2_norm_clip,
    )
    for _ in range(options.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x.float()), y).backward()
            optimizer.step()
    return model, optimizer.noise_multiplier


def accuracy(model: torch.nn.Module, rows: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The share of rows whose class is found."""
    with torch.no_grad():
        found = torch.cat([model(x.float()).argmax(1) for x in rows[0].split(1_000)])
    return float((found == rows[1]).double().mean())


def main() -> None:
    """Tunes, trains, and prints a line of the example's table."""
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
    options = parser.parse_args()
    # Opacus warns of its generator, and PyTorch of the hooks of Opacus, in every run.
    warnings.filterwarnings("ignore", module=r"opacus|torch")
    with np.load(options.data) as file:
        rows = {
            part: (
                torch.from_numpy(np.load(options.output / f"{options.data.stem}-{part}.npy")),
                torch.from_numpy(file[f"y_{part}"].astype("int64").ravel()),
            )
            for part in ("train", "test")
        }
    rows["held out"] = tuple(each[-HELD_OUT:] for each in rows["train"])
    rows["train"] = tuple(each[:-HELD_OUT] for each in rows["train"])
    budget = f"{options.epsilon:g}-{options.delta:g}"
    training = f"{options.batch_size}-{options.epochs}-{options.l2_norm_clip:g}"
    kept = options.output / f"{options.data.stem}-{budget}-{training}-opacus.json"
    runs = json.loads(kept.read_text()) if kept.exists() else {}

    def run(rate: float, seed: int) -> dict[str, float]:
        key = f"rate {rate:g}, seed {seed}"
        if key not in runs:
            started = time.time()
            model, noise = fitted(options, rows["train"], rate, seed)
            runs[key] = {on: accuracy(model, rows[on]) for on in ("held out", "test")}
            runs[key] |= {"noise": noise, "seconds": time.time() - started}
            kept.write_text(json.dumps(runs, indent=1))
            print(f"opacus, {key}: {runs[key]}", flush=True)
        return runs[key]

    best = max(options.rates, key=lambda rate: run(rate, 0)["held out"])
    found = [run(best, 1 + i) for i in range(options.seeds)]
    scores = np.array([each["test"] for each in found])
    error = f" +- {scores.std(ddof=1) / len(scores) ** 0.5:.4f}" if len(scores) > 1 else ""
    print(
        f"opacus   noise {found[0]['noise']:.3f}   rate {best:g}   accuracy {scores.mean():.4f}"
        f"{error}   {np.mean([each['seconds'] for each in found]):.0f} s a run"
    )


if __name__ == "__main__":
    main()
