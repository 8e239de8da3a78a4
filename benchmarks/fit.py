"""A private `fit` over Keras's own, by the epoch: `python benchmarks/fit.py`.

For each case one process trains a plain and a private model on the same arrays, in two threads that
take turns at whole epochs, so that whatever else the machine does strikes both. The table has the
medians of the epochs after the first, and the median and the quartiles of the ratios of neighbors.
`--starts` measures the start in fresh processes, which take turns, too: what the first epoch takes
beyond a later one, and for a private model, `plan.batches`. `--pieces` says where the time goes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import json
import os
import subprocess
import sys
import threading
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import clipping_models as models
import keras
import numpy as np
import tensorflow as tf
from clipping_measure import FULL, data

import keras_bandmf as bandmf

BATCHES = {"mlp": 1024, "cnn": 256, "bert": 32, "lstm": 64}
LAWS = ("cyclic_poisson", "random_allocation", "fixed_order")
# The largest ratio that is aimed at; of the start, seconds above the plain one.
GOALS = {"mlp": 1.3, "cnn": 1.3, "bert": 1.15}
START_GOAL = 1.0


class Turns(keras.callbacks.Callback):
    """Times the epochs of one `fit`, each from when its turn comes to when it passes it on."""

    def __init__(self, own: threading.Semaphore, after: threading.Semaphore):
        super().__init__()
        self.seconds, self.processor = [], []
        self._own, self._after = own, after

    def on_epoch_begin(self, epoch, logs=None):
        """Waits for its turn; the one of the first epoch began before `fit`."""
        if epoch:
            self._own.acquire()
        self._begin = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        """Stops the clocks and passes the turn on."""
        self.seconds.append(time.perf_counter() - self._begin[0])
        self.processor.append(time.process_time() - self._begin[1])
        self._after.release()


@functools.cache
def distribution(replicas):
    """The same for both ways: the collective operations of two would take each other's keys."""
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def compiled_model(task, optimizer):
    """A model with the loss of both ways, under the distribution of the task."""
    replicas = task["replicas"]
    with distribution(replicas).scope() if replicas > 1 else tf.device(None):
        keras.utils.set_random_seed(0)
        model = models.BUILDERS[task["model"]](task_sizes(task))
        model.compile(
            optimizer(),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"] if task["metrics"] else None,
            jit_compile={"auto": "auto", "on": True, "off": False}[task["jit"]],
        )
    return model


def task_sizes(task):
    """The shapes of the model."""
    return type(FULL)(**task["sizes"])


def arrays(task):
    """The rows of an epoch, as (x, y)."""
    batch = data(task["model"], task["batch"], task_sizes(task))
    repeat = lambda a: np.concatenate([np.asarray(a)] * task["steps"])  # noqa: E731
    return keras.tree.map_structure(repeat, batch)


def make_plan(task, epochs):
    """A plan of so many epochs."""
    return bandmf.TrainingPlan(
        num_examples=task["batch"] * task["steps"],
        batch_size=task["batch"],
        epochs=epochs,
        noise_multiplier=1.0,
        delta=1e-6,
        num_bands=task["bands"],
        sampling=task["law"],
    )


def trainer(kind, task, epochs):
    """A function that calls `fit` with callbacks, and the model."""
    x, y = arrays(task)
    if kind == "plain":
        model = compiled_model(task, lambda: keras.optimizers.SGD(1e-3))
        fit = lambda **more: model.fit(x, y, batch_size=task["batch"], **more)  # noqa: E731
        return fit, model
    plan = make_plan(task, epochs)
    model = bandmf.privatize(
        compiled_model(task, lambda: bandmf.BandMFOptimizer(keras.optimizers.SGD(1e-3), plan))
    )
    return lambda **more: model.fit(plan.batches(x, y), **more), model


def epochs_in_turns(task):
    """Seconds, and seconds of processors, of each later epoch of a plain and a private `fit`."""
    epochs = task["epochs"] + 1
    ways = [trainer(kind, task, epochs)[0] for kind in ("plain", "private")]
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    clocks = [Turns(turns[0], turns[1]), Turns(turns[1], turns[0])]

    def train(i):
        try:
            turns[i].acquire()
            ways[i](epochs=epochs, verbose=0, callbacks=[clocks[i]])
        finally:
            turns[1 - i].release(epochs)  # if it failed, the other one must not wait for it

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(train, i) for i in range(2)]:
            done.result()
    return [[clock.seconds[1:], clock.processor[1:]] for clock in clocks]


