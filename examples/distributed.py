"""The same private training on one device, on several devices, and in several processes.

    python examples/distributed.py                        one device
    python examples/distributed.py --devices 2            MirroredStrategy over logical CPUs
    python examples/distributed.py --workers 2            two worker processes on this machine

On a machine with GPUs `--devices 2` takes the first two of them. On a cluster start the script once
on each machine with `TF_CONFIG` set, and no option: that is all a worker needs. Every worker is
given the same rows in the same order. Weights agree for a fixed `--seed`, which is for such a
comparison only: without it keys come from the operating system.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import quiet  # noqa: F401 - first

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_bandmf as bandmf


def start_workers(count: int, arguments: list[str]) -> int:
    """Starts this script once for each worker, each with its `TF_CONFIG`."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        addresses = [f"localhost:{each.getsockname()[1]}" for each in sockets]
    processes = []
    for index in range(count):
        config = {
            "cluster": {"worker": addresses},
            "task": {"type": "worker", "index": index},
        }
        environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
        command = [sys.executable, os.path.abspath(__file__), *arguments]
        processes.append(subprocess.Popen(command, env=environment))
    return max(abs(process.wait()) for process in processes)


def make_strategy(devices: int) -> tuple[tf.distribute.Strategy, int]:
    """The strategy for `TF_CONFIG` or the devices asked for, and the number of this worker."""
    if "TF_CONFIG" in os.environ:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        return strategy, strategy.cluster_resolver.task_id
    if devices == 1:
        return tf.distribute.get_strategy(), 0
    if len(tf.config.list_physical_devices("GPU")) >= devices:
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(devices)]), 0
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * devices,
    )
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)]), 0


def backup(folder: pathlib.Path, worker: int) -> keras.callbacks.BackupAndRestore:
    """Every worker saves, to a folder of its own; after a crash all restore the chief's."""
    own, chief = folder / f"worker{worker}", folder / "worker0"
    if worker:
        shutil.rmtree(own, ignore_errors=True)
        if chief.exists():
            shutil.copytree(chief, own)
    # Keras writes its file in place: keep the one before.
    return keras.callbacks.BackupAndRestore(own, double_checkpoint=True)


def main() -> None:
    """Plans, trains where it was told to, prints on the first worker."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, help="for comparisons only: not private")
    parser.add_argument("--backup", type=pathlib.Path, help="folder that all workers can reach")
    options = parser.parse_args()
    if options.workers > 1 and "TF_CONFIG" not in os.environ:
        sys.exit(start_workers(options.workers, sys.argv[1:]))

    strategy, worker = make_strategy(options.devices)
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype("float32"), y.astype("int32")
    plan = bandmf.TrainingPlan(
        num_examples=1500,
        batch_size=100,
        epochs=options.epochs,
        num_bands=8,
        noise_multiplier=1.0,
        delta=1e-5,
    )
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = bandmf.privatize(
            keras.Sequential(
                [
                    keras.Input((64,)),
                    keras.layers.Dense(256, "relu"),
                    keras.layers.Dense(10),
                ]
            )
        )
        model.compile(
            bandmf.BandMFOptimizer("adam", plan, l2_norm_clip=1.0, seed=options.seed),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        model.optimizer.build(model.trainable_variables)
    model.fit(
        plan.batches(x[:1500], y[:1500]),
        epochs=options.epochs,
        validation_data=(x[1500:], y[1500:]),
        callbacks=[backup(options.backup, worker)] if options.backup else [],
        verbose=0,
    )
    if worker == 0:
        # Not `model.evaluate`: with several workers Keras's own fails outside of `fit`.
        accuracy = np.mean(np.argmax(model(x[1500:]), axis=1) == y[1500:])
        checksum = sum(float(np.abs(w.numpy()).sum()) for w in model.trainable_variables)
        ring = model.optimizer.run_state.noise.state_bytes
        print(
            f"{strategy.num_replicas_in_sync} replicas: accuracy {accuracy:.3f}, sum of absolute "
            f"weights {checksum:.3f}, {ring / 1024:.0f} KiB of noise ring a replica"
        )
        print(bandmf.statement(model))


if __name__ == "__main__":
    main()
