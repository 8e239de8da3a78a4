"""Memory of clipped gradients over the logical batch size, beside what "auto" reckons with.

    python benchmarks/microbatches.py [--models mlp cnn bert] [--batches 256 1024 4096]
        [--sizes none auto 128]

Each measurement is a process of its own: what computing the clipped sums takes at its peak above
what the process had before, the data included, once it is compiled (`clipping_measure.memory`).
"reckoned" is what the trace says about one microbatch (`paths.liveness`); "auto" allows 1 GiB that
grows with the examples. The last column is measured over reckoned.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")


def measure(name: str, batch: int, size: int | str | None) -> dict:
    """The memory in MiB, measured and reckoned, and the size of a microbatch."""
    import clipping_models as models
    import keras
    import tensorflow as tf
    from clipping_measure import FULL, data, memory

    import keras_bandmf as bandmf
    from keras_bandmf.clipping.paths.microbatches import (
        TAKEN_FOR_ALIVE,
        rows_at_a_time,
        step_memory,
    )

    model = models.compiled(name)
    x, y = keras.tree.map_structure(tf.constant, data(name, batch, FULL))
    most = rows_at_a_time(model, x, y, None, None) if size == "auto" else size or batch
    chunks = -(-batch // min(most, batch))
    rows = -(-batch // chunks)

    @tf.function(autograph=False)
    def step(x, y):
        return bandmf.clipped_gradients(model, x, y, microbatch_size=size).sums

    found = memory(lambda: step(x, y))
    # A chunk has one more row, which is masked.
    alive = step_memory(model, x, y, None, None).peak(rows + (rows < batch))
    return {"rows": rows, "measured": found, "reckoned": TAKEN_FOR_ALIVE * alive / 2**20}


def in_a_process(*task) -> dict:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--one", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn", "bert"])
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--sizes", nargs="+", default=["none", "auto", "128"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    columns = ("model", "microbatch", "batch", "rows", "MiB", "reckoned", "ratio")
    print("{:<10}{:>11}{:>8}{:>8}{:>8}{:>10}{:>8}".format(*columns))
    for name in options.models:
        for text in options.sizes:
            size = {"none": None, "auto": "auto"}[text] if text.isalpha() else int(text)
            for batch in options.batches:
                found = in_a_process(name, batch, size)
                measured, reckoned = found["measured"], found["reckoned"]
                print(
                    f"{name:<10}{text:>11}{batch:>8}{found['rows']:>8}{measured:>8.0f}"
                    f"{reckoned:>10.0f}{measured / reckoned:>8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
