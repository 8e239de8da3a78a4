"""From the arguments of a plan to its steps, bands and strategy; what does not fit is refused."""

from __future__ import annotations

from typing import Any

from keras_bandmf.accounting import Schedule
from keras_bandmf.checks import checked_choice, checked_int
from keras_bandmf.strategies import BandedStrategy, ToeplitzStrategy

_NAMES = ("toeplitz", "banded")
_KNOWN = (ToeplitzStrategy, BandedStrategy)
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


def resolve_strategy(strategy: Any, num_steps: int, num_bands: int) -> Any:
    """The strategy object: itself, or the named one of `num_bands` bands, optimised.

    Args:
        strategy: a strategy's name or object.
        num_steps: n.
        num_bands: b.

    Returns:
        A strategy object.
    """
    if isinstance(strategy, str):
        checked_choice("strategy", strategy, _NAMES, hint=_HINT)
        return refine_strategy(strategy, ToeplitzStrategy.optimize(num_steps, num_bands))
    return strategy


def refine_strategy(name: str, toeplitz: ToeplitzStrategy) -> Any:
    """The named strategy of the steps and bands of an optimal Toeplitz strategy.

    Bands are chosen among Toeplitz strategies, which are found in no time and within 2 % of the
    banded optimum; only the chosen one is refined.

    Args:
        name: a strategy's name.
        toeplitz: the optimal Toeplitz strategy.

    Returns:
        A strategy object.
    """
    if name == "toeplitz":
        return toeplitz
    return BandedStrategy.optimize(toeplitz.num_steps, toeplitz.num_bands, start=toeplitz)


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
