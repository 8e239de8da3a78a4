"""The epsilon of several mechanisms on the same data."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import dp_accounting
from dp_accounting.pld import PLDAccountant

from keras_bandmf._checks import checked_float
from keras_bandmf.accounting.accountant import (
    FINE_ACCURACY,
    FINITE_NOISE_SHARE,
    accountant_name,
    delta_without_noise_share,
    epsilon_of,
    parts_of,
)

#: (rounds, sampling probability, noise multiplier) of a sampled Gaussian.
Event = tuple[int, float, float]

# Of privacy loss: the grid of dp_accounting's accountant, the most it may be, and how many buckets
# a round and the whole may have; and the rounding of its FFT.
_FINE_INTERVAL = 1e-4
_MAX_BUCKETS = 2**18, 2**22
_MAX_INTERVAL = 0.1
_LEAST_NOISE = 1e-6
_ROUNDING = 2.0**-52


def composed_epsilon(events: Sequence[Event], delta: float) -> tuple[float, str]:
    """Returns the epsilon of several events on the same data.

    Formal guarantees: an upper bound for mechanisms that may see the results of those before them
    (adaptive composition), if their parameters were fixed in advance, at
    delta * (1 - FINITE_NOISE_SHARE), like that of `epsilon_of`. Unsampled Gaussians are
    merged exactly. Losses are rounded up to a grid, and `delta` is lowered by the rounding error
    of the accountant's FFT. Where the accountant cannot do it, the sum of the epsilons of the
    parts, each at its share of delta (basic composition), bounds it.

    Args:
        events: (rounds, sampling probability, noise multiplier) of each.
        delta: In (0, 1).

    Returns:
        Epsilon, and the accountant that computed it: `accountant_name`, or "PLD, summed over the
        runs".

    Raises:
        TypeError: `delta` is not a number.
        ValueError: `delta` is not in (0, 1).
    """
    (epsilon,), accountant = composed_epsilons(events, [delta])
    return epsilon, accountant


def composed_epsilons(
    events: Sequence[Event], deltas: Sequence[float], accuracy: float = FINE_ACCURACY
) -> tuple[list[float], str]:
    """Returns the epsilon of several events at each of several deltas; see `composed_epsilon`.

    Args:
        events: (rounds, sampling probability, noise multiplier) of each.
        deltas: Each in (0, 1).
        accuracy: See `epsilon_of`, where there is one event.

    Returns:
        The epsilons, and the accountant that computed the last.

    Raises:
        TypeError: A delta is not a number.
        ValueError: A delta is not in (0, 1).
    """
    deltas = [checked_float("delta", delta, above=0.0, below=1.0) for delta in deltas]
    merged = _merged(events)
    if any(sigma < _LEAST_NOISE for _, _, sigma in merged):
        return [math.inf] * len(deltas), "PLD"
    if not merged:
        return [0.0] * len(deltas), "PLD"
    if len(merged) == 1:
        event = dp_event(merged[0])
        return [epsilon_of(event, delta, accuracy) for delta in deltas], accountant_name(event)
    rounds = sum(count for count, _, _ in merged)
    interval = _affordable_interval(merged)
    accountant = None
    if interval <= _MAX_INTERVAL and max(deltas, default=0.0) > 10 * rounds * _ROUNDING:
        accountant = _composed(tuple(merged), interval)
    name, epsilons = "PLD", []
    for delta in deltas:
        name = "PLD, summed over the runs"
        if accountant is not None and delta > 10 * rounds * _ROUNDING:
            ideal = delta_without_noise_share(delta)
            try:
                epsilons.append(float(accountant.get_epsilon(ideal - rounds * _ROUNDING)))
                name = "PLD"
                continue
            except ValueError:
                pass
        epsilons.append(_summed(merged, delta))
    return epsilons, name


@functools.lru_cache(maxsize=1)  # Composing takes seconds; then every delta takes little.
def _composed(events: tuple[Event, ...], interval: float) -> PLDAccountant | None:
    accountant = PLDAccountant(value_discretization_interval=interval)
    try:
        for part in events:
            accountant.compose(dp_event(part))
    except ValueError:  # dp_accounting's own checks fail on rounding errors of its own
        return None
    return accountant


def _summed(events: Sequence[Event], delta: float) -> float:
    share = delta / len(events)
    return math.fsum(epsilon_of(dp_event(event), share) for event in events)


def dp_event(event: Event) -> dp_accounting.DpEvent:
    """Returns the event as `dp_accounting` has it, in the form that `Schedule.dp_event` makes.

    Args:
        event: (rounds, sampling probability, noise multiplier).

    Returns:
        A `dp_accounting.DpEvent`.
    """
    rounds, probability, sigma = event
    gaussian = dp_accounting.GaussianDpEvent(sigma)
    if probability == 1.0 and rounds == 1:
        return gaussian
    sampled = dp_accounting.PoissonSampledDpEvent(probability, gaussian)
    return dp_accounting.SelfComposedDpEvent(sampled, rounds)


def event_parts(event: dp_accounting.DpEvent) -> tuple[Event, ...]:
    """Returns an event as a statement keeps it.

    Args:
        event: An event that `Schedule.dp_event` made.

    Returns:
        Nothing for no step, or one triple of rounds, sampling probability and noise multiplier.

    Raises:
        ValueError: The event has another form.
    """
    rounds, probability, sigma = parts_of(event)
    return ((int(rounds), float(probability), float(sigma)),) if rounds else ()


def delta_of_ideal_noise(deltas: Sequence[float], delta: float) -> float:
    """Returns the delta to call `epsilon_of` with, once the noise of every run is charged.

    The noise of all runs together may cost `FINITE_NOISE_SHARE` of the sum of their deltas. Whether
    it costs no more is checked by `compose`, at the epsilon of all runs.

    Args:
        deltas: The delta of each run.
        delta: The delta of all runs together.

    Returns:
        A delta, of which `epsilon_of` still takes its share.

    Raises:
        ValueError: Nothing of delta is left.
    """
    charged = FINITE_NOISE_SHARE * math.fsum(deltas)
    if charged >= delta:
        raise ValueError(
            f"Expected `delta` to be above {charged!r}, which the noise of all runs may cost, "
            f"because it is made of finitely many random bits. Received: delta={delta!r}. Use a "
            "larger `delta`."
        )
    return (delta - charged) / (1.0 - FINITE_NOISE_SHARE)


def _merged(events: Sequence[Event]) -> list[Event]:
    """Returns the events with equal ones added up, and Gaussians without sampling merged."""
    precision = 0.0
    rounds: dict[tuple[float, float], int] = {}
    for count, probability, sigma in events:
        if probability < 1.0:
            rounds[probability, sigma] = rounds.get((probability, sigma), 0) + count
        elif sigma < _LEAST_NOISE:
            precision = math.inf
        else:
            precision += count / sigma**2
    merged = [(count, q, sigma) for (q, sigma), count in rounds.items()]
    return [(1, 1.0, precision**-0.5), *merged] if precision else merged


def _affordable_interval(events: Sequence[Event]) -> float:
    """Returns the fine interval, doubled until a round and the whole take few buckets.

    A round's loss spans about 10 / sigma + 1 / (2 sigma^2), and the whole about 16 of its standard
    deviations; that of a round is at most q sqrt(exp(1 / sigma^2) - 1).
    """
    widest, variance = 0.0, 0.0
    for rounds, probability, sigma in events:
        inverse = 1.0 / sigma
        widest = max(widest, 10 * inverse + inverse * inverse / 2)
        spread = probability * math.sqrt(math.expm1(min(inverse * inverse, 700.0)))
        variance += rounds * min(inverse, spread) ** 2
    spans = widest, 16 * math.sqrt(variance)
    grid = max(span / most for span, most in zip(spans, _MAX_BUCKETS, strict=True))
    return _FINE_INTERVAL * 2.0 ** max(0, math.ceil(math.log2(max(grid, 1e-300) / _FINE_INTERVAL)))
