"""Time and memory of strategy optimization, alone and against jax-privacy, as ratios in one run.

    python benchmarks/strategies.py [--peer_python PATH] [--million]

PATH is the interpreter of an environment with `jax` and `jax-privacy`; without it the columns of
the peer stay empty. `--million` adds the banded optimum at 10^6 steps (minutes). Every figure
is measured in a process of its own, after imports.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The peak since `memory(reset=True)`, in MiB: that of the process would be that of its imports.
# Linux only.
MEMORY = """
def memory(reset=False):
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
"""
# Both programs print one JSON line: seconds of the first and of the second call, coefficients.
OURS = """
import json, sys, time
import tensorflow as tf
from keras_bandmf import strategies
n, b = int(sys.argv[1]), int(sys.argv[2])
repeats = int(sys.argv[3])
tf.zeros([3]).numpy()
before, seconds = memory(reset=True), []
for _ in range(repeats):
    start = time.perf_counter()
    s = strategies.ToeplitzStrategy.optimize(n, b, column_normalize=False)
    seconds.append(time.perf_counter() - start)
print(json.dumps({"seconds": seconds, "mebibytes": memory() - before,
                  "coefficients": s.coefficients.tolist()}))
"""
PEER = """
import json, sys, time
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
from jax_privacy.matrix_factorization import toeplitz
n, b = int(sys.argv[1]), int(sys.argv[2])
repeats, seconds = int(sys.argv[3]), []
jnp.zeros(3).block_until_ready()
before = memory(reset=True)
for _ in range(repeats):
    start = time.perf_counter()
    c = toeplitz.optimize_banded_toeplitz(n, b).block_until_ready()
    seconds.append(time.perf_counter() - start)
print(json.dumps({"seconds": seconds, "mebibytes": memory() - before,
                  "coefficients": [float(x) for x in c]}))
"""

# Banded: the columns' own search, and the median time between two of its iterations.
OURS_BANDED = """
import json, sys, time
import numpy as np
import tensorflow as tf
from keras_bandmf import strategies
n, b, limit = (int(a) for a in sys.argv[1:4])
tf.zeros([3]).numpy()
start = strategies.ToeplitzStrategy.optimize(n, b)
before, begun, at = memory(reset=True), time.perf_counter(), []
s = strategies.BandedStrategy.optimize(
    n, b, start=start if limit < 5000 else None, max_iterations=limit,
    callback=lambda _: at.append(time.perf_counter()))
seconds, each = time.perf_counter() - begun, float(np.median(np.diff(at)))
print(json.dumps({"seconds": seconds, "iteration": each,
                  "iterations": len(at), "mebibytes": memory() - before,
                  "loss": s.loss(), "toeplitz": start.loss()}))
"""
PEER_BANDED = """
import json, sys, time
import numpy as np
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
from jax_privacy.matrix_factorization import banded
n, b, limit = (int(a) for a in sys.argv[1:4])
jnp.zeros(3).block_until_ready()
before, begun, at = memory(reset=True), time.perf_counter(), []
def tick(state):
    jax.block_until_ready(state.params)
    at.append(time.perf_counter())
found = banded.optimize(n, bands=b, max_optimizer_steps=limit, callback=tick)
seconds = time.perf_counter() - begun
print(json.dumps({"seconds": seconds, "iteration": float(np.median(np.diff(at))),
                  "iterations": len(at), "mebibytes": memory() - before,
                  "loss": float(jnp.mean(banded.per_query_error(found)))}))
