"""Time of an error and its gradient by the TensorFlow graph over that of the NumPy code.

    python benchmarks/banded_solvers.py

Both are solvers of `BandedStrategy.optimize`; the first call, which traces, is not counted.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

from keras_bandmf.strategies import Workload
from keras_bandmf.strategies.errors.banded import BandedErrors, block_size
from keras_bandmf.strategies.errors.banded_graph import GraphErrors

SIZES = ((1_000, 16), (10_000, 32), (100_000, 16))
REPEATS = 3


def seconds(solver: BandedErrors | GraphErrors, columns: np.ndarray, weights: np.ndarray) -> float:
    """Returns the time of one value and gradient, the best of some."""
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        solver.evaluate(columns)
        solver.gradient(weights)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def main(sizes: Sequence[tuple[int, int]] = SIZES) -> None:
    """Prints a line for each problem."""
    print(f"{'steps':>8} {'bands':>6} {'NumPy, s':>10} {'graph, s':>10} {'ratio':>7}")
    for num_steps, num_bands in sizes:
        random = np.random.default_rng(0)
        columns = random.standard_normal((num_steps, num_bands)) / num_bands
        columns[:, 0] = 1.5
        weights = np.full(num_steps, 1.0 / num_steps)
        blocks = Workload(num_steps).blocks(block_size(num_bands))
        blocked, graph = (
            seconds(solver(num_steps, num_bands, blocks), columns, weights)
            for solver in (BandedErrors, GraphErrors)
        )
        line = f"{num_steps:>8} {num_bands:>6} {blocked:>10.4f} {graph:>10.4f}"
        print(f"{line} {graph / blocked:>7.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
