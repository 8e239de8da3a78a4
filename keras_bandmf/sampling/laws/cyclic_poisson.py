"""Cyclic Poisson sampling: random groups take turns, and each step samples one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import dp_accounting
import numpy as np

from keras_bandmf._printed import rounded_up
from keras_bandmf.sampling import draws
from keras_bandmf.sampling.laws.base import SamplingLaw
from keras_bandmf.sampling.patterns import PoissonInGroup, Rounds

if TYPE_CHECKING:
    from keras_bandmf.sampling.schedule import Schedule


class CyclicPoisson(SamplingLaw):
    """Cyclic Poisson sampling over random groups; with one band it is plain Poisson sampling.

    Formal guarantees:
        * The draws: each example has one group, uniform over `num_bands` and independent of the
          others; step t includes each member of group `t % num_bands` independently with
          probability `num_bands * batch_size / num_examples`. Two participations of an example
          are therefore a multiple of `num_bands` steps apart.
        * The accounting: `ceil(num_steps / num_bands)` rounds of a Poisson-sampled Gaussian at
          rate `sampling_probability`, under add-or-remove-one. The rate is fixed by
          `num_examples`, a constant, and the mechanism is defined for any number of rows, so for
          both of two neighbors, of which one has another number of rows than `num_examples`. This
          needs independent random groups and sampling at exactly this rate ("(Amplified) Banded
          Matrix Factorization", https://arxiv.org/abs/2306.08153, theorem 1).
        * Every draw compares exact integers. A probability is rounded down to a multiple of
          2^-64; a group (64 bits modulo `num_bands`) is uniform up to a total variation of
          `num_bands * 2^-64` per example.
    """

    name = "cyclic_poisson"
    adjacency = "add-or-remove-one"
    noise_depends_on_bands = True

    def check(self, schedule: Schedule) -> None:
        """Refuses a sampling probability above 1.

        Args:
            schedule: The numbers to check.

        Raises:
            ValueError: `num_bands * batch_size` exceeds `num_examples`.
        """
        bands, batch_size = schedule.num_bands, schedule.batch_size
        if bands * batch_size > schedule.num_examples:
            raise ValueError(
                "Cyclic Poisson sampling takes `batch_size` examples from one of `num_bands` "
                "groups. Expected `num_bands * batch_size` to be at most `num_examples`. "
                f"Received: num_bands={bands}, batch_size={batch_size}, "
                f"num_examples={schedule.num_examples}, a sampling probability of "
                f"{rounded_up(bands * batch_size / schedule.num_examples, 4)}. "
                f"Use at most {self.max_bands(schedule)} bands or a smaller batch."
            )

    def check_own_batches(self, schedule: Schedule) -> None:
        """Accepts every schedule: nothing can be declared under this law.

        Args:
            schedule: The numbers of the run.
        """

    def patterns(self, schedule: Schedule) -> PoissonInGroup:
        """Returns independent participations in the rounds of a secret group.

        Args:
            schedule: The numbers of the run.

        Returns:
            The law, at rate `sampling_probability`.
        """
        rounds = Rounds(schedule.num_steps, schedule.num_bands)
        return PoissonInGroup(rounds, self.sampling_probability(schedule))

    def draws(self, schedule: Schedule, key: np.ndarray) -> CyclicPoissonDraws:
        """Returns the draws of a run with this key.

        Args:
            schedule: The numbers of the run.
            key: Two uint64.

        Returns:
            The draws; `indices(t)` may be empty.
        """
        return CyclicPoissonDraws(schedule, key)

    def padded_sizes(self, schedule: Schedule, num_replicas: int) -> tuple[int, ...]:
        """Returns the 70 % and the 99.9 % quantile of the batch size, with room for masked rows.

        The batch size is Binomial(num_examples, batch_size / num_examples).

        Args:
            schedule: The numbers of the run.
            num_replicas: Number of replicas that share a batch.

        Returns:
            The sizes: see `draws.binomial_padded_sizes`.
        """
        rate = schedule.batch_size / schedule.num_examples
        return draws.binomial_padded_sizes(schedule.num_examples, rate, num_replicas)

    def max_bands(self, schedule: Schedule) -> int:
        """Returns the number of bands at which the sampling probability reaches 1.

        Args:
            schedule: The numbers of the run.

        Returns:
            `num_examples // batch_size`.
        """
        return schedule.steps_per_epoch

    def sampling_probability(self, schedule: Schedule) -> float:
        """Returns q, the probability of each member of a group whose turn it is.

        Args:
            schedule: The numbers of the run.

        Returns:
            `num_bands * batch_size / num_examples`.
        """
        return schedule.num_bands * schedule.batch_size / schedule.num_examples

    def separation(self, schedule: Schedule) -> None:
        """Returns None: the accounting amplifies by sampling instead.

        Args:
            schedule: The numbers of the run.
        """

    def participations(self, schedule: Schedule, steps: int) -> None:
        """Returns None: the number of participations is random.

        Args:
            schedule: The numbers of the run.
            steps: The number of steps that ran.
        """

    def sensitivity(self, schedule: Schedule) -> float:
        """Returns 1: each round is one Gaussian mechanism, of the largest column norm.

        Args:
            schedule: The numbers of the run.

        Returns:
            1.
        """
        return 1.0

    def dp_event(
        self, schedule: Schedule, noise_multiplier: float, steps: int
    ) -> dp_accounting.DpEvent:
        """Returns `ceil(steps / num_bands)` rounds of a Poisson-sampled Gaussian.

        Args:
            schedule: The numbers of the run.
            noise_multiplier: sigma.
            steps: The steps to charge.

        Returns:
            A `dp_accounting.SelfComposedDpEvent`.
        """
        sampled = dp_accounting.PoissonSampledDpEvent(
            self.sampling_probability(schedule), dp_accounting.GaussianDpEvent(noise_multiplier)
        )
        return dp_accounting.SelfComposedDpEvent(sampled, math.ceil(steps / schedule.num_bands))

    def in_words(self, schedule: Schedule) -> str:
        """Returns the law in one line.

        Args:
            schedule: The numbers of the run.

        Returns:
            Groups and rate, in words.
        """
        rate = rounded_up(self.sampling_probability(schedule), 6)
        if schedule.num_bands == 1:
            return f"Poisson: every example takes part at rate {rate}"
        return (
            f"cyclic Poisson: an example is in one of {schedule.num_bands} random groups; step i "
            f"samples group i mod {schedule.num_bands} at rate {rate}"
        )


class CyclicPoissonDraws:
    """The draws of a run (https://arxiv.org/abs/2306.08153, algorithm 2).

    They keep 4 bytes an example (8 above 2^32 examples), and none with one group.

    Here the groups are independent uniform draws, not a partition into equal parts, because the
    add-or-remove-one adjacency of the statement needs that.

    Args:
        schedule: The public numbers.
        key: Two uint64.
    """

    def __init__(self, schedule: Schedule, key: np.ndarray):
        self._schedule = schedule
        self._key = key
        bands, rows = schedule.num_bands, schedule.num_examples

        def groups() -> Iterator[tuple[int, np.ndarray]]:
            bits = draws.bit_stream(key, draws.GROUPS)
            for start, stop in draws.chunks(rows):
                words = bits.random_raw(stop - start)
                # The smallest integer type: NumPy sorts 8 and 16 bits by counting.
                yield start, (words % np.uint64(bands)).astype(np.min_scalar_type(bands))

        # With one group an example is its own number.
        self._members = draws.Blocks(bands, groups, rows) if bands > 1 else None

    def groups(self) -> np.ndarray:
        """Returns the group of each example, as secret as the key.

        Returns:
            (num_examples,) int64.
        """
        found = np.zeros(self._schedule.num_examples, np.int64)
        if self._members is not None:
            for group in range(self._schedule.num_bands):
                found[self._members[group]] = group
        return found

    def indices(self, step: int) -> np.ndarray:
        """Returns the examples of a step.

        Args:
            step: The step, 0 <= step < num_steps.

        Returns:
            (k,) int64, increasing; k is random and may be 0.
        """
        schedule = self._schedule
        members = None if self._members is None else self._members[step % schedule.num_bands]
        count = schedule.num_examples if members is None else len(members)
        bits = draws.bit_stream(self._key, draws.INCLUSION, step)
        numerator = schedule.num_bands * schedule.batch_size
        chosen = draws.bernoulli_positions(bits, count, numerator, schedule.num_examples)
        return chosen if members is None else members[chosen].astype(np.int64)
