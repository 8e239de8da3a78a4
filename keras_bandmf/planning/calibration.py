"""From (epsilon, delta) to sampling, bands, strategy and noise multiplier."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Literal

import keras

from keras_bandmf._checks import checked_choice
from keras_bandmf.accounting.accountant import calibrate_noise, checked_delta, checked_epsilon
from keras_bandmf.accounting.amplification.certificate import Certificate, OutOfReach
from keras_bandmf.planning.arguments import (
    KnownStrategy,
    NumBands,
    PlanArguments,
    StrategyName,
    refuse_comparison,
)
from keras_bandmf.planning.band_choice import (
    DEFAULT_MAX_BANDS,
    BandCandidate,
    BandChoice,
    choose_bands,
    expected_rmse,
)
from keras_bandmf.planning.secret_group import (
    best_for_secret_groups,
    certified_noise,
)
from keras_bandmf.sampling.laws import SAMPLINGS, SamplingName
from keras_bandmf.sampling.schedule import Schedule
from keras_bandmf.strategies import Workload

# n b^2 up to which the chosen Toeplitz strategy is searched for under a workload: some seconds.
_MAX_SEARCH = 2 * 10**7


#: How the accounting counts the group that the sampler draws for each example.
Amplification = Literal["known_group", "secret_group"]
_AMPLIFICATIONS = ("known_group", "secret_group")


@dataclasses.dataclass(frozen=True)
class CalibratedRun:
    """What `calibrate` found: everything about a plan but its delta.

    Attributes:
        schedule: Who takes part when.
        noise_multiplier: sigma, calibrated finely for this very schedule.
        strategy: The strategy object.
        certificate: Of the epsilon that counts groups as secret, or None.
    """

    schedule: Schedule
    noise_multiplier: float
    strategy: KnownStrategy
    certificate: Certificate | None = None


def compare_bands(
    *,
    num_examples: int,
    batch_size: int,
    epsilon: float,
    delta: float,
    epochs: int | None = None,
    num_steps: int | None = None,
    num_bands: NumBands | Sequence[int] = "auto",
    strategy: StrategyName | KnownStrategy = "toeplitz",
    sampling: SamplingName | Literal["auto"] = "cyclic_poisson",
    max_bands: int = DEFAULT_MAX_BANDS,
    max_participations: int | None = None,
    min_separation: int | None = None,
    workload: Workload | keras.optimizers.SGD | None = None,
) -> BandChoice:
    """Returns the comparison behind `TrainingPlan.calibrate`, for the same arguments.

    Noise multipliers are coarse, some tenths of a percent above what is needed. Strategies are
    Toeplitz strategies. Under a workload their coefficients are those for prefix sums, so the
    plan, whose strategy is optimized for the workload, has a somewhat lower RMSE than its row.

    Formal guarantees: looks at no data, so the choice costs no privacy. Rows of different
    `sampling` meet the same (epsilon, delta) under different adjacencies: add-or-remove-one for
    cyclic Poisson, zero-out for a fixed order.

    Args:
        num_examples: N, the number of rows of the training data.
        batch_size: The expected number of rows of a step.
        epsilon: The target, from 10^-6 to 10^6.
        delta: In (0, 1), below 1 / num_examples.
        epochs: Passes over the data. Give this or `num_steps`.
        num_steps: n, the number of steps.
        num_bands: "auto" looks for the best number; one number, or several, are compared with 1.
        strategy: "toeplitz", "banded", or a strategy object, which is then compared with 1 band.
        sampling: "cyclic_poisson", "fixed_order", or "auto" for both.
        max_bands: The largest number of bands that "auto" considers.
        max_participations: Fixed order only: declared for data that the user feeds.
        min_separation: Fixed order only, in steps: declared for data that the user feeds.
        workload: None for prefix sums, a `strategies.Workload`, or the `keras.optimizers.SGD` to
            train with.

    Returns:
        The candidates. `.best` has the lowest expected RMSE, and `str()` is a table.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value or a combination cannot be accounted for.

    Example:
        >>> import keras_bandmf as bandmf
        >>> choice = bandmf.compare_bands(
        ...     num_examples=20_000, batch_size=100, epochs=2, epsilon=2.0, delta=1e-6,
        ...     num_bands=[2, 4],
        ... )
        >>> [row.num_bands for row in choice.candidates]
        [1, 2, 4]
        >>> choice.best.num_bands
        4
    """
    several: Sequence[int] | None = None
    if isinstance(strategy, str) and isinstance(num_bands, Sequence):
        several = None if isinstance(num_bands, str) else num_bands
    arguments = PlanArguments.resolve(
        num_examples=num_examples,
        batch_size=batch_size,
        num_steps=num_steps,
        epochs=epochs,
        num_bands="auto" if several is not None or num_bands is None else num_bands,
        strategy=strategy,
        workload=workload,
        max_participations=max_participations,
        min_separation=min_separation,
    )
    compared = arguments.num_bands if several is None else several
    return _compared(arguments, epsilon, delta, sampling, compared, max_bands)


def _compared(
    arguments: PlanArguments,
    epsilon: float,
    delta: float,
    sampling: SamplingName | Literal["auto"],
    num_bands: int | Sequence[int] | None,
    max_bands: int,
) -> BandChoice:
    """Returns the candidates for resolved arguments; None compares all numbers of bands."""
    checked_choice("sampling", sampling, (*SAMPLINGS, "auto"))
    refuse_comparison(arguments.strategy)
    # Both ways of sampling compare the same strategies.
    make_strategy = functools.cache(arguments.quick_strategy)
    candidates: list[BandCandidate] = []
    for name in SAMPLINGS if sampling == "auto" else (sampling,):
        choice = choose_bands(
            arguments.schedule(name, 1),
            epsilon,
            delta,
            make_strategy,
            num_bands=num_bands,
            max_bands=max_bands,
        )
        candidates += choice.candidates
    return BandChoice(tuple(candidates))


def calibrated_run(
    arguments: PlanArguments,
    *,
    epsilon: float,
    delta: float,
    sampling: SamplingName | Literal["auto"],
    max_bands: int,
    amplification: Amplification = "known_group",
) -> CalibratedRun:
    """Returns the run of least expected error: see `TrainingPlan.calibrate`.

    Formal guarantees: the noise multiplier is that of `calibrate_noise` at the fine accuracy, or
    the smaller one of the certificate, for the very schedule and strategy that are returned.

    Args:
        arguments: The resolved arguments of the plan.
        epsilon: The target, from 10^-6 to 10^6.
        delta: In (0, 1).
        sampling: The name of a sampling law, or "auto" for the one of lower expected RMSE.
        max_bands: The largest number of bands to consider where `arguments` names none.
        amplification: "known_group" or "secret_group".

    Returns:
        Schedule, noise multiplier, strategy and certificate.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value or a combination cannot be accounted for.
    """
    epsilon, delta = checked_epsilon(epsilon), checked_delta(delta)
    checked_choice("amplification", amplification, _AMPLIFICATIONS)
    if amplification == "secret_group" and sampling != "cyclic_poisson":
        raise ValueError(
            "Expected `sampling` to be 'cyclic_poisson' with amplification='secret_group': only "
            f"there groups are secret. Received: sampling={sampling!r}. Leave `amplification` at "
            "'known_group', or use cyclic Poisson sampling."
        )
    bands, guess = arguments.num_bands, None
    max_work = _MAX_SEARCH if bands is None else None
    if bands is None or sampling == "auto":
        choice = _compared(arguments, epsilon, delta, sampling, bands, max_bands)
        best = (choice if bands is None else choice.of_bands(bands)).best
        sampling, bands, guess = best.sampling, best.num_bands, best.noise_multiplier
    schedule = arguments.schedule(sampling, bands)
    sigma = calibrate_noise(schedule, epsilon, delta, guess=guess)
    strategy = arguments.best_strategy(bands, max_work)
    known = CalibratedRun(schedule, sigma, strategy)
    if amplification == "known_group":
        return known
    limit = None
    if arguments.may_choose_coefficients:
        limit = max_bands if arguments.num_bands is None else bands
    return _with_secret_groups(known, epsilon, delta, limit)


def _with_secret_groups(
    known: CalibratedRun, epsilon: float, delta: float, max_bands: int | None
) -> CalibratedRun:
    """Returns the certified run of lower expected error than that of known groups, or that run.

    Args:
        known: The best run where groups are known.
        epsilon: The target.
        delta: The target.
        max_bands: The largest number of bands to consider; None keeps the strategy of `known`.
    """
    schedule, strategy = known.schedule, known.strategy
    known_error = expected_rmse(schedule, known.noise_multiplier, strategy.loss("mean"))
    if max_bands is not None:
        schedule, strategy = best_for_secret_groups(
            schedule, strategy, known_error, epsilon, delta, max_bands
        )
    # With 1 band all examples are in one group: there is nothing to keep secret.
    if schedule.num_bands == 1:
        return known
    try:
        found = certified_noise(schedule, strategy, epsilon, delta, known.noise_multiplier)
    except OutOfReach as error:
        warnings.warn(f"Groups are counted as known. {error}", stacklevel=4)
        return known
    if expected_rmse(schedule, found.sigma, strategy.loss("mean")) >= known_error:
        return known
    return CalibratedRun(schedule, found.sigma, strategy, found)
