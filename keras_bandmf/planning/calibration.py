"""From (epsilon, delta) to sampling, bands, strategy and noise multiplier."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from keras_bandmf._checks import checked_choice
from keras_bandmf.accounting.accountant import (
    SAMPLINGS,
    Schedule,
    calibrate_noise,
    checked_delta,
    checked_epsilon,
)
from keras_bandmf.planning.arguments import (
    check_strategy,
    quick_strategy,
    refine_strategy,
    resolve_bands,
    resolve_steps,
    resolve_strategy,
    resolve_workload,
)
from keras_bandmf.planning.band_choice import DEFAULT_MAX_BANDS, BandChoice, choose_bands

# n b^2 up to which the chosen Toeplitz strategy is searched for under a workload: some seconds.
_MAX_SEARCH = 2 * 10**7


def compare_bands(
    *,
    num_examples: int,
    batch_size: int,
    epsilon: float,
    delta: float,
    epochs: int | None = None,
    num_steps: int | None = None,
    num_bands: int | str | Sequence[int] | None = "auto",
    strategy: Any = "toeplitz",
    sampling: str = "cyclic_poisson",
    max_bands: int = DEFAULT_MAX_BANDS,
    max_participations: int | None = None,
    min_separation: int | None = None,
    workload: Any = None,
) -> BandChoice:
    """The table and the curve behind `TrainingPlan.calibrate`, for the same arguments.

    Noise multipliers are coarse, some tenths of a percent above what is needed. Strategies are
    Toeplitz strategies; under a workload their coefficients are those for prefix sums, so that a
    plan, whose strategy is searched for under it, has a somewhat lower RMSE than its row.

    Formal guarantees: looks at no data, so the choice costs no privacy. Rows of different
    `sampling` meet the same (epsilon, delta) under different adjacencies: add-or-remove-one for
    cyclic Poisson, zero-out for a fixed order.

    Args:
        num_examples: N.
        batch_size: expected examples a step.
        epsilon: the target, above 0.
        delta: in (0, 1).
        epochs: passes over the data; give this or `num_steps`.
        num_steps: n.
        num_bands: "auto" looks for the best; a number, or several, are compared with 1.
        strategy: a name, or a strategy object, which is then compared with 1 band.
        sampling: "cyclic_poisson", "fixed_order", or "auto" for both.
        max_bands: cap of "auto".
        max_participations: fixed order only, declared for foreign data.
        min_separation: fixed order only, declared for foreign data.
        workload: None for prefix sums, a `strategies.Workload`, or a `keras.optimizers.SGD`.

    Returns:
        The candidates; `.best` has the lowest expected RMSE, `str()` is a table.

    Raises:
        TypeError: for a wrong type.
        ValueError: for a value or combination that cannot be accounted for.
    """
    checked_choice("sampling", sampling, (*SAMPLINGS, "auto"))
    steps = resolve_steps(num_examples, batch_size, num_steps, epochs)
    workload = resolve_workload(workload, steps)
    given: Any = None if _is_auto(num_bands) else num_bands
    several = isinstance(given, Sequence) and not isinstance(given, str)
    if not isinstance(strategy, str):
        given = resolve_bands(given, strategy)
        workload = resolve_strategy(strategy, steps, given, workload).workload
    elif given is None or several:
        resolve_bands(1, strategy)
    else:
        given = resolve_bands(given, strategy)

    @functools.cache  # both ways of sampling compare the same strategies
    def make_strategy(bands: int) -> Any:
        if not isinstance(strategy, str) and bands == strategy.num_bands:
            return strategy
        return quick_strategy(steps, workload, bands)

    candidates = []
    for name in SAMPLINGS if sampling == "auto" else (sampling,):
        run = Schedule(name, num_examples, batch_size, steps, 1, max_participations, min_separation)
        if not isinstance(strategy, str):
            check_strategy(strategy, run)
        choice = choose_bands(
            run, epsilon, delta, make_strategy, num_bands=given, max_bands=max_bands
        )
        candidates += choice.candidates
    return BandChoice(tuple(candidates))


def calibrated_arguments(
    *,
    num_examples: int,
    batch_size: int,
    epsilon: float,
    delta: float,
    epochs: int | None,
    num_steps: int | None,
    num_bands: int | str | None,
    strategy: Any,
    sampling: str,
    max_bands: int,
    max_participations: int | None,
    min_separation: int | None,
    workload: Any,
) -> dict[str, Any]:
    """The arguments of the `TrainingPlan` of least expected error: see `TrainingPlan.calibrate`.

    Formal guarantees: the noise multiplier is that of `calibrate_noise` at the fine accuracy, for
    the very schedule the arguments give.

    Args:
        As of `TrainingPlan.calibrate`.

    Returns:
        Keyword arguments of `TrainingPlan`.

    Raises:
        As `TrainingPlan.calibrate`.
    """
    num_steps = resolve_steps(num_examples, batch_size, num_steps, epochs)
    run = {
        "num_examples": num_examples,
        "batch_size": batch_size,
        "num_steps": num_steps,
        "max_participations": max_participations,
        "min_separation": min_separation,
    }
    target = {
        "epsilon": checked_epsilon(epsilon),
        "delta": checked_delta(delta),
    }
    workload = resolve_workload(workload, num_steps)
    chooses_bands = _is_auto(num_bands) and isinstance(strategy, str)
    if not chooses_bands:
        num_bands = resolve_bands(None if _is_auto(num_bands) else num_bands, strategy)
    guess = None
    if chooses_bands or sampling == "auto":
        choice = compare_bands(
            **run,
            **target,
            num_bands=num_bands,
            strategy=strategy,
            sampling=sampling,
            max_bands=max_bands,
            workload=workload,
        )
        best = choice.best if chooses_bands else choice.of_bands(num_bands).best
        sampling, num_bands, guess = best.sampling, best.num_bands, best.noise_multiplier
        if chooses_bands:
            strategy = refine_strategy(strategy, best.strategy, _MAX_SEARCH)
    schedule = Schedule(sampling, num_bands=num_bands, **run)
    return {
        **run,
        "num_bands": num_bands,
        "noise_multiplier": calibrate_noise(schedule, **target, guess=guess),
        "delta": delta,
        "strategy": strategy,
        "sampling": sampling,
        "workload": workload,
    }


def _is_auto(num_bands: Any) -> bool:
    return isinstance(num_bands, str) and num_bands == "auto"
