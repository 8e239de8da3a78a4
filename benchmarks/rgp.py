"""Time and memory of a step on a BERT: `python benchmarks/rgp.py plain | flat | rgp`.

A process each, since the peak of the memory belongs to the process. The model is that of
`examples/bert_sst2.py` (6 layers, 384 wide), frozen embeddings, Adam. `--num_bands` gives the
private ones correlated noise: the ring of `flat` holds copies of all weights, that of `rgp` of the
coordinates.
"""

import argparse
import os
import pathlib
import resource
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import bert_sst2
import keras
import numpy as np
import tensorflow as tf

import keras_bandmf as bandmf


def make_optimizer(options):
    """Adam, private unless the method is plain."""
    inner = keras.optimizers.Adam(1e-4)
    if options.method == "plain":
        return inner
    strategy = bandmf.strategies.BlockDiagonalStrategy.optimize(
        1000, options.num_bands, options.num_bands
    )
    plan = bandmf.TrainingPlan(
        num_examples=1000 * options.batch_size,
        batch_size=options.batch_size,
        num_steps=1000,
        noise_multiplier=1.0,
        delta=1e-6,
        strategy=strategy,
        sampling="fixed_order",
        max_participations=1,
        min_separation=1000,
    )
    return bandmf.BandMFOptimizer(inner, plan)


def main():
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=["plain", "flat", "rgp"])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--num_bands", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    model = bert_sst2.make_model(bert_sst2.default_preset(), options.length)
    if options.method == "rgp":
        bandmf.enable_rgp(model, options.rank, refresh_every=options.num_bands)
    if options.method != "plain":
        bandmf.privatize(model)
    optimizer = make_optimizer(options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    shape = (options.batch_size, options.length)
    x = {
        "token_ids": rng.integers(1000, 20000, shape).astype(np.int32),
        "padding_mask": np.ones(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
    }
    data = tf.data.Dataset.from_tensors((x, rng.integers(0, 2, options.batch_size))).repeat()
    model.make_train_function()
    step, batches = model.train_function, iter(data)
    times, cpu = [], []
    for _ in range(options.steps + 1):  # the first one traces
        started, used = time.perf_counter(), time.process_time()
        keras.tree.map_structure(np.asarray, step(batches))
        times.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    ring = 0 if options.method == "plain" else optimizer.run_state.noise.state_bytes / 2**20
    print(
        f"{options.method:<6} bands {options.num_bands}: {np.median(times[1:]):.2f} s a step, "
        f"{np.median(cpu[1:]):.2f} s of processor time; peak {peak:.2f} GiB; ring {ring:.1f} MiB"
    )


if __name__ == "__main__":
    main()
