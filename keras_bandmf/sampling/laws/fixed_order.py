"""Fixed order: the same batches in the same order in every epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import dp_accounting
import numpy as np

from keras_bandmf.sampling import draws
from keras_bandmf.sampling.laws.base import SamplingLaw

if TYPE_CHECKING:
    from keras_bandmf.sampling.schedule import Schedule


class FixedOrder(SamplingLaw):
    """Batches in a fixed order, without amplification; also for data that the user feeds.

    Formal guarantees:
        * The draws: step t takes block `t % steps_per_epoch` of one permutation, so two
          participations of an example are a multiple of `steps_per_epoch` steps apart. The
          permutation is uniform up to a total variation of `num_examples^2 * 2^-65` (ties of
          64-bit words); the guarantee does not depend on that.
        * The accounting: one Gaussian, under zero-out. Participations at least `separation` >=
          `num_bands` steps apart touch disjoint rows of the noise, so k of them have sensitivity
          sqrt(k). With more bands their columns overlap, and S is the schedule's
          `strategy_sensitivity`: a bound for k participations at least `separation` apart, in any
          of the steps. Any number of steps then costs what all of them do, because the columns that
          a shorter run cuts off are not known here.
    """

    name = "fixed_order"
    adjacency = "zero-out"
    takes_declarations = True
    takes_overlap = True
    noise_depends_on_bands = False

    def check_declaration(self, schedule: Schedule) -> None:
        """Refuses half a declaration.

        Args:
            schedule: The numbers to check.

        Raises:
            ValueError: One of `max_participations` and `min_separation` is missing.
        """
        declared = (schedule.max_participations, schedule.min_separation)
        if None in declared and declared != (None, None):
            raise ValueError(
                "Expected `max_participations` and `min_separation` to be declared together. "
                f"Received: max_participations={schedule.max_participations}, "
                f"min_separation={schedule.min_separation}, sampling={schedule.sampling!r}. Pass "
                "both. If nothing is known about the separation, use min_separation=1."
            )

    def check(self, schedule: Schedule) -> None:
        """Refuses more bands than steps between two participations, unless S is known.

        Args:
            schedule: The numbers to check.

        Raises:
            ValueError: `num_bands` exceeds `separation`.
        """
        separation = self.separation(schedule)
        if schedule.num_bands > separation and schedule.strategy_sensitivity is None:
            what = "`min_separation`" if schedule.min_separation else "the steps of an epoch"
            raise ValueError(
                "In a fixed order, two participations of an example must be at least `num_bands` "
                f"steps apart. Expected `num_bands` to be at most {what}. Received: "
                f"num_bands={schedule.num_bands}, {what}={separation}. "
                f"Use at most {separation} bands."
            )

    def check_own_batches(self, schedule: Schedule) -> None:
        """Refuses a declaration that is stricter than what the plan's own batches do.

        Args:
            schedule: The numbers of the run.

        Raises:
            ValueError: An example would take part more often, or sooner again, than declared.
        """
        if schedule.min_separation is None:
            return
        apart = schedule.steps_per_epoch
        most = math.ceil(schedule.num_steps / apart)
        declared = self.participations(schedule, schedule.num_steps)
        if apart < self.separation(schedule) or most > declared:
            raise ValueError(
                f"The plan's own batches let an example take part {most} times, {apart} steps "
                "apart, which is more than the plan declares. Received: max_participations="
                f"{schedule.max_participations}, min_separation={schedule.min_separation}. To "
                "train on `plan.batches`, make a plan that declares no participations; to use "
                "this plan, feed the data that the declaration describes."
            )

    def draws(self, schedule: Schedule, key: np.ndarray) -> FixedOrderDraws:
        """Returns the draws of a run with this key.

        Args:
            schedule: The numbers of the run.
            key: Two uint64.

        Returns:
            The draws; each has exactly `batch_size` rows.
        """
        return FixedOrderDraws(schedule, key)

    def padded_sizes(self, schedule: Schedule, num_replicas: int) -> tuple[int, ...]:
        """Returns the size that every batch has: `batch_size` and a masked row for each replica.

        Args:
            schedule: The numbers of the run.
            num_replicas: Number of replicas that share a batch.

        Returns:
            P alone, the sum rounded up to a multiple of `num_replicas`.
        """
        return (self.fitted_size(schedule.batch_size, num_replicas),)

    def fitted_size(self, count: int, num_replicas: int) -> int:
        """Returns `count` and a masked row for each replica, rounded up to a multiple of them.

        Args:
            count: Examples that were drawn.
            num_replicas: Number of replicas that share the batch.

        Returns:
            The size: the same in every step, for `count` is.
        """
        return draws.round_up(count + num_replicas, num_replicas)

    def max_bands(self, schedule: Schedule) -> int:
        """Returns the separation of two participations.

        Args:
            schedule: The numbers of the run.

        Returns:
            The declared `min_separation`, or `steps_per_epoch`.
        """
        return self.separation(schedule)

    def sampling_probability(self, schedule: Schedule) -> None:
        """Returns None: nothing is sampled.

        Args:
            schedule: The numbers of the run.
        """

    def separation(self, schedule: Schedule) -> int:
        """Returns the fewest steps between two participations of an example.

        Args:
            schedule: The numbers of the run.

        Returns:
            The declared `min_separation`, or `steps_per_epoch`.
        """
        declared = schedule.min_separation
        return schedule.steps_per_epoch if declared is None else declared

    def participations(self, schedule: Schedule, steps: int) -> int:
        """Returns the largest number of participations of an example in the first `steps` steps.

        Args:
            schedule: The numbers of the run.
            steps: The number of steps that ran.

        Returns:
            `ceil(steps / separation)`, or the declared `max_participations` if that is smaller.
        """
        most = math.ceil(steps / self.separation(schedule))
        declared = schedule.max_participations
        return most if declared is None else min(most, declared)

    def sensitivity(self, schedule: Schedule) -> float:
        """Returns the square root of the number of participations, or S of the strategy.

        Args:
            schedule: The numbers of the run.

        Returns:
            sqrt(k): participations at least `num_bands` steps apart touch disjoint rows. With more
            bands, `strategy_sensitivity`.
        """
        if schedule.strategy_sensitivity is not None:
            return schedule.strategy_sensitivity
        return math.sqrt(self.participations(schedule, schedule.num_steps))

    def dp_event(
        self, schedule: Schedule, noise_multiplier: float, steps: int
    ) -> dp_accounting.DpEvent:
        """Returns one Gaussian at `noise_multiplier * sqrt(k / k_t)`.

        k_t is the number of participations that are possible by step t = `steps`. The noise was
        scaled for all k of the whole run. With a `strategy_sensitivity`, k_t counts as k.

        Args:
            schedule: The numbers of the run.
            noise_multiplier: sigma.
            steps: The steps to charge.

        Returns:
            A `dp_accounting.GaussianDpEvent`.
        """
        if schedule.strategy_sensitivity is not None:
            return dp_accounting.GaussianDpEvent(noise_multiplier)
        whole = self.participations(schedule, schedule.num_steps)
        share = whole / self.participations(schedule, steps)
        return dp_accounting.GaussianDpEvent(noise_multiplier * math.sqrt(share))

    def in_words(self, schedule: Schedule) -> str:
        """Returns the law in one line.

        Args:
            schedule: The numbers of the run.

        Returns:
            Participations and separation, in words.
        """
        most = self.participations(schedule, schedule.num_steps)
        return (
            f"fixed order: an example takes part at most {most} times, at least "
            f"{self.separation(schedule)} steps apart"
        )


class FixedOrderDraws:
    """Blocks of one random permutation, the same in every epoch; the remainder never takes part.

    Args:
        schedule: The public numbers.
        key: Two uint64.
    """

    def __init__(self, schedule: Schedule, key: np.ndarray):
        self._schedule = schedule
        words = draws.bit_stream(key, draws.ORDER).random_raw(schedule.num_examples)
        order = np.argsort(words)
        if any(np.any(np.diff(words[order[a : b + 1]]) == 0) for a, b in draws.chunks(len(words))):
            order = np.argsort(words, kind="stable")  # slower, and needed for ties alone
        self._order = order.astype(np.min_scalar_type(len(words)))

    def indices(self, step: int) -> np.ndarray:
        """Returns the examples of a step.

        Args:
            step: The step, 0 <= step < num_steps.

        Returns:
            (batch_size,) int64.
        """
        batch_size = self._schedule.batch_size
        start = (step % self._schedule.steps_per_epoch) * batch_size
        return self._order[start : start + batch_size].astype(np.int64)
