"""Data, time and memory of training steps, for any library; NumPy only, memory glibc only.

A library brings factories, `(name of model, batch size, sizes) -> step`, by the name of what they
make, "plain" among them. `answer` measures what the JSON on the command line asks for:

    {"model", "batch", "repeats", "sizes", "memory": a step, "timed": steps to interleave}
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

IMAGES = {"mlp": (784,), "wide": (784,), "cnn": (28, 28, 1)}
Step = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of the models; the defaults are those of the targets.

    Attributes:
        units: of the MLP's two hidden layers.
        filters: of the CNN's first convolution; the second has twice as many.
        vocabulary: tokens BERT knows.
        blocks: of BERT.
        hidden: BERT's width.
        tokens: of an example, of BERT and of the embedding model.
        rows: of the embedding model's table.
        width: of that table.
        units_over_time: of the LSTM.
        steps: of an example, for the LSTM.
        features: of a step.
        small_vocabulary: tokens the small encoders (T5, DeBERTa) know.
        small_blocks: of each of them.
        small_hidden: their width.
    """

    units: int = 1024
    filters: int = 32
    vocabulary: int = 30_522
    blocks: int = 4
    hidden: int = 256
    tokens: int = 64
    rows: int = 50_000
    width: int = 128
    units_over_time: int = 64
    steps: int = 50
    features: int = 32
    small_vocabulary: int = 1_000
    small_blocks: int = 2
    small_hidden: int = 128


# The sizes of the targets.
FULL = Sizes()


def data(name: str, batch: int, sizes: Sizes) -> tuple[Any, np.ndarray]:
    """(x, y): what the model of that name takes, channels last, and ten classes."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, size=batch).astype("int32")
    shapes = {**IMAGES, "lstm": (sizes.steps, sizes.features)}
    if name in shapes:
        return rng.standard_normal((batch, *shapes[name]), dtype="float32"), y
    small = sizes.small_vocabulary
    rows = {"bert": sizes.vocabulary, "embedding": sizes.rows, "t5": small, "deberta": small}[name]
    ids = rng.integers(0, rows, size=(batch, sizes.tokens)).astype("int32")
    if name == "embedding":
        return ids, y
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    return x | ({"segment_ids": np.zeros_like(ids)} if name == "bert" else {}), y


def status(field: str) -> float:
    """A size of this process in MiB: "VmRSS" now, "VmHWM" the peak since `forget_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def forget_peak() -> None:
    """Starts "VmHWM" anew, freed memory given back first: what went before would hide in it."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def memory(step: Step) -> float:
    """MiB a step needs at its peak above what the process had before the first one.

    The first two steps compile; what compiling takes for the time is not counted.
    """
    forget_peak()
    before = status("VmRSS")
    for _ in range(2):
        step()
    forget_peak()
    for _ in range(3):
        step()
    return status("VmHWM") - before


def seconds(steps: list[Step], repeats: int) -> np.ndarray:
    """Seconds of each step, interleaved: (repeats, number of steps)."""
    for _ in range(3):
        for step in steps:
            step()
    times = np.empty((repeats, len(steps)))
    for row in times:
        for column, step in enumerate(steps):
            start = time.perf_counter()
            step()
            row[column] = time.perf_counter() - start
    return times


def answer(factories: dict[str, Callable[[str, int, Sizes], Step]], task: str) -> None:
    """Prints one JSON line: {"memory": MiB, "seconds": {step: one a repeat}}."""
    asked = json.loads(task)
    sizes = Sizes(**asked["sizes"])
    steps = {}

    def step(kind: str) -> Step:
        if kind not in steps:
            steps[kind] = factories[kind](asked["model"], asked["batch"], sizes)
        return steps[kind]

    found = {"memory": memory(step(asked["memory"])), "seconds": {}}
    if asked["timed"]:
        times = seconds([step(kind) for kind in asked["timed"]], asked["repeats"])
        found["seconds"] = dict(zip(asked["timed"], times.T.tolist(), strict=True))
    print(json.dumps(found))


def versions(packages: list[str]) -> dict[str, str]:
    """The versions of packages in this environment."""
    return {package: importlib.metadata.version(package) for package in packages}


if __name__ == "__main__":
    print(json.dumps(versions(json.loads(sys.argv[1])["packages"])))
