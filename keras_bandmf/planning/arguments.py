"""From the arguments of a plan to its steps, bands, workload and strategy, or a refusal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import keras

from keras_bandmf._checks import checked_choice, checked_float, checked_int
from keras_bandmf.noise.taps import checked_taps
from keras_bandmf.planning.keras_workload import workload_from_optimizer
from keras_bandmf.sampling.laws import LAWS, SAMPLINGS, SamplingName
from keras_bandmf.sampling.schedule import Schedule, check_batch_size
from keras_bandmf.strategies import (
    BandedInverseStrategy,
    BandedStrategy,
    BlockDiagonalStrategy,
    ToeplitzStrategy,
    Workload,
)
from keras_bandmf.strategies.toeplitz_workload import constant_rate_coefficients
from keras_bandmf.strategies.workload import num_curvatures

#: Strategies that a plan finds by itself.
StrategyName = Literal["toeplitz", "banded"]

#: Strategies that a plan takes: banded ones whose classes vouch for their bands, and in a fixed
#: order one without bands whose class vouches for its sensitivity.
KnownStrategy: TypeAlias = (
    ToeplitzStrategy | BandedStrategy | BlockDiagonalStrategy | BandedInverseStrategy
)

#: How many bands: a number, "auto" for the best one, or None for those of a strategy object.
NumBands: TypeAlias = int | Literal["auto"] | None

_NAMES = ("toeplitz", "banded")
_KNOWN = (ToeplitzStrategy, BandedStrategy, BlockDiagonalStrategy, BandedInverseStrategy)
_HINT = "Or pass a strategy object of `keras_bandmf.strategies`."


@dataclasses.dataclass(frozen=True)
class PlanArguments:
    """The arguments of a plan, resolved once: `TrainingPlan`, `calibrate` and `compare_bands`.

    What depends on the sampling law is checked by `schedule`, for one law and number of bands.

    Attributes:
        num_examples: N.
        batch_size: The expected number of examples of a step.
        num_steps: n, whichever of `num_steps` and `epochs` was given.
        num_bands: b, or None where the best number is to be found.
        strategy: The name of a strategy, or a strategy object that fits the steps and workload.
        workload: A, of n steps, that of the strategy object if there is one; None is prefix sums.
        epochs: Passes over the data, or None where `num_steps` was given.
        max_participations: Of random allocation (None is `epochs`), declared for data of the
            user's own, or None.
        min_separation: Declared for data of the user's own, or None.
    """

    num_examples: int
    batch_size: int
    num_steps: int
    num_bands: int | None
    strategy: StrategyName | KnownStrategy
    workload: Workload | None
    epochs: int | None
    max_participations: int | None
    min_separation: int | None

    @property
    def may_choose_coefficients(self) -> bool:
        """Whether any Toeplitz strategy for prefix sums will do."""
        return self.strategy == "toeplitz" and self.workload is None

    @classmethod
    def resolve(
        cls,
        *,
        num_examples: int,
        batch_size: int,
        num_steps: int | None,
        epochs: int | None,
        num_bands: NumBands | Sequence[int],
        strategy: StrategyName | KnownStrategy,
        workload: Workload | keras.optimizers.Optimizer | None,
        max_participations: int | None,
        min_separation: int | None,
    ) -> PlanArguments:
        """Checks the arguments of a plan and turns them into values that fit together.

        Args:
            num_examples: N.
            batch_size: The expected number of examples of a step.
            num_steps: n, or None.
            epochs: Passes over the data, or None.
            num_bands: b; "auto" to have it found; None for the bands of a strategy object.
                Several numbers are refused.
            strategy: The name of a strategy, or a strategy object.
            workload: A `Workload`, a `keras.optimizers.SGD`, or None.
            max_participations: Declared, or None; `schedule` checks it.
            min_separation: Declared, or None; `schedule` checks it.

        Returns:
            The arguments.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument is out of range, or two do not fit together.
        """
        num_steps = resolve_steps(num_examples, batch_size, num_steps, epochs)
        resolved = resolve_workload(workload, num_steps)
        bands: int | None
        is_auto = isinstance(num_bands, str) and num_bands == "auto"
        if not isinstance(strategy, str):
            bands = resolve_bands(None if is_auto else num_bands, strategy)
            check_workload(strategy, resolved)
            check_steps(strategy, num_steps)
            resolved = strategy.workload
        elif is_auto:
            bands = None
            checked_choice("strategy", strategy, _NAMES, hint=_HINT)
        else:
            bands = resolve_bands(num_bands, strategy)
        return cls(
            num_examples=num_examples,
            batch_size=batch_size,
            num_steps=num_steps,
            num_bands=bands,
            strategy=strategy,
            workload=resolved,
            epochs=epochs,
            max_participations=max_participations,
            min_separation=min_separation,
        )

    def bands(self) -> int:
        """Returns the number of bands, for callers that do not look for the best one.

        Returns:
            b.

        Raises:
            TypeError: The number is not known yet.
        """
        return checked_int("num_bands", self.num_bands)

    def schedule(self, sampling: SamplingName, num_bands: int) -> Schedule:
        """Returns the schedule of these arguments under a sampling law.

        Args:
            sampling: The name of the law.
            num_bands: b.

        Returns:
            The schedule.

        Raises:
            TypeError: A number is not an integer.
            ValueError: The numbers do not fit together under this law.
        """
        checked_choice("sampling", sampling, SAMPLINGS)
        refuse_overlap(self.strategy, sampling)
        law, participations = LAWS.get(sampling), self.max_participations
        if law is not None and law.fixes_participations and participations is None:
            participations = self.epochs
        schedule = Schedule(
            sampling=sampling,
            num_examples=self.num_examples,
            batch_size=self.batch_size,
            num_steps=self.num_steps,
            num_bands=1 if isinstance(self.strategy, BandedInverseStrategy) else num_bands,
            max_participations=participations,
            min_separation=self.min_separation,
        )
        overlap = overlap_sensitivity(self.strategy, schedule)
        if overlap is None:
            return schedule
        return dataclasses.replace(schedule, num_bands=num_bands, strategy_sensitivity=overlap)

    def quick_strategy(self, num_bands: int) -> KnownStrategy:
        """Returns a strategy to compare this number of bands by, without a search.

        Args:
            num_bands: b.

        Returns:
            The strategy object that was given, if it has these bands; otherwise a nearly
            optimal Toeplitz strategy: see the function of this name.
        """
        if not isinstance(self.strategy, str) and num_bands == self.strategy.num_bands:
            return self.strategy
        return quick_strategy(self.num_steps, self.workload, num_bands)

    def best_strategy(self, num_bands: int, max_work: int | None = None) -> KnownStrategy:
        """Returns the strategy that is run with this number of bands.

        Args:
            num_bands: b.
            max_work: As in `refine_strategy`.

        Returns:
            The strategy object that was given, or the named one, optimized.
        """
        if not isinstance(self.strategy, str):
            return self.strategy
        start = quick_strategy(self.num_steps, self.workload, num_bands)
        return refine_strategy(self.strategy, start, max_work)


def resolve_steps(
    num_examples: int, batch_size: int, num_steps: int | None, epochs: int | None
) -> int:
    """Returns the number of steps from whichever of `num_steps` and `epochs` was given.

    Args:
        num_examples: N, checked here.
        batch_size: Expected examples of a step, checked here.
        num_steps: n, or None.
        epochs: Passes over the data, or None.

    Returns:
        n.

    Raises:
        TypeError: An argument is not an integer.
        ValueError: Both or none are given, or one is out of range.
    """
    num_examples = checked_int("num_examples", num_examples)
    batch_size = checked_int("batch_size", batch_size)
    if (num_steps is None) == (epochs is None):
        raise ValueError(
            "Expected exactly one of `epochs` and `num_steps`. Received: "
            f"epochs={epochs!r}, num_steps={num_steps!r}."
        )
    if num_steps is not None:
        return checked_int("num_steps", num_steps)
    epochs = checked_int("epochs", epochs, hint="Use `num_steps` for part of an epoch.")
    check_batch_size(batch_size, num_examples)
    return epochs * (num_examples // batch_size)


def checked_noise(noise_multiplier: float) -> float:
    """Returns a noise multiplier as a float, or refuses it.

    Args:
        noise_multiplier: sigma, at least 0.

    Returns:
        sigma.

    Raises:
        TypeError: It is not a number.
        ValueError: It is negative or not finite.
    """
    return checked_float(
        "noise_multiplier",
        noise_multiplier,
        minimum=0.0,
        hint="Use `TrainingPlan.calibrate(epsilon=...)` to find one.",
    )


def resolve_bands(num_bands: Any, strategy: Any) -> int:
    """Returns the number of bands, from the argument or from a strategy object.

    Args:
        num_bands: A number; may be None for a strategy object.
        strategy: The name of a strategy, or a strategy object.

    Returns:
        b.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The strategy is unknown, or the number is not that of the strategy.
    """
    if isinstance(strategy, str):
        checked_choice("strategy", strategy, _NAMES, hint=_HINT)
        return checked_int("num_bands", num_bands, hint="Or 'auto', with `calibrate`.")
    # The class is what vouches for the bands: an unknown one could claim any number.
    if type(strategy) not in _KNOWN:
        raise ValueError(
            "Expected `strategy` to be 'toeplitz', 'banded', or a banded strategy of "
            "`keras_bandmf.strategies` (`ToeplitzStrategy`, `BandedStrategy` or "
            "`BlockDiagonalStrategy`), or in a fixed order a `BandedInverseStrategy`, because "
            f"there is no accounting for others. Received: strategy={strategy!r}."
        )
    own = strategy.num_bands
    if num_bands is not None and checked_int("num_bands", num_bands) != own:
        raise ValueError(
            f"Expected `num_bands` to be that of the strategy, {own}. Received: "
            f"num_bands={num_bands}. Leave it out."
        )
    return own


def resolve_workload(workload: Any, num_steps: int) -> Workload | None:
    """Returns the workload: the argument itself, or that of a Keras optimizer.

    Args:
        workload: A `Workload`, a `keras.optimizers.SGD`, or None.
        num_steps: n.

    Returns:
        A workload of n steps, or None if none was given.

    Raises:
        TypeError: It has another type.
        ValueError: It is a workload of other steps, or an optimizer without a workload.
    """
    if isinstance(workload, keras.optimizers.Optimizer):
        return workload_from_optimizer(workload, num_steps)
    if workload is None:
        return None
    if type(workload) is not Workload:
        raise TypeError(
            "Expected `workload` to be a `strategies.Workload`, a `keras.optimizers.SGD` of Keras "
            "3 (`import keras`; `import tensorflow_transform` makes `tf.keras` Keras 2), or None "
            f"for prefix sums. Received: workload={workload!r}. Leave it out if unsure."
        )
    if workload.num_steps != num_steps:
        raise ValueError(
            f"Expected `workload` to have {num_steps} steps, as many as the plan. Received: "
            f"workload.num_steps={workload.num_steps}. Make it for the steps of the plan."
        )
    return workload


def quick_strategy(num_steps: int, workload: Workload | None, num_bands: int) -> ToeplitzStrategy:
    """Returns a nearly optimal Toeplitz strategy for a workload, to compare bands by.

    Args:
        num_steps: n.
        workload: A, of n steps; None is prefix sums.
        num_bands: b.

    Returns:
        A strategy whose `workload` is A: the optimum for prefix sums, within a few percent of it
        for others, at the cost of one evaluation instead of a search. With curvatures, where that
        may be a third above the optimum, it is the optimum for a constant learning rate.
    """
    if workload is not None and workload.is_curved:
        coefficients = constant_rate_coefficients(workload, num_bands, "mean")
        return ToeplitzStrategy(coefficients, num_steps, workload=workload)
    best = ToeplitzStrategy.optimize(num_steps, num_bands)
    if workload is None or workload == Workload(num_steps):
        return best
    return ToeplitzStrategy(best.coefficients, num_steps, workload=workload)


def refine_strategy(
    name: StrategyName, quick: ToeplitzStrategy, max_work: int | None
) -> ToeplitzStrategy | BandedStrategy:
    """Returns the named strategy of the steps, bands and workload of a quick Toeplitz strategy.

    Bands are chosen among Toeplitz strategies, which are found in no time and within 2 % of the
    banded optimum; only the chosen one is refined.

    Args:
        name: The name of a strategy.
        quick: A strategy made by `quick_strategy`.
        max_work: n b^2, times the number of curvatures, up to which a Toeplitz strategy is searched
            for under a workload; None is no limit.

    Returns:
        A strategy object.
    """
    n, b, workload = quick.num_steps, quick.num_bands, quick.workload
    toeplitz = quick
    work = n * b * b * num_curvatures(workload)
    if workload is not None and b > 1 and (max_work is None or work <= max_work):
        toeplitz = ToeplitzStrategy.optimize(n, b, workload=workload)
    if name == "toeplitz":
        return toeplitz
    return BandedStrategy.optimize(n, b, start=toeplitz, workload=workload)


def check_workload(strategy: KnownStrategy, workload: Workload | None) -> None:
    """Refuses a workload that a strategy object was not optimized for.

    Args:
        strategy: A strategy object.
        workload: A, or None if none was given.

    Raises:
        ValueError: The workload is not that of the object.
    """
    if workload is not None and workload != (strategy.workload or Workload(strategy.num_steps)):
        raise ValueError(
            "Expected `workload` to be the one that the strategy was optimized for. Received: "
            f"workload={workload!r}, strategy.workload={strategy.workload!r} (None is prefix "
            "sums). Leave `workload` out, or optimize the strategy for it."
        )


def check_steps(strategy: KnownStrategy, num_steps: int) -> None:
    """Refuses a strategy of another length than the plan.

    Args:
        strategy: A strategy object.
        num_steps: n, the steps of the plan.

    Raises:
        ValueError: The strategy has another number of steps.
    """
    if strategy.num_steps != num_steps:
        raise ValueError(
            f"Expected a strategy for {num_steps} steps. Received: strategy.num_steps="
            f"{strategy.num_steps}. Optimize it for the steps of the plan."
        )


def refuse_overlap(strategy: Any, sampling: str) -> None:
    """Refuses a strategy whose columns overlap under any law but a fixed order.

    Args:
        strategy: A strategy, or the name of one.
        sampling: The name of a law, or "auto".

    Raises:
        ValueError: There is no accounting for it.
    """
    if isinstance(strategy, BandedInverseStrategy) and sampling != "fixed_order":
        raise ValueError(
            "A strategy whose inverse is banded has no bands itself, which the accounting of "
            f"sampled batches needs. Received: strategy={strategy!r}, sampling={sampling!r}. Use "
            "sampling='fixed_order', or a `ToeplitzStrategy`."
        )


def refuse_comparison(strategy: Any) -> None:
    """Refuses to compare a strategy without bands with numbers of bands.

    Args:
        strategy: A strategy object, or the name of one.

    Raises:
        ValueError: It has no bands.
    """
    if isinstance(strategy, BandedInverseStrategy):
        raise ValueError(
            "A strategy whose inverse is banded has no bands to compare, and runs in a fixed order "
            f"only. Received: strategy={strategy!r}. Use `TrainingPlan.calibrate(strategy=..., "
            "sampling='fixed_order')`, and compare `expected_rmse` of plans."
        )


def overlap_sensitivity(strategy: Any, schedule: Schedule) -> float | None:
    """Returns S of a strategy whose columns overlap, under the participations of a schedule.

    Args:
        strategy: A strategy object, or the name of one.
        schedule: The schedule; its number of bands is ignored.

    Returns:
        For a `BandedInverseStrategy` in a fixed order its sensitivity, for participations that are
        at least `separation` apart. None for the others.
    """
    most, apart = schedule.participations(), schedule.separation
    if not isinstance(strategy, BandedInverseStrategy) or most is None:
        return None
    return max(1.0, strategy.sensitivity(most, apart))


def strategy_in_words(strategy: KnownStrategy) -> str:
    """Returns the class of a strategy and its bands, or those of its inverse.

    Args:
        strategy: A strategy object.
    """
    name = type(strategy).__name__
    if isinstance(strategy, BandedInverseStrategy):
        return f"{name}, C^-1 of {_bands(strategy.num_inverse_bands)}, drawn again from its key"
    return f"{name}, {_bands(strategy.num_bands)}"


def _bands(count: int) -> str:
    return f"{count} band{'s' if count > 1 else ''}"


def check_strategy(strategy: KnownStrategy, schedule: Schedule) -> None:
    """Refuses a strategy that the accounting of a schedule does not hold for.

    Args:
        strategy: A strategy object.
        schedule: The schedule that epsilon is computed from.

    Raises:
        ValueError: Steps, bands or sensitivity are not those of the schedule, or a column is too
            large.
    """
    check_steps(strategy, schedule.num_steps)
    if strategy.num_bands != schedule.num_bands:
        raise ValueError(
            f"Expected a strategy of {schedule.num_bands} bands, as in the schedule. Received: "
            f"strategy.num_bands={strategy.num_bands}. Leave `num_bands` out."
        )
    refuse_overlap(strategy, schedule.sampling)
    if isinstance(strategy, BandedInverseStrategy):
        checked_taps(strategy)
    overlap = overlap_sensitivity(strategy, schedule)
    if overlap != schedule.strategy_sensitivity:
        raise ValueError(
            f"Expected a schedule for a strategy of sensitivity {overlap} (None: it follows from "
            "the participations). Received: strategy_sensitivity="
            f"{schedule.strategy_sensitivity}, strategy={strategy!r}. Make the plan from the "
            "strategy itself."
        )
    # Accounting and noise scale assume columns of norm at most 1; rounding aside.
    norm = strategy.sensitivity()
    if not 0 < norm <= 1 + 1e-9:
        raise ValueError(
            "Expected a strategy whose largest column norm is 1. Received: "
            f"strategy.sensitivity()={norm!r}. Normalize it."
        )
