"""From a schedule of participations to (epsilon, delta) and back."""

from __future__ import annotations

import math
from collections.abc import Callable

import dp_accounting
import scipy.optimize

from keras_bandmf._checks import checked_float
from keras_bandmf.accounting.sampled_gaussian import gaussian_epsilon, sampled_gaussian_epsilon
from keras_bandmf.noise.finite import DELTA_SHARE
from keras_bandmf.sampling.schedule import Schedule

# The noise is made of finitely many random bits. What that costs in total variation, over all
# coordinates and steps, may take this share of delta; epsilon is computed for the rest.
FINITE_NOISE_SHARE = DELTA_SHARE

FINE_ACCURACY = 1e-5  # what is reported is above the exact epsilon by about this share of it
COARSE_ACCURACY = 1e-3  # for sweeps; still on the safe side

_MOST_NOISE = 1e12  # more counts as that
_LEAST_NOISE = 1e-6  # below it, squares overflow; epsilon is above 10^11
_LEAST_EPSILON, _MOST_EPSILON = 1e-6, 1e6  # targets that noise is calibrated to
_LEAST_DELTA = 1e-100  # below it, products of probabilities underflow


def accountant_name(event: dp_accounting.DpEvent) -> str:
    """Returns what `epsilon_of` computes with: "PLD", or "analytic Gaussian" without sampling.

    Args:
        event: An event that `Schedule.dp_event` made.

    Returns:
        The name for the statement.
    """
    rounds, probability, _ = parts_of(event)
    return "analytic Gaussian" if rounds and probability == 1.0 else "PLD"


def epsilon_of(
    event: dp_accounting.DpEvent, delta: float, accuracy: float = FINE_ACCURACY
) -> float:
    """Returns the epsilon of an event at `delta`.

    The noise is made of finitely many random bits, which may cost a small share of delta. Epsilon
    is computed at the rest.

    Formal guarantees: an upper bound on the epsilon at delta * (1 - FINITE_NOISE_SHARE), as
    `gaussian_epsilon` and `sampled_gaussian_epsilon` guarantee it. So a run whose noise is within
    FINITE_NOISE_SHARE * delta of ideal noise in total variation is (epsilon, delta)-private.

    Args:
        event: An event that `Schedule.dp_event` made.
        delta: In (0, 1), at least 10^-100.
        accuracy: The share of epsilon that the accountant's grid may cost, about.

    Returns:
        Epsilon; `math.inf` for no noise (a multiplier below 10^-6).

    Raises:
        TypeError: `delta` is not a number.
        ValueError: The event is of another form, or `delta` is out of range.
    """
    delta = checked_delta(delta)
    rounds, probability, sigma = parts_of(event)
    if rounds == 0:
        return 0.0
    if sigma < _LEAST_NOISE:
        return math.inf
    sigma = min(sigma, _MOST_NOISE)
    delta = delta_without_noise_share(delta)
    if probability == 1.0:
        return gaussian_epsilon(sigma / math.sqrt(rounds), delta)
    return sampled_gaussian_epsilon(rounds, probability, sigma, delta, accuracy)


def delta_without_noise_share(delta: float) -> float:
    """Returns the delta that is left for ideal noise, once its finitely many bits have their share.

    Args:
        delta: The delta of the guarantee.
    """
    return delta * (1.0 - FINITE_NOISE_SHARE)


def checked_delta(delta: float) -> float:
    """Returns `delta` as a float that the accounting can work with.

    Raises:
        TypeError: It is not a real number.
        ValueError: It is not in [10^-100, 1).
    """
    hint = "Use a delta below 1 / num_examples, such as 1e-6."
    delta = checked_float("delta", delta, above=0.0, below=1.0, hint=hint)
    return checked_float("delta", delta, minimum=_LEAST_DELTA, hint=hint)


