"""From a schedule of participations to (epsilon, delta) and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import dp_accounting
import scipy.optimize

from keras_bandmf._checks import checked_choice, checked_float, checked_int
from keras_bandmf._printed import rounded_up
from keras_bandmf.accounting.sampled_gaussian import gaussian_epsilon, sampled_gaussian_epsilon
from keras_bandmf.noise.finite import DELTA_SHARE

SAMPLINGS = ("cyclic_poisson", "fixed_order")
ADJACENCY = {"cyclic_poisson": "add-or-remove-one", "fixed_order": "zero-out"}

# The noise is made of finitely many random bits. What that costs in total variation, over all
# coordinates and steps, may take this share of delta; epsilon is computed for the rest.
FINITE_NOISE_SHARE = DELTA_SHARE

FINE_ACCURACY = 1e-5  # what is reported is above the exact epsilon by about this share of it
COARSE_ACCURACY = 1e-3  # for sweeps; still on the safe side

_MOST = 10**12  # examples or steps
_MOST_NOISE = 1e12  # more counts as that
_LEAST_NOISE = 1e-6  # below it, squares overflow; epsilon is above 10^11
_LEAST_EPSILON, _MOST_EPSILON = 1e-6, 1e6  # targets that noise is calibrated to
_LEAST_DELTA = 1e-100  # below it, products of probabilities underflow


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who may take part when: all that the accounting needs to know, noise aside.

    Formal guarantees: a strategy of `num_bands` bands with columns of norm at most 1, gradients
    of norm at most 1 and noise of standard deviation `noise_multiplier * sensitivity`, run on
    batches that follow this schedule, has the privacy of `dp_event(noise_multiplier)`.

     * "cyclic_poisson": ceil(num_steps / num_bands) rounds of a Poisson-sampled Gaussian at rate
       `sampling_probability`, under add-or-remove-one. The rate is fixed by `num_examples`, a
       constant, and the mechanism defined for any number of rows, so for both of two neighbors,
       of which one has another number than `num_examples`. Needs independent random groups and
       sampling at exactly this rate ("(Amplified) Banded Matrix Factorization", arXiv
       2306.08153, theorem 1).
     * "fixed_order": one Gaussian, under zero-out. Participations at least `separation` >=
       `num_bands` steps apart touch disjoint rows, so k of them have sensitivity sqrt(k).

    Attributes:
        sampling: "cyclic_poisson" or "fixed_order".
        num_examples: N, a public constant; it alone sets the sampling rate.
        batch_size: the expected number of examples of a step.
        num_steps: n, the length of the whole run.
        num_bands: b, the bands of the strategy.
        max_participations: fixed order only: a declared bound on an example's participations.
        min_separation: fixed order only: a declared bound, in steps, on the distance of two
            participations of an example. Declared together or not at all.
    """

    sampling: str
    num_examples: int
    batch_size: int
    num_steps: int
    num_bands: int
    max_participations: int | None = None
    min_separation: int | None = None

    def __post_init__(self) -> None:
        checked_choice("sampling", self.sampling, SAMPLINGS)
        for name in ("num_examples", "batch_size", "num_steps"):
            value = checked_int(name, getattr(self, name))
            if value > _MOST:
                raise ValueError(
                    f"Expected `{name}` to be at most {_MOST:g}: the accounting is in floating "
                    f"point. Received: {name} of {len(str(value))} digits. Plan a smaller run."
                )
            object.__setattr__(self, name, value)
        bands = checked_int(
            "num_bands", self.num_bands, hint="Only banded strategies can be accounted for."
        )
        object.__setattr__(self, "num_bands", bands)
        if self.batch_size > self.num_examples:
            raise ValueError(
                "Expected `batch_size` to be at most `num_examples`. Received: "
                f"batch_size={self.batch_size}, num_examples={self.num_examples}. "
                "Use a smaller `batch_size`."
            )
        if bands > self.num_steps:
            raise ValueError(
                "Expected `num_bands` to be at most `num_steps`. Received: "
                f"num_bands={bands}, num_steps={self.num_steps}. Use fewer bands or train longer."
            )
        self._check_declaration()
        if self.sampling == "cyclic_poisson":
            self._check_sampling_probability()
        else:
            self._check_separation()

    def _check_declaration(self) -> None:
        declared = (self.max_participations, self.min_separation)
        if declared == (None, None):
            return
        received = (
            f"Received: max_participations={self.max_participations}, "
            f"min_separation={self.min_separation}, sampling={self.sampling!r}. "
        )
        if self.sampling != "fixed_order":
            raise ValueError(
                "`max_participations` and `min_separation` describe data in a fixed order. "
                + received
                + "Leave them out, or use sampling='fixed_order'."
            )
        if None in declared:
            raise ValueError(
                "Expected `max_participations` and `min_separation` to be declared together. "
                + received
                + "Give both (min_separation=1 claims nothing)."
            )
        for name in ("max_participations", "min_separation"):
            object.__setattr__(self, name, checked_int(name, getattr(self, name)))

    def _check_sampling_probability(self) -> None:
        if self.num_bands * self.batch_size > self.num_examples:
            raise ValueError(
                "Cyclic Poisson sampling takes `batch_size` examples from one of `num_bands` "
                "groups, so `num_bands * batch_size` may not exceed `num_examples`. Received: "
                f"num_bands={self.num_bands}, batch_size={self.batch_size}, "
                f"num_examples={self.num_examples}, a sampling probability of "
                f"{rounded_up(self.num_bands * self.batch_size / self.num_examples, 4)}. "
                f"Use at most {self.num_examples // self.batch_size} bands or a smaller batch."
            )

    def _check_separation(self) -> None:
        if self.num_bands > self.separation:
            what = "`min_separation`" if self.min_separation else "the steps of an epoch"
            raise ValueError(
                "In a fixed order participations further apart than the bands are needed: "
                f"expected `num_bands` to be at most {what}. Received: "
                f"num_bands={self.num_bands}, {what}={self.separation}. "
                f"Use at most {self.separation} bands."
            )

    @property
    def steps_per_epoch(self) -> int:
        """E = floor(num_examples / batch_size)."""
        return self.num_examples // self.batch_size

    @property
    def separation(self) -> int:
        """Fixed order: the least number of steps between two participations of an example."""
        return self.steps_per_epoch if self.min_separation is None else self.min_separation

    @property
    def sampling_probability(self) -> float | None:
        """Cyclic Poisson: q = num_bands * batch_size / num_examples; None in a fixed order."""
        if self.sampling != "cyclic_poisson":
            return None
        return self.num_bands * self.batch_size / self.num_examples

    @property
    def adjacency(self) -> str:
        """The relation between data sets that the guarantee is about."""
        return ADJACENCY[self.sampling]

    @property
    def expected_participations(self) -> float:
        """How often an example takes part on average: num_steps * batch_size / num_examples."""
        return self.num_steps * self.batch_size / self.num_examples

    def participations(self, steps: int | None = None) -> int:
        """Fixed order: the most often one example can have taken part after `steps` steps."""
        most = math.ceil(self._checked_steps(steps) / self.separation)
        return most if self.max_participations is None else min(most, self.max_participations)

    def check_own_batches(self) -> None:
        """Refuses a declaration stricter than what batches in a plain fixed order keep."""
        if self.min_separation is None:
            return
        own = dataclasses.replace(self, max_participations=None, min_separation=None)
        if own.separation < self.separation or own.participations() > self.participations():
            raise ValueError(
                f"The plan's own batches let an example take part {own.participations()} times, "
                f"{own.separation} steps apart. Received: max_participations="
                f"{self.max_participations}, min_separation={self.min_separation}. Declare no "
                "participations to train on them, or feed the data declared."
            )

    @property
    def sensitivity(self) -> float:
        """S of a strategy whose largest column norm is 1: 1 (cyclic Poisson) or sqrt(k)."""
        return 1.0 if self.sampling == "cyclic_poisson" else math.sqrt(self.participations())

    def dp_event(self, noise_multiplier: float, steps: int | None = None) -> dp_accounting.DpEvent:
        """The privacy event of the first `steps` steps.

        Formal guarantees: valid for a number of steps that was fixed in advance, or chosen
        without looking at anything private. t steps cost ceil(t / num_bands) rounds (cyclic
        Poisson), or one Gaussian at noise_multiplier * sqrt(k / k_t) with k_t the participations
        possible by then (fixed order): the noise was scaled for the whole run.

        Args:
            noise_multiplier: sigma, at least 0.
            steps: t in [0, num_steps]; None charges the whole run.

        Returns:
            A `dp_accounting.DpEvent`.
        """
        steps = self._checked_steps(steps)
        sigma = checked_float("noise_multiplier", noise_multiplier, minimum=0.0)
        if steps == 0:
            return dp_accounting.NoOpDpEvent()
        if self.sampling == "fixed_order":
            share = self.participations() / self.participations(steps)
            return dp_accounting.GaussianDpEvent(sigma * math.sqrt(share))
        sampled = dp_accounting.PoissonSampledDpEvent(
            self.sampling_probability, dp_accounting.GaussianDpEvent(sigma)
        )
        return dp_accounting.SelfComposedDpEvent(sampled, math.ceil(steps / self.num_bands))

    def _checked_steps(self, steps: int | None) -> int:
        if steps is None:
            return self.num_steps
        steps = checked_int("steps", steps, minimum=0)
        if steps > self.num_steps:
            raise ValueError(
                f"Expected `steps` to be at most `num_steps`={self.num_steps}: noise and "
                f"accounting end there. Received: steps={steps}. Plan a longer run."
            )
        return steps


