"""Training on data that is not in memory: the bits of data in memory, after a kill, too."""

import functools
import gc
import os
import pathlib
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.sampling.stores import RandomAccessStore, columns
from keras_bandmf.sampling.stores.workers import THREAD_NAME
from tests import crash_job, data_kinds, runs

LAWS = {
    "cyclic_poisson": {},
    "random_allocation": {"max_participations": 2},
    "fixed_order": {},
}


@pytest.fixture(autouse=True)
def _keep_the_constant(monkeypatch):
    monkeypatch.setattr(columns, "MAPPED_BYTES", columns.MAPPED_BYTES)


def plan_of(sampling):
    return runs.make_plan(sampling=sampling, **LAWS[sampling])


def trained(batches, plan, replicas=1, **options):
    model = runs.compiled_in_scope(replicas, runs.counting_model, plan, **options)
    return model, runs.fit(model, batches)


@functools.cache
def in_memory(sampling):
    plan = plan_of(sampling)
    return trained(plan.batches(*runs.counting_data()), plan)[1]


def reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]


@pytest.mark.parametrize("sampling", ["cyclic_poisson", "random_allocation"])
@pytest.mark.parametrize("kind", data_kinds.KINDS)
def test_every_kind_of_data_trains_to_the_bits_of_data_in_memory(kind, sampling, tmp_path):
    data, options = data_kinds.KINDS[kind](tmp_path)
    plan = plan_of(sampling)
    batches = plan.batches(*data, **options)
    assert isinstance(batches._store, RandomAccessStore)
    _, updates = trained(batches, plan)
    np.testing.assert_array_equal(updates, in_memory(sampling))
    gc.collect()
    assert not reading_threads()


@pytest.mark.parametrize(
    "options", [{"run_eagerly": True}, {"jit_compile": True}, {"replicas": 2}], ids=str
)
def test_eager_compiled_and_two_replicas(options, tmp_path):
    data, source_options = data_kinds.array_record(tmp_path)
    plan = plan_of("cyclic_poisson")
    _, ours = trained(plan.batches(*data, **source_options), plan, **options)
    _, theirs = trained(plan.batches(*runs.counting_data()), plan, **options)
    np.testing.assert_array_equal(ours, theirs)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("mapped", "converted")]


@pytest.mark.parametrize("kind", ["hdf5", "hugging_face", "array_record", *SLOW])
def test_a_killed_run_goes_on_bit_for_bit(kind, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "run").mkdir()
    data_kinds.KINDS[kind](tmp_path / "data")  # written before the first process
    rng = np.random.default_rng(1)
    killed = crash_job.run_with_kills(tmp_path / "run", True, 1, rng, (kind, tmp_path / "data"))
    assert killed["restores"] == 1 and killed["steps"] == crash_job.STEPS
    plan = crash_job.make_plan()
    model = runs.compiled(runs.counting_model(), plan)
    model.fit(plan.batches(*runs.counting_data()), verbose=0)
    np.testing.assert_array_equal(killed["weights"], model.get_weights()[0])


class Source:
    """One-hot rows, some of which fail."""

    def __init__(self, fails=lambda number: False, length=96):
        self.x, self.y = runs.counting_data()
        self.fails, self.length = fails, length

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        if self.fails(number):
            raise OSError("the disk is gone")
        return self.x[number], self.y[number]


def test_a_restored_run_refuses_a_source_in_another_order(tmp_path):
    plan = plan_of("cyclic_poisson")
    model, source = runs.compiled(runs.counting_model(), plan), Source()
    runs.fit(model, plan.batches(source), epochs=1)
    moved = Source()
    moved.x = np.roll(source.x, 1, axis=0)
    with pytest.raises(bandmf.PrivacyError, match="order of the rows"):
        runs.fit(model, plan.batches(moved), epochs=1)
    runs.fit(model, plan.batches(Source()), epochs=1)
    assert model.optimizer.steps_done == 24


