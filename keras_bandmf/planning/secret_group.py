"""Epsilon of a plan whose sampler keeps the group of every example secret.

The accounting of `accounting/accountant.py` gives the group away to the adversary. What counts it
as the secret that it is, is in `accounting/amplification/`; the theorem is in
`docs/amplification.md`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from keras_bandmf.accounting.accountant import FINITE_NOISE_SHARE
from keras_bandmf.accounting.amplification.certificate import Certificate, Certifier
from keras_bandmf.accounting.amplification.estimator import Estimator
from keras_bandmf.accounting.amplification.laws import PoissonInGroup, Rounds
from keras_bandmf.planning.arguments import KnownStrategy
from keras_bandmf.planning.band_choice import expected_rmse
from keras_bandmf.sampling.schedule import Schedule
from keras_bandmf.strategies import ToeplitzStrategy

# A row of the noise is rounded in float64, which depends on rows before it: at most 10^-5 lattice
# steps of 2^-22 sigma for each coordinate. Over 10^9 of them that is below this share of sigma
# times the least entry of C that a plan has.
_ROUNDING_SHARE = 2.0**-16

#: Of (1 - x)^(-gamma): 1/2 is best where groups are known and bands many, less overlaps less.
_EXPONENTS = (0.5, 0.45, 0.4)


def certified_noise(
    schedule: Schedule, strategy: KnownStrategy, epsilon: float, delta: float, guess: float
) -> Certificate:
    """Returns the least certified noise multiplier of the grid for (epsilon, delta).

    Formal guarantees: unless a confidence bound fails, with probability at most
    `certificate.FAILURE_SHARE * delta` over the random words of the samples, the run with this
    noise multiplier is (epsilon, delta)-private, of which delta the finitely many bits of the
    noise have their share. See `docs/amplification.md`.

    Args:
        schedule: Of cyclic Poisson sampling.
        strategy: With `schedule.num_bands` bands.
        epsilon: The target.
        delta: The target.
        guess: A noise multiplier to start at: that of a known group is an upper bound.

    Returns:
        The certificate; its `delta` is the share of the ideal noise.

    Raises:
        OutOfReach: If nothing could be certified with as many samples as are allowed.
        ValueError: If the schedule is of another sampling law.
    """
    share = delta * (1.0 - FINITE_NOISE_SHARE)
    return _certifier(schedule, strategy).noise(epsilon, share, guess)


def best_for_secret_groups(
    schedule: Schedule, strategy: KnownStrategy, epsilon: float, delta: float, max_bands: int
) -> tuple[Schedule, KnownStrategy]:
    """Returns the number of bands and the Toeplitz coefficients of lowest estimated error.

    With secret groups, columns of different groups that overlap cost privacy, and more bands cost
    less of it than where the group is known. So numbers of bands are compared from that of
    `schedule` on, each half as large again, while the error falls; and for each the coefficients
    of lowest error with those of (1 - x)^(-gamma), of which the overlap is smaller.

    Formal guarantees: estimates only choose. What is stated is certified anew.

    Args:
        schedule: The run with the best number of bands where groups are known.
        strategy: The best for it.
        epsilon: The target.
        delta: The target.
        max_bands: The largest number of bands to consider.

    Returns:
        The schedule with the number of bands, and the strategy.
    """
    share = delta * (1.0 - FINITE_NOISE_SHARE)
    limit = min(max_bands, schedule.num_steps, schedule.num_examples // schedule.batch_size)
    best: tuple[float, Schedule, KnownStrategy] | None = None
    bands, guess = schedule.num_bands, 1.0
    while bands > 1:
        run = dataclasses.replace(schedule, num_bands=bands)
        candidates = [strategy] if bands == schedule.num_bands else []
        candidates += [fractional(gamma, bands, run.num_steps) for gamma in _EXPONENTS]
        found = []
        for candidate in candidates:
            guess = _certifier(run, candidate).estimated_noise(epsilon, share, guess)
            found.append((expected_rmse(run, guess, candidate.loss("mean")), candidate))
        error, candidate = min(found, key=lambda pair: pair[0])
        if best is not None and error >= best[0]:
            break
        best = error, run, candidate
        if bands >= limit:
            break
        bands = min(math.ceil(1.5 * bands), limit)
    return (schedule, strategy) if best is None else best[1:]


def fractional(gamma: float, num_bands: int, num_steps: int) -> ToeplitzStrategy:
    """Returns the strategy of the first coefficients of (1 - x)^(-gamma); 1/2 is the square root.

    Args:
        gamma: In (0, 1).
        num_bands: b, the number of coefficients.
        num_steps: n.
    """
    lags = np.arange(1, num_bands)
    coefficients = np.cumprod(np.concatenate([[1.0], (gamma + lags - 1.0) / lags]))
    return ToeplitzStrategy(coefficients, num_steps)


def noise_multiplier_of(certificate: Certificate) -> float:
    """Returns the noise multiplier of a plan for which a certificate holds."""
    return certificate.sigma * (1.0 + 2.0 * _ROUNDING_SHARE)


@functools.lru_cache(maxsize=64)
def confirmed_epsilon(
    schedule: Schedule,
    strategy: KnownStrategy,
    noise_multiplier: float,
    delta: float,
    certificate: Certificate,
) -> float:
    """Returns the epsilon of a plan's certificate, once it is computed again from its seed.

    Args:
        schedule: Of the plan.
        strategy: Of the plan.
        noise_multiplier: Of the plan; more noise than was certified is fine.
        delta: Of the plan.
        certificate: Of the plan.

    Returns:
        Epsilon.

    Raises:
        ValueError: If it is not confirmed, or is about less delta or more noise than the plan's.
    """
    if noise_multiplier * (
        1.0 - _ROUNDING_SHARE
    ) < certificate.sigma or certificate.delta > delta * (1.0 - FINITE_NOISE_SHARE):
        raise ValueError(
            "Expected the certificate of a plan to be for at most its noise and its delta. "
            f"Received: noise_multiplier={noise_multiplier}, delta={delta}, {certificate}. Make "
            "the plan anew."
        )
    return _certifier(schedule, strategy).verify(certificate).epsilon


@functools.lru_cache(maxsize=4)
def _certifier(schedule: Schedule, strategy: KnownStrategy) -> Certifier:
    if schedule.sampling != "cyclic_poisson":
        raise ValueError(
            "Only cyclic Poisson sampling keeps groups secret. Received: "
            f"sampling={schedule.sampling!r}. Use sampling='cyclic_poisson', or leave "
            "amplification at 'known_group'."
        )
    law = PoissonInGroup(
        Rounds(schedule.num_steps, schedule.num_bands), schedule.sampling_probability or 0.0
    )
    return Certifier(Estimator(columns_of(strategy), law))


def columns_of(strategy: KnownStrategy) -> np.ndarray:
    """Returns the columns of C over its sensitivity: entry (i, l) is that of row i + l, column i.

    Args:
        strategy: A banded strategy.

    Returns:
        Shape (n, b), float64; zero beyond the last row, and of norm at most 1.
    """
    steps, bands = strategy.num_steps, strategy.num_bands
    rows = np.asarray(strategy.noise_rows(), np.float64)
    tail = np.asarray(strategy.tail_scale(), np.float64)
    scales = np.ones(steps)
    scales[steps - len(tail) :] = tail
    columns = np.zeros((steps, bands))
    for lag in range(bands):
        count = steps - lag
        # C = R S^-1 of the rows R of the recurrence and the scales S of what is released.
        entries = rows[lag:, lag] if len(rows) == steps else np.full(count, rows[0, lag])
        columns[:count, lag] = entries / scales[:count]
    columns /= strategy.sensitivity()
    # Rounding may leave a norm above 1 by a few units in the last place.
    return columns / np.maximum(np.linalg.norm(columns, axis=1, keepdims=True), 1.0)
