"""Data that does not fit into memory: the draws of many rows, formats of files, a large memory map.

    python benchmarks/sources.py draws --rows 10000000
    python benchmarks/sources.py formats --rows 50000
    python benchmarks/sources.py memmap --gibibytes 20 --steps 50

`draws` prints for each sampling law how long it takes to make the draws of a run and those of one
step, and the memory that stays and that was needed. `formats` reads random rows. `memmap` trains a
small model on a sparse file, and prints the time to the first step and the growth of the memory of
the process that is not a cache of the file (RssAnon of Linux).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import resource
import shutil
import tempfile
import threading
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_bandmf as bandmf
from keras_bandmf.sampling.schedule import Schedule

ROW = (32, 32, 3)
LAWS = {
    "cyclic_poisson, 1 band": ("cyclic_poisson", 1, {}),
    "cyclic_poisson, 16 bands": ("cyclic_poisson", 16, {}),
    "random_allocation, k = 2": ("random_allocation", 16, {"max_participations": 2}),
    "fixed_order": ("fixed_order", 16, {}),
}


def anonymous_memory():
    """The memory of this process that is no cache of files, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


class Peak:
    """The largest growth of the memory while it is watched."""

    def __enter__(self):
        self.start = self.peak = anonymous_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._ended.wait(0.005):
            self.peak = max(self.peak, anonymous_memory())

    def __exit__(self, *args):
        self._ended.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_memory())

    @property
    def mebibytes(self):
        return (self.peak - self.start) / 2**20


def draws(rows, laws):
    """Time and memory of the draws of each law."""
    key = np.array([1, 2], np.uint64)
    print(f"draws of {rows:,} rows, batches of 1,024")
    for name in laws:
        law, bands, extra = LAWS[name]
        steps = 2 * rows // 1024
        schedule = Schedule(law, rows, 1024, steps, bands, **extra)
        with Peak() as peak:
            began = time.perf_counter()
            made = schedule.draws(key)
            whole = time.perf_counter() - began
        kept = (anonymous_memory() - peak.start) / 2**20
        times = []
        for step in range(0, steps, max(1, steps // 10)):
            began = time.perf_counter()
            made.indices(step)
            times.append(time.perf_counter() - began)
        print(
            f"  {name}: made in {whole:.2f} s, {1e3 * np.median(times):.2f} ms a step, "
            f"{kept:.0f} MiB stay, {peak.mebibytes:.0f} MiB at most"
        )
        del made


def formats(rows, folder):
    """Random rows a second of three formats, from a warm cache."""
    x = np.random.default_rng(0).integers(0, 256, (rows, *ROW), np.uint8)
    out = np.empty((256, *ROW), np.uint8)
    stored = bandmf.sources.convert(iter(x), folder / "rows")
    mapped = stored.columns["x"]
    readers = {".npy": lambda i: np.take(mapped, i, axis=0, out=out, mode="clip")}
    import h5py

    with h5py.File(folder / "x.h5", "w") as file:
        file["x"] = x
    hdf5 = h5py.File(folder / "x.h5", "r")["x"]

    def read_hdf5(indices):
        for place in np.argsort(indices):
            out[place] = hdf5[int(indices[place])]

    readers["HDF5"] = read_hdf5
    try:
        from array_record.python import array_record_data_source, array_record_module
    except ImportError:
        print("array_record is not installed")
    else:
        path = str(folder / "x.array_record")
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
        for row in x:
            writer.write(row.tobytes())
        writer.close()
        source = array_record_data_source.ArrayRecordDataSource(path)

        def read_records(indices):
            for place, record in enumerate(source.__getitems__(indices.tolist())):
                out[place] = np.frombuffer(record, np.uint8).reshape(ROW)

        readers["ArrayRecord"] = read_records
    rng = np.random.default_rng(1)
    rates = {name: [] for name in readers}
    for _ in range(5):
        for name, read in readers.items():
            began = time.perf_counter()
            for _ in range(10):
                read(rng.integers(0, rows, 256))
            rates[name].append(2560 / (time.perf_counter() - began))
    for name, found in rates.items():
        print(f"  {name}: {np.median(found):,.0f} rows a second")


class Times(keras.callbacks.Callback):
    """When each step ended."""

    def __init__(self):
        super().__init__()
        self.ended = []

    def on_train_batch_end(self, batch, logs=None):
        self.ended.append(time.perf_counter())


def memmap(gibibytes, steps, folder):
    """Trains on a sparse file of zeros."""
    rows = int(gibibytes * 2**30) // int(np.prod(ROW))
    path = folder / "x.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, (rows, *ROW)).flush()
    x, y = np.load(path, mmap_mode="r"), np.zeros(rows, np.int32)
    layers = keras.layers
    model = bandmf.privatize(
        keras.Sequential(
            [
                keras.Input(ROW),
                layers.Rescaling(1 / 255),
                layers.Conv2D(16, 3, strides=2, activation="relu"),
                layers.Flatten(),
                layers.Dense(10),
            ]
        )
    )
    plan = bandmf.TrainingPlan(
        num_examples=rows, batch_size=256, num_steps=steps, num_bands=1, noise_multiplier=1.0,
        delta=1e-8,
    )  # fmt: skip
    model.compile(
        bandmf.BandMFOptimizer("sgd", plan, l2_norm_clip=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    times = Times()
    with Peak() as peak:
        began = time.perf_counter()
        batches = plan.batches(x, y)
        made = time.perf_counter()
        model.fit(batches, verbose=0, callbacks=[times])
    gaps = np.diff(times.ended)
    print(
        f"{rows:,} rows of {x[0].nbytes} bytes, {x.nbytes / 2**30:.1f} GiB: batches made in "
        f"{made - began:.2f} s, first step after {times.ended[0] - began:.1f} s, then "
        f"{1e3 * np.median(gaps):.1f} ms a step; {peak.mebibytes:.0f} MiB more memory at most "
        f"({resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB with the cache)"
    )
    store, reading = batches._store, []
    for step in range(min(5, steps)):
        indices = batches.indices(step)
        began = time.perf_counter()
        store.rows(indices)
        reading.append(time.perf_counter() - began)
    print(f"  a batch is drawn and read in {1e3 * np.median(reading):.2f} ms")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("draws", "formats", "memmap"))
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--laws", nargs="*", default=list(LAWS))
    parser.add_argument("--gibibytes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", help="for the files; the default is a temporary one")
    options = parser.parse_args(arguments)
    folder = pathlib.Path(tempfile.mkdtemp(dir=options.folder))
    try:
        if options.what == "draws":
            draws(options.rows, options.laws)
        elif options.what == "formats":
            formats(options.rows, folder)
        else:
            memmap(options.gibibytes, options.steps, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
