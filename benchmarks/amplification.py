"""Certified noise multipliers of secret groups: what they take, and what they give.

    python benchmarks/amplification.py --output=amplification.json

A row for each run and law, in a process of its own: seconds, certified noise multiplier, its ratio
to the estimate that no confidence bound made larger, its ratio to the noise multiplier of known
groups (Poisson), and the peak memory of the process, in MiB, of which TensorFlow takes some 500.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import NamedTuple

from keras_bandmf.accounting.accountant import calibrate_noise, delta_without_noise_share
from keras_bandmf.accounting.amplification.certificate import Certifier, OutOfReach
from keras_bandmf.accounting.amplification.estimator import Estimator
from keras_bandmf.sampling.patterns import AllocationInGroup, PoissonInGroup, Rounds
from keras_bandmf.planning.secret_group import columns_of, most_samples
from keras_bandmf.sampling.schedule import Schedule
from keras_bandmf.strategies import ToeplitzStrategy
from keras_bandmf.strategies.coefficients import fractional_coefficients

LAWS = ("poisson", "allocation")
_ESTIMATE_SAMPLES = 2**17


class Run(NamedTuple):
    """N examples, batches of B, k epochs, b bands of (1 - x)^(-gamma), and the target."""

    num_examples: int
    batch_size: int
    epochs: int
    num_bands: int
    exponent: float
    epsilon: float
    delta: float

    @property
    def num_steps(self) -> int:
        return self.epochs * (self.num_examples // self.batch_size)


RUNS = {
    "quickstart": Run(1500, 25, 4, 11, 0.5, 4.0, 1e-5),
    "quickstart, 60 bands": Run(1500, 25, 4, 60, 0.4, 4.0, 1e-5),
    "60,000 rows, 16 bands": Run(60_000, 1000, 20, 16, 0.5, 4.0, 1e-6),
    "60,000 rows, 30 bands": Run(60_000, 1000, 20, 30, 0.5, 4.0, 1e-6),
    "MNIST": Run(60_000, 500, 6, 16, 0.5, 2.0, 1e-6),
    "10,000 steps": Run(1_000_000, 1000, 10, 32, 0.5, 4.0, 1e-7),
}


def result(name: str, law_name: str) -> dict:
    """The row of one run and law."""
    run = RUNS[name]
    n, b = run.num_steps, run.num_bands
    schedule = Schedule("cyclic_poisson", run.num_examples, run.batch_size, n, b)
    strategy = ToeplitzStrategy(fractional_coefficients(run.exponent, b), n)
    known = calibrate_noise(schedule, run.epsilon, run.delta)
    rounds = Rounds(n, b)
    if law_name == "poisson":
        law = PoissonInGroup(rounds, schedule.sampling_probability)
    else:
        law = AllocationInGroup(rounds, run.epochs)
    certifier = Certifier(Estimator(columns_of(strategy), law), most_samples(schedule))
    delta = delta_without_noise_share(run.delta)
    record = {"run": name, "law": law_name, "n": n, "b": b, "k": run.epochs}
    record |= {"epsilon": run.epsilon, "delta": run.delta}
    start = time.perf_counter()
    try:
        found = certifier.noise(run.epsilon, delta, known)
    except OutOfReach as error:
        record |= {"seconds": time.perf_counter() - start, "out_of_reach": str(error)}
    else:
        record |= {"seconds": time.perf_counter() - start, "sigma": found.sigma}
        record |= {"samples": found.samples, "attempt": found.attempt}
        estimate = certifier.estimated_noise(run.epsilon, delta, found.sigma, _ESTIMATE_SAMPLES)
        record |= {"to_estimate": found.sigma / estimate, "to_known": found.sigma / known}
    record["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
    return record


def table(records: list[dict]) -> str:
    """The rows, as Markdown."""
    lines = [
        "| run | law | n | b | (epsilon, delta) | seconds | sigma | to estimate | to known | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in records:
        found = "out of reach | | "
        if "sigma" in row:
            found = f"{row['sigma']:.4f} | {row['to_estimate']:.3f} | {row['to_known']:.3f}"
        lines.append(
            f"| {row['run']} | {row['law']} | {row['n']} | {row['b']} "
            f"| ({row['epsilon']:g}, {row['delta']:g}) | {row['seconds']:.1f} | {found} "
            f"| {row['memory']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--output", default="amplification.json")
    parser.add_argument("--one", nargs=2, metavar=("RUN", "LAW"), help="this process: one row")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(result(*arguments.one)))
        return
    records = []
    for run in arguments.runs:
        for law in LAWS:
            command = [sys.executable, __file__, "--one", run, law]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            records.append(json.loads(done.stdout.splitlines()[-1]))
            with open(arguments.output, "w", encoding="utf-8") as file:
                json.dump(records, file, indent=2)
    print(table(records))


if __name__ == "__main__":
    main()
