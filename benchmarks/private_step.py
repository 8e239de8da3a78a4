"""A private training step over a plain one, inside `fit`: `python benchmarks/private_step.py`.

Both are steps of Keras's `fit` with SGD and an accuracy metric, timed from the begin of a batch to
its end, reading of the data not included. The private one clips, draws noise, adds it and updates;
it has the masked row that every private batch has. Calls of `fit` take turns; the table shows
medians, their ratio, and what the noise alone costs.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import clipping_models as models
import keras
import numpy as np
import tensorflow as tf
from clipping_measure import FULL, data

import keras_bandmf as bandmf

# (model, batch size, bands, largest ratio allowed or None)
CASES = [
    ("cnn", 256, 1, 1.5),
    ("cnn", 256, 16, None),
    ("mlp", 1024, 1, 1.35),
    ("mlp", 1024, 16, None),
    ("bert", 32, 1, None),
    ("bert", 128, 1, 1.25),
    ("bert", 128, 16, None),
    ("embedding", 256, 1, None),
]


# Steps of an epoch, at least the largest number of bands, and of a call of `fit`.
EPOCH_STEPS, FIT_STEPS = 20, 5


def make_plan(batch_size, num_bands):
    """A plan in fixed order, whose batches all have the same size."""
    return bandmf.TrainingPlan(
        num_examples=EPOCH_STEPS * batch_size,
        batch_size=batch_size,
        num_steps=10_000,
        noise_multiplier=1.0,
        delta=1e-6,
        num_bands=num_bands,
        sampling="fixed_order",
    )


class StepTimes(keras.callbacks.Callback):
    """Seconds of every step, its result included."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Waits for the result and stops it."""
        float(logs["loss"])
        self.seconds.append(time.perf_counter() - self._start)


def compiled_model(name, optimizer):
    """A model with the loss and metric of both steps."""
    keras.utils.set_random_seed(0)
    model = models.BUILDERS[name]()
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def measured(name, batch, num_bands, repeats):
    """(seconds of a plain step, of a private one, of the noise alone; number of parameters)."""
    plain = compiled_model(name, keras.optimizers.SGD(1e-3))
    plan = make_plan(batch, num_bands)
    private = bandmf.privatize(
        compiled_model(name, bandmf.BandMFOptimizer(keras.optimizers.SGD(1e-3), plan))
    )
    x, y = data(name, batch, FULL)
    whole = keras.tree.map_structure(
        lambda a: np.concatenate([np.asarray(a)] * EPOCH_STEPS), (x, y)
    )
    batches = plan.batches(*whole)
    stream = tf.data.Dataset.from_tensors((x, y)).repeat().prefetch(2)
    noise = bandmf.noise.CorrelatedNoise(
        plan.strategy, 1.0, [v.shape for v in private.trainable_variables]
    )
    noise_row = tf.function(lambda: [tf.reduce_sum(part) for part in noise.next()], autograph=False)

    def fit_steps(model, batches):
        times = StepTimes()
        model.fit(batches, steps_per_epoch=FIT_STEPS, verbose=0, callbacks=[times], epochs=1)
        return times.seconds[1:]  # the first of a fit may trace

    def noise_steps():
        found = []
        for _ in range(FIT_STEPS):
            start = time.perf_counter()
            noise_row()[0].numpy()
            found.append(time.perf_counter() - start)
        return found[1:]

    ways = (lambda: fit_steps(plain, stream), lambda: fit_steps(private, batches), noise_steps)
    found = [[], [], []]
    for round_ in range(1 + -(-repeats // (FIT_STEPS - 1))):
        for way, seconds in zip(ways, found, strict=True):
            seconds += way() if round_ else way()[:0]
    return [np.median(seconds) for seconds in found], private.count_params()


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--models", nargs="*", default=None, help="cnn, mlp, bert, embedding")
    options = parser.parse_args()
    # A GPU would use it in the plain step; the private one refuses it.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    print(
        f"{'model':<10}{'batch':>6}{'bands':>6}{'plain ms':>10}{'private ms':>12}{'ratio':>7}"
        f"{'at most':>9}{'noise ns/parameter':>20}"
    )
    for name, batch, num_bands, limit in CASES:
        if options.models is not None and name not in options.models:
            continue
        (plain, private, noise), parameters = measured(name, batch, num_bands, options.repeats)
        print(
            f"{name:<10}{batch:>6}{num_bands:>6}{plain * 1e3:>10.1f}{private * 1e3:>12.1f}"
            f"{private / plain:>7.2f}{limit or '':>9}{noise / parameters * 1e9:>20.1f}",
            flush=True,
        )
        keras.backend.clear_session()


if __name__ == "__main__":
    main()
