"""From the arguments of a plan to its steps, bands, workload and strategy, or a refusal."""

from __future__ import annotations

from typing import Any

import keras

from keras_bandmf._checks import checked_choice, checked_int
from keras_bandmf.accounting.accountant import Schedule
from keras_bandmf.planning.keras_workload import workload_from_optimizer
from keras_bandmf.strategies import (
    BandedStrategy,
    BlockDiagonalStrategy,
    ToeplitzStrategy,
    Workload,
)

_NAMES = ("toeplitz", "banded")
_KNOWN = (ToeplitzStrategy, BandedStrategy, BlockDiagonalStrategy)
_HINT = "Or pass a strategy object of `keras_bandmf.strategies`."


def resolve_steps(num_examples: Any, batch_size: Any, num_steps: Any, epochs: Any) -> int:
    """The number of steps from whichever of `num_steps` and `epochs` was given.

    Args:
        num_examples: N, checked here.
        batch_size: expected examples a step, checked here.
        num_steps: n, or None.
        epochs: passes over the data, or None.

    Returns:
        n.

    Raises:
        TypeError: for anything but integers.
        ValueError: if both or none are given, or one is out of range.
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
    if batch_size > num_examples:
        raise ValueError(
            "Expected `batch_size` to be at most `num_examples`. Received: "
            f"batch_size={batch_size}, num_examples={num_examples}. Use a smaller `batch_size`."
        )
    return epochs * (num_examples // batch_size)


def resolve_bands(num_bands: Any, strategy: Any) -> int:
    """The number of bands, from the argument or from a strategy object.

    Args:
        num_bands: a number; may be None for a strategy object.
        strategy: a strategy's name or object.

    Returns:
        b.

    Raises:
        TypeError: for a wrong type.
        ValueError: for an unknown strategy, or a number that is not the strategy's.
    """
    if isinstance(strategy, str):
        checked_choice("strategy", strategy, _NAMES, hint=_HINT)
        return checked_int("num_bands", num_bands, hint="Or 'auto', with `calibrate`.")
    # The class is what vouches for the bands: an unknown one could claim any number.
    if type(strategy) not in _KNOWN:
        raise ValueError(
            "Expected a banded strategy of `keras_bandmf.strategies`: others have no accounting "
            f"here. Received: strategy={strategy!r}. Use 'toeplitz', 'banded', a "
            "`ToeplitzStrategy` or a `BandedStrategy`."
        )
    own = strategy.num_bands
    if num_bands is not None and checked_int("num_bands", num_bands) != own:
        raise ValueError(
            f"Expected `num_bands` to be that of the strategy, {own}. Received: "
            f"num_bands={num_bands}. Leave it out."
        )
    return own


def resolve_workload(workload: Any, num_steps: int) -> Workload | None:
    """The workload: itself, or that of a Keras optimizer.

    Args:
        workload: a `Workload`, a `keras.optimizers.SGD`, or None.
        num_steps: n.

    Returns:
        A workload of n steps, or None if none was given.

    Raises:
        TypeError: for another type.
        ValueError: for a workload of other steps, or an optimizer without one.
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
            f"Expected a workload of {num_steps} steps, as many as the plan. Received: "
            f"workload.num_steps={workload.num_steps}. Make it for the steps of the plan."
        )
    return workload


def resolve_strategy(
    strategy: Any, num_steps: int, num_bands: int, workload: Workload | None = None
) -> Any:
    """The strategy object: itself, or the named one of `num_bands` bands, optimised.

    Args:
        strategy: a strategy's name or object.
        num_steps: n.
        num_bands: b.
        workload: A, of n steps; None is prefix sums, or that of the object.

    Returns:
        A strategy object.

    Raises:
        ValueError: for an unknown name, or a workload that is not that of the object.
    """
    if isinstance(strategy, str):
        checked_choice("strategy", strategy, _NAMES, hint=_HINT)
        start = quick_strategy(num_steps, workload, num_bands)
        return refine_strategy(strategy, start, max_work=None)
    if workload is not None and workload != (strategy.workload or Workload(strategy.num_steps)):
        raise ValueError(
            "Expected `workload` to be the one the strategy was optimised for. Received: "
            f"workload={workload!r}, strategy.workload={strategy.workload!r} (None is prefix "
            "sums). Leave `workload` out, or optimise the strategy for it."
        )
    return strategy


def quick_strategy(num_steps: int, workload: Workload | None, num_bands: int) -> ToeplitzStrategy:
    """The Toeplitz optimum for prefix sums, made for a workload: for comparing numbers of bands.

    Args:
        num_steps: n.
        workload: A, of n steps; None is prefix sums.
        num_bands: b.

    Returns:
        A strategy whose `workload` is A: the optimum for prefix sums, within a few percent of it
        for others, at the cost of one evaluation instead of a search.
    """
    best = ToeplitzStrategy.optimize(num_steps, num_bands)
    if workload is None or workload == Workload(num_steps):
        return best
    return ToeplitzStrategy(best.coefficients, num_steps, workload=workload)


def refine_strategy(name: str, quick: ToeplitzStrategy, max_work: int | None) -> Any:
    """The named strategy of the steps, bands and workload of a quick Toeplitz strategy.

    Bands are chosen among Toeplitz strategies, which are found in no time and within 2 % of the
    banded optimum; only the chosen one is refined.

    Args:
        name: a strategy's name.
        quick: from `quick_strategy`.
        max_work: n b^2 up to which a Toeplitz strategy is searched for under a workload; None is
            no limit.

    Returns:
        A strategy object.
    """
    n, b, workload = quick.num_steps, quick.num_bands, quick.workload
    toeplitz = quick
    if workload is not None and b > 1 and (max_work is None or n * b * b <= max_work):
        toeplitz = ToeplitzStrategy.optimize(n, b, workload=workload)
    if name == "toeplitz":
        return toeplitz
    return BandedStrategy.optimize(n, b, start=toeplitz, workload=workload)


def check_strategy(strategy: Any, schedule: Schedule) -> None:
    """Refuses a strategy the accounting does not hold for: another length, larger columns.

    Args:
        strategy: a strategy object.
        schedule: the run.

    Raises:
        ValueError: if it does not fit.
    """
    if strategy.num_steps != schedule.num_steps:
        raise ValueError(
            f"Expected a strategy for {schedule.num_steps} steps. Received: strategy.num_steps="
            f"{strategy.num_steps}. Optimise it for the steps of the plan."
        )
    # Accounting and noise scale assume columns of norm at most 1; rounding aside.
    norm = strategy.sensitivity()
    if not 0 < norm <= 1 + 1e-9:
        raise ValueError(
            "Expected a strategy whose largest column norm is 1. Received: "
            f"strategy.sensitivity()={norm!r}. Normalise it."
        )
