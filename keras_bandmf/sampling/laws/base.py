"""What a sampling law is: how the examples of a step are drawn, and what the draws cost."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import dp_accounting
import numpy as np

from keras_bandmf.sampling.draws import round_up
from keras_bandmf.sampling.patterns import AllocationInGroup, PoissonInGroup

if TYPE_CHECKING:
    from keras_bandmf.sampling.schedule import Schedule

#: The names of the sampling laws: the keys of `keras_bandmf.sampling.laws.LAWS`.
SamplingName = Literal["cyclic_poisson", "random_allocation", "fixed_order"]

#: The relation between data sets that a guarantee is about.
Adjacency = Literal["add-or-remove-one", "zero-out"]


class Draws(Protocol):
    """The draws of one run: a law, its public numbers, and a secret key."""

    def indices(self, step: int) -> np.ndarray:
        """Returns the row numbers of the examples of a step.

        Args:
            step: The step, 0 <= step < num_steps.

        Returns:
            (k,) int64, without repetition.
        """


class SamplingLaw(abc.ABC):
    """One way to choose the examples of each step: its sampler and its accounting, side by side.

    A law has no numbers of its own. Every method reads them from the `Schedule` it is given, and
    sampler and accountant are given the same one. A difference between what is drawn and what is
    accounted for would be a false epsilon, so both stand in the one file of the law.

    Formal guarantees: a strategy of `num_bands` bands whose columns have a norm of at most 1,
    gradients of norm at most 1, and noise of standard deviation `noise_multiplier * sensitivity`,
    run on batches that `draws` chose, have the privacy of `dp_event` under `adjacency`. The
    docstring of each law says why.

    Attributes:
        name: The value of the argument `sampling`.
        adjacency: The relation between data sets that the guarantee is about.
        takes_declarations: Whether the user may feed data of their own and declare
            `max_participations` and `min_separation` of it.
        fixes_participations: Whether `max_participations` is the number of steps that every
            example takes part in; in a plan of epochs it is their number.
        takes_overlap: Whether participations may overlap in the noise, with a sensitivity that the
            schedule brings (`strategy_sensitivity`).
        noise_depends_on_bands: Whether more bands need a larger noise multiplier for the same
            (epsilon, delta).
    """

    name: ClassVar[SamplingName]
    adjacency: ClassVar[Adjacency]
    takes_declarations: ClassVar[bool] = False
    fixes_participations: ClassVar[bool] = False
    takes_overlap: ClassVar[bool] = False
    noise_depends_on_bands: ClassVar[bool]

    def check_declaration(self, schedule: Schedule) -> None:
        """Refuses `max_participations` and `min_separation` where the law has no use for them.

        Args:
            schedule: The numbers to check; types and ranges are checked.

        Raises:
            ValueError: A number is given that the law does not take, or one is missing.
        """
        if (schedule.max_participations, schedule.min_separation) != (None, None):
            raise ValueError(
                "`max_participations` and `min_separation` describe data in a fixed order. "
                f"Received: max_participations={schedule.max_participations}, "
                f"min_separation={schedule.min_separation}, sampling={schedule.sampling!r}. "
                "Leave them out, or use sampling='fixed_order'."
            )

    @abc.abstractmethod
    def check(self, schedule: Schedule) -> None:
        """Refuses numbers for which the law, or its accounting, does not exist.

        The caller has checked types, ranges, `batch_size <= num_examples`, `num_bands <=
        num_steps`, and that declared participations are allowed and complete.

        Args:
            schedule: The numbers to check.

        Raises:
            ValueError: The numbers do not fit together.
        """

    @abc.abstractmethod
    def check_own_batches(self, schedule: Schedule) -> None:
        """Refuses declared participations that the batches of `draws` would exceed.

        Args:
            schedule: The numbers of the run.

        Raises:
            ValueError: The declaration is stricter than what `draws` does.
        """

    def expected_participations(self, schedule: Schedule) -> float:
        """Returns how often an example takes part on average.

        Args:
            schedule: The numbers of the run.

        Returns:
            `num_steps * batch_size / num_examples`, unless the law says otherwise.
        """
        return schedule.num_steps * schedule.batch_size / schedule.num_examples

    def patterns(self, schedule: Schedule) -> PoissonInGroup | AllocationInGroup | None:
        """Returns the law of the steps of one example, for the accounting that keeps them secret.

        Formal guarantees: it is the law that `draws` follows.

        Args:
            schedule: The numbers of the run.

        Returns:
            The law, or None where nothing about the steps of an example is secret.
        """
        return None

    @abc.abstractmethod
    def draws(self, schedule: Schedule, key: np.ndarray) -> Draws:
        """Returns the draws of a run with this key.

        Args:
            schedule: The numbers of the run.
            key: Two uint64: the 128 bits of the sampler's key.

        Returns:
            An object whose `indices(t)` are the examples of step t. They depend on the schedule,
            the key and t alone.
        """

    @abc.abstractmethod
    def padded_sizes(self, schedule: Schedule, num_replicas: int) -> tuple[int, ...]:
        """Returns the sizes that padded batches have where there should be few of them.

        Args:
            schedule: The numbers of the run.
            num_replicas: Number of replicas that share a batch, at least 1.

        Returns:
            Increasing multiples of `num_replicas`, with room for a masked row on each replica. The
            last one is P.
        """

    def fitted_size(self, count: int, num_replicas: int) -> int:
        """Returns the size of a padded batch that is as small as it may be.

        Args:
            count: Examples that were drawn.
            num_replicas: Number of replicas that share the batch, at least 1.

        Returns:
            `count`, and a masked row for each replica, rounded up to a multiple of
            `8 * num_replicas`.
        """
        return round_up(count + num_replicas, 8 * num_replicas)

    @abc.abstractmethod
    def max_bands(self, schedule: Schedule) -> int:
        """Returns the largest number of bands that these examples and batches allow.

        Args:
            schedule: The numbers of the run; its own number of bands is ignored.

        Returns:
            The number of bands, at least 1.
        """

    @abc.abstractmethod
    def sampling_probability(self, schedule: Schedule) -> float | None:
        """Returns the probability that the accounting amplifies by, or None without sampling.

        Args:
            schedule: The numbers of the run.

        Returns:
            A probability in (0, 1], or None.
        """

    @abc.abstractmethod
    def separation(self, schedule: Schedule) -> int | None:
        """Returns the fewest steps between two participations, where the accounting uses that.

        Args:
            schedule: The numbers of the run.

        Returns:
            A number of steps, or None.
        """

    @abc.abstractmethod
    def participations(self, schedule: Schedule, steps: int) -> int | None:
        """Returns the largest possible number of participations of an example, where it is used.

        Args:
            schedule: The numbers of the run.
            steps: The number of steps that ran, from 0 to `num_steps`.

        Returns:
            A number of participations, or None where the accounting uses no such bound.
        """

    @abc.abstractmethod
    def sensitivity(self, schedule: Schedule) -> float:
        """Returns S of a strategy whose largest column norm is 1.

        Args:
            schedule: The numbers of the run.

        Returns:
            S, by which the noise is scaled.
        """

    @abc.abstractmethod
    def dp_event(
        self, schedule: Schedule, noise_multiplier: float, steps: int
    ) -> dp_accounting.DpEvent:
        """Returns the privacy event of the first `steps` steps.

        Args:
            schedule: The numbers of the run.
            noise_multiplier: sigma, at least 0.
            steps: The steps to charge, from 1 to `num_steps`.

        Returns:
            A `dp_accounting.DpEvent` under the adjacency of the law.
        """

    @abc.abstractmethod
    def in_words(self, schedule: Schedule) -> str:
        """Returns how batches are drawn, in one line of a privacy statement.

        Args:
            schedule: The numbers of the run.

        Returns:
            A phrase without a period at its end.
        """
