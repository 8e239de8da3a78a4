"""Certified epsilons and noise multipliers of runs whose groups are secret.

An estimate from few samples says where to look; a bound from fresh samples, that fails with a
stated probability, is what is reported.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_bandmf._checks import checked_float, checked_int
from keras_bandmf.accounting.amplification import one_group, proposals
from keras_bandmf.accounting.amplification.concentration import upper_bound
from keras_bandmf.accounting.amplification.estimator import Estimator, Moments, OutOfReach
from keras_bandmf.sampling.patterns import AllocationInGroup, PoissonInGroup

#: The public seed of all samples. A certificate is computed again from it, by anybody.
SEED = 20261126

#: All bounds of a certificate together fail with this probability, as a share of delta.
FAILURE_SHARE = 1e-3

#: Values that are tried lie on the grid 2^(i / 256), fixed in advance.
_GRID = 256

#: Numbers of samples lie on the grid 2^i, from 2^14 to 2^21.
_LOG_SAMPLES = range(14, 22)
_PILOT_SAMPLES = 2 ** _LOG_SAMPLES[0]
#: By which the samples of an attempt are planned, in the remove direction.
_PLANNING_SAMPLES = 2**16
_COMPARISON_SAMPLES = 2**13
_ATTEMPTS = 8
#: What the confidence bounds may add to delta, as a share of it, where samples are affordable.
_SLACK = 0.1
#: How close, as a share of delta, an estimate comes before the rest of the way is extrapolated.
_CLOSE = 0.15


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was certified: with noise multiplier `sigma` the run is (epsilon, delta)-private.

    Attributes:
        sigma: the noise multiplier.
        epsilon: of the claim.
        delta: of the claim.
        failure: the probability, over the random words of the samples, that the bounds fail.
        samples: of the bounds, of the remove and the add direction; 0 where none are needed.
        attempt: which of the attempts was successful, from 0; each has its own seed.
        estimate: the mean of the weighted samples, the larger of both directions.
        bound: the upper confidence bound on delta(epsilon), at most `delta`.
    """

    sigma: float
    epsilon: float
    delta: float
    failure: float
    samples: tuple[int, int]
    attempt: int
    estimate: float
    bound: float

    def get_config(self) -> dict[str, Any]:
        """Returns the certificate as values that JSON can hold, exact to the last bit."""
        return {**dataclasses.asdict(self), "samples": list(self.samples)}

    @classmethod
    def from_config(cls, config: object) -> Certificate:
        """Reads what `get_config` returned. That it is true is for `Certifier.verify` to say.

        Raises:
            ValueError: it is of another make.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(config, dict) or set(config) != set(names):
            raise ValueError(
                f"Expected `certificate` to be a dict with the keys {names}, as `get_config` "
                f"returns it. Received: certificate={config!r}."
            )
        samples = config["samples"]
        if not isinstance(samples, (list, tuple)) or len(samples) != 2:
            raise ValueError(
                "Expected `samples` of a certificate to be two integers. Received: "
                f"samples={samples!r}."
            )
        floats = {
            name: checked_float(name, config[name], minimum=0.0)
            for name in ("sigma", "epsilon", "delta", "failure", "estimate", "bound")
        }
        return cls(
            **floats,
            samples=(
                checked_int("samples", samples[0]),
                checked_int("samples", samples[1], minimum=0),
            ),
            attempt=checked_int("attempt", config["attempt"], minimum=0),
        )


class Certifier:
    """Certifies epsilons and noise multipliers for one matrix and one law.

    Formal guarantees: a `Certificate` that is returned is true unless the upper confidence bound
    of one of its attempts failed. Attempt i, with samples of its own, may fail with probability
    2^-(i+1) of `FAILURE_SHARE * delta`, half of it in each direction, and an eighth of that for
    each number of samples, so that all together fail with at most that. Where an attempt looks is
    chosen from other samples and from earlier attempts only. All of this is about a plan that was
    chosen without looking at these samples: whoever certifies many plans and keeps the luckiest
    has to add up their probabilities.

    Args:
        estimator: of the matrix and the law.
        max_samples: the most samples of an attempt in each direction, at least 2^14.
    """

    def __init__(self, estimator: Estimator, max_samples: int = 2**19):
        self._estimator = estimator
        self._max_samples = max_samples
        law = estimator.law
        #: The law where the add direction has a bound that needs no samples, else None.
        self._one_group = None
        if isinstance(law, AllocationInGroup) and law.rounds.num_bands == 1:
            self._one_group = law

    def noise(self, epsilon: float, delta: float, guess: float) -> Certificate:
        """The least noise multiplier of the grid that can be certified for (epsilon, delta).

        Args:
            epsilon: the target.
            delta: the target.
            guess: a noise multiplier to start at, such as that of a known group.

        Raises:
            OutOfReach: if no attempt is successful.
        """
        log_sigma, slope = self._noise_root(epsilon, delta, guess, _PILOT_SAMPLES)
        return self._attempts(
            delta, lambda shift: (_on_grid(math.exp(log_sigma + shift / slope)), epsilon)
        )

    def estimated_noise(
        self, epsilon: float, delta: float, guess: float, samples: int = _COMPARISON_SAMPLES
    ) -> float:
        """The noise multiplier for (epsilon, delta), estimated: to compare plans, not to state.

        Args:
            epsilon: the target.
            delta: the target.
            guess: a noise multiplier to start at.
            samples: for each noise multiplier that is tried.
        """
        return math.exp(self._noise_root(epsilon, delta, guess, samples)[0])

    def epsilon(self, sigma: float, delta: float, guess: float) -> Certificate:
        """The least epsilon of the grid that can be certified at a noise multiplier.

        Args:
            sigma: the noise multiplier.
            delta: the target.
            guess: an epsilon to start at.

        Raises:
            OutOfReach: if no attempt is successful.
        """

        def pilot(log_epsilon: float) -> float:
            return self._pilot(sigma, math.exp(log_epsilon), _PILOT_SAMPLES)

        log_epsilon, slope = _root(pilot, math.log(guess), math.log(delta))
        return self._attempts(
            delta, lambda shift: (sigma, _on_grid(math.exp(log_epsilon + shift / slope)))
        )

    def verify(self, claim: Certificate) -> Certificate:
        """Computes a certificate again from its seed.

        Raises:
            ValueError: if it is not confirmed.
        """
        sizes = {2**exponent for exponent in _LOG_SAMPLES}
        of_remove, of_add = claim.samples
        possible = claim.attempt in range(_ATTEMPTS) and of_remove in sizes
        possible = possible and of_add in (sizes if self._one_group is None else {0})
        found = None
        if possible and claim.failure == FAILURE_SHARE * claim.delta:
            found = self._attempt(
                claim.sigma, claim.epsilon, claim.delta, claim.attempt, claim.samples
            )
        if found is None or not found.bound <= claim.delta:
            raise ValueError(
                "A certificate is not confirmed when it is computed again. Received: "
                f"{claim}; computed: {found}. It belongs to another plan, or was changed: make "
                "the plan anew."
            )
        return found

    def _noise_root(
        self, epsilon: float, delta: float, guess: float, samples: int
    ) -> tuple[float, float]:
        """(log of the noise multiplier whose estimated delta is the target, the slope there)."""

        def pilot(log_sigma: float) -> float:
            return self._pilot(math.exp(log_sigma), epsilon, samples)

        return _root(pilot, math.log(guess), math.log(delta))

    def _pilot(self, sigma: float, epsilon: float, samples: int) -> float:
        """Log of an estimate of delta; infinite where likelihood ratios overflow."""
        try:
            mean = float(self._remove(sigma, epsilon, samples, 0)[0].mean[0])
        except OutOfReach:
            return math.inf
        return math.log(mean) if mean > 0.0 else -math.inf

    def _attempts(self, delta: float, place: Callable[[float], tuple[float, float]]) -> Certificate:
        """Attempts further and further on the safe side: `place(log of a factor of delta)`."""
        samples, excess = self._planned(*place(0.0), delta)
        shift, attempts = -excess, 0
        if math.isfinite(excess):  # from where the mean is delta to where the bound is
            shift -= self._planned(*place(shift), delta, samples)[1]
            attempts = _ATTEMPTS
        for attempt in range(attempts):
            found = self._attempt(*place(shift), delta, attempt, samples)
            if found.bound <= delta:
                return found
            if not math.isfinite(found.bound):
                break
            shift -= math.log(min(found.bound, 1.0) / delta) + 0.02
        raise OutOfReach(
            f"No privacy loss could be certified with {samples} samples. Received: delta={delta}. "
            "Use a larger delta, fewer steps, or the accounting of a known group."
        )

    def _planned(
        self,
        sigma: float,
        epsilon: float,
        delta: float,
        samples: tuple[int, int] | None = None,
    ) -> tuple[tuple[int, int], float]:
        """(samples of an attempt, log of the factor by which its bounds will exceed delta).

        Args:
            sigma: the noise multiplier.
            epsilon: of the claim.
            delta: of the claim.
            samples: None, or what was planned already.
        """
        failure, counts, worst = _failure(delta, 0), [], 0.0
        for number, directed in enumerate((self._remove, self._add)):
            if number and self._one_group is not None:
                counts.append(0)
                worst = max(worst, one_group.add_bound(self._one_group, sigma, epsilon))
                continue
            pilots = _PILOT_SAMPLES if number else _PLANNING_SAMPLES
            moments, largest = directed(sigma, epsilon, pilots, 1)
            mean = float(moments.mean[0])
            # The mean of these samples, and of those of the attempt, is off by some of its errors.
            error = math.sqrt(float(moments.variance[0]) / moments.samples)

            def bound(
                count: int,
                moments: Moments = moments,
                largest: float = largest,
                margin: float = 1.5 * error,
            ) -> float:
                log_sums = moments.log_sums[:, 0] * (count / moments.samples)
                return upper_bound(count, log_sums, largest, failure) + margin

            if samples is None:
                # The bound of the add direction need only be below that of the remove direction.
                enough = 0.9 * worst if number else (1.0 + _SLACK) * max(mean, delta / 2.0)
                affordable = [2**i for i in _LOG_SAMPLES if 2**i < self._max_samples]
                fitting = [count for count in affordable if bound(count) <= enough]
                counts.append(fitting[0] if fitting else self._max_samples)
            else:
                counts.append(samples[number])
            worst = max(worst, bound(counts[number]))
        # Of deltas above 1 only how far they are away is lost.
        excess = math.log(min(worst, 1.0) / delta) if math.isfinite(worst) else math.inf
        return (counts[0], counts[1]), excess

    def _attempt(
        self, sigma: float, epsilon: float, delta: float, attempt: int, samples: tuple[int, int]
    ) -> Certificate:
        failure = _failure(delta, attempt)
        bounds, means = [], []
        for number, directed in enumerate((self._remove, self._add)):
            if number and self._one_group is not None:
                bounds.append(one_group.add_bound(self._one_group, sigma, epsilon))
                means.append(bounds[-1])
                continue
            moments, largest = directed(sigma, epsilon, samples[number], 2 + attempt)
            if moments.largest[0] > largest * (1.0 + 1e-9):
                raise RuntimeError(
                    f"A sample of {moments.largest[0]:.9g} is above its proved bound "
                    f"{largest:.9g}. This is an error of keras_bandmf, and no epsilon is stated: "
                    "please report it."
                )
            bounds.append(upper_bound(moments.samples, moments.log_sums[:, 0], largest, failure))
            means.append(float(moments.mean[0]))
        return Certificate(
            sigma,
            epsilon,
            delta,
            FAILURE_SHARE * delta,
            samples,
            attempt,
            max(means),
            max(bounds),
        )

    def _remove(
        self, sigma: float, epsilon: float, samples: int, seed: int
    ) -> tuple[Moments, float]:
        proposal, largest = _best_tilt(self._estimator.law, sigma, epsilon)
        moments = self._estimator.remove(
            sigma, epsilon, proposal, samples, SEED + 2 * seed, largest
        )
        return moments, largest

    def _add(self, sigma: float, epsilon: float, samples: int, seed: int) -> tuple[Moments, float]:
        estimator = self._estimator
        law, seed = estimator.law, SEED + 2 * seed + 1
        tilt, largest = proposals.best_shift(
            estimator.mean_square, estimator.expected_participations, sigma, epsilon
        )
        if isinstance(law, PoissonInGroup) and law.probability < 1.0:
            dip, of_dip = proposals.best_dip(law, sigma, epsilon)
            if of_dip < largest:
                return estimator.dip(sigma, epsilon, dip, samples, seed, of_dip), of_dip
        return estimator.shift(sigma, epsilon, tilt, samples, seed, largest), largest


def _failure(delta: float, attempt: int) -> float:
    """The probability with which the bound of one direction may fail."""
    return FAILURE_SHARE * delta * 2.0 ** -(attempt + 1) / 2.0 / len(_LOG_SAMPLES)


_best_tilt = functools.lru_cache(maxsize=256)(proposals.best_tilt)


def _on_grid(value: float) -> float:
    """The least number of the grid that is at least `value`."""
    return 2.0 ** (math.ceil(math.log2(value) * _GRID) / _GRID)


def _root(function: Callable[[float], float], start: float, target: float) -> tuple[float, float]:
    """(where a decreasing function meets the target, its slope there).

    Where the function is minus infinity, because no sample counted, the root is further down; where
    it is infinite, because float64 could not hold the samples, it is further up.

    Raises:
        OutOfReach: if it is not found.
    """
    low, high = start, start + 0.1
    at_low, at_high = function(low), function(high)
    for _ in range(20):
        if not math.isfinite(at_high):
            low, at_low, high = high, at_high, high + (0.35 if at_high > 0.0 else -0.7)
        else:
            slope = -4.0
            if math.isfinite(at_low) and high != low:
                slope = min((at_high - at_low) / (high - low), -0.5)
            step = float(np.clip((target - at_high) / slope, -0.5, 0.5))
            if abs(at_high - target) < _CLOSE:
                return high + step, slope
            low, at_low, high = high, at_high, high + step
        at_high = function(high)
    raise OutOfReach(
        "No estimate of the privacy loss meets the target. Received: log(delta) of "
        f"{target:.6g}, at last {at_high:.6g}. Use a larger delta, or the accounting of a known "
        "group."
    )
