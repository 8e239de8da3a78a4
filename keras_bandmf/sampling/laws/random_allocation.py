"""Random allocation: every example takes part exactly k times, in secret steps of its group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import dp_accounting
import numpy as np

from keras_bandmf._printed import rounded_up
from keras_bandmf.sampling import draws
from keras_bandmf.sampling.laws.base import SamplingLaw
from keras_bandmf.sampling.patterns import AllocationInGroup, Rounds

if TYPE_CHECKING:
    from keras_bandmf.sampling.schedule import Schedule


class RandomAllocation(SamplingLaw):
    """Exactly k participations of every example, within a random group of steps.

    Formal guarantees:
        * The draws: each example draws a step uniformly, whose remainder modulo `num_bands` is
          its group: so a group has a probability proportional to its number of rounds, the steps
          of this remainder. It takes part in k of these rounds, and every choice of k is equally
          likely. Examples are independent of each other. Two participations of an example are a
          multiple of `num_bands` steps apart, and each step is a participation with probability
          `k / num_steps`.
        * The accounting: `dp_event` is one Gaussian at `noise_multiplier / sqrt(k)`, under
          add-or-remove-one, as if the steps of every example were known: participations at least
          `num_bands` steps apart touch disjoint rows of the noise. What is gained by keeping them
          secret is in `patterns`, for the accounting of `accounting/amplification/`. Both fix the
          law of an example's steps by public constants, so the mechanism is defined for any
          number of rows, and for both of two neighbors.
        * Every draw is an integer, by 64 random bits modulo m: uniform up to a total variation of
          `m * 2^-64`, and `num_steps * (k + 1) * 2^-64` per example. The k rounds are drawn by
          Floyd's algorithm, for which uniform integers give all subsets the same probability.
    """

    name = "random_allocation"
    adjacency = "add-or-remove-one"
    fixes_participations = True
    noise_depends_on_bands = False

    def check_declaration(self, schedule: Schedule) -> None:
        """Asks for the number of participations, and refuses a separation.

        Args:
            schedule: The numbers to check.

        Raises:
            ValueError: `max_participations` is missing, or `min_separation` is given.
        """
        _participations(schedule)
        if schedule.min_separation is not None:
            raise ValueError(
                "`min_separation` describes data in a fixed order; with random allocation two "
                "participations are a multiple of `num_bands` steps apart. Received: "
                f"min_separation={schedule.min_separation}, sampling={schedule.sampling!r}. Leave "
                "`min_separation` out."
            )

    def check(self, schedule: Schedule) -> None:
        """Refuses groups with too few rounds, and a batch size far from the expected one.

        Args:
            schedule: The numbers to check.

        Raises:
            ValueError: A group has fewer than k rounds, or the expected number of examples of a
                step is not within half and twice of `batch_size`.
        """
        k, steps, bands = _participations(schedule), schedule.num_steps, schedule.num_bands
        if steps // bands < k:
            advice = f"Use at most {steps // k} bands" if k <= steps else "Use fewer participations"
            raise ValueError(
                "With random allocation every example takes part `max_participations` times within "
                "every `num_bands`-th step. Expected `num_bands * max_participations` to be at "
                f"most `num_steps`. Received: num_bands={bands}, max_participations={k}, "
                f"num_steps={steps}. {advice}, or more steps."
            )
        expected = schedule.expected_batch_size
        if not 0.5 * schedule.batch_size <= expected <= 2.0 * schedule.batch_size:
            fitting = max(1, round(schedule.batch_size * steps / schedule.num_examples))
            raise ValueError(
                "With random allocation a step has `num_examples * max_participations / "
                "num_steps` examples on average. Expected that to be close to `batch_size`. "
                f"Received: batch_size={schedule.batch_size}, num_examples="
                f"{schedule.num_examples}, max_participations={k}, num_steps={steps}, hence "
                f"{expected:.6g} examples. Use max_participations={fitting}, or plan with `epochs`."
            )

    def check_own_batches(self, schedule: Schedule) -> None:
        """Accepts every schedule: `draws` does exactly what it says.

        Args:
            schedule: The numbers of the run.
        """

    def expected_participations(self, schedule: Schedule) -> float:
        """Returns k, how often every example takes part.

        Args:
            schedule: The numbers of the run.

        Returns:
            `max_participations`.
        """
        return float(_participations(schedule))

    def patterns(self, schedule: Schedule) -> AllocationInGroup:
        """Returns the law of k secret rounds of a secret group.

        Args:
            schedule: The numbers of the run.

        Returns:
            The law.
        """
        rounds = Rounds(schedule.num_steps, schedule.num_bands)
        return AllocationInGroup(rounds, _participations(schedule))

    def draws(self, schedule: Schedule, key: np.ndarray) -> RandomAllocationDraws:
        """Returns the draws of a run with this key.

        Args:
            schedule: The numbers of the run.
            key: Two uint64.

        Returns:
            The draws; `indices(t)` may be empty.
        """
        return RandomAllocationDraws(schedule, key)

    def padded_sizes(self, schedule: Schedule, num_replicas: int) -> tuple[int, ...]:
        """Returns the 70 % and the 99.9 % quantile of the batch size, with room for masked rows.

        The batch size is Binomial(num_examples, max_participations / num_steps).

        Args:
            schedule: The numbers of the run.
            num_replicas: Number of replicas that share a batch.

        Returns:
            The sizes: see `draws.binomial_padded_sizes`.
        """
        rate = _participations(schedule) / schedule.num_steps
        return draws.binomial_padded_sizes(schedule.num_examples, rate, num_replicas)

    def max_bands(self, schedule: Schedule) -> int:
        """Returns the number of bands at which the smallest group has just k rounds.

        Args:
            schedule: The numbers of the run.

        Returns:
            `num_steps // max_participations`.
        """
        return schedule.num_steps // _participations(schedule)

    def sampling_probability(self, schedule: Schedule) -> None:
        """Returns None: participations are not independent of each other.

        Args:
            schedule: The numbers of the run.
        """

    def separation(self, schedule: Schedule) -> None:
        """Returns None: it is a multiple of the number of bands.

        Args:
            schedule: The numbers of the run.
        """

    def participations(self, schedule: Schedule, steps: int) -> int:
        """Returns the largest number of participations of an example in the first `steps` steps.

        Args:
            schedule: The numbers of the run.
            steps: The number of steps that ran.

        Returns:
            k, or the rounds of a group by then if those are fewer.
        """
        return min(_participations(schedule), math.ceil(steps / schedule.num_bands))

    def sensitivity(self, schedule: Schedule) -> float:
        """Returns 1: the participations of an example are counted in `dp_event`.

        Args:
            schedule: The numbers of the run.

        Returns:
            1.
        """
        return 1.0

    def dp_event(
        self, schedule: Schedule, noise_multiplier: float, steps: int
    ) -> dp_accounting.DpEvent:
        """Returns one Gaussian at `noise_multiplier / sqrt(k_t)`, as if all steps were known.

        k_t is the number of participations that are possible by step t = `steps`.

        Args:
            schedule: The numbers of the run.
            noise_multiplier: sigma.
            steps: The steps to charge.

        Returns:
            A `dp_accounting.GaussianDpEvent`.
        """
        possible = self.participations(schedule, steps)
        return dp_accounting.GaussianDpEvent(noise_multiplier / math.sqrt(possible))

    def in_words(self, schedule: Schedule) -> str:
        """Returns the law in one line.

        Args:
            schedule: The numbers of the run.

        Returns:
            Participations, groups and the expected batch, in words.
        """
        k, bands = _participations(schedule), schedule.num_bands
        times = "once" if k == 1 else f"exactly {k} times"
        expected = rounded_up(schedule.expected_batch_size, 6)
        where = "in random steps"
        if bands > 1:
            where = f"in random steps i with the same random value of i mod {bands}"
        return (
            f"random allocation: an example takes part {times}, {where}; {expected} examples a "
            "step on average"
        )


class RandomAllocationDraws:
    """The draws of a run, made at once: 4 bytes for each participation.

    Args:
        schedule: The public numbers.
        key: Two uint64.
    """

    def __init__(self, schedule: Schedule, key: np.ndarray):
        rows, k = schedule.num_examples, _participations(schedule)
        steps, bands = schedule.num_steps, schedule.num_bands

        def steps_of() -> Iterator[tuple[int, np.ndarray]]:
            streams = [draws.bit_stream(key, draws.ALLOCATION, use) for use in range(k + 1)]
            for start, stop in draws.chunks(rows):

                def uniform(use: int, sizes: int | np.ndarray, count: int) -> np.ndarray:
                    words = streams[use].random_raw(count)
                    return (words % np.asarray(sizes, np.uint64)).astype(np.int64)

                size = stop - start
                group = uniform(0, steps, size) % bands
                rounds = (steps - 1 - group) // bands + 1
                chosen = np.empty((k, size), np.min_scalar_type(-(-steps // bands)))
                for count in range(k):
                    # Floyd: one more round is open for each draw, and is taken if the draw is
                    # taken.
                    newest = rounds - k + count
                    drawn = uniform(1 + count, newest + 1, size)
                    taken = np.any(chosen[:count] == drawn.astype(chosen.dtype), axis=0)
                    chosen[count] = np.where(taken, newest, drawn)
                step_of = group + bands * chosen.astype(np.int64)
                yield start, step_of.astype(np.min_scalar_type(steps))

        self._examples = draws.Blocks(steps, steps_of, rows)

    def indices(self, step: int) -> np.ndarray:
        """Returns the examples of a step.

        Args:
            step: The step, 0 <= step < num_steps.

        Returns:
            (k,) int64, increasing; k is random and may be 0.
        """
        return np.sort(self._examples[step]).astype(np.int64)


def _participations(schedule: Schedule) -> int:
    """Returns k; it is missing in no schedule that passed `check_declaration`."""
    if schedule.max_participations is None:
        raise ValueError(
            "With random allocation every example takes part in exactly `max_participations` "
            f"steps. Received: max_participations=None, sampling={schedule.sampling!r}. Plan with "
            "`epochs`, which is then this number, or pass `max_participations`."
        )
    return schedule.max_participations
