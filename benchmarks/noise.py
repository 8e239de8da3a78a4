"""Time and memory of the correlated noise, as ratios in one run.

    python benchmarks/noise.py [--peer_python PATH] [--repeats 20] [--skip_training]

PATH is the interpreter of an environment with `jax` and `jax-privacy`. Whole rows are compared
with draws (ours and TensorFlow's own), two replicas of one thread each with one replica of one
thread, and a training step at 16 bands with DP-SGD; what tail, lattice and exact noise cost is
printed. Steps that are compared are interleaved, and medians are shown. Run it on a machine that
does nothing else.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
MILLION = 10**6

# One thread an operation, R replicas on R logical devices, sixteen variables: seconds a step, ring
# bytes a replica.
REPLICAS = """
import json, sys, time
import numpy as np
import tensorflow as tf
from keras_bandmf.noise import CorrelatedNoise
from keras_bandmf.strategies import ToeplitzStrategy
d, b, replicas, repeats = map(int, sys.argv[1:])
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(4)
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * replicas)
devices = tf.distribute.MirroredStrategy([f"CPU:{r}" for r in range(replicas)])
with devices.scope():
    noise = CorrelatedNoise(ToeplitzStrategy.optimize(10_000, b), 1.0, [(d // 16,)] * 16, seed=0)
def share(step):
    context = tf.distribute.get_replica_context()
    replica = int(tf.get_static_value(context.replica_id_in_sync_group))
    zeros = [tf.zeros(shape) for shape in noise.layout.shapes]
    return tf.add_n([part[0] for part in noise.noisy_sums(zeros, step, replica)])
@tf.function(autograph=False)
def take(step):
    return devices.run(share, (step,))
seconds = []
for step in range(repeats + 3):
    start = time.perf_counter()
    [part.numpy() for part in devices.experimental_local_results(take(tf.constant(step)))]
    seconds.append(time.perf_counter() - start)
print(json.dumps({"seconds": float(np.median(seconds[3:])), "bytes": noise.state_bytes}))
"""

PEER = """
import json, sys, time
import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy import noise_addition
from jax_privacy.matrix_factorization import toeplitz
d, b, repeats = map(int, sys.argv[1:])
coefficients = toeplitz.optimize_banded_toeplitz(10_000, b)
privatizer = noise_addition.matrix_factorization_privatizer(
    toeplitz.inverse_as_streaming_matrix(coefficients), stddev=1.0, prng_key=0)
update, gradient = jax.jit(privatizer.update, donate_argnums=1), jnp.zeros(d)
state, seconds = privatizer.init(gradient), []
for _ in range(repeats + 3):
    start = time.perf_counter()
    noisy, state = jax.block_until_ready(update(gradient, state))
    seconds.append(time.perf_counter() - start)
print(json.dumps({"seconds": float(np.median(seconds[3:]))}))
"""


def run(python: str, program: str, *arguments: int) -> dict:
    """Runs one of the programs above in a fresh process and returns what it printed."""
    environment = dict(os.environ)
    if python == sys.executable:
        environment["PYTHONPATH"] = str(ROOT)
    command = [python, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{python} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(what: str, value: str, target: str = "") -> None:
    print(f"{what:<66} {value:>22}  {target}", flush=True)


def verdict(measured: float, limit: float, at_least: bool = False) -> str:
    """The target, and whether it is met."""
    met = measured >= limit if at_least else measured <= limit
    return f"target {'>=' if at_least else '<='} {limit}: {'met' if met else 'MISSED'}"


def interleaved(steps: list, repeats: int) -> np.ndarray:
    """Median seconds of each of several functions, called in turn."""
    seconds = np.empty((repeats + 3, len(steps)))
    for times in seconds:
        for index, step in enumerate(steps):
            start = time.perf_counter()
            step()
            times[index] = time.perf_counter() - start
    return np.median(seconds[3:], axis=0)


def copier(num_bytes: int, threads: int = os.cpu_count() or 1):
    """A function that copies an array in as many threads as there are processors."""
    source, target = (np.full(num_bytes // 4, value, np.float32) for value in (1, 0))
    pairs = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs))


def noise_steps(size: int, num_bands: int):
    """(noise, steps): functions without arguments that make a row, a draw, TensorFlow's, a pass."""
    import tensorflow as tf

    from keras_bandmf.noise import CorrelatedNoise, normals
    from keras_bandmf.strategies import ToeplitzStrategy

    strategy = ToeplitzStrategy.optimize(10_000, num_bands)
    noise = CorrelatedNoise(strategy, 1.0, [(size,)], seed=0)
    exact = CorrelatedNoise(strategy, 1.0, [(size,)], seed=0, exact=True)
    key = tf.constant(normals.key_from_seed(0).view(np.int64))
    counter = tf.Variable(0, dtype=tf.int64)
    gradient = tf.Variable(tf.random.normal((size,)))

    @tf.function(autograph=False, jit_compile=True)
    def draw() -> tf.Tensor:
        low, high = normals.standard_normals(
            key, counter.read_value(), 0, noise.layout.chunks_per_shard
        )
        return low + high  # of one array: for each XLA draws anew

    @tf.function(autograph=False)
    def builtin() -> tf.Tensor:
        seed = tf.stack([counter.assign_add(1), key[0]])
        return tf.random.stateless_normal((size,), seed, alg="philox")

    @tf.function(autograph=False)
    def row() -> tf.Tensor:
        return noise._row(noise._position.read_value(), 0)

    def whole(which: CorrelatedNoise) -> tf.types.experimental.PolymorphicFunction:
        return tf.function(
            lambda: which.noisy_sums([gradient.read_value()], which._position.read_value())[0],
            autograph=False,
        )

    add, add_exact = whole(noise), whole(exact)
    # The element is read so that the row is made, and not copied out of TensorFlow.
    return noise, {
        "row": lambda: row()[0].numpy(),
        "add": lambda: add()[0].numpy(),
        "exact": lambda: add_exact()[0].numpy(),
        "draw": lambda: draw()[0].numpy(),
        "builtin": lambda: builtin()[0].numpy(),
    }


def targets(repeats: int) -> None:
    """Draw, row and addition against TensorFlow's own draw and copying; what exact noise costs."""
    from keras_bandmf.noise import finite, lattice

    size = 4 * MILLION
    for num_bands in (1, 8, 32):
        noise, steps = noise_steps(size, num_bands)
        named = [steps[k] for k in ("draw", "row", "add", "exact", "builtin")]
        seconds = interleaved([*named, copier(16 * size)], repeats)
        draw, drawn, added, exact, builtin, copied = seconds
        times = " / ".join(f"{s * 1e3:.1f}" for s in (draw, drawn, added, exact, builtin))
        name = f"b={num_bands} d=4e6"
        row(f"{name}: draw / row / row on the sum / exact / TensorFlow's draw, ms", times)
        met = verdict(drawn / builtin, 1.3) if num_bands == 8 else ""
        row(f"{name}: row over TensorFlow's own draw", f"{drawn / builtin:.2f}", met)
        # It reads b - 1 rows and writes one, whatever computes it; copying reads and writes.
        least = 1 + num_bands * 4 * size / (32 * size / copied) / draw
        row(f"{name}: row over our draw", f"{drawn / draw:.2f}", f"{least:.2f} at copy bandwidth")
        row(f"{name}: lattice, ring kept and sum added, over the row", f"{added / drawn:.2f}")
        row(f"{name}: exact over default", f"{exact / added:.2f}")
    norm = lattice.charged_norm(1.0, noise.strategy, 1.0, 10 * MILLION, 1)
    row("lattice: more noise at d=1e7, sigma 1", f"{(norm - 1) * 100:.3f} %")
    charge = finite.tail_total_variation(10 * MILLION * 10_000)
    row("tail: delta of 10,000 steps at d=1e7", f"{charge:.1e}")


def sizes(repeats: int, peer_python: str | None) -> None:
    """Seconds and bytes over b and d, and the peer at the same sizes."""
    for size in (MILLION, 4 * MILLION, 16 * MILLION):
        for num_bands in (1, 8, 32):
            noise, steps = noise_steps(size, num_bands)
            (seconds,) = interleaved([steps["add"]], repeats)
            name = f"b={num_bands} d={size:.0e}"
            each = f"{seconds * 1e9 / size:.1f} ns/parameter, {noise.state_bytes / 2**20:.0f} MiB"
            row(f"noise {name}", f"{seconds * 1e3:.1f} ms", each)
            del noise, steps
            if peer_python and num_bands > 1 and size <= 4 * MILLION:
                peer = run(peer_python, PEER, size, num_bands, repeats)["seconds"]
                times = f"{peer / seconds:.1f} times ours"
                row(f"noise {name}, jax-privacy", f"{peer * 1e3:.1f} ms", times)
    if not peer_python:
        row("jax-privacy", "peer not given", "(--peer_python PATH)")


def replicas(repeats: int, rounds: int = 5) -> None:
    """One thread a replica: time falls and memory halves. The best of several processes counts."""
    size, num_bands = 4 * MILLION, 16
    found = {}
    for count in (1, 2, 4) * rounds:
        figures = run(sys.executable, REPLICAS, size, num_bands, count, repeats)
        best = found.setdefault(count, figures)
        best["seconds"] = min(best["seconds"], figures["seconds"])
    for count, figures in found.items():
        name = f"noise b={num_bands} d={size:.0e}, R={count}, one thread each"
        ring = f"{figures['bytes'] / 2**20:.1f} MiB of ring a replica"
        row(name, f"{figures['seconds'] * 1e3:.1f} ms", ring)
    time_ratio = found[2]["seconds"] / found[1]["seconds"]
    row("time of two replicas over one", f"{time_ratio:.2f}", verdict(time_ratio, 0.65))
    one, two = interleaved([copier(64 * size, threads) for threads in (1, 2)], repeats)
    row("copying, time of two threads over one", f"{two / one:.2f}")
    memory_ratio = found[2]["bytes"] / found[1]["bytes"]
    row("ring of a replica of two over one", f"{memory_ratio:.3f}", verdict(memory_ratio, 0.501))


def training(repeats: int) -> None:
    """A whole private training step of ten million parameters, BandMF over DP-SGD."""
    import private_step

    (_, banded, _), parameters = private_step.measured("wide", 1024, 16, repeats)
    (_, plain, _), _ = private_step.measured("wide", 1024, 1, repeats)
    name = f"training step of {parameters / 1e6:.1f}M parameters, batch 1024"
    row(f"{name}, b=16 / b=1, ms", f"{banded * 1e3:.0f} / {plain * 1e3:.0f}")
    row("BandMF at b=16 over DP-SGD", f"{banded / plain:.2f}", verdict(banded / plain, 1.2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer_python", help="interpreter with jax and jax-privacy installed")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--skip_training", action="store_true", help="leave out the model")
    options = parser.parse_args()
    targets(options.repeats)
    replicas(options.repeats)
    if not options.skip_training:
        training(options.repeats)
    sizes(options.repeats, options.peer_python)


if __name__ == "__main__":
    main()
