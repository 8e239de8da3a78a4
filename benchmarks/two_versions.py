"""A private step of this checkout over that of another one, inside `fit`.

    python benchmarks/two_versions.py ../other --models cnn mlp embedding

Two processes, one for each version, hold a private model each and take turns at calls of `fit` of
six steps, so that whatever else the machine does strikes both. The table shows the median of the
ratios of neighboring calls, and their quartiles. The other checkout must know what
`private_step.make_plan` and `privatize` ask for; the models are those of this one.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
SIZES = {"cnn": 256, "mlp": 1024, "bert": 32, "embedding": 256}
STEPS = 6


def serve(name, batch_size, num_bands):
    """Answers every line of the standard input by the seconds of a step."""
    import keras
    import numpy as np
    import private_step
    from clipping_measure import FULL, data

    import keras_bandmf as bandmf

    plan = private_step.make_plan(batch_size, num_bands)
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(1e-3), plan)
    model = bandmf.privatize(private_step.compiled_model(name, optimizer))
    whole = keras.tree.map_structure(
        lambda a: np.concatenate([np.asarray(a)] * private_step.EPOCH_STEPS),
        data(name, batch_size, FULL),
    )
    batches = plan.batches(*whole)
    for _ in sys.stdin:
        times = private_step.StepTimes()
        model.fit(batches, epochs=1, steps_per_epoch=STEPS, verbose=0, callbacks=[times])
        print("seconds", statistics.median(times.seconds[1:]), flush=True)


def started(checkout, arguments):
    """The process of one version."""
    path = os.pathsep.join([str(checkout), str(HERE)])
    return subprocess.Popen(
        [sys.executable, __file__, str(checkout), "--serve", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


def asked(process):
    """The seconds of a step, from one call of `fit`."""
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("seconds"):
            return float(line.split()[1])
    raise SystemExit("A process ended. Does the other checkout have this public interface?")


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=pathlib.Path, help="the other checkout")
    parser.add_argument("--models", nargs="*", default=list(SIZES))
    parser.add_argument("--bands", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        name, batch_size, num_bands = options.serve
        serve(name, int(batch_size), int(num_bands))
        return
    print(f"{'model':<11}{'bands':>6}{'other ms':>10}{'this ms':>10}{'ratio':>7}{'quartiles':>14}")
    for name in options.models:
        for num_bands in options.bands:
            arguments = (name, SIZES[name], num_bands)
            both = [started(c.resolve(), arguments) for c in (options.other, HERE.parent)]
            for process in both:
                asked(process)  # traces
            seconds = [[], []]
            for round_ in range(options.rounds):
                for i in (0, 1) if round_ % 2 else (1, 0):
                    seconds[i].append(asked(both[i]))
            for process in both:
                process.kill()
            ratios = [this / other for other, this in zip(*seconds, strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            other, this = (statistics.median(found) * 1e3 for found in seconds)
            print(
                f"{name:<11}{num_bands:>6}{other:>10.1f}{this:>10.1f}"
                f"{statistics.median(ratios):>7.3f}{low:>8.3f}{high:>6.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
