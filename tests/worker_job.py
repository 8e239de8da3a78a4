"""A worker process of `tests/training/test_workers.py`: `-m tests.worker_job JOB FOLDER`."""

import os
import pathlib
import shutil
import signal
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.clipping.coordinates import coordinates_of
from tests import runs

EPOCHS = 4


def regression_plan():
    """Four bands, two epochs."""
    return runs.make_plan()


def regression_data():
    """Inputs and targets of `regression_model`."""
    x = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
    return x, x[:, :1].copy()


def regression_model(optimizer=None):
    """3501 weights, four chunks: each of two replicas owns half of them."""
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(500, activation="tanh", kernel_regularizer="l2"),
            keras.layers.Dense(1),
        ]
    )
    if optimizer is not None:
        bandmf.privatize(model).compile(optimizer, loss="mse")
        return model
    return runs.compiled(
        bandmf.privatize(model), regression_plan(), inner="adam", loss="mse", metrics=["mae"]
    )


def planning_model():
    """The same without a plan, which its first `fit` makes, with a clip norm that is adapted."""
    target = {"epsilon": 4.0, "delta": 1e-5, "num_bands": 3, "seed": 3}
    return regression_model(bandmf.BandMFOptimizer("sgd", clipping="adaptive", **target))


def carriers_plan():
    """Noise independent from step to step, as carriers of every step need it."""
    return runs.make_plan(num_bands=1)


def carriers_model():
    """Low-rank carriers that are redrawn in every step."""
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(40, activation="tanh"), keras.layers.Dense(1)]
    )
    bandmf.enable_rgp(model, 2, restart=True, warmup_steps=carriers_plan().num_steps)
    return runs.compiled(bandmf.privatize(model), carriers_plan(), loss="mse")


def covariance_plan():
    """As in the tests of one process."""
    return runs.make_plan(num_bands=6, num_steps=64, noise_multiplier=2.0)


def crash_plan():
    """Four epochs, and noise that a wrong step would show in the weights."""
    return runs.make_plan(num_steps=12 * EPOCHS)


def crash_model(replay=True):
    """A counting model of `crash_plan`, built, so that a backup can be restored into it."""
    model = runs.compiled(runs.counting_model(), crash_plan(), replay=replay)
    model.optimizer.build(model.trainable_variables)
    return model


def backup(folder, worker=0, **options):
    """Each worker saves into a folder of its own, and all restore what the chief saved."""
    own, chief = (pathlib.Path(folder) / f"backup{index}" for index in (worker, 0))
    if worker:
        shutil.rmtree(own, ignore_errors=True)
        if chief.exists():
            shutil.copytree(chief, own)
    return keras.callbacks.BackupAndRestore(own, double_checkpoint=True, **options)


class DieInThirdEpoch(keras.callbacks.Callback):
    """Kills its process without a chance to clean up."""

    def on_train_batch_end(self, batch, logs=None):
        """Dies once the optimizer has made 29 steps."""
        if self.model.optimizer.steps_done == 29:
            os.kill(os.getpid(), signal.SIGKILL)


def outcome(action):
    """Returns the error an action raises, as text, or what it returns."""
    try:
        return action()
    except Exception as error:  # What is raised is the result.
        return f"{type(error).__name__}: {error}"


def keras_alone(strategy, folder, worker):
    """What Keras does without the workarounds."""
    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    data = np.ones((8, 3), np.float32), np.ones((8, 1), np.float32)
    found = {"symbolic_build": outcome(lambda: str(model.fit(*data, verbose=0)))}
    with strategy.scope():
        model.optimizer.build(model.trainable_variables)
    model._maybe_symbolic_build = lambda *args, **kwargs: None
    model.train_function = None
    found["scalar_logs"] = outcome(lambda: str(model.fit(*data, verbose=0)))
    return found


def weights_of(model):
    """The trained weights by name, for a result file."""
    return {f"weight{i}": w.numpy() for i, w in enumerate(model.trainable_variables)}


