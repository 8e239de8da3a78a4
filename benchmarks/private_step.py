"""A whole private training step over a plain Keras step: `python benchmarks/private_step.py`.

Both are Keras's compiled `train_step` with SGD and an accuracy metric on the same batch. The
private one clips, draws noise, adds it and updates. Runs are interleaved; the table shows medians,
their ratio, and what the noise alone costs.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import clipping_models as models
import keras
import numpy as np
import tensorflow as tf
from clipping_measure import FULL, data, seconds

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


def make_plan(batch_size, num_bands):
    """A plan long enough for the benchmark."""
    return bandmf.TrainingPlan(
        num_examples=100 * batch_size,
        batch_size=batch_size,
        num_steps=10_000,
        noise_multiplier=1.0,
        delta=1e-6,
        num_bands=num_bands,
    )


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


def make_steps(name, batch, num_bands):
    """(plain step, private step, noise alone, parameters): functions without arguments."""
    plain = compiled_model(name, keras.optimizers.SGD(1e-3))
    plan = make_plan(batch, num_bands)
    private = bandmf.privatize(
        compiled_model(name, bandmf.BandMFOptimizer(keras.optimizers.SGD(1e-3), plan))
    )
    x, y = keras.tree.map_structure(tf.constant, data(name, batch, FULL))
    mask = tf.ones([batch], tf.bool)
    bandmf.clipping.check_model(private, x, y)
    private.optimizer.build(private.trainable_variables)
    noise = bandmf.noise.CorrelatedNoise(
        plan.strategy, 1.0, [v.shape for v in private.trainable_variables]
    )

    plain_step = tf.function(lambda: plain.train_step((x, y)), autograph=False)
    private_step = tf.function(
        lambda: private.train_step({"x": x, "y": y, "mask": mask}), autograph=False
    )
    noise_row = tf.function(lambda: [tf.reduce_sum(part) for part in noise.next()], autograph=False)

    def run_private():
        with private.optimizer.accepting("the benchmark"):
            return private_step()["loss"].numpy()

    steps = (lambda: plain_step()["loss"].numpy(), run_private, lambda: noise_row()[0].numpy())
    return steps, private.count_params()


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    print(
        f"{'model':<10}{'batch':>6}{'bands':>6}{'plain ms':>10}{'private ms':>12}{'ratio':>7}"
        f"{'at most':>9}{'noise ns/parameter':>20}"
    )
    for name, batch, num_bands, limit in CASES:
        steps, parameters = make_steps(name, batch, num_bands)
        plain, private, noise = np.median(seconds(steps, options.repeats), axis=0)
        print(
            f"{name:<10}{batch:>6}{num_bands:>6}{plain * 1e3:>10.1f}{private * 1e3:>12.1f}"
            f"{private / plain:>7.2f}{limit or '':>9}{noise / parameters * 1e9:>20.1f}",
            flush=True,
        )
        keras.backend.clear_session()


if __name__ == "__main__":
    main()