def start(task, kind):
    """Seconds, and of processors, of a `fit` beyond as many epochs like the later ones."""
    epochs = 4
    fit, _ = trainer(kind, task, epochs)
    free = threading.Semaphore(epochs)
    clock = Turns(free, free)
    begin = time.perf_counter(), time.process_time()
    fit(epochs=epochs, verbose=0, callbacks=[clock])
    found = []
    ends = time.perf_counter(), time.process_time()
    for first, last, later in zip(begin, ends, (clock.seconds, clock.processor), strict=True):
        found.append(last - first - sum(later[1:]) - float(np.median(later[1:])))
    return found


def pieces(task):
    """Milliseconds of processors for each piece of a private step, and for a plain gradient."""
    plan = make_plan(task, 100)
    x, y = arrays(task)
    batches = plan.batches(x, y)
    batches.bind(np.random.SeedSequence(0).generate_state(2, np.uint64))
    model = compiled_model(task, lambda: keras.optimizers.SGD(1e-3))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    steps = itertools.cycle(range(plan.num_steps))
    few = bool(model.jit_compile)
    stream = iter(batches.dataset(task["replicas"], few_sizes=few))
    padded = batches.batch(0, task["replicas"], few_sizes=few)
    whole = batches.rows(np.arange(task["batch"]))
    variables = model.trainable_variables
    noise = bandmf.noise.CorrelatedNoise(plan.strategy, 1.0, [v.shape for v in variables])
    zeros = [tf.zeros(v.shape) for v in variables]
    compiled = model.jit_compile or None

    @tf.function(jit_compile=compiled, autograph=False)
    def plain(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        return tape.gradient(value, [v.value for v in variables])

    @tf.function(jit_compile=compiled, autograph=False)
    def clip(x, y, mask):
        return bandmf.clipped_gradients(model, x, y, mask=mask).sums

    @tf.function(autograph=False)
    def noisy(step):
        return noise.noisy_sums(zeros, step)

    @tf.function(autograph=False)
    def update():
        model.optimizer.apply(zeros, variables)

    @tf.function(autograph=False)
    def metrics(y, outputs):
        return model.compute_metrics(None, y, outputs)

    rows = keras.tree.map_structure(tf.constant, (whole["x"], whole["y"]))
    tensors = keras.tree.map_structure(tf.constant, (padded["x"], padded["y"]))
    outputs = model(rows[0])
    everyone = tf.ones([task["batch"]], tf.bool)
    metrics(rows[1], outputs)
    position = itertools.count()
    ways = {
        "draw": lambda: batches.indices(next(steps)),
        "draw and gather": lambda: batches.batch(next(steps), task["replicas"], few_sizes=few),
        "next batch": lambda: next(stream),
        "plain gradient": lambda: np.asarray(plain(*rows)[0]),
        "clip": lambda: clip(*rows, everyone)[0].numpy(),
        "clip, padded": lambda: clip(*tensors, tf.constant(padded["mask"]))[0].numpy(),
        "noise": lambda: noisy(tf.constant(next(position), tf.int64))[0].numpy(),
        "update": lambda: update(),
        "metrics": lambda: metrics(rows[1], outputs),
    }
    found = {name: [] for name in ways}
    for round_ in range(task["rounds"] + 2):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            found[name] += [time.process_time() - begin] * (round_ > 1)
    return {name: float(np.median(seconds) * 1e3) for name, seconds in found.items()} | {
        "rows": len(padded["mask"])
    }


def answered(task):
    """What a task asks for."""
    if task["what"] == "epochs":
        return epochs_in_turns(task)
    if task["what"] == "pieces":
        return pieces(task)
    return start(task, task["what"])


def in_a_process(task):
    """`answered`, in a fresh process."""
    command = [sys.executable, __file__, "--one", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def row_of_epochs(task):
    """The line of the table of epochs."""
    plain, private = (np.array(s) for s in in_a_process({**task, "what": "epochs"}))
    low, middle, high = np.quantile(private / plain, [0.25, 0.5, 0.75], axis=1)
    goal = GOALS.get(task["model"], "")
    step = np.median([plain, private], axis=2) * 1e3 / task["steps"]
    ratios = "".join(f"{middle[i]:>7.2f}{f'{low[i]:.2f}-{high[i]:.2f}':>12}" for i in range(2))
    return f"{label(task)}{step[0, 0]:>10.1f}{step[1, 0]:>12.1f}{ratios}{goal:>7}"


def row_of_starts(task, repeats):
    """The line of the table of starts."""
    found = {"plain": [], "private": []}
    for _ in range(repeats):
        for kind, seconds in found.items():
            seconds.append(in_a_process({**task, "what": kind}))
    plain, private = (np.median(seconds, axis=0)[0] for seconds in found.values())
    more = np.subtract(found["private"], found["plain"])
    text = "".join(f"{np.median(m):>7.2f}{f'{m.min():.2f}-{m.max():.2f}':>12}" for m in more.T)
    return f"{label(task)}{plain:>10.2f}{private:>12.2f}{text}{START_GOAL:>7}"


def label(task):
    """What the tables name a task by."""
    return (
        f"{task['model']:<6}{task['batch']:>6}  {task['law']:<18}{task['replicas']:>4}"
        f"{'yes' if task['metrics'] else 'no':>8}{task['jit']:>6}"
    )


HEADER = f"{'model':<6}{'batch':>6}  {'sampling':<18}{'reps':>4}{'metrics':>8}{'XLA':>6}"


def main(arguments=None, sizes=FULL):
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["mlp", "cnn", "bert"], help="and lstm")
    parser.add_argument("--batch", type=int, help="in place of the model's own")
    parser.add_argument("--laws", nargs="*", default=list(LAWS))
    parser.add_argument("--metrics", nargs="*", default=["yes"], choices=["yes", "no"])
    parser.add_argument("--replicas", nargs="*", type=int, default=[1])
    parser.add_argument("--jit", nargs="*", default=["auto"], choices=["auto", "on", "off"])
    parser.add_argument("--bands", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=12, help="that are timed, of each way")
    parser.add_argument("--starts", type=int, default=0, metavar="REPEATS")
    parser.add_argument("--pieces", type=int, default=0, metavar="ROUNDS", dest="rounds")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        task = json.loads(options.one)
        processors = tf.config.list_physical_devices("CPU")[:1]
        if task["replicas"] > 1:
            parts = [tf.config.LogicalDeviceConfiguration()] * task["replicas"]
            tf.config.set_logical_device_configuration(processors[0], parts)
        print(json.dumps(answered(task)))
        return
    cases = [
        {
            "model": model,
            "batch": options.batch or BATCHES[model],
            "law": law,
            "metrics": metrics == "yes",
            "replicas": replicas,
            "jit": jit,
            "bands": options.bands,
            "steps": options.steps,
            "epochs": options.epochs,
            "rounds": options.rounds,
            "sizes": vars(sizes),
        }
        for model, replicas, jit, metrics, law in itertools.product(
            options.models, options.replicas, options.jit, options.metrics, options.laws
        )
    ]
    ratios = f"{'ratio':>7}{'quartiles':>12}{'CPU s':>7}{'quartiles':>12}{'goal':>7}"
    if options.epochs:
        print(f"{HEADER}{'plain ms':>10}{'private ms':>12}{ratios}")
        for case in cases:
            print(row_of_epochs(case), flush=True)
    if options.starts:
        ranges = f"{'more':>7}{'range':>12}{'CPU s':>7}{'range':>12}{'goal':>7}"
        print(f"\n{HEADER}{'plain s':>10}{'private s':>12}{ranges}")
        for case in cases:
            print(row_of_starts(case, options.starts), flush=True)
    if options.rounds:
        print("\nmilliseconds of processors for a step, each piece by itself")
        for case in cases:
            found = in_a_process({**case, "what": "pieces"})
            print(label(case) + "".join(f"\n  {k:<18}{v:>9.2f}" for k, v in found.items()))


if __name__ == "__main__":
    main()