def train(strategy, folder, worker):
    """A model with regularizer, metrics and validation data, then its evaluation by Keras."""
    x, y = regression_data()
    with strategy.scope():
        model = regression_model()
    batches = regression_plan().batches(x, y)
    history = model.fit(batches, epochs=2, verbose=0, validation_data=(x[:32], y[:32])).history
    return {
        "ring_bytes": model.optimizer.run_state.noise.state_bytes,
        **weights_of(model),
        **{f"history_{name}": values for name, values in history.items()},
    }


def rows(strategy, folder, worker):
    """Every worker makes the plan from its rows, and passes all of them."""
    with strategy.scope():
        model = planning_model()
    model.fit(*regression_data(), batch_size=8, epochs=2, validation_split=0.25, verbose=0)
    return {"plan": model.optimizer.plan.fingerprint, **weights_of(model)}


def carriers(strategy, folder, worker):
    """A run in low-rank coordinates: its weights and its carriers."""
    with strategy.scope():
        model = carriers_model()
    model.fit(carriers_plan().batches(*regression_data()), epochs=2, verbose=0)
    return {**weights_of(model), **coordinates_of(model.trainable_variables[0]).to_arrays()}


def covariance(strategy, folder, worker):
    """The weights of a run whose gradients are zero are its noise."""
    with strategy.scope():
        model = runs.compiled(runs.noise_model(), covariance_plan(), seed=None)
    return {"updates": runs.fit(model, covariance_plan().batches(*runs.noise_data()), epochs=6)}


def save(strategy, folder, worker):
    """A run of nine steps, saved with its noise key for another number of replicas."""
    with strategy.scope():
        model = crash_model()
    model.fit(crash_plan().batches(*runs.counting_data()), epochs=1, steps_per_epoch=9, verbose=0)
    model.save_weights(pathlib.Path(folder) / f"worker{worker}.weights.h5")
    return {}


def refusals(strategy, folder, worker):
    """Workers that do not run the same job, and data that is not split by this library."""
    x, y = runs.counting_data()
    with strategy.scope():
        model = runs.compiled(runs.counting_model(), runs.make_plan())
    other_rows = x[::-1].copy() if worker else x
    differs = outcome(
        lambda: model.fit(runs.make_plan().batches(other_rows, y), epochs=1, verbose=0)
    )
    with strategy.scope():
        plan = runs.make_plan(sampling="fixed_order", max_participations=2, min_separation=12)
        model = runs.compiled(runs.counting_model(), plan)
    return {"other_rows": differs, "arrays": outcome(lambda: model.fit(x, y, verbose=0, epochs=1))}


def resumed(strategy, folder, worker, *callbacks):
    """A run that backs up each epoch and goes on from what an earlier job left."""
    with strategy.scope():
        model = crash_model()
    model.fit(
        crash_plan().batches(*runs.counting_data()),
        epochs=EPOCHS,
        verbose=0,
        callbacks=[backup(folder, worker), *callbacks],
    )
    return {
        "weights": model.get_weights()[0],
        "steps": model.optimizer.steps_done,
        "restores": model.optimizer.run_state.restores,
    }


def dies(strategy, folder, worker):
    """The same run, but the last worker dies in the third epoch."""
    return resumed(strategy, folder, worker, *([DieInThirdEpoch()] if worker else []))


JOBS = {
    "together": (keras_alone, train, rows, carriers, covariance, save, refusals),
    "three": (train, covariance),
    "dies": (dies,),
    "resumed": (resumed,),
}


def main(job, folder):
    """Runs the parts of a job and writes their results to `worker<i>.npz`."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    worker = strategy.cluster_resolver.task_id
    results = {}
    for part in JOBS[job]:
        for name, value in part(strategy, folder, worker).items():
            results[f"{part.__name__}.{name}"] = np.asarray(value)
    np.savez(pathlib.Path(folder) / f"worker{worker}.npz", **results)
    # Keras and TensorFlow leave threads that wait for the other workers.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
