"""From (epsilon, delta) to sampling, bands, strategy and noise multiplier."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import keras

from keras_bandmf._checks import checked_choice, checked_function, checked_int
from keras_bandmf.accounting.accountant import (
    COARSE_ACCURACY,
    calibrate_noise,
    checked_delta,
    checked_epsilon,
)
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
    BandChoice,
    choose_bands,
    expected_rmse,
)
from keras_bandmf.planning.kept_calibration import Kept, KeptCalibration
from keras_bandmf.planning.progress import UNWATCHED, CalibrationProgress, Watch
from keras_bandmf.planning.secret_group import (
    best_for_secret_groups,
    certified_noise,
)
from keras_bandmf.sampling.laws import LAWS, SAMPLINGS, SamplingName
from keras_bandmf.sampling.schedule import Schedule
from keras_bandmf.strategies import Workload

# n b^2, times the number of curvatures, up to which the chosen Toeplitz strategy is searched for
# under a workload: some seconds.
_MAX_SEARCH = 2 * 10**7


#: The sampling laws that "auto" compares: those whose accounting takes no time.
_AUTO: tuple[SamplingName, ...] = ("cyclic_poisson", "fixed_order")

#: How the accounting counts the group that the sampler draws for each example.
Amplification = Literal["auto", "known_group", "secret_group"]
_AMPLIFICATIONS = ("auto", "known_group", "secret_group")


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
    Toeplitz strategies. Under a workload their coefficients are those for prefix sums (with
    curvatures, for a constant learning rate), so the plan, whose strategy is optimized for the
    workload, has a somewhat lower RMSE than its row.

    Formal guarantees: looks at no data, so the choice costs no privacy. Rows of different
    `sampling` meet the same (epsilon, delta) under different adjacencies: zero-out for a fixed
    order, add-or-remove-one otherwise.

    Groups are counted as known; under random allocation the steps of each row too, which needs
    far more noise than `TrainingPlan.calibrate` then finds.

    Args:
        num_examples: N, the number of rows of the training data.
        batch_size: The expected number of rows of a step.
        epsilon: The target, from 10^-6 to 10^6.
        delta: In (0, 1), below 1 / num_examples.
        epochs: Passes over the data. Give this or `num_steps`.
        num_steps: n, the number of steps.
        num_bands: "auto" looks for the best number; one number, or several, are compared with 1.
        strategy: "toeplitz", "banded", or a strategy object, which is then compared with 1 band.
        sampling: "cyclic_poisson", "random_allocation", "fixed_order", or "auto" for the first and
            the last.
        max_bands: The largest number of bands that "auto" considers.
        max_participations: Random allocation: the participations of every row; None is `epochs`.
            Fixed order: declared for data that the user feeds.
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
    choices = {
        name: choose_bands(
            arguments.schedule(name, 1),
            epsilon,
            delta,
            make_strategy,
            num_bands=num_bands,
            max_bands=max_bands,
        )
        for name in (_AUTO if sampling == "auto" else (sampling,))
    }
    found = BandChoice(tuple(row for choice in choices.values() for row in choice.candidates))
    return dataclasses.replace(found, limited_by=choices[found.best.sampling].limited_by)


def resolved_amplification(
    amplification: Amplification, sampling: SamplingName | Literal["auto"]
) -> Amplification:
    """Returns "known_group" or "secret_group": what "auto" means under a sampling law.

    Args:
        amplification: The argument of `TrainingPlan.calibrate`.
        sampling: The name of a sampling law, or "auto".

    Raises:
        TypeError: An argument is not a string.
        ValueError: An argument is unknown.
    """
    checked_choice("amplification", amplification, _AMPLIFICATIONS)
    checked_choice("sampling", sampling, (*SAMPLINGS, "auto"))
    if amplification != "auto":
        return amplification
    allocates = sampling != "auto" and LAWS[sampling].fixes_participations
    return "secret_group" if allocates else "known_group"


def calibrated_run(
    arguments: PlanArguments,
    *,
    epsilon: float,
    delta: float,
    sampling: SamplingName | Literal["auto"],
    max_bands: int,
    amplification: Amplification = "auto",
    watch: Watch = UNWATCHED,
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
        amplification: "known_group", "secret_group", or "auto": see `TrainingPlan.calibrate`.
        watch: Told about the samples that are drawn for secret groups.

    Returns:
        Schedule, noise multiplier, strategy and certificate.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value or a combination cannot be accounted for.
    """
    epsilon, delta = checked_epsilon(epsilon), checked_delta(delta)
    checked_int("max_bands", max_bands)
    amplification = resolved_amplification(amplification, sampling)
    if amplification == "secret_group":
        if sampling == "fixed_order":
            raise ValueError(
                "In a fixed order the steps of an example are not secret. Received: "
                "sampling='fixed_order', amplification='secret_group'. Use another `sampling`, or "
                "leave `amplification` out."
            )
        if sampling == "random_allocation":
            return _allocated(arguments, epsilon, delta, max_bands, watch)
        if sampling == "auto":
            return _best_of_all(arguments, epsilon, delta, max_bands, watch)
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
    return _with_secret_groups(known, epsilon, delta, limit, watch)


