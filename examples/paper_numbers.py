"""What the paper reports about strategies, computed anew: every function returns plain rows.

"The paper" is McKenna, arXiv 2405.15913. RMSE is the root mean square error, over the steps, of the
noisy running sum of gradients, in clip norms, divided by the times an example takes part.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterator

from keras_bandmf.accounting.accountant import COARSE_ACCURACY, calibrate_noise
from keras_bandmf.planning.band_choice import BandChoice, choose_bands, expected_rmse
from keras_bandmf.sampling.schedule import Schedule
from keras_bandmf.strategies import (
    BandedInverseStrategy,
    BandedStrategy,
    BufferedToeplitzStrategy,
    ToeplitzStrategy,
    TreeStrategy,
)

STEPS = (16, 64, 256, 1024, 4096, 10_000, 16_384, 100_000, 1_000_000)
BANDS = (2, 4, 8, 16, 32, 64)
# Short matrices may be full, as iterations are cheap; long ones have at most so many numbers that
# the search fits 10 GiB.
FEW_BANDS, FEW_NUMBERS, MOST_NUMBERS = 32, 2**14, 32 * 10**6


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far the best Toeplitz strategy is from the best banded one.

    Attributes:
        num_steps: n.
        num_bands: b.
        exact: RMSE of the banded optimum at noise multiplier 1 and one participation.
        raw: RMSE of the Toeplitz optimum above it, in percent.
        normalized: the same with columns of norm 1.
        seconds: what the search took.
    """

    num_steps: int
    num_bands: int
    exact: float
    raw: float
    normalized: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Numbers of bands compared at one (epsilon, delta).

    Attributes:
        num_steps: n.
        epochs: k, the times an example takes part.
        epsilon: the target.
        choice: the numbers of bands, with amplification by sampling.
        unamplified: RMSE of as many bands as fit an epoch, in a fixed order.
    """

    num_steps: int
    epochs: int
    epsilon: float
    choice: BandChoice
    unamplified: float

    @property
    def rule(self) -> float:
        """The paper's rule of thumb for the best number of bands: epsilon sqrt(n) / k."""
        return self.epsilon * math.sqrt(self.num_steps) / self.epochs

    @property
    def rmse_by_rule(self) -> float:
        """RMSE of the number of bands nearest to the rule, of those compared."""
        target = math.log(max(1.0, self.rule))
        nearest = min(self.choice.candidates, key=lambda row: abs(math.log(row.num_bands) - target))
        return nearest.expected_rmse


@functools.cache
def toeplitz(num_steps: int, num_bands: int) -> ToeplitzStrategy:
    """The Toeplitz optimum with columns of norm 1; found once."""
    return ToeplitzStrategy.optimize(num_steps, num_bands)


def gap_points(max_steps: int) -> list[tuple[int, int]]:
    """The (n, b) of the first figure up to `max_steps`."""
    return [
        (n, b)
        for n in STEPS
        if n <= max_steps
        for b in sorted({*BANDS, n})
        if b <= n and n * b <= (MOST_NUMBERS if b <= FEW_BANDS else FEW_NUMBERS)
    ]


def gaps(max_steps: int, cache_dir: pathlib.Path | None = None) -> Iterator[Gap]:
    """Compares Toeplitz with banded; says beforehand how long a long search will take.

    Args:
        max_steps: the largest n.
        cache_dir: where results are kept, and searches resumed from; None keeps nothing.

    Yields:
        A `Gap` per (n, b), by ascending n.
    """
    pace: dict[int, float] = {}  # seconds a step of the last search with so many bands
    for n, b in gap_points(max_steps):
        if n >= 16_384 and b in pace:
            print(f"  n = {n:,}, b = {b}: about {pace[b] * n / 60:.1f} minutes", flush=True)
        started = time.perf_counter()
        banded = BandedStrategy.optimize(n, b, max_iterations=5000, cache_dir=cache_dir)
        seconds = time.perf_counter() - started
        pace[b] = seconds / n
        normalized = toeplitz(n, b)
        raw = dataclasses.replace(normalized, column_normalize=False)
        best = banded.loss()
        above = [100 * (math.sqrt(s.loss() / best) - 1) for s in (raw, normalized)]
        yield Gap(n, b, math.sqrt(best), *above, seconds)