def accountant_name(event: dp_accounting.DpEvent) -> str:
    """What `epsilon_of` computes with: "PLD", or "analytic Gaussian" where nothing is sampled."""
    rounds, probability, _ = parts_of(event)
    return "analytic Gaussian" if rounds and probability == 1.0 else "PLD"


def epsilon_of(
    event: dp_accounting.DpEvent, delta: float, accuracy: float = FINE_ACCURACY
) -> float:
    """The epsilon of an event at `delta`, of which the finitely many bits of the noise get a share.

    Formal guarantees: an upper bound on the epsilon at delta * (1 - FINITE_NOISE_SHARE), as of
    `gaussian_epsilon` and `sampled_gaussian_epsilon`. So a run whose noise is within
    FINITE_NOISE_SHARE * delta of ideal noise in total variation is (epsilon, delta)-private.

    Args:
        event: an event built by `Schedule.dp_event`.
        delta: in (0, 1), at least 10^-100.
        accuracy: how much of epsilon the accountant's grid may cost, about.

    Returns:
        Epsilon; `math.inf` for no noise (a multiplier below 10^-6).

    Raises:
        ValueError: for an event of another make, or a delta out of range.
    """
    delta = checked_delta(delta)
    rounds, probability, sigma = parts_of(event)
    if rounds == 0:
        return 0.0
    if sigma < _LEAST_NOISE:
        return math.inf
    sigma = min(sigma, _MOST_NOISE)
    delta *= 1.0 - FINITE_NOISE_SHARE
    if probability == 1.0:
        return gaussian_epsilon(sigma / math.sqrt(rounds), delta)
    return sampled_gaussian_epsilon(rounds, probability, sigma, delta, accuracy)