def kept_run(
    arguments: PlanArguments,
    *,
    epsilon: float,
    delta: float,
    sampling: SamplingName | Literal["auto"],
    max_bands: int,
    amplification: Amplification,
    callback: Callable[[CalibrationProgress], object] | None,
    cache_dir: str | os.PathLike[str] | None,
) -> CalibratedRun:
    """Returns `calibrated_run`, or that of an earlier call from the files of `cache_dir`.

    Formal guarantees: see `KeptCalibration` for what is checked again. Runs without a certificate
    are not kept: they are found in no time, or come with a warning.

    Args:
        arguments: The resolved arguments of the plan.
        epsilon: As in `calibrated_run`.
        delta: As in `calibrated_run`.
        sampling: As in `calibrated_run`.
        max_bands: As in `calibrated_run`.
        amplification: As in `calibrated_run`.
        callback: Called with a `CalibrationProgress` while samples are drawn, or None.
        cache_dir: The directory of the files, or None.

    Returns:
        Schedule, noise multiplier, strategy and certificate.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value or a combination cannot be accounted for.
        OSError: If `cache_dir` cannot be made.
    """
    epsilon, delta = checked_epsilon(epsilon), checked_delta(delta)
    checked_function("callback", callback, "It takes a `CalibrationProgress`.")
    checked_choice("amplification", amplification, _AMPLIFICATIONS)
    kept = None
    if cache_dir is not None:
        kept = KeptCalibration(
            cache_dir,
            arguments,
            epsilon=epsilon,
            delta=delta,
            sampling=sampling,
            max_bands=checked_int("max_bands", max_bands),
            amplification=amplification,
        )
        if (found := kept.load()) is not None:
            sigma = found.certificate.sigma
            return CalibratedRun(found.schedule, sigma, found.strategy, found.certificate)
    watch = Watch(callback)
    run = calibrated_run(
        arguments,
        epsilon=epsilon,
        delta=delta,
        sampling=sampling,
        max_bands=max_bands,
        amplification=amplification,
        watch=watch,
    )
    watch.end()
    if kept is not None and run.certificate is not None:
        kept.save(Kept(run.schedule, run.strategy, run.certificate))
    return run


def _allocated(
    arguments: PlanArguments, epsilon: float, delta: float, max_bands: int, watch: Watch
) -> CalibratedRun:
    """Returns the certified run of least expected error under random allocation.

    Args:
        arguments: The resolved arguments of the plan.
        epsilon: The target.
        delta: The target.
        max_bands: The largest number of bands to consider where `arguments` names none.
        watch: Told about the samples that are drawn.

    Raises:
        OutOfReach: If nothing can be certified.
    """
    most = max_bands
    if arguments.num_bands is None:
        # Poisson sampling in known groups needs similar bands, and is compared quickly.
        one_band = arguments.schedule("random_allocation", 1)
        most = min(max_bands, one_band.law.max_bands(one_band))
        poisson = dataclasses.replace(arguments, max_participations=None)
        compared = _compared(poisson, epsilon, delta, "cyclic_poisson", None, most)
        bands, guess = compared.best.num_bands, compared.best.noise_multiplier
        schedule = arguments.schedule("random_allocation", bands)
    else:
        bands = most = arguments.num_bands
        schedule = arguments.schedule("random_allocation", bands)
        guess = calibrate_noise(schedule, epsilon, delta, accuracy=COARSE_ACCURACY)
    strategy = arguments.best_strategy(bands, None if arguments.num_bands else _MAX_SEARCH)
    if arguments.may_choose_coefficients:
        schedule, strategy = best_for_secret_groups(
            schedule, strategy, math.inf, epsilon, delta, most, watch
        )
    found = certified_noise(schedule, strategy, epsilon, delta, guess, watch)
    return CalibratedRun(schedule, found.sigma, strategy, found)


def _best_of_all(
    arguments: PlanArguments, epsilon: float, delta: float, max_bands: int, watch: Watch
) -> CalibratedRun:
    """Returns the run of least expected error: by random allocation, or any law that needs no time.

    Cyclic Poisson sampling in secret groups is not compared: wherever both were certified, exactly
    k participations needed less noise than a random number of them.

    Args:
        arguments: The resolved arguments of the plan.
        epsilon: The target.
        delta: The target.
        max_bands: The largest number of bands to consider where `arguments` names none.
        watch: Told about the samples that are drawn.
    """
    known = calibrated_run(
        arguments,
        epsilon=epsilon,
        delta=delta,
        sampling="auto",
        max_bands=max_bands,
        amplification="known_group",
    )
    try:
        arguments.schedule("random_allocation", arguments.num_bands or 1)
    except ValueError:  # such as for a number of steps without a number of participations
        return known
    try:
        allocated = _allocated(arguments, epsilon, delta, max_bands, watch)
    except OutOfReach as error:
        warnings.warn(f"Random allocation is not considered. {error}", stacklevel=4)
        return known
    return min(known, allocated, key=_error_of)


def _error_of(run: CalibratedRun) -> float:
    return expected_rmse(run.schedule, run.noise_multiplier, run.strategy.loss("mean"))


def _with_secret_groups(
    known: CalibratedRun,
    epsilon: float,
    delta: float,
    max_bands: int | None,
    watch: Watch,
) -> CalibratedRun:
    """Returns the certified run of lower expected error than that of known groups, or that run.

    Args:
        known: The best run where groups are known.
        epsilon: The target.
        delta: The target.
        max_bands: The largest number of bands to consider; None keeps the strategy of `known`.
        watch: Told about the samples that are drawn.
    """
    schedule, strategy = known.schedule, known.strategy
    known_error = _error_of(known)
    if max_bands is not None:
        schedule, strategy = best_for_secret_groups(
            schedule, strategy, known_error, epsilon, delta, max_bands, watch
        )
    # With 1 band all examples are in one group: there is nothing to keep secret.
    if schedule.num_bands == 1:
        return known
    try:
        found = certified_noise(schedule, strategy, epsilon, delta, known.noise_multiplier, watch)
    except OutOfReach as error:
        warnings.warn(f"Groups are counted as known. {error}", stacklevel=4)
        return known
    if expected_rmse(schedule, found.sigma, strategy.loss("mean")) >= known_error:
        return known
    return CalibratedRun(schedule, found.sigma, strategy, found)
