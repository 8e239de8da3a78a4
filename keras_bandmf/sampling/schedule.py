"""The schedule of a run: the one record of who takes part when, for sampler and accountant."""

from __future__ import annotations

import dataclasses

import dp_accounting
import numpy as np

from keras_bandmf._checks import checked_choice, checked_float, checked_int
from keras_bandmf.sampling.laws import LAWS, SAMPLINGS, Adjacency, Draws, SamplingLaw, SamplingName

_MOST = 10**12  # examples or steps


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who may take part when: the public numbers that sampler and accountant share.

    A plan makes one schedule. Its batches are drawn by `draws`, and its epsilon is computed from
    `dp_event`; both read these very numbers, by the same sampling law. The law is in a file of
    its own (`keras_bandmf/sampling/laws/`).

    Formal guarantees: a strategy of `num_bands` bands with columns of norm at most 1, gradients
    of norm at most 1 and noise of standard deviation `noise_multiplier * sensitivity`, run on
    batches that `draws` chose (or, in a fixed order, on data that keeps the declared
    participations), has the privacy of `dp_event(noise_multiplier)` under `adjacency`. The proof
    for each law is in its docstring: `laws.cyclic_poisson.CyclicPoisson`,
    `laws.random_allocation.RandomAllocation` and `laws.fixed_order.FixedOrder`. `num_examples` is
    taken as the public constant it is declared to be, never from data.

    Attributes:
        sampling: The name of the law: "cyclic_poisson", "random_allocation" or "fixed_order".
        num_examples: N, a public constant.
        batch_size: Number of examples of a step: expected (cyclic Poisson), exact (fixed order),
            or the number asked for (random allocation; see `expected_batch_size`).
        num_steps: n, the length of the whole run.
        num_bands: b, the bands of the strategy, and the number of random groups of examples.
        max_participations: Random allocation: k, the steps that every example takes part in.
            Fixed order: a declared bound on them, or None.
        min_separation: Fixed order only: a declared bound, in steps, on the distance of two
            participations of an example. Declared together or not at all.
        strategy_sensitivity: Fixed order only: S of a strategy with more bands than `separation`,
            under the participations of this schedule. None where columns do not overlap.

    Raises:
        TypeError: A number is not an integer.
        ValueError: A number is out of range, or the numbers do not fit together.

    Example:
        >>> from keras_bandmf.sampling.schedule import Schedule
        >>> schedule = Schedule("cyclic_poisson", 60_000, 600, 1_000, num_bands=4)
        >>> schedule.sampling_probability, schedule.steps_per_epoch, schedule.adjacency
        (0.04, 100, 'add-or-remove-one')
        >>> schedule.dp_event(noise_multiplier=1.5).count
        250
    """

    sampling: SamplingName
    num_examples: int
    batch_size: int
    num_steps: int
    num_bands: int
    max_participations: int | None = None
    min_separation: int | None = None
    strategy_sensitivity: float | None = None

    def __post_init__(self) -> None:
        checked_choice("sampling", self.sampling, SAMPLINGS)
        for name in ("num_examples", "batch_size", "num_steps"):
            value = checked_int(name, getattr(self, name))
            if value > _MOST:
                raise ValueError(
                    f"Expected `{name}` to be at most {_MOST:g}, because the accounting is in "
                    f"floating point. Received: {name} of {len(str(value))} digits. Plan a "
                    "smaller run."
                )
            object.__setattr__(self, name, value)
        bands = checked_int(
            "num_bands", self.num_bands, hint="Only banded strategies can be accounted for."
        )
        object.__setattr__(self, "num_bands", bands)
        check_batch_size(self.batch_size, self.num_examples)
        if bands > self.num_steps:
            raise ValueError(
                "Expected `num_bands` to be at most `num_steps`. Received: "
                f"num_bands={bands}, num_steps={self.num_steps}. Use fewer bands or train longer."
            )
        for name in ("max_participations", "min_separation"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checked_int(name, value))
        self.law.check_declaration(self)
        self._check_overlap()
        self.law.check(self)

    def _check_overlap(self) -> None:
        if self.strategy_sensitivity is None:
            return
        if not self.law.takes_overlap:
            raise ValueError(
                "A strategy whose columns overlap is accounted for in a fixed order only. "
                f"Received: strategy_sensitivity={self.strategy_sensitivity!r}, "
                f"sampling={self.sampling!r}. Use 'fixed_order', or a banded strategy."
            )
        # Largest column norm 1, and at least one participation.
        checked_float("strategy_sensitivity", self.strategy_sensitivity, minimum=1.0)

    @property
    def law(self) -> SamplingLaw:
        """The sampling law, which both the draws and the accounting come from."""
        return LAWS[self.sampling]

    @property
    def steps_per_epoch(self) -> int:
        """E = `num_examples // batch_size`."""
        return self.num_examples // self.batch_size

    @property
    def separation(self) -> int | None:
        """Fixed order: the fewest steps between two participations of an example; else None."""
        return self.law.separation(self)

    @property
    def sampling_probability(self) -> float | None:
        """Cyclic Poisson: q = `num_bands * batch_size / num_examples`; otherwise None."""
        return self.law.sampling_probability(self)

    @property
    def adjacency(self) -> Adjacency:
        """The relation between data sets that the guarantee is about."""
        return self.law.adjacency

    @property
    def expected_participations(self) -> float:
        """How often an example takes part on average."""
        return self.law.expected_participations(self)

    @property
    def expected_batch_size(self) -> float:
        """The expected number of examples of a step, by which the sum of gradients is divided.

        It is `batch_size`, or `num_examples * max_participations / num_steps` under random
        allocation, which is a little more where `batch_size` does not divide `num_examples`.
        """
        if self.law.fixes_participations:
            return self.num_examples * self.expected_participations / self.num_steps
        return float(self.batch_size)

    @property
    def sensitivity(self) -> float:
        """S of a strategy whose largest column norm is 1.

        It is sqrt(k) in a fixed order, or `strategy_sensitivity` if there is one, and else 1.
        """
        return self.law.sensitivity(self)

    def participations(self, steps: int | None = None) -> int | None:
        """Returns the largest number of times one example can have taken part.

        Args:
            steps: The number of steps that ran; None is the whole run.

        Returns:
            The number of participations; None under cyclic Poisson, where it is random.

        Raises:
            TypeError: `steps` is not an integer.
            ValueError: `steps` is not in [0, num_steps].
        """
        return self.law.participations(self, self._checked_steps(steps))

    def check_own_batches(self) -> None:
        """Refuses declared participations that are stricter than what `draws` does.

        Raises:
            ValueError: An example would take part more often, or sooner again, than declared.
        """
        self.law.check_own_batches(self)

    def draws(self, key: np.ndarray) -> Draws:
        """Returns the draws of a run with this key.

        Args:
            key: Two uint64: the 128 bits of the sampler's key.

        Returns:
            An object whose `indices(t)` are the examples of step t.
        """
        return self.law.draws(self, key)

    def padded_size(self, num_replicas: int = 1) -> int:
        """Returns P, the largest usual number of examples of a padded batch, over all replicas.

        Args:
            num_replicas: Number of replicas that share a batch.

        Returns:
            P, a multiple of `num_replicas`: the last of `padded_sizes`.

        Raises:
            TypeError: `num_replicas` is not an integer.
            ValueError: `num_replicas` is below 1.
        """
        return self.padded_sizes(num_replicas)[-1]

    def padded_sizes(self, num_replicas: int = 1) -> tuple[int, ...]:
        """Returns the sizes that padded batches have where there should be few of them.

        A batch has the smallest that leaves a masked example to each replica. A draw of more than
        `P - num_replicas` examples takes the next multiple of P, the last one.

        Args:
            num_replicas: Number of replicas that share a batch.

        Returns:
            Increasing multiples of `num_replicas`.

        Raises:
            TypeError: `num_replicas` is not an integer.
            ValueError: `num_replicas` is below 1.
        """
        return self.law.padded_sizes(self, checked_int("num_replicas", num_replicas))

    def dp_event(self, noise_multiplier: float, steps: int | None = None) -> dp_accounting.DpEvent:
        """Returns the privacy event of the first `steps` steps.

        Formal guarantees: valid for a number of steps that was fixed in advance, or chosen
        without looking at anything private. With k_t the participations possible by step t,
        t steps cost ceil(t / num_bands) rounds (cyclic Poisson), one Gaussian at
        noise_multiplier / sqrt(k_t) (random allocation, as if all was known that it keeps
        secret), or one Gaussian at noise_multiplier * sqrt(k / k_t) (fixed order), because the
        noise was scaled for the whole run.

        Args:
            noise_multiplier: sigma, at least 0.
            steps: t in [0, num_steps]; None charges the whole run.

        Returns:
            A `dp_accounting.DpEvent`.

        Raises:
            TypeError: An argument is not a number.
            ValueError: An argument is out of range.
        """
        steps = self._checked_steps(steps)
        sigma = checked_float("noise_multiplier", noise_multiplier, minimum=0.0)
        if steps == 0:
            return dp_accounting.NoOpDpEvent()
        return self.law.dp_event(self, sigma, steps)

    def in_words(self) -> str:
        """Returns how batches are drawn, in one line of a privacy statement."""
        return self.law.in_words(self)

    def _checked_steps(self, steps: int | None) -> int:
        if steps is None:
            return self.num_steps
        steps = checked_int("steps", steps, minimum=0)
        if steps > self.num_steps:
            raise ValueError(
                f"Expected `steps` to be at most `num_steps`={self.num_steps}, where noise and "
                f"accounting end. Received: steps={steps}. Plan a longer run."
            )
        return steps


def check_batch_size(batch_size: int, num_examples: int) -> None:
    """Refuses batches that are larger than the data.

    Args:
        batch_size: Expected or exact number of examples of a step.
        num_examples: N.

    Raises:
        ValueError: `batch_size` exceeds `num_examples`.
    """
    if batch_size > num_examples:
        raise ValueError(
            "Expected `batch_size` to be at most `num_examples`. Received: "
            f"batch_size={batch_size}, num_examples={num_examples}. Use a smaller `batch_size`."
        )
