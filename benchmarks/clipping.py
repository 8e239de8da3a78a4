"""Time and peak memory of a clipped step over a plain one, here and in three peers.

    python benchmarks/clipping.py [--models mlp cnn bert embedding lstm t5 deberta]
        [--batches 32 256] [--minutes 10] [--tfp_python PATH] [--jax_python PATH]
        [--opacus_python PATH]

PATHs are interpreters of environments with what `clipping_tfp.py`, `clipping_jax.py` and
`clipping_opacus.py` need; without one its rows say so. Every ratio is private over plain in the
same framework, so that the frameworks' own speeds cancel. Runs of both are interleaved in one
process, so that a busy machine slows both alike: the table shows medians, the median of the ratios
of neighboring runs and their quartiles. Memory is what a step takes at its peak above what the
process had before the first; each is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from clipping_measure import FULL, Sizes

HERE = pathlib.Path(__file__).resolve().parent
# The largest ratios of time aimed at, and of memory on every model.
TIME = {
    "mlp": 1.15,
    "cnn": 1.4,
    "bert": 1.15,
    "embedding": 1.15,
    "lstm": 1.5,
    "t5": 1.3,
    "deberta": 1.3,
}
MEMORY = 1.3
FASTER_THAN_TFP = 10
# What peers that write out the gradient of every example can hold.
BATCHES = {
    "mlp": (64, 256),
    "cnn": (64, 256),
    "bert": (8, 32),
    "embedding": (32, 128),
    "lstm": (32, 256),
    "t5": (8, 32),
    "deberta": (8, 32),
}


@dataclasses.dataclass(frozen=True)
class Library:
    """A program of this folder that runs steps.

    Attributes:
        name: in the table.
        program: its file.
        private: the steps to compare with its plain one.
        option: of the command line that names its interpreter; None for this one.
        packages: whose versions the heading names.
        models: it has steps for; None for all.
    """

    name: str
    program: str
    private: tuple[str, ...]
    option: str | None
    packages: tuple[str, ...]
    models: tuple[str, ...] | None = None


LIBRARIES = (
    Library("keras_bandmf", "clipping_ours.py", ("clipped",), None, ("tensorflow", "keras")),
    Library(
        "tf-privacy",
        "clipping_tfp.py",
        ("clipped",),
        "tfp_python",
        ("tensorflow-privacy", "tensorflow"),
    ),
    Library(
        "jax-privacy",
        "clipping_jax.py",
        ("core", "clipped", "with noise"),
        "jax_python",
        ("jax-privacy", "jax", "keras"),
    ),
    Library(
        "opacus",
        "clipping_opacus.py",
        ("hooks", "ghost"),
        "opacus_python",
        ("opacus", "torch"),
        ("mlp", "cnn", "bert", "embedding", "lstm"),
    ),
)


def run(python: str, program: str, task: dict) -> dict:
    """Runs one of the programs in a fresh process and returns what it printed.

    Raises:
        RuntimeError: it failed, or took longer than task["minutes"].
    """
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
    environment.pop("KERAS_BACKEND", None)
    if python == sys.executable:
        path = (str(HERE.parent), os.environ.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(p for p in path if p)
    command = [python, str(HERE / program), json.dumps(task)]
    limit = task["minutes"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60 * limit
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer in {limit:g} minutes") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def measured(python: str, library: Library, task: dict) -> list[dict]:
    """A row for each private step of a library.

    A step that fails (memory, an operation that is not supported) does not end the others.
    """
    rows = []
    kinds = [*library.private]
    plains = ["plain"]
    if library.option is None and task["model"] in ("bert", "embedding"):
        plains.append("dense")
    for plain in plains:
        needs = None
        for kind in kinds:
            try:
                own = run(python, library.program, {**task, "memory": kind, "timed": []})
                both = {**task, "memory": plain, "timed": [plain, kind]}
                found = run(python, library.program, both)
            except RuntimeError as error:
                rows.append({"kind": kind, "plain": plain, "error": str(error)})
                continue
            # Of several measurements of the plain step's memory, the first: they are the same.
            needs = needs or found["memory"]
            times = np.array([found["seconds"][plain], found["seconds"][kind]]) * 1e3
            low, middle, high = np.percentile(times[1] / times[0], [25, 50, 75])
            rows.append(
                {
                    "kind": kind,
                    "plain": plain,
                    "milliseconds": np.median(times, axis=1).tolist(),
                    "ratio": middle,
                    "quartiles": (low, high),
                    "mebibytes": (needs, own["memory"]),
                }
            )
    return rows


HEADER = (
    f"{'model':<10}{'batch':>6} {'library, step':<28}{'plain ms':>10}{'ms':>10}{'ratio':>8}"
    f"{'quartiles':>14}{'at most':>9}{'MiB':>8}{'plain':>8}{'ratio':>7}{'at most':>9}"
)


def line(library: Library, task: dict, row: dict) -> str:
    """A row of the table."""
    over = " over dense" if row["plain"] == "dense" else ""
    start = f"{task['model']:<10}{task['batch']:>6} {library.name + ', ' + row['kind'] + over:<28}"
    if "error" in row:
        return f"{start}  failed: {row['error'][:100]}"
    plain, private = row["milliseconds"]
    ours = library.option is None
    low, high = row["quartiles"]
    needs, takes = row["mebibytes"]
    # Less than a MiB is noise of the allocator.
    more = f"{takes / needs:.2f}" if needs > 1 else "-"
    time_limit, memory_limit = (TIME[task["model"]], MEMORY) if ours else ("", "")
    return (
        f"{start}{plain:>10.1f}{private:>10.1f}{row['ratio']:>8.2f}{f'{low:.2f}-{high:.2f}':>14}"
        f"{time_limit:>9}{takes:>8.0f}{needs:>8.0f}{more:>7}{memory_limit:>9}"
    )


def main(arguments: list[str] | None = None, sizes: Sizes = FULL) -> None:
    """Prints the table, and for each model whether the peers are behind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(TIME), choices=list(TIME))
    parser.add_argument("--batches", nargs="+", type=int, help="by default, by the model")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=10.0, help="the most a process may take")
    for library in LIBRARIES[1:]:
        parser.add_argument(f"--{library.option}", help=f"interpreter for {library.program}")
    options = parser.parse_args(arguments)
    pythons = {
        library: getattr(options, library.option) if library.option else sys.executable
        for library in LIBRARIES
    }
    for library, python in pythons.items():
        if python is not None:
            task = {"packages": library.packages, "minutes": options.minutes}
            found = run(python, "clipping_measure.py", task)
            print(f"{library.name}: " + ", ".join(" ".join(pair) for pair in found.items()))
    print(HEADER)
    for model in options.models:
        for batch in options.batches or BATCHES[model]:
            task = {"model": model, "batch": batch, "repeats": options.repeats}
            task["minutes"] = options.minutes
            task["sizes"] = dataclasses.asdict(sizes)
            ours = None
            for library, python in pythons.items():
                if library.models is not None and model not in library.models:
                    continue
                if python is None:
                    absent = f"absent (--{library.option} PATH)"
                    print(f"{model:<10}{batch:>6} {library.name:<28}  {absent}", flush=True)
                    continue
                for row in measured(python, library, task):
                    print(line(library, task, row) + _behind(library, row, ours), flush=True)
                    if library.option is None and "error" not in row:
                        ours = ours or row


def _behind(library: Library, row: dict, ours: dict | None) -> str:
    """How many times a peer's ratio is ours: "ahead" of it from 1 on."""
    if library.option is None or ours is None or "error" in row:
        return ""
    times = row["ratio"] / ours["ratio"]
    target = FASTER_THAN_TFP if library.name == "tf-privacy" else 1
    return f"   {times:.2f} of ours, target {target}"


if __name__ == "__main__":
    main()
