"""How much correlated noise helps within blocks of carriers: `python benchmarks/rgp_blocks.py`.

Noise may be correlated between two refreshes of RGP's carriers only. For runs like those of the
examples the table shows the expected error of the noise with b bands in blocks of R steps, over
that of independent noise at the same (epsilon, delta); the last block is the whole run, as without
carriers.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras_bandmf as bandmf

# (name, examples, batch size, epochs, epsilon)
RUNS = [
    ("SST-2, a fifth", 13_469, 512, 3, 8.0),
    ("MNIST", 60_000, 500, 5, 2.0),
]
BLOCKS = (4, 8, 13, 16)


def expected_error(run, strategy):
    """Expected root mean squared error of a plan calibrated to the run's budget."""
    _, num_examples, batch_size, epochs, epsilon = run
    plan = bandmf.TrainingPlan.calibrate(
        num_examples=num_examples,
        batch_size=batch_size,
        epochs=epochs,
        epsilon=epsilon,
        delta=1e-5,
        num_bands=None,
        strategy=strategy,
    )
    return plan.expected_rmse


def main():
    """Prints a line for each run and block."""
    print(f"{'run':<16} {'R':>5} {'b = 2':>7} {'b = 4':>7} {'b = 8':>7}")
    for run in RUNS:
        name, num_examples, batch_size, epochs, _ = run
        num_steps = epochs * (num_examples // batch_size)
        independent = expected_error(run, bandmf.strategies.ToeplitzStrategy.optimize(num_steps, 1))
        for block in (*BLOCKS, num_steps):
            ratios = []
            for bands in (2, 4, 8):
                if bands > block:
                    ratios.append(f"{'-':>7}")
                    continue
                strategy = bandmf.strategies.BlockDiagonalStrategy.optimize(num_steps, bands, block)
                ratios.append(f"{expected_error(run, strategy) / independent:7.3f}")
            print(f"{name:<16} {block:>5} {' '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