def checked_delta(delta: float) -> float:
    """Returns `delta` as a float that the accounting can work with.

    Raises:
        TypeError: if it is not a real number.
        ValueError: if it is not in [10^-100, 1).
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
    """The smallest noise multiplier with which the whole run is (epsilon, delta)-private.

    Formal guarantees: on the safe side. `epsilon_of(schedule.dp_event(sigma), delta, accuracy)`
    was evaluated at the very sigma returned and is at most `epsilon`; sigma is larger than
    necessary for that by about 10^-6 of itself (10^-4 in a coarse sweep).

    Args:
        schedule: the run.
        epsilon: the target, from 10^-6 to 10^6.
        delta: in (0, 1).
        accuracy: as of `epsilon_of`; anything above `FINE_ACCURACY` is a sweep.
        guess: where to start; found at the coarse accuracy if None.

    Returns:
        sigma, above 0.

    Raises:
        ValueError: if an argument is out of range.
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
        TypeError: if it is not a real number.
        ValueError: if it is not in [10^-6, 10^6].
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
    """Enough noise without amplification: rho-zCDP has epsilon rho + 2 sqrt(rho log(1/delta))."""
    rounds, _, _ = parts_of(schedule.dp_event(1.0))
    log = math.log(1 / delta)
    root_rho = epsilon / (math.sqrt(log + epsilon) + math.sqrt(log))
    return math.sqrt(rounds / 2) / root_rho


def parts_of(event: dp_accounting.DpEvent) -> tuple[int, float, float]:
    """The (rounds, sampling probability, noise multiplier) of what `Schedule.dp_event` made.

    Raises:
        ValueError: for an event of another make.
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
        f"sampled Gaussians. Received: event={event!r}. Use dp_accounting itself for others."
    )