class BreakSource(keras.callbacks.Callback):
    """Breaks a source when the first step begins: what `fit` reads before is whole."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def on_train_batch_begin(self, batch, logs=None):
        self.broken[0] = True


def test_a_row_that_fails_is_named_and_its_step_is_not_half_done():
    """Steps before it are whole, and training goes on with that step when it is readable."""
    plan = plan_of("fixed_order")
    expected = trained(plan.batches(*runs.counting_data()), plan)[1]
    broken, bad = [False], [None]
    source = Source(lambda number: broken[0] and number == bad[0])
    model = runs.compiled(runs.counting_model(), plan)
    batches = plan.batches(source, workers=3)
    first = runs.fit(model, batches, epochs=1, steps_per_epoch=1)
    bad[0] = int(batches.indices(10)[3])
    recorder = runs.WeightsOfEachStep()
    named = f"Row {bad[0]} of the source cannot be read: OSError"
    with pytest.raises(tf.errors.OpError, match=named):
        model.fit(batches, verbose=0, callbacks=[recorder, BreakSource(broken)])
    # Reading is ahead of training, perhaps by a whole epoch of this small run.
    assert model.optimizer.steps_done == 1 + len(recorder.weights)
    assert model.optimizer.steps_done in (10, 22)
    done = model.optimizer.steps_done
    start = -first.sum(axis=0)
    updates = np.concatenate([first, recorder.updates(start)])
    np.testing.assert_array_equal(model.get_weights()[0].ravel(), recorder.weights[-1])
    assert not reading_threads()
    broken[0] = False
    updates = np.concatenate([updates, runs.fit(model, batches, epochs=None)])
    assert len(updates) == 24 and done < 24
    np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)


class Stop(keras.callbacks.Callback):
    """Raises in the middle of training, while rows are read ahead."""

    def __init__(self, error):
        super().__init__()
        self.error, self.threads = error, 0

    def on_train_batch_end(self, batch, logs=None):
        self.threads = len(reading_threads())
        if batch == 3:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_threads_end_with_an_exception_in_fit_while_its_traceback_lives(error):
    plan = plan_of("cyclic_poisson")
    model = runs.compiled(runs.counting_model(), plan)
    stop = Stop(error("stop"))
    with pytest.raises(error) as raised:
        model.fit(plan.batches(Source(), workers=3), verbose=0, callbacks=[stop])
    assert raised.tb is not None and stop.threads
    assert not reading_threads()


STOPPED_FIT = """
import os, signal, sys, threading, time
import keras, numpy as np
import keras_bandmf as bandmf

class Slow:
    def __len__(self):
        return 2000

    def __getitem__(self, number):
        time.sleep(0.0005)
        return np.ones(4, np.float32), np.float32([number % 2])

class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1 and sys.argv[1] == "error":
            raise ValueError("stop")
        if batch == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
            os.kill(os.getpid(), signal.SIGINT)

plan = bandmf.TrainingPlan(
    num_examples=2000, batch_size=256, num_steps=40, noise_multiplier=1.0, delta=1e-5, num_bands=2)
model = bandmf.privatize(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]))
model.compile(
    optimizer=bandmf.BandMFOptimizer(keras.optimizers.SGD(0.1), plan, l2_norm_clip=1.0), loss="mse")
workers = int(sys.argv[2]) or None
try:
    model.fit(plan.batches(Slow(), workers=workers), verbose=0, callbacks=[Stop()])
except (KeyboardInterrupt, ValueError) as error:
    names = [thread.name for thread in threading.enumerate() if "bandmf" in thread.name]
    print("ended by", type(error).__name__, names, flush=True)
"""


@pytest.mark.parametrize(("how", "name"), [("error", "ValueError"), ("int", "KeyboardInterrupt")])
@pytest.mark.parametrize("workers", [0, 4])
def test_fit_ends_when_it_is_stopped_while_a_slow_source_is_read(how, name, workers):
    """Parts of a batch wait for a thread then; a process that hangs is killed."""
    root = pathlib.Path(bandmf.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_FIT, how, str(workers)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert f"ended by {name} []" in done.stdout, done.stderr
    assert done.returncode == 0


def test_threads_end_with_an_iterator():
    batches = plan_of("cyclic_poisson").batches(Source(), workers=3, seed=0)
    iterator = iter(batches)
    next(iterator)
    assert reading_threads()
    del iterator
    gc.collect()
    for _ in range(200):
        if not reading_threads():
            break
        time.sleep(0.02)
    assert not reading_threads()


def test_a_source_that_grows_between_two_fits_is_refused():
    plan = plan_of("cyclic_poisson")
    source = Source()
    model, batches = runs.compiled(runs.counting_model(), plan), plan.batches(source)
    runs.fit(model, batches, epochs=1)
    source.length = 97
    with pytest.raises(ValueError, match="length 97"):
        runs.fit(model, batches, epochs=1)


def test_weights_of_a_source_are_checked_before_a_step():
    class Weighted(Source):
        def __getitem__(self, number):
            return *super().__getitem__(number), np.nan if number == 95 else 1.0

    plan = plan_of("fixed_order")
    model = runs.compiled(runs.counting_model(), plan)
    with pytest.raises(ValueError, match="sample_weight.*finite"):
        plan.batches(Weighted())
    del model
