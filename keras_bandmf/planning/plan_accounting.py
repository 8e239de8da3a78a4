"""What a plan costs: its noise, its privacy event, its epsilon, its statement."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import dp_accounting

from keras_bandmf._checks import checked_float, checked_int
from keras_bandmf.accounting.accountant import epsilon_of
from keras_bandmf.accounting.amplification.certificate import Certificate
from keras_bandmf.planning.arguments import KnownStrategy, strategy_in_words
from keras_bandmf.planning.plan_report import planned_statement
from keras_bandmf.planning.secret_group import confirmed_epsilon
from keras_bandmf.planning.statement import Statement
from keras_bandmf.sampling.schedule import Schedule


class PlanAccounting:
    """The part of `TrainingPlan` that follows from its schedule, its strategy and its noise.

    `TrainingPlan` sets the fields.
    """

    if TYPE_CHECKING:
        num_steps: int
        noise_multiplier: float
        delta: float
        unit: str
        strategy: KnownStrategy
        certificate: Certificate | None
        schedule: Schedule

        @property
        def fingerprint(self) -> str:
            """The fingerprint of the plan."""

    @functools.cached_property
    def sensitivity(self) -> float:
        """The sensitivity S: that of the strategy under the participations of the schedule."""
        return self.schedule.sensitivity * self.strategy.sensitivity()

    def noise_stddev(self, l2_norm_clip: float) -> float:
        """Returns the standard deviation of z, the independent noise before correlation.

        Args:
            l2_norm_clip: zeta, the norm that each example's gradient is clipped to, above 0.

        Returns:
            sigma * S * zeta.

        Raises:
            TypeError: `l2_norm_clip` is not a number.
            ValueError: `l2_norm_clip` is not finite and above 0.

        Example:
            >>> import keras_bandmf as bandmf
            >>> plan = bandmf.TrainingPlan(
            ...     num_examples=1_000, batch_size=50, epochs=3, num_bands=1,
            ...     noise_multiplier=1.5, delta=1e-5,
            ... )
            >>> plan.noise_stddev(l2_norm_clip=2.0)
            3.0
        """
        clip = checked_float("l2_norm_clip", l2_norm_clip, above=0.0)
        return self.noise_multiplier * self.sensitivity * clip

    def dp_event(self, steps: int | None = None) -> dp_accounting.DpEvent:
        """Returns the `dp_accounting` event of the first `steps` steps.

        Formal guarantees: `steps` must have been fixed in advance, or the stop must not have
        looked at anything private. Otherwise the whole run is to be charged.

        Args:
            steps: t in [0, num_steps]; None charges the whole run.

        Returns:
            A `dp_accounting.DpEvent` under `adjacency`.

        Raises:
            TypeError: `steps` is not an integer.
            ValueError: `steps` is out of range.

        Example:
            >>> import keras_bandmf as bandmf
            >>> plan = bandmf.TrainingPlan(
            ...     num_examples=1_000, batch_size=50, epochs=3, num_bands=4,
            ...     noise_multiplier=1.5, delta=1e-5,
            ... )
            >>> plan.dp_event().count, plan.dp_event(steps=5).count
            (15, 2)
        """
        return self.schedule.dp_event(self.noise_multiplier, steps)

    def epsilon(self, steps: int | None = None) -> float:
        """Returns epsilon at `delta` of the first `steps` steps.

        Formal guarantees: an upper bound, valid for a number of steps that was fixed in advance
        or chosen without looking at anything private; otherwise the whole run is to be charged.

        Args:
            steps: t in [0, num_steps]; None charges the whole run.

        Returns:
            Epsilon; `math.inf` without noise.

        Raises:
            TypeError: `steps` is not an integer.
            ValueError: `steps` is out of range.

        Example:
            >>> import keras_bandmf as bandmf
            >>> plan = bandmf.TrainingPlan(
            ...     num_examples=1_000, batch_size=50, epochs=3, num_bands=4,
            ...     noise_multiplier=1.5, delta=1e-5,
            ... )
            >>> plan.epsilon(steps=4) < plan.epsilon(steps=5) < plan.epsilon()
            True
        """
        if steps is not None:
            steps = checked_int("steps", steps, 0)
        whole = steps is None or steps == self.num_steps
        known = self._known_group_epsilon if whole else epsilon_of(self.dp_event(steps), self.delta)
        if self.certificate is None or known <= self.certificate.epsilon:
            return known
        # The first steps of a run tell no more than all of it.
        return min(known, self._secret_group_epsilon)

    @functools.cached_property
    def _known_group_epsilon(self) -> float:
        return epsilon_of(self.dp_event(), self.delta)

    @functools.cached_property
    def _secret_group_epsilon(self) -> float:
        """That of the certificate, computed again from its seed."""
        if self.certificate is None:
            raise ValueError("A plan without a certificate has no epsilon of secret groups.")
        return confirmed_epsilon(
            self.schedule, self.strategy, self.noise_multiplier, self.delta, self.certificate
        )

    def statement(self, steps: int | None = None) -> Statement:
        """Returns what the plan would guarantee, headed "planned, not executed".

        Formal guarantees: as for `epsilon`, charging fewer than all steps is valid only if their
        number was fixed in advance.

        Args:
            steps: t in [0, num_steps]; None charges the whole run.

        Returns:
            A `Statement`. `keras_bandmf.statement(model)` returns that of a run.

        Raises:
            TypeError: `steps` is not an integer.
            ValueError: `steps` is out of range.

        Example:
            >>> import keras_bandmf as bandmf
            >>> plan = bandmf.TrainingPlan(
            ...     num_examples=1_000, batch_size=50, epochs=3, num_bands=4,
            ...     noise_multiplier=1.5, delta=1e-5,
            ... )
            >>> print(str(plan.statement()).splitlines()[0])
            Privacy statement: planned, not executed
        """
        return planned_statement(
            self.schedule,
            strategy=strategy_in_words(self.strategy),
            noise_multiplier=self.noise_multiplier,
            epsilon=self.epsilon(steps),
            delta=self.delta,
            steps=steps,
            fingerprint=self.fingerprint,
            certificate=self.certificate,
            unit=self.unit,
        )
