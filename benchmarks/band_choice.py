"""Seconds to choose the number of bands: 20 values at n = 10^5, and whole calibrations.

    python benchmarks/band_choice.py

Prints wall-clock and processor seconds of this process (both cores counted), imports apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_bandmf import TrainingPlan, compare_bands
from keras_bandmf.strategies import Workload

RUN = {"num_examples": 10**6, "batch_size": 1_000, "epsilon": 1.0, "delta": 1e-7}
TWENTY = (2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1_000)
TARGET = 60.0


def timed(what: str, work: Callable[[], Any], target: str = "") -> Any:
    """Runs `work` once and prints what it took."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{what:<58} {wall:>7.1f} s wall {processor:>7.1f} s processor  {target}", flush=True)
    return result


def main() -> None:
    steps = {"num_steps": 10**5}
    for sampling in ("cyclic_poisson", "auto"):
        choice = timed(
            f"1 and {len(TWENTY)} more numbers of bands, n=1e5, {sampling}",
            lambda sampling=sampling: compare_bands(
                **RUN, **steps, num_bands=TWENTY, sampling=sampling
            ),
            f"target {TARGET:.0f} s" if sampling == "cyclic_poisson" else "",
        )
        print(choice)
    for sampling in ("cyclic_poisson", "auto"):
        plan = timed(
            f"TrainingPlan.calibrate, defaults, n=1e5, {sampling}",
            lambda sampling=sampling: TrainingPlan.calibrate(**RUN, **steps, sampling=sampling),
        )
        print(f"    {plan.num_bands} bands, {plan.sampling}, RMSE {plan.expected_rmse:.5g}")
    n = 10**4
    workload = Workload(n, 0.05 * (1 + np.cos(np.pi * np.arange(n) / n)), momentum=0.9)
    plan = timed(
        "TrainingPlan.calibrate, momentum and cosine decay, n=1e4",
        lambda: TrainingPlan.calibrate(**RUN, num_steps=n, workload=workload),
    )
    single = TrainingPlan.calibrate(**RUN, num_steps=n, workload=workload, num_bands=1)
    ratio = single.expected_rmse / plan.expected_rmse
    print(f"    {plan.num_bands} bands, RMSE of DP-SGD over it {ratio:.3f}")


if __name__ == "__main__":
    main()
