"""Draws what the accuracy examples found: the score of each mechanism over the learning rate.

    python examples/rates.py scattering/cifar10-4-1e-05-500-10-0.1 --titles CIFAR-10 --to rates.png

Each folder is one that scattering.py, convolutions.py, user_level.py, sst2.py or perplexity.py
made, and becomes a panel. The points are the runs that chose the learning rate, judged on the rows
that were held out; none of them is a result. Mechanisms that are not private are left out, for
their learning rates are others.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"DP-SGD": "tab:gray", "BandMF": "tab:blue"}
TUNING = re.compile(r"rate (\S+), seed 0")


def scores(path: pathlib.Path) -> dict[float, float]:
    """Learning rate -> score on the held-out rows, in rising order of the rates."""
    runs = json.loads(path.read_text())
    found = {m[1]: run["held out"] for key, run in runs.items() if (m := TUNING.fullmatch(key))}
    return dict(sorted((float(rate), score) for rate, score in found.items()))


def draw(folder: pathlib.Path, title: str, axes: plt.Axes) -> None:
    """Draws one panel.

    Args:
        folder: of the results of one task.
        title: of the panel.
        axes: to draw on.
    """
    rates = set()
    for path in sorted(folder.glob("*.json"), reverse=True):
        if path.name.startswith("plan-") or path.stem == "not_private":
            continue
        label = path.stem.replace("_", " ")
        color = next((c for name, c in COLORS.items() if name in label), None)
        found = scores(path)
        rates.update(found)
        style = "o-" if "allocated" in label else "s:"
        axes.plot(list(found), list(found.values()), style, color=color, label=label)
    if not axes.lines:
        raise SystemExit(f"Expected a folder with runs of private mechanisms. Received: {folder}.")
    axes.set(title=title, xscale="log", xlabel="learning rate", ylabel="score on held-out rows")
    axes.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def main(arguments: list[str] | None = None) -> None:
    """Draws a panel for each folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=pathlib.Path, nargs="+")
    parser.add_argument("--titles", nargs="+", help="of the panels; by default the folders' names")
    parser.add_argument("--to", type=pathlib.Path, required=True, help="file of the picture")
    options = parser.parse_args(arguments)
    titles = options.titles or [folder.name for folder in options.folders]
    if len(titles) != len(options.folders):
        parser.error("--titles needs one for each folder")
    count = len(titles)
    figure, panels = plt.subplots(
        1, count, figsize=(4.6 * count, 3.6), layout="constrained", squeeze=False
    )
    for folder, title, axes in zip(options.folders, titles, panels[0], strict=True):
        draw(folder, title, axes)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.to, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
