"""Peak memory of a clipped step over the logical batch size: `python benchmarks/microbatches.py`.

Each measurement is a process of its own: it makes the model and the data, takes two clipped steps
in one compiled function, and reports its largest resident size (`ru_maxrss`) and that before the
first step, the data included. The difference is what the steps needed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")


def peak():
    """Largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name, batch, size):
    """Peak memory before and after two clipped steps, in MiB."""
    import clipping_models as models
    import keras
    import numpy as np
    import tensorflow as tf

    import keras_bandmf as bandmf

    keras.utils.set_random_seed(0)
    model = {"mlp": models.mlp, "cnn": models.cnn}[name]()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    x = tf.constant(rng.standard_normal((batch, *model.input_shape[1:]), dtype="float32"))
    y = tf.constant(rng.integers(0, 10, size=batch))

    @tf.function(autograph=False)
    def step(x, y):
        return bandmf.clipped_gradients(model, x, y, microbatch_size=size).sums

    before = peak()
    for _ in range(2):
        total = sum(float(tf.reduce_sum(tf.abs(s))) for s in step(x, y))
    if not np.isfinite(total):
        raise ValueError(f"Expected finite sums. Received: {total}")
    return {"before": before, "after": peak()}


def in_a_process(name, batch, size):
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--one", json.dumps([name, batch, size])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"])
    parser.add_argument("--batches", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--sizes", nargs="+", default=["128", "auto", "none"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    header = ("model", "microbatch", "batch", "start MiB", "peak MiB", "steps MiB")
    print("{:<6}{:>11}{:>8}{:>11}{:>10}{:>11}".format(*header))
    for name in options.models:
        for text in options.sizes:
            size = {"none": None, "auto": "auto"}[text] if text.isalpha() else int(text)
            for batch in options.batches:
                found = in_a_process(name, batch, size)
                before, after = found["before"], found["after"]
                print(
                    f"{name:<6}{text:>11}{batch:>8}{before:>11.0f}{after:>10.0f}"
                    f"{after - before:>11.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