def schedule(num_steps: int, epochs: int, sampling: str, num_bands: int = 1) -> Schedule:
    """A run of n steps in which an example takes part k times: only n, k and b matter."""
    return Schedule(sampling, num_steps, epochs, num_steps, num_bands)


@functools.cache
def gaussian_noise(num_steps: int, epochs: int, epsilon: float, delta: float) -> float:
    """The noise multiplier of one Gaussian, as of every strategy in a fixed order."""
    run = schedule(num_steps, epochs, "fixed_order")
    return calibrate_noise(run, epsilon, delta, accuracy=COARSE_ACCURACY)


@functools.cache
def sweep(num_steps: int, epochs: int, epsilon: float, delta: float) -> Sweep:
    """Compares numbers of bands from 1 up to an epoch, with coarse accounting.

    Args:
        num_steps: n.
        epochs: k.
        epsilon: the target.
        delta: the target.

    Returns:
        The comparison.
    """
    most = num_steps // epochs
    choice = choose_bands(
        schedule(num_steps, epochs, "cyclic_poisson"),
        epsilon,
        delta,
        functools.partial(toeplitz, num_steps),
        max_bands=most,
    )
    sigma = gaussian_noise(num_steps, epochs, epsilon, delta)
    run = schedule(num_steps, epochs, "fixed_order", most)
    unamplified = expected_rmse(run, sigma, toeplitz(num_steps, most).loss())
    return Sweep(num_steps, epochs, epsilon, choice, unamplified)


def fixed_order_errors(num_steps: int, epochs: int) -> dict[str, float]:
    """RMSE of the mechanisms without amplification, at noise multiplier 1.

    Args:
        num_steps: n.
        epochs: k; an example takes part every n / k steps.

    Returns:
        sensitivity * sqrt(mean error) / k for each mechanism, of several variants the lowest.
    """
    separation = num_steps // epochs

    def rmse(strategy) -> float:
        sensitivity = strategy.sensitivity(epochs, separation, fixed_order=True)
        return sensitivity * math.sqrt(strategy.loss()) / epochs

    inverse_bands = [2**power for power in range(num_steps.bit_length()) if 2**power < num_steps]
    buffered = [
        BufferedToeplitzStrategy.optimize(
            num_steps, buffers, max_participations=epochs, min_separation=separation
        )
        for buffers in (1, 2, 3, 4)
    ]
    return {
        # "full" would look at steps to come, which training cannot.
        "tree aggregation": rmse(TreeStrategy(num_steps, "online")),
        "square root": rmse(BandedInverseStrategy.square_root(num_steps, num_steps)),
        "banded inverse": min(
            rmse(BandedInverseStrategy.square_root(num_steps, b)) for b in inverse_bands
        ),
        "buffered Toeplitz": min(rmse(strategy) for strategy in buffered),
        "BandMF, fixed order": rmse(toeplitz(num_steps, separation)),
    }


def mechanisms(
    num_steps: int, epochs: int, epsilons: tuple[float, ...], delta: float
) -> dict[str, list[float]]:
    """RMSE of every mechanism over epsilon.

    Args:
        num_steps: n.
        epochs: k.
        epsilons: the targets.
        delta: the target.

    Returns:
        A list a mechanism, along `epsilons`; the first and the last are amplified by sampling.
    """
    noise = [gaussian_noise(num_steps, epochs, epsilon, delta) for epsilon in epsilons]
    choices = [sweep(num_steps, epochs, epsilon, delta).choice for epsilon in epsilons]
    found = {"DP-SGD": [choice.dp_sgd.expected_rmse for choice in choices]}
    for name, error in fixed_order_errors(num_steps, epochs).items():
        found[name] = [sigma * error for sigma in noise]
    found["BandMF, amplified"] = [choice.best.expected_rmse for choice in choices]
    return found


def full_batch(num_steps: int, epsilon: float, delta: float) -> float:
    """RMSE of DP-SGD that sees all data at each of n steps: no sampling, k = n.

    Args:
        num_steps: n.
        epsilon: the target.
        delta: the target.

    Returns:
        sigma sqrt((n + 1) / (2 n)) for the sigma of one Gaussian.
    """
    sigma = gaussian_noise(num_steps, num_steps, epsilon, delta)
    return expected_rmse(
        schedule(num_steps, num_steps, "fixed_order"), sigma, toeplitz(num_steps, 1).loss()
    )