"""

GROWTH_BANDS = 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The (n, b) of every part; the defaults are those of the targets.

    Attributes:
        cold: Toeplitz alone, and the limit in seconds, if there is one.
        warm: Toeplitz against the peer, both compiled.
        toeplitz: the table's rows of Toeplitz optima.
        banded: the table's rows of banded optima; the peer's searches take its default of steps.
        whole: banded searches to convergence, with limits in seconds and MiB.
        million: the same, only on request.
        growth: numbers of steps over which the time of a banded iteration should grow linearly.
        iteration: banded iterations against the peer's, and how many to time.
    """

    cold: tuple = ((10**6, 8, 10.0), (10**6, 32, 3.0), (10**6, 1024, 10.0), (10**9, 64, None))
    warm: tuple = (10**4, 32)
    toeplitz: tuple = ((1000, 8), (10**4, 8), (10**4, 32), (10**5, 32))
    banded: tuple = ((256, 16), (500, 8), (1000, 16))
    whole: tuple = ((10**4, 32, 20.0, 1024),)
    million: tuple = ((10**6, 16, 1200.0, 8192),)
    growth: tuple = (10**4, 3 * 10**4, 10**5, 3 * 10**5)
    iteration: tuple = ((500, 32, 12), (1000, 32, 12), (2000, 32, 6), (10**4, 32, 3))