def calibrate_noise(
    schedule: Schedule,
    epsilon: float,
    delta: float,
    *,
    accuracy: float = FINE_ACCURACY,
    guess: float | None = None,
) -> float:
    """Returns the smallest noise multiplier with which the whole run is (epsilon, delta)-private.

    Formal guarantees: on the safe side. `epsilon_of(schedule.dp_event(sigma), delta, accuracy)`
    was evaluated at the very sigma returned and is at most `epsilon`; sigma is larger than
    necessary for that by about 10^-6 of itself (10^-4 in a coarse sweep).

    Args:
        schedule: The schedule of the run.
        epsilon: The target, from 10^-6 to 10^6.
        delta: In (0, 1).
        accuracy: See `epsilon_of`; anything above `FINE_ACCURACY` is a sweep.
        guess: Where to start; None finds a start at the coarse accuracy.

    Returns:
        sigma, above 0.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is out of range.
    """
    epsilon = checked_epsilon(epsilon)
    delta = checked_delta(delta)
    is_fine = accuracy <= FINE_ACCURACY
    if guess is not None:
        start, factor = checked_float("guess", guess, above=0.0), 1.001 if is_fine else 1.1
    elif accuracy < COARSE_ACCURACY:
        start, factor = calibrate_noise(schedule, epsilon, delta, accuracy=COARSE_ACCURACY), 1.001
    else:
        start, factor = _unamplified_noise(schedule, epsilon, delta), 2.0

    evaluated: dict[float, float] = {}

    def excess(log_sigma: float) -> float:
        if log_sigma not in evaluated:
            value = epsilon_of(schedule.dp_event(math.exp(log_sigma)), delta, accuracy)
            evaluated[log_sigma] = math.log(min(max(value / epsilon, 1e-9), 1e9))
        return evaluated[log_sigma]

    low, high = _bracket(excess, math.log(start), math.log(factor))
    tolerance = 4e-7 if is_fine else 5e-5
    root = scipy.optimize.brentq(excess, low, high, xtol=tolerance)
    while excess(root) > 0:
        root, tolerance = min(root + tolerance, high), 2 * tolerance
    return math.exp(root)


def checked_epsilon(epsilon: float) -> float:
    """Returns a target `epsilon` as a float that noise can be calibrated to.

    Raises:
        TypeError: It is not a real number.
        ValueError: It is not in [10^-6, 10^6].
    """
    hint = "A useful epsilon is between 0.01 and 100."
    epsilon = checked_float("epsilon", epsilon, above=0.0, hint=hint)
    epsilon = checked_float("epsilon", epsilon, minimum=_LEAST_EPSILON, hint=hint)
    if epsilon > _MOST_EPSILON:
        raise ValueError(
            f"Expected `epsilon` to be at most {_MOST_EPSILON:g}. Received: epsilon={epsilon}. "
            f"{hint}"
        )
    return epsilon


def _bracket(excess: Callable[[float], float], start: float, step: float) -> tuple[float, float]:
    """Widens from `start` until excess(low) > 0 >= excess(high), in doubling steps of log.

    Both ends exist: without noise epsilon is infinite, and with much noise it is 0, for a delta
    within the bounds of `checked_delta`.
    """
    low = high = start
    while excess(high) > 0:
        low, high, step = high, high + step, 2 * step
    while excess(low) <= 0:
        low, high, step = low - step, low, 2 * step
    return low, high


def _unamplified_noise(schedule: Schedule, epsilon: float, delta: float) -> float:
    """Returns enough noise without amplification.

    By zero-concentrated differential privacy: rho has epsilon rho + 2 sqrt(rho log(1 / delta)).
    """
    rounds, _, _ = parts_of(schedule.dp_event(1.0))
    log = math.log(1 / delta)
    root_rho = epsilon / (math.sqrt(log + epsilon) + math.sqrt(log))
    return math.sqrt(rounds / 2) / root_rho


def parts_of(event: dp_accounting.DpEvent) -> tuple[int, float, float]:
    """Returns the (rounds, sampling probability, noise multiplier) of an event.

    Args:
        event: An event that `Schedule.dp_event` made.

    Returns:
        (0, 0.0, 0.0) for no step; the probability is 1 for a Gaussian that is not sampled.

    Raises:
        ValueError: The event has another form.
    """
    if isinstance(event, dp_accounting.NoOpDpEvent):
        return 0, 0.0, 0.0
    if isinstance(event, dp_accounting.GaussianDpEvent):
        return 1, 1.0, event.noise_multiplier
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        sampled = event.event
        if isinstance(sampled, dp_accounting.PoissonSampledDpEvent) and isinstance(
            sampled.event, dp_accounting.GaussianDpEvent
        ):
            return event.count, sampled.sampling_probability, sampled.event.noise_multiplier
    raise ValueError(
        "Expected an event made by `Schedule.dp_event`: a Gaussian, or a composition of Poisson-"
        f"sampled Gaussians. Received: event={event!r}. For other events, use dp_accounting itself."
    )
