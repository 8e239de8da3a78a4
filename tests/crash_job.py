"""Training processes of `tests/training/test_crash.py`, each killed at any moment but the last."""

import json
import multiprocessing
import os
import pathlib
import time

import keras
import numpy as np

import keras_bandmf as bandmf
from tests import data_kinds, runs

STEPS = 96
# Backups take longer than these epochs: a random moment is likely inside one.
STEPS_PER_EPOCH = 3


def make_plan():
    """Six bands over 96 steps."""
    return runs.make_plan(num_bands=6, num_steps=STEPS, noise_multiplier=2.0)


class Progress(keras.callbacks.Callback):
    """Counts steps for the parent process, and keeps the weights after each."""

    def __init__(self, counter, folder):
        super().__init__()
        self._counter, self._folder = counter, folder

    def on_train_batch_end(self, batch, logs=None):
        """A step that is made again overwrites what it left the first time."""
        step = self.model.optimizer.steps_done
        np.save(self._folder / f"step{step}.npy", self.model.get_weights()[0])
        self._counter.value += 1


def train(folder, replay, counter, kind=None):
    """Trains to the end of the plan, from the last backup if there is one.

    `kind` names a kind of `data_kinds`, and the folder of its files.
    """
    folder = pathlib.Path(folder)
    metadata = folder / "backup" / "training_metadata.json"
    try:
        json.loads(metadata.read_text())
    except ValueError:
        # Keras writes it in place. The step is the optimizer's; Keras's epoch may be lost.
        metadata.unlink()
    except FileNotFoundError:
        pass
    make_model, data = (
        (runs.counting_model, runs.counting_data())
        if replay
        else (runs.noise_model, runs.noise_data())
    )
    options = {}
    if kind is not None:
        data, options = data_kinds.KINDS[kind[0]](pathlib.Path(kind[1]))
    model = runs.compiled(make_model(), make_plan(), seed=3 if replay else None, replay=replay)
    model.optimizer.build(model.trainable_variables)
    model.fit(
        make_plan().batches(*data, **options),
        epochs=STEPS // STEPS_PER_EPOCH,
        steps_per_epoch=STEPS_PER_EPOCH,
        verbose=0,
        callbacks=[
            Progress(counter, folder),
            keras.callbacks.BackupAndRestore(folder / "backup", double_checkpoint=True),
        ],
    )
    statement = bandmf.statement(model)
    np.savez(
        folder / "end.npz",
        steps=model.optimizer.steps_done,
        restores=model.optimizer.run_state.restores,
        charged=statement.steps_charged,
        weights=model.get_weights()[0],
    )


def run_with_kills(folder, replay, kills, rng, kind=None):
    """Runs `train` until it ends by itself, killed `kills` times at random moments before.

    Returns:
        What the last process saved.
    """
    # The server has imported all, and started no TensorFlow runtime: children start fast.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.crash_job"])
    for attempt in range(kills + 1):
        counter = context.Value("i", 0)
        process = context.Process(target=train, args=(os.fspath(folder), replay, counter, kind))
        process.start()
        if attempt < kills:
            # With data of a `kind` the backup before the last is whole, too.
            first = 1 if kind is None else 3 * STEPS_PER_EPOCH
            last = rng.integers(first, first + 2 * STEPS_PER_EPOCH)
            while counter.value < last and process.is_alive():
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
        process.join()
        expected = (-9, 0) if attempt < kills else (0,)
        if process.exitcode not in expected:
            raise RuntimeError(f"Attempt {attempt} ended with exit code {process.exitcode}.")
        if process.exitcode == 0:
            break
    return dict(np.load(folder / "end.npz"))
