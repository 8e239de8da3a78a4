"""Epsilon of a plan whose sampler keeps the group of every example secret.

The accounting of `accounting/accountant.py` gives the group away to the adversary. What counts it
as the secret that it is, is in `accounting/amplification/`; the theorem is in
`docs/amplification.md`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from keras_bandmf._checks import PrivacyError
from keras_bandmf.accounting.accountant import delta_without_noise_share
from keras_bandmf.accounting.amplification.certificate import (
    Certificate,
    Certifier,
    OutOfReach,
)
from keras_bandmf.accounting.amplification.estimator import Estimator
from keras_bandmf.noise.lattice import largest_row_norm, rounding_steps, step_exponent
from keras_bandmf.planning.arguments import KnownStrategy
from keras_bandmf.planning.band_choice import expected_rmse
from keras_bandmf.planning.progress import UNWATCHED, Watch
from keras_bandmf.sampling.schedule import Schedule
from keras_bandmf.strategies import ToeplitzStrategy
from keras_bandmf.strategies.coefficients import fractional_coefficients

#: n b up to which bands and coefficients are compared: minutes.
_MOST_COMPARED = 50_000
#: Nanoseconds of one processor for the samples of an attempt: five minutes on two cores.
_MOST_WORK = 6e11
_MOST_SAMPLES = 20
#: Where an attempt affords fewer, the search before it would take longer than the attempt.
_LEAST_AFFORDABLE = 2**17

#: Of (1 - x)^(-gamma): 1/2 is best where groups are known and bands many, less overlaps less.
_EXPONENTS = (0.5, 0.45, 0.4)


def certified_noise(
    schedule: Schedule,
    strategy: KnownStrategy,
    epsilon: float,
    delta: float,
    guess: float,
    watch: Watch = UNWATCHED,
) -> Certificate:
    """Returns the least certified noise multiplier of the grid for (epsilon, delta).

    Formal guarantees: unless a confidence bound fails, with probability at most
    `certificate.FAILURE_SHARE * delta` over the random words of the samples, the run with this
    noise multiplier is (epsilon, delta)-private, of which delta the finitely many bits of the
    noise have their share. See `docs/amplification.md`.

    Args:
        schedule: Of a sampling law that keeps the steps of an example secret.
        strategy: With `schedule.num_bands` bands.
        epsilon: The target.
        delta: The target.
        guess: A noise multiplier to start at: that of a known group is an upper bound.
        watch: Told about the samples that are drawn.

    Returns:
        The certificate; its `delta` is the share of the ideal noise.

    Raises:
        OutOfReach: If nothing could be certified with as many samples as are allowed.
        ValueError: If the schedule is of another sampling law.
    """
    share = delta_without_noise_share(delta)
    report = watch.at("certify", schedule.num_bands)
    return _certifier(schedule, strategy, report).noise(epsilon, share, guess)


def best_for_secret_groups(
    schedule: Schedule,
    strategy: KnownStrategy,
    known_error: float,
    epsilon: float,
    delta: float,
    max_bands: int,
    watch: Watch = UNWATCHED,
) -> tuple[Schedule, KnownStrategy]:
    """Returns the number of bands and the Toeplitz coefficients of lowest estimated error.

    With secret groups, columns of different groups that overlap cost privacy, and more bands cost
    less of it than where the group is known. So numbers of bands are compared from that of
    `schedule` on, each half as large again, while the error falls. If it does not fall at once,
    fewer bands are tried under random allocation. For each number the coefficients of lowest error
    are compared with those of (1 - x)^(-gamma), of which the overlap is smaller.

    Formal guarantees: estimates only choose. What is stated is certified anew.

    Args:
        schedule: The run with the best number of bands where groups are known.
        strategy: The best for it.
        known_error: The expected RMSE of both where groups are known.
        epsilon: The target.
        delta: The target.
        max_bands: The largest number of bands to consider.
        watch: Told about the samples that are drawn.

    Returns:
        The schedule with the number of bands, and the strategy.
    """
    share = delta_without_noise_share(delta)
    limit = min(max_bands, schedule.num_steps, schedule.law.max_bands(schedule))
    allocates = schedule.law.fixes_participations
    best = known_error, schedule, strategy
    guess = 1.0

    def improved(bands: int) -> bool:
        """Whether the best of these bands is better than the best so far, which it then is."""
        nonlocal best, guess
        if schedule.num_steps * bands > _MOST_COMPARED:
            return False
        run = dataclasses.replace(schedule, num_bands=bands)
        candidates = [strategy] if bands == schedule.num_bands else []
        # With one band all coefficients are the same.
        candidates += [
            ToeplitzStrategy(fractional_coefficients(gamma, bands), run.num_steps)
            for gamma in _EXPONENTS
            if bands > 1
        ]
        report = watch.at("compare", bands)
        before = best[0]
        for candidate in candidates:
            try:
                guess = _certifier(run, candidate, report).estimated_noise(epsilon, share, guess)
            except OutOfReach:
                continue
            error = expected_rmse(run, guess, candidate.loss("mean"))
            if error < best[0]:
                best = error, run, candidate
        return best[0] < before

    # Under cyclic Poisson sampling one band leaves nothing to keep secret.
    start = bands = max(schedule.num_bands, 1 if allocates else min(2, limit))
    if not allocates and limit < 2:
        return schedule, strategy
    while improved(bands) and bands < limit:
        bands = min(math.ceil(1.5 * bands), limit)
    if allocates and best[1].num_bands == start:
        bands = start
        while bands > 1 and improved(bands := math.floor(bands / 1.5)):
            pass
    return best[1:]


def check_certificate(
    schedule: Schedule, noise_multiplier: float, delta: float, certificate: object
) -> None:
    """Refuses a certificate that cannot be one of this plan, without computing it again.

    Args:
        schedule: Of the plan.
        noise_multiplier: Of the plan; more noise than was certified is fine.
        delta: Of the plan.
        certificate: The one that the plan is given.

    Raises:
        TypeError: If it is no certificate.
        PrivacyError: If it is about less delta or more noise than the plan's, or another sampling.
    """
    if type(certificate) is not Certificate:
        raise TypeError(
            "Expected `certificate` to be a Certificate, as `calibrate` found it, or None. "
            f"Received: certificate={certificate!r}."
        )
    if (
        schedule.law.patterns(schedule) is None
        or noise_multiplier < certificate.sigma
        or certificate.delta > delta_without_noise_share(delta)
    ):
        raise PrivacyError(
            "Expected the certificate of a plan to be for its sampling, and for at most its noise "
            f"and its delta. Received: sampling={schedule.sampling!r}, "
            f"noise_multiplier={noise_multiplier}, delta={delta}, certificate={certificate}. Make "
            "the plan anew, or with certificate=None, which states the epsilon of known groups."
        )


def rounding_factor(strategy: KnownStrategy, stddev: float, norm: float, size: int) -> float:
    """Returns what noise is to be multiplied by, because its rows are rounded in float64.

    Formal guarantees: the theorem of secret groups takes that an example moves row i of C by no
    more than |C_ij| times the norm of its gradient, for each i. In a row after a participation
    float64 rounds as if another value had been added, at most `lattice.rounding_steps` lattice
    steps for each of `size` coordinates. All entries of C that are not zero are taken to be
    larger by the factor returned; where C is zero, the row does not depend on the example.

    Args:
        strategy: The strategy of the noise.
        stddev: The standard deviation of Z.
        norm: The clip norm.
        size: The number of released coordinates.

    Returns:
        A factor of at least 1.
    """
    if stddev == 0.0:
        return 1.0
    entries = np.abs(columns_of(strategy)) * strategy.sensitivity()
    # Twice: the step of the larger noise may be that much coarser.
    step = 2.0 * 2.0 ** step_exponent(stddev, largest_row_norm(strategy))
    moved = rounding_steps(strategy) * step * math.sqrt(size)
    return 1.0 + moved / (float(entries[entries > 0.0].min()) * norm)


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
    check_certificate(schedule, noise_multiplier, delta, certificate)
    return _certifier(schedule, strategy).verify(certificate).epsilon


def _certifier(
    schedule: Schedule, strategy: KnownStrategy, report: Callable[[int], None] | None = None
) -> Certifier:
    law = schedule.law.patterns(schedule)
    if law is None:
        raise ValueError(
            "Expected a sampling law that keeps the steps of an example secret. Received: "
            f"sampling={schedule.sampling!r}. Use sampling='cyclic_poisson' or "
            "'random_allocation', or leave amplification at 'known_group'."
        )
    samples = most_samples(schedule)
    if samples < _LEAST_AFFORDABLE:
        raise OutOfReach(
            "Certifying this run would take hours. Received: "
            f"{schedule.num_steps} steps and {schedule.num_bands} bands. Use fewer bands, or "
            "amplification='known_group'."
        )
    return Certifier(Estimator(columns_of(strategy), law, report), max_samples=samples)


def most_samples(schedule: Schedule) -> int:
    """Returns how many samples of a run an attempt may draw in each direction.

    Args:
        schedule: The run.

    Returns:
        A power of 2; too few where a certificate would take hours.
    """
    work = schedule.num_steps * (40.0 + schedule.num_bands / 5.0)
    return 2 ** max(0, min(_MOST_SAMPLES, math.floor(math.log2(_MOST_WORK / work))))


def columns_of(strategy: KnownStrategy) -> np.ndarray:
    """Returns the columns of C over its sensitivity: entry (i, l) is that of row i + l, column i.

    Args:
        strategy: A banded strategy.

    Returns:
        Shape (n, b), float64; zero beyond the last row, and of norm at most 1.
    """
    columns = banded_columns(strategy) / strategy.sensitivity()
    norms = np.linalg.norm(columns, axis=1, keepdims=True)
    # Rounding may leave a norm above 1 by a few units in the last place; more is an error.
    return columns / np.where(norms <= 1.0 + 1e-9, np.maximum(norms, 1.0), 1.0)


def banded_columns(strategy: KnownStrategy) -> np.ndarray:
    """Returns the columns of C: entry (i, l) is that of row i + l, column i.

    Args:
        strategy: A banded strategy.

    Returns:
        Shape (n, b), float64; zero beyond the last row.
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
    return columns