def run(python: str, program: str, num_steps: int, num_bands: int, repeats: int) -> dict:
    """Runs one of the programs above in a fresh process and returns what it printed."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
    if python == sys.executable:
        environment["PYTHONPATH"] = path
    command = [python, "-c", MEMORY + program, str(num_steps), str(num_bands), str(repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{python} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(what: str, value: str, target: str = "") -> None:
    print(f"{what:<62} {value:>24}  {target}", flush=True)


def alone(sizes: Sizes) -> None:
    """Fresh-process times at sizes from a million steps up."""
    for num_steps, num_bands, target in sizes.cold:
        result = run(sys.executable, OURS, num_steps, num_bands, 1 if num_bands > 64 else 2)
        name = f"optimize n={num_steps:.0e} b={num_bands}"
        cold = result["seconds"][0]
        limit = f"target {target} s: {cold / target:.2f} of it" if target else ""
        row(f"{name}, fresh process after imports", f"{cold:.2f} s", limit)
        if len(result["seconds"]) > 1:
            row(f"{name}, again", f"{result['seconds'][1]:.2f} s")
        row(f"{name}, memory above imports", f"{result['mebibytes']:.0f} MiB")


def side_by_side(peer_python: str | None, sizes: Sizes) -> None:
    """The table: loss, seconds and peak memory of both libraries, compilation counted."""
    head = ["kind", "n", "b", "loss", "peer's", "s", "peer's", "MiB", "peer's"]
    print(("{:<9}{:>9}{:>5}" + "{:>16}" * 2 + "{:>10}" * 4).format(*head))
    kinds = [("toeplitz", OURS, PEER, 1, sizes.toeplitz)]
    kinds += [("banded", OURS_BANDED, PEER_BANDED, None, sizes.banded)]
    for kind, program, peer_program, limit, shapes in kinds:
        for n, b in shapes:
            found = [run(sys.executable, program, n, b, limit or 5000)]
            if peer_python:
                found.append(run(peer_python, peer_program, n, b, limit or 100))
            columns = [
                [f"{loss_of(f, n):.8f}" for f in found],
                [f"{f['seconds'][0] if limit else f['seconds']:.2f}" for f in found],
                [f"{f['mebibytes']:.0f}" for f in found],
            ]
            cells = [cell for column in columns for cell in (*column, "-")[:2]]
            print(
                f"{kind:<9}{n:>9,}{b:>5}"
                + "".join(f"{cell:>{16 if i < 2 else 10}}" for i, cell in enumerate(cells)),
                flush=True,
            )


def loss_of(found: dict, num_steps: int) -> float:
    """The mean loss of what a program printed; of coefficients, computed by our code for both."""
    if "loss" in found:
        return found["loss"]
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from keras_bandmf.strategies import ToeplitzStrategy

    strategy = ToeplitzStrategy(found["coefficients"], num_steps, column_normalize=False)
    return strategy.loss("mean")


def against_peer(peer_python: str | None, sizes: Sizes) -> None:
    """Both libraries on the same problem, both losses computed by the same code."""
    num_steps, num_bands = sizes.warm
    ours = run(sys.executable, OURS, num_steps, num_bands, 7)
    name = f"n={num_steps:.0e} b={num_bands}"
    warm = min(ours["seconds"][1:])
    row(f"keras_bandmf {name}, first call (tracing counted)", f"{ours['seconds'][0]:.3f} s")
    row(f"keras_bandmf {name}, warm (best of 6)", f"{warm:.3f} s")
    if peer_python is None:
        row(f"jax-privacy {name}", "peer not given", "(--peer_python PATH)")
        return
    peer = run(peer_python, PEER, num_steps, num_bands, 3)
    peer_warm = min(peer["seconds"][1:])
    row(f"jax-privacy {name}, first call", f"{peer['seconds'][0]:.3f} s")
    row(f"jax-privacy {name}, warm (best of 2)", f"{peer_warm:.3f} s")
    losses = [loss_of(found, num_steps) for found in (ours, peer)]
    row("loss, keras_bandmf / jax-privacy", f"{losses[0]:.10f} / {losses[1]:.10f}")
    row("loss over jax-privacy's, minus 1", f"{losses[0] / losses[1] - 1:.1e}", "target <= 1e-12")
    row("times faster, both warm", f"{peer_warm / warm:.0f}", "target 100")
    row(
        "times faster, tracing counted",
        f"{peer['seconds'][0] / ours['seconds'][0]:.1f}",
        "target 10",
    )


def banded(peer_python: str | None, million: bool, sizes: Sizes) -> None:
    """The exact banded optimum: whole searches, growth with n, an iteration against the peer's."""
    for num_steps, num_bands, seconds, mebibytes in sizes.whole + million * sizes.million:
        found = run(sys.executable, OURS_BANDED, num_steps, num_bands, 5000)
        name = f"banded n={num_steps:.0e} b={num_bands}"
        row(
            f"{name}, to convergence ({found['iterations']} iterations)",
            f"{found['seconds']:.1f} s",
            f"target {seconds} s: {found['seconds'] / seconds:.2f} of it",
        )
        row(f"{name}, memory", f"{found['mebibytes']:.0f} MiB", f"target {mebibytes} MiB")
        row(f"{name}, loss", f"{found['loss']:.8f}")
        gap = 100 * ((found["toeplitz"] / found["loss"]) ** 0.5 - 1)
        row(f"{name}, RMSE of the Toeplitz optimum above it", f"at least {gap:.4f} %")
    first = None
    for num_steps in sizes.growth:
        found = run(sys.executable, OURS_BANDED, num_steps, GROWTH_BANDS, 8)
        each = 1e9 * found["iteration"] / num_steps
        first = first or each
        name = f"banded n={num_steps:.0e} b={GROWTH_BANDS}, an iteration"
        growth = f"{each:.0f} ns a step, {each / first:.2f} of the first (linear: 1)"
        row(name, f"{found['iteration']:.3f} s", growth)
    for num_steps, num_bands, times in sizes.iteration if peer_python else ():
        ours = run(sys.executable, OURS_BANDED, num_steps, num_bands, times)["iteration"]
        name = f"banded n={num_steps} b={num_bands}, an iteration, ours / jax-privacy"
        target = ", target 100" if (num_steps, num_bands) == (10**4, 32) else ""
        try:
            peer = run(peer_python, PEER_BANDED, num_steps, num_bands, times)["iteration"]
        except RuntimeError as error:
            why = str(error).strip().splitlines()[-1][:60]
            row(name, f"{ours:.4f} s / -", f"jax-privacy fails: {why}{target}")
            continue
        row(name, f"{ours:.4f} / {peer:.3f} s", f"{peer / ours:.0f} times faster{target}")


def main(arguments: list[str] | None = None, sizes: Sizes = Sizes()) -> None:
    """Prints everything, the table first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer_python", help="interpreter with jax and jax-privacy installed")
    parser.add_argument("--million", action="store_true", help="the banded optimum at n = 10^6")
    options = parser.parse_args(arguments)
    side_by_side(options.peer_python, sizes)
    alone(sizes)
    against_peer(options.peer_python, sizes)
    banded(options.peer_python, options.million, sizes)


if __name__ == "__main__":
    main()
