"""Small private runs whose weights show exactly what the mechanism did."""

import functools
import pathlib

import keras
import numpy as np
import tensorflow as tf

import keras_bandmf as bandmf


def mirrored(replicas=2):
    """One MirroredStrategy a process: TensorFlow numbers the collectives of each from 100 anew."""
    return _mirrored(replicas)


@functools.cache
def _mirrored(replicas):
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def in_scope(replicas, make):
    """Makes something under one device or a MirroredStrategy."""
    if replicas == 1:
        return make()
    with mirrored(replicas).scope():
        return make()


def make_plan(num_bands=4, num_steps=24, noise_multiplier=1.0, **changes):
    """A plan over 96 examples: batches of 8 expected, 12 steps an epoch."""
    arguments = {
        "num_examples": 96,
        "batch_size": 8,
        "num_steps": num_steps,
        "noise_multiplier": noise_multiplier,
        "delta": 1e-5,
        "num_bands": num_bands,
    }
    return bandmf.TrainingPlan(**(arguments | changes))


@keras.saving.register_keras_serializable(package="keras_bandmf_tests")
def prediction_loss(y_true, y_pred):
    """A loss whose gradient by the prediction is one."""
    return y_pred[:, 0] + 0.0 * y_true


def compiled(
    model, plan, seed=3, clip=1.0, inner=None, loss=prediction_loss, replay=False, **options
):
    """Compiles with SGD at learning rate one, so that weights are minus the sum of updates."""
    inner = inner or keras.optimizers.SGD(1.0)
    optimizer = bandmf.BandMFOptimizer(inner, plan, l2_norm_clip=clip, seed=seed, replay=replay)
    model.compile(optimizer=optimizer, loss=loss, **options)
    return model


def compiled_in_scope(replicas, make_model, plan, **options):
    """Makes and compiles a model under one device or a MirroredStrategy."""
    return in_scope(replicas, lambda: compiled(make_model(), plan, **options))


def counting_model(num_examples=96):
    """One weight an example: with one-hot rows, the weight counts participations."""
    model = keras.Sequential(
        [keras.Input((num_examples,)), keras.layers.Dense(1, use_bias=False, name="count")]
    )
    model.layers[0].kernel.assign(np.zeros((num_examples, 1), np.float32))
    return bandmf.privatize(model)


def counting_data(num_examples=96):
    """One-hot rows: example i moves weight i and no other."""
    return np.eye(num_examples, dtype=np.float32), np.zeros(num_examples, np.float32)


def noise_model(units=1000):
    """A model whose gradients are zero on zero inputs: its weights are the noise alone."""
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(units, use_bias=False, kernel_initializer="zeros", name="noise"),
        ]
    )
    return bandmf.privatize(model)


def regularized_model(units):
    """A model with a regularizer, whose noise moves it about as much as its gradients."""
    keras.utils.set_random_seed(4)
    return keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(units, activation="tanh", kernel_regularizer="l2"),
            keras.layers.Dense(1),
        ]
    )


def regularized_data():
    """Rows and targets of `regularized_model`."""
    x = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
    return x, x[:, :1].copy()


def noise_data(num_examples=96):
    """Zero inputs."""
    return np.zeros((num_examples, 2), np.float32), np.zeros(num_examples, np.float32)


class WeightsOfEachStep(keras.callbacks.Callback):
    """Records the flat weights after each step."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_train_batch_end(self, batch, logs=None):
        """Copies the weights."""
        flat = [np.ravel(keras.ops.convert_to_numpy(w)) for w in self.model.trainable_variables]
        self.weights.append(np.concatenate(flat))

    def updates(self, start=0.0):
        """Returns minus the change of each step, (steps, d) float64."""
        weights = np.array(self.weights, np.float64)
        first = np.broadcast_to(start, weights[0].shape)
        return -np.diff(np.concatenate([first[None], weights]), axis=0)


def fit(model, batches, epochs=2, **options):
    """Fits quietly and returns the updates of each step."""
    start = np.concatenate([np.ravel(w.numpy()) for w in model.trainable_variables])
    recorder = WeightsOfEachStep()
    callbacks = [recorder, *options.pop("callbacks", [])]
    model.fit(batches, epochs=epochs, verbose=0, callbacks=callbacks, **options)
    return recorder.updates(start)


def whitened_statistic(plan, updates, clip=1.0):
    """Chi-square statistic and its degrees of freedom of `C @ updates` being white noise."""
    stddev = plan.noise_stddev(clip) / plan.batch_size
    white = plan.strategy.materialize()[: len(updates), : len(updates)] @ updates / stddev
    steps, count = white.shape
    lower = np.tril_indices(steps)
    scores = np.sqrt(count) * (white @ white.T / count - np.eye(steps))[lower]
    variances = np.where(lower[0] == lower[1], 2.0, 1.0)
    return (scores**2 / variances).sum(), scores.size


def secrets(model):
    """The bytes that must not leave: keys, and rows of the ring."""
    state = model.optimizer.run_state
    rows = [row[:8].tobytes() for row in state.noise.get_ring()]
    words = np.concatenate([state.sampler_key, state.noise.get_key(), state.get_mask_key()])
    return [*rows, *[word.tobytes() for word in words]]


def all_bytes(folder):
    """Every byte below a folder."""
    return b"".join(p.read_bytes() for p in pathlib.Path(folder).rglob("*") if p.is_file())
